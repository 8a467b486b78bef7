"""The gateway's own files: LiteLLM's configuration and its env file. Read, and never written.

The configuration is read as LiteLLM reads it, YAML with anchors and merge keys and `include`, but with bounds: what
is read may have been written by anybody.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from mlxops.control.inventory import Gateway
from mlxops.core import gateway as core
from mlxops.core.errors import Refused
from mlxops.core.gateway import Entry, Files, Finding

MAX_BYTES = 512 * 1024
MAX_FILES = 20
MAX_MERGED = 10_000
"""Keys that a mapping may have after its merge keys are followed."""
MAX_DIGITS = 32

_LINE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_DOUBLE = re.compile(r'"((?:[^"\\]|\\.)*)"\s*(?:#.*)?')
_SINGLE = re.compile(r"'([^']*)'\s*(?:#.*)?")


@dataclass(frozen=True)
class Told:
    """What the gateway's files say. `environ` holds secrets: it is never shown."""

    entries: tuple[Entry, ...]
    findings: tuple[Finding, ...]
    files: Files
    environ: Mapping[str, str]
    known: bool = True
    """False: no configuration is named, so that nothing can be held against it."""


def read(gateway: Gateway) -> Told:
    """Raises `Refused` (bad_gateway_config, bad_gateway_env) with file and line."""
    environ = read_env(gateway.env) if gateway.env else dict(os.environ)
    files = Files(gateway.config or "the gateway's configuration", gateway.env)
    entries: list[Entry] = []
    findings: list[Finding] = []
    for name, document, lines in _documents(gateway.config) if gateway.config else ():
        read, wrong = core.parse(document, environ, Files(name, gateway.env), lines)
        entries += read
        findings += wrong
    return Told(tuple(entries), tuple(findings), files, environ, known=gateway.config is not None)


def key_of(gateway: Gateway, environ: Mapping[str, str]) -> str | None:
    """The key for the gateway: from the variable that `key_env` names, here or in the gateway's env file."""
    return (os.environ.get(gateway.key_env) or environ.get(gateway.key_env)) if gateway.key_env else None


# -- files --------------------------------------------------------------------------------------------------------


def read_env(name: str) -> dict[str, str]:
    """The variables of an env file: `NAME=value` lines, `export`, quotes, comments. Nothing is expanded or executed.

    Raises `Refused` (bad_gateway_env).
    """
    variables: dict[str, str] = {}
    for number, line in enumerate(_text(name, "bad_gateway_env").splitlines(), 1):
        words = line.strip()
        if not words or words.startswith(("#", ";")):
            continue
        matched = _LINE.fullmatch(words)
        value = _value(matched[2].strip()) if matched else None
        if matched is None or value is None:
            # Never the line itself: this file is where the keys are.
            why = "it is not NAME=value" if matched is None else f"the quotes of {matched[1]} do not end"
            hint = "correct that line, or `gateway.env` in hosts.yaml"
            raise Refused("bad_gateway_env", f"{name}:{number} cannot be read", why=why, hint=hint)
        variables[matched[1]] = value
    return variables


def _value(text: str) -> str | None:
    """The value behind the `=`; None for quotes that do not end."""
    if text.startswith('"'):
        found = _DOUBLE.fullmatch(text)
        return re.sub(r"\\(.)", r"\1", found[1]) if found else None
    if text.startswith("'"):
        found = _SINGLE.fullmatch(text)
        return found[1] if found else None
    return re.split(r"(?:^|\s+)#", text, maxsplit=1)[0]


def _text(name: str, code: str) -> str:
    def bad(what: str, why: str, hint: str) -> Refused:
        return Refused(code, f"{name} {what}", why=why, hint=hint)

    path = Path(name).expanduser()
    try:
        # A named pipe would block for ever.
        if os.path.exists(path) and not os.path.isfile(path):
            raise bad("is not a file", "only a regular file is read", "see `gateway` in hosts.yaml")
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        hint = "see `gateway` in hosts.yaml: its paths are those of this machine"
        raise bad("cannot be read", error.strerror or str(error), hint) from None
    if len(data) > MAX_BYTES:
        raise bad("is too large", f"more than {MAX_BYTES // 1024} kB are not read", "see `gateway` in hosts.yaml")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        why = "it has bytes that are no character of it"
        raise Refused(code, f"{name}:{line} is not UTF-8", why=why, hint="save the file as UTF-8") from None


class _Bomb(Exception):
    """A document that would unfold to far more than it says."""


class _Loader(yaml.SafeLoader):
    """Safe, and bounded where PyYAML is not: merge keys that unfold, numbers that take minutes to read."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        merged = 0
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                for inner in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if isinstance(inner, yaml.MappingNode):
                        self.flatten_mapping(inner)
                        merged += len(inner.value)
                    if merged > MAX_MERGED:
                        raise _Bomb("its merge keys unfold without end")
        super().flatten_mapping(node)

    def number(self, node: yaml.ScalarNode) -> object:
        return node.value if len(node.value) > MAX_DIGITS else self.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.number)


def _documents(first: str) -> Iterator[tuple[str, object, tuple[int, ...]]]:
    """The configuration and what it includes: name, document, and the lines of its `model_list`."""
    waiting, seen = [first], set[str]()
    while waiting:
        name = waiting.pop(0)
        if (real := os.path.realpath(os.path.expanduser(name))) in seen:
            continue
        seen.add(real)
        if len(seen) > MAX_FILES:
            raise Refused(
                "bad_gateway_config",
                f"{first} includes more than {MAX_FILES} files",
                why="files that include files are followed so far and no further",
                hint="correct `include`",
            )
        document, lines = _load(name)
        yield name, document, lines
        included = document.get("include") if isinstance(document, dict) else None
        folder = os.path.dirname(name)
        waiting += [os.path.join(folder, each) for each in included or () if isinstance(each, str)]


def _load(name: str) -> tuple[object, tuple[int, ...]]:
    text = _text(name, "bad_gateway_config")

    def bad(line: int | None, why: str) -> Refused:
        place = f"{name}:{line}" if line else name
        hint = "correct that file; LiteLLM could not read it either"
        return Refused("bad_gateway_config", f"{place} cannot be read as YAML", why=why, hint=hint)

    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            document = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        why = ", ".join(part for part in (error.problem, error.context) if part)
        raise bad(mark.line + 1 if mark else None, why) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise bad(line, f"the character U+{ord(text[error.position]):04X}") from None
    except RecursionError:
        raise bad(None, "it is nested too deeply") from None
    except (_Bomb, ValueError, OverflowError, yaml.YAMLError) as error:
        raise bad(None, str(error)[:200]) from None
    return document, _lines(node)


def _lines(node: yaml.Node | None) -> tuple[int, ...]:
    if not isinstance(node, yaml.MappingNode):
        return ()
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value == "model_list" and isinstance(value, yaml.SequenceNode):
            return tuple(item.start_mark.line + 1 for item in value.value)
    return ()
