"""Read the gateway's own files: LiteLLM's configuration and its env file. Never write them.

Read the configuration as LiteLLM does: YAML with anchors, merge keys and `include`. The files may be hostile, so limit
their size, depth and number.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from mlxops.control.inventory import Gateway
from mlxops.control.yaml_file import FileProblem, compose, construct, read_text
from mlxops.core import env_file
from mlxops.core.errors import Refused
from mlxops.core.frozen import dataclass
from mlxops.core.gateway import Entry, GatewayPaths, Impact, Mismatch
from mlxops.core.litellm import Environ, LiteLLMConfig, parse
from mlxops.core.redaction import redact

MAX_BYTES = 512 * 1024
MAX_FILES = 20
MAX_DEPTH = 100


@dataclass(frozen=True)
class GatewayConfig:
    """What the gateway's files say. `environ` holds secrets: it is never shown."""

    config: LiteLLMConfig
    entries: tuple[Entry, ...]
    """As written, an alias may be a pattern. `check.with_client_names` gives them the names that clients use."""
    findings: tuple[Mismatch, ...]
    files: GatewayPaths
    environ: Mapping[str, str]
    known: bool = True
    """False: hosts.yaml names no configuration, so there is nothing to compare."""


def read(gateway: Gateway) -> GatewayConfig:
    """Read the files that hosts.yaml names.

    Raises `Refused` (bad_gateway_config, bad_gateway_env) with file and line.
    """
    files = GatewayPaths(gateway.config or "the gateway's configuration", gateway.env)
    environ, findings = _environ(gateway.env) if gateway.env else (Environ(dict(os.environ), whole=False), ())
    if gateway.config is None:
        return GatewayConfig(LiteLLMConfig(), (), findings, files, environ.values, known=False)
    document, places, repeated = _merged(gateway.config)
    config = parse(document, environ, files, places)
    all_findings = (*findings, *repeated, *config.findings)
    return GatewayConfig(config, config.entries, all_findings, files, environ.values)


def read_if_possible(gateway: Gateway | None) -> tuple[LiteLLMConfig, str]:
    """Return what the gateway's files say today, and why they are not known; "" if they are."""
    if gateway is None or gateway.config is None:
        return LiteLLMConfig(), "hosts.yaml does not name the gateway's configuration"
    try:
        return read(gateway).config, ""
    except Refused as error:
        return LiteLLMConfig(), f"{error.message}: {error.why}"


def key_of(gateway: Gateway, environ: Mapping[str, str]) -> str | None:
    """Return the gateway's key: the variable that `key_env` names, in our environment or else in its env file."""
    return (os.environ.get(gateway.key_env) or environ.get(gateway.key_env)) if gateway.key_env else None


# -- files --------------------------------------------------------------------------------------------------------


def _environ(name: str) -> tuple[Environ, tuple[Mismatch, ...]]:
    """Return the variables of an env file, and findings about its lines. Raises `Refused` (bad_gateway_env)."""
    parsed = env_file.parse(_text(name, "bad_gateway_env"))
    # Never show the line itself: this file has the keys.
    findings = tuple(
        Mismatch(
            "env_line",
            None,
            None,
            Impact.WARNING,
            f"{name}:{problem.line}: {problem.why}",
            "write it as NAME=value",
        )
        for problem in parsed.problems
    )
    return Environ(parsed.values, parsed.doubtful), findings


def _text(name: str, code: str) -> str:
    try:
        return read_text(Path(name).expanduser(), MAX_BYTES)
    except FileProblem as problem:
        why = "it belongs to the gateway's files that `gateway` in hosts.yaml names: paths of this machine"
        raise Refused(code, f"{problem.place(name)} {problem.what}", why=why, hint=problem.hint) from None


@dataclass(frozen=True)
class _Document:
    name: str
    content: object
    lines: Mapping[str, int]
    """Key -> its line. Of a repeated key the last counts."""
    items: tuple[int, ...]
    """The lines of the items of `model_list`."""
    repeated: tuple[tuple[str, int, int], ...]
    """Repeated keys: (key, line of one that does not count, line of the one that counts)."""


