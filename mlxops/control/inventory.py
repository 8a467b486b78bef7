"""hosts.yaml: the managed hosts, how to reach them, and their settings.

The file is read strictly. A misspelt key, a value of the wrong type, or a contradiction is an error with file, line and
key: otherwise a server would silently run with a default. The YAML nodes are not converted to Python values, because
nodes have line numbers and show what YAML 1.1 makes of a word such as `off`.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields
from pathlib import Path

import yaml

from mlxops.common.build import engines
from mlxops.control.yaml_file import FileProblem, NotFast, compose, compose_fast, read_text
from mlxops.core.errors import UsageError
from mlxops.core.frozen import dataclass
from mlxops.core.names import is_name, shown
from mlxops.core.settings import Settings, absolute_path, argv, read_settings, settings_keys, variable_name

MAX_BYTES = 1024 * 1024
MAX_DEPTH = 16
_SEE_EXAMPLE = "see the annotated hosts.yaml of mlxops"
_BOOLEAN_WORDS = "in YAML 1.1 on, off, yes, no, true and false are all booleans"
_TAG = "tag:yaml.org,2002:"
_KINDS = {"str": "text", "int": "number", "bool": "boolean", "null": "nothing", "timestamp": "date"}


@dataclass(frozen=True)
class YAMLValue:
    """A YAML node with its place. Implements `mlxops.core.settings.Value`."""

    file: str
    key: str
    line: int
    node: yaml.Node

    @property
    def kind(self) -> str:
        """Return text, number, boolean, nothing, date, list, mapping, or the name of another YAML type."""
        if isinstance(self.node, yaml.MappingNode):
            return "mapping"
        if isinstance(self.node, yaml.SequenceNode):
            return "list"
        name = self.node.tag.removeprefix(_TAG)
        return _KINDS.get(name, name)

    @property
    def raw(self) -> str:
        return str(self.node.value) if isinstance(self.node, yaml.ScalarNode) else ""

    @property
    def _shown(self) -> str:
        """Return the value for a message, without what may be a secret."""
        from mlxops.core.redaction import HIDDEN, redact

        return shown(HIDDEN if self._may_be_secret else redact(self.raw))

    @property
    def _may_be_secret(self) -> bool:
        """Return whether this is in `env`, and no number or the like."""
        return re.search(r"\.env\b", self.key) is not None and self.kind not in ("number", "boolean", "date")

    def bad(self, what: str, why: str, hint: str) -> UsageError:
        place = f"{self.file}:{self.line}: {self.key}: " if self.key else f"{self.file}: "
        return UsageError("bad_hosts_file", place + what, why=why, hint=hint)

    def mapping(self) -> dict[str, YAMLValue]:
        """Return the entries of a mapping. A key is text or a plain number, whose digits are returned."""
        if self.kind != "mapping":
            raise self._wrong_kind("a mapping (key: value)")
        entries: dict[str, YAMLValue] = {}
        for key_node, node in self.node.value:
            key = self._below("", key_node)
            name = key.raw if isinstance(key_node, yaml.ScalarNode) else "?"
            value = YAMLValue(self.file, self._below(name, key_node).key, key.line, node)
            if key.kind == "boolean":
                raise value.bad(f"YAML reads the key {name} as true or false", _BOOLEAN_WORDS, f'quote it: "{name}"')
            if key.kind not in ("text", "number") or not name or not name.isprintable():
                raise value.bad("is not a key", "a key is one line of plain text", "correct or quote the key")
            if name in entries:
                raise value.bad("appears twice", f"the first is in line {entries[name].line}", "remove one of them")
            entries[name] = value
        return entries

    def entries(self, known: Sequence[str]) -> dict[str, YAMLValue]:
        """Return the entries of a mapping that has no other keys than `known`."""
        entries = self.mapping()
        for key, value in entries.items():
            if key not in known:
                import difflib

                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {close[0]}?" if close else "remove it"
                raise value.bad("unknown key", f"known here: {', '.join(known)}", hint)
        return entries

    def sequence(self) -> list[YAMLValue]:
        if self.kind != "list":
            raise self._wrong_kind("a list: [one, two]")
        return [
            YAMLValue(self.file, f"{self.key}[{index}]", node.start_mark.line + 1, node)
            for index, node in enumerate(self.node.value)
        ]

    def text(self, *, empty: bool = False) -> str:
        """Return one line of text without control or invisible characters."""
        if self.kind != "text":
            raise self._wrong_kind("text")
        if not self.raw.isprintable():
            raise self.bad(
                f"has a character that cannot be shown: {self._shown}",
                "line ends, NUL, escape sequences and invisible characters are never part of a setting",
                "remove it",
            )
        if not self.raw and not empty:
            raise self.bad(
                "is empty", "an empty value would silently mean the default", "give it a value or remove the key"
            )
        return self.raw

    def number(self) -> int:
        if self.kind != "number":
            raise self._wrong_kind("a whole number")
        if not re.fullmatch(r"0|[1-9][0-9]{0,17}", self.raw):
            raise self.bad(
                f"{self.raw} is not a plain decimal number",
                "it must be 0 or more; and YAML would read leading zeros as octal and colons as sixtieths",
                "write digits only",
            )
        return int(self.raw)

    def _below(self, key: str, node: yaml.Node) -> YAMLValue:
        name = key if key.isprintable() else ascii(key)
        return YAMLValue(self.file, f"{self.key}.{name}" if self.key else name, node.start_mark.line + 1, node)

    def _wrong_kind(self, wanted: str) -> UsageError:
        kind, raw, why = self.kind, self._shown, f"it must be {wanted}"
        if kind in ("mapping", "list"):
            return self.bad(f"is a {kind}", why, _SEE_EXAMPLE)
        if kind == "text":
            return self.bad(f"{raw} is text", why, _SEE_EXAMPLE)
        if kind == "nothing":
            return self.bad(
                "has no value",
                "in YAML an empty value, null and a lone ~ are no value",
                f"make it {wanted}, or remove the key",
            )
        if kind == "boolean":
            what = f"YAML reads {self.raw} as true or false"
            hint = f'{why}; quote it: "{self.raw}"' if wanted == "text" else f"make it {wanted}"
            return self.bad(what, _BOOLEAN_WORDS, hint)
        article = {"number": "a number", "date": "a date"}.get(kind, f"of the YAML type {shown(kind)}")
        quotable = wanted == "text" and self.raw.isprintable() and not self._may_be_secret
        hint = f'quote it: "{self.raw}"' if quotable else f"make it {wanted}"
        return self.bad(f"{raw} is {article}", why, hint)


# -- what the file describes --------------------------------------------------------------------------------------


def _checked(check: Callable[[YAMLValue], object]) -> dict[str, Callable[[YAMLValue], object]]:
    """Declare a key of hosts.yaml: metadata for the field of the same name."""
    return {"check": check}


def _ssh_name(value: YAMLValue) -> str:
    text = value.text()
    if text.startswith("-") or re.search(r"\s", text):
        raise value.bad(
            f"{shown(text)} is not a destination",
            "it is one word, as typed after ssh; a leading '-' would be an option",
            "use a Host alias of ~/.ssh/config, or user@name",
        )
    return text


def _url(value: YAMLValue) -> str:
    text = value.text()
    if not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", text) or not _has_valid_port(text):
        from mlxops.core.redaction import redact

        raise value.bad(
            f"{shown(redact(text))} is not a URL of a gateway",
            "it is http:// or https://, host and port, without user or password",
            "for example: http://127.0.0.1:4000",
        )
    return text.rstrip("/")


def _has_valid_port(url: str) -> bool:
    """Return whether the URL has a usable port or no port."""
    from urllib.parse import urlsplit

    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


@dataclass(frozen=True)
class Gateway:
    """The gateway's own files and address. mlxops reads the files and never writes them."""

    config: str | None = field(default=None, metadata=_checked(absolute_path))
    env: str | None = field(default=None, metadata=_checked(absolute_path))
    url: str | None = field(default=None, metadata=_checked(_url))
    key_env: str | None = field(default=None, metadata=_checked(variable_name))


@dataclass(frozen=True)
class Host:
    """A managed host."""

    name: str
    ssh: str = field(metadata=_checked(_ssh_name))
    """The destination, as typed after `ssh`."""
    python: tuple[str, ...] | None = field(metadata=_checked(argv))
    """The argv prefix that runs the agent; None: the interpreter that `deploy` made, `<state>/venv/bin/python`."""
    settings: Settings

    def interpreter(self) -> tuple[str, ...]:
        """Return the argv prefix that runs the agent: `python`, or its default."""
        return self.python or (f"{self.settings.state.rstrip('/')}/venv/bin/python",)


@dataclass(frozen=True)
class Inventory:
    path: Path
    default: str | None
    """The host for commands without --host; None: there are several hosts and no default."""
    hosts: Mapping[str, Host]
    gateway: Gateway | None

    def host(self, name: str) -> Host:
        """Raises `UsageError` unknown_host."""
        if name in self.hosts:
            return self.hosts[name]
        raise UsageError(
            "unknown_host",
            f"there is no host {shown(name)}",
            why=f"{self.path} has: {', '.join(self.hosts)}",
            hint="name one of those with --host, or add the host to that file",
        )

    def select(self, names: str | None, *, all_by_default: bool) -> tuple[Host, ...]:
        """Return the hosts of `"a,b"` in that order, each once. None selects all hosts, or the default one.

        Raises `UsageError`: unknown_host, no_default_host.
        """
        if names is None and all_by_default:
            return tuple(self.hosts.values())
        if names is None and self.default is None:
            raise UsageError(
                "no_default_host",
                "this command needs one host, and --host is missing",
                why=f"{self.path} has {', '.join(self.hosts)}, and no default",
                hint=f"name one with --host; or add a line to that file: default: {next(iter(self.hosts))}",
            )
        if names is None:
            return (self.host(self.default or ""),)
        return tuple(self.host(name) for name in dict.fromkeys(part.strip() for part in names.split(",")))