def _merged(first: str) -> tuple[object, list[str], list[Mismatch]]:
    """Merge the configuration and its includes as LiteLLM does: join lists, replace everything else.

    Return it, file and line of each item of its `model_list`, and the findings.
    """
    root = _load(first)
    if not isinstance(root.content, dict):
        return root.content, [], []
    merged: dict[object, object] = {key: value for key, value in root.content.items() if key != "include"}
    places = [f"{first}:{line}" for line in root.items]
    findings = _repeated(root)
    waiting, visited = _included(root), {os.path.abspath(os.path.expanduser(first))}
    while waiting:
        entry, declaring = waiting.pop(0)
        name = _included_path(entry, declaring, first)
        if (absolute := os.path.abspath(os.path.expanduser(name))) in visited:
            continue
        visited.add(absolute)
        if len(visited) > MAX_FILES:
            raise Refused(
                "bad_gateway_config",
                f"{first} includes more than {MAX_FILES} files",
                why="that is the limit of included files, at any depth",
                hint="correct `include`",
            )
        if not os.path.exists(os.path.expanduser(name)):
            why = f"the included file {redact(name)} is not there: LiteLLM does not start"
            raise _not_included(declaring, why)
        document = _load(name)
        content = {} if document.content is None else document.content
        if not isinstance(content, dict):
            raise _not_included(declaring, f"the included file {redact(name)} is not a mapping: LiteLLM does not start")
        findings += _repeated(document)
        for key, value in content.items():
            if key == "include":
                continue
            mine = merged.get(key)
            both = isinstance(mine, list) and isinstance(value, list)
            if key == "model_list":
                places = [*(places if both else []), *(f"{name}:{line}" for line in document.items)]
            merged[key] = [*mine, *value] if isinstance(mine, list) and isinstance(value, list) else value
        waiting += _included(document)
    return merged, places, findings


def _included(document: _Document) -> list[tuple[str, _Document]]:
    """Return the included paths, each with this document.

    Raises `Refused` (bad_gateway_config) if LiteLLM would not start.
    """
    if not isinstance(document.content, dict) or "include" not in document.content:
        return []
    listed = document.content["include"]
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise _not_included(document, "'include' must be a list of file paths: LiteLLM does not start")
    return [(name, document) for name in listed]


def _not_included(document: _Document, why: str) -> Refused:
    place = f"{document.name}:{document.lines['include']}" if "include" in document.lines else document.name
    hint = "write it as `include: [models.yaml]`, relative to the file that it stands in"
    return Refused("bad_gateway_config", f"{place} cannot be included", why=why, hint=hint)


def _included_path(entry: str, declaring: _Document, first: str) -> str:
    """Return the path of an include: beside the file that names it, else beside the first file."""
    name = os.path.join(os.path.dirname(declaring.name), entry)
    beside = os.path.join(os.path.dirname(first), entry)
    there, other = (os.path.exists(os.path.expanduser(path)) for path in (name, beside))
    return beside if other and not there else name


def _repeated(document: _Document) -> list[Mismatch]:
    return [
        Mismatch(
            "repeated_key",
            None,
            None,
            Impact.WARNING,
            f"{document.name}:{line}: this {key} is not seen by LiteLLM: the one in line {last} is in force",
            f"remove it, or move what it has to line {last}",
        )
        for key, line, last in document.repeated
    ]


def _load(name: str) -> _Document:
    text = _text(name, "bad_gateway_config")
    try:
        node = compose(text, max_depth=MAX_DEPTH, aliases=True)
        lines = _lines(node)  # `construct` replaces merge keys in the node
        return _Document(name, construct(node) if node is not None else None, *lines)
    except FileProblem as problem:
        raise Refused(
            "bad_gateway_config",
            f"{problem.place(name)} cannot be read as YAML",
            why=problem.what,
            hint=f"{problem.hint}; LiteLLM could not read the file either",
        ) from None


_DEPTH = 6
"""Levels of a document that are searched for repeated keys."""


def _lines(
    node: yaml.Node | None,
) -> tuple[dict[str, int], tuple[int, ...], tuple[tuple[str, int, int], ...]]:
    """Return the lines of the keys, the lines of the items of `model_list`, and the repeated keys."""
    lines: dict[str, int] = {}
    items: tuple[int, ...] = ()
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                lines[key.value] = key.start_mark.line + 1
                if key.value == "model_list":
                    sequence = isinstance(value, yaml.SequenceNode)
                    items = tuple(item.start_mark.line + 1 for item in value.value) if sequence else ()
    return lines, items, tuple(_twice(node, _DEPTH, set()))


def _twice(node: yaml.Node | None, depth: int, visited: set[int]) -> Iterator[tuple[str, int, int]]:
    if node is None or not depth or id(node) in visited:
        return
    visited.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _twice(item, depth - 1, visited)
    elif isinstance(node, yaml.MappingNode):
        last: dict[str, int] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                last[key.value] = key.start_mark.line + 1
            yield from _twice(value, depth - 1, visited)
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in last and key.start_mark.line + 1 != last[key.value]:
                yield key.value, key.start_mark.line + 1, last[key.value]