# -- find and read the file ---------------------------------------------------------------------------------------


def hosts_file(environ: Mapping[str, str], beside: Path | None) -> Path | None:
    """Return the hosts file to use: the one that `MLXOPS_HOSTS_FILE` names, else the user's, else the one in the folder
    `beside`; None if there is none.

    Raises `UsageError` if the variable names a file that does not exist: another file would send the command to another
    machine.
    """
    named = environ.get("MLXOPS_HOSTS_FILE")
    if named:
        path = Path(os.path.expanduser(named))  # keeps ~name if there is no such user
        try:
            if not stat.S_ISDIR(os.stat(path).st_mode):
                return path
            why = "it is a folder"
        except OSError as error:
            why = error.strerror or str(error)
        raise UsageError(
            "bad_hosts_file",
            f"the hosts file {shown(named)} is not a file",
            why=f"MLXOPS_HOSTS_FILE names it: {why}",
            hint="correct the variable, or unset it to use ~/.config/mlxops/hosts.yaml",
        )
    home = Path(environ["HOME"]) if environ.get("HOME") else Path.home()
    candidates = [home / ".config" / "mlxops" / "hosts.yaml"]
    if beside is not None:
        candidates.append(beside / "hosts.yaml")
    return next((path for path in candidates if _is_present(path)), None)


def _is_present(path: Path) -> bool:
    """Return whether there is a hosts file, even if it cannot be read now: a link to an unmounted disk, or a folder
    without access. The next candidate describes other machines, so it is no replacement."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return any(os.path.islink(folder) and not os.path.exists(folder) for folder in list(path.parents)[:2])
    except OSError:
        pass
    return True


def load(path: Path) -> Inventory:
    """Raises `UsageError` (bad_hosts_file) if the file cannot be read or has a wrong setting."""
    try:
        text = read_text(path, MAX_BYTES, allow_pipe=True)
        try:
            return _inventory(path, compose_fast(text, max_depth=MAX_DEPTH))
        except (NotFast, FileProblem, UsageError, yaml.YAMLError):
            return _inventory(path, compose(text, max_depth=MAX_DEPTH, aliases=False))
    except FileProblem as problem:
        raise UsageError(
            "bad_hosts_file",
            f"{problem.place(path.name)}: {problem.what}",
            why=f"it was read as YAML from {path}",
            hint=problem.hint,
        ) from problem


def _inventory(path: Path, root: yaml.Node | None) -> Inventory:
    """Raises `UsageError`, and `FileProblem` if there is no document."""
    if root is None:
        raise FileProblem("is empty", _SEE_EXAMPLE)
    top = YAMLValue(path.name, "", 1, root)
    entries = top.entries(("default", "hosts", "gateway"))
    if "hosts" not in entries or not entries["hosts"].mapping():
        raise top.bad("no hosts", "there is nothing to manage", f"add a host: {_SEE_EXAMPLE}")
    hosts = {name: _host(name, value) for name, value in entries["hosts"].mapping().items()}
    return Inventory(
        path=path,
        default=_default(entries.get("default"), hosts),
        hosts=hosts,
        gateway=_gateway(entries["gateway"]) if "gateway" in entries else None,
    )


def _default(value: YAMLValue | None, hosts: Mapping[str, Host]) -> str | None:
    if value is None:
        return next(iter(hosts)) if len(hosts) == 1 else None
    name = value.text()
    if name not in hosts:
        raise value.bad(f"{shown(name)} is not a host", f"the hosts are: {', '.join(hosts)}", "use one of those")
    return name


def _host(name: str, value: YAMLValue) -> Host:
    if not is_name(name):
        raise value.bad("is not a host name", "a name is 1-64 letters, digits, '.', '_' or '-'", "rename the host")
    checks = _checks(Host)
    entries = value.entries((*checks, *settings_keys()))
    own = {"ssh": name, "python": None} | {key: check(entries[key]) for key, check in checks.items() if key in entries}
    settings = read_settings(entries, engines())
    return Host(name=name, settings=settings, **own)  # type: ignore[arg-type]  # a check returns its field's type


def _gateway(value: YAMLValue) -> Gateway:
    checks = _checks(Gateway)
    entries = value.entries(tuple(checks))
    return Gateway(**{key: checks[key](entry) for key, entry in entries.items()})  # type: ignore[arg-type]  # the same


def _checks(declaring: type[Host | Gateway]) -> dict[str, Callable[[YAMLValue], object]]:
    return {each.name: each.metadata["check"] for each in fields(declaring) if "check" in each.metadata}
