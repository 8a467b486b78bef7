"""hosts.yaml: which hosts there are, how they are reached, and what each is told about itself.

Read strictly. A setting that is misspelt, of the wrong type or contradicts another is refused with file, line
and key, because the alternative is a server that silently runs with a default. The nodes are read by hand
instead of being constructed: that keeps the line numbers, and shows what YAML 1.1 made of a word.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from mlxops.common.build import engines
from mlxops.control.yaml_file import FileProblem, compose, read_text
from mlxops.core.errors import UsageError
from mlxops.core.names import is_name, shown
from mlxops.core.settings import DEFAULT_ENGINE, BootJob, PortRange, Settings

MAX_BYTES = 1024 * 1024
MAX_DEPTH = 16
MAX_PORTS = 100
MIN_MEMORY = 1_000_000
"""Bytes; less than this is somebody's gigabytes without their unit."""

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,17}")
_RANGE = re.compile(r"([1-9][0-9]{0,4})-([1-9][0-9]{0,4})")
_SIZE = re.compile(r"([1-9][0-9]{0,6}(?:\.[0-9]{1,3})?) ?([MGT])(i?)B")
_DNS_NAME = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*"
)
_URL = re.compile(r"https?://[^\s/@?#]+(/[^\s@?#]*)?")
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")

_STR, _INT, _BOOL, _NULL = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "bool", "null"))
_KINDS = {_INT: "a number", _BOOL: "true or false", _NULL: "nothing", "tag:yaml.org,2002:timestamp": "a date"}


@dataclass(frozen=True)
class Gateway:
    """Where the gateway's own configuration lies. It is read, never written."""

    config: str | None
    env: str | None
    url: str | None
    key_env: str | None


@dataclass(frozen=True)
class Host:
    """A managed host. `ssh` is what one would type after `ssh`; `python` runs the agent there."""

    name: str
    ssh: str
    python: tuple[str, ...] | None
    """None: the interpreter that `deploy` made, `<state>/venv/bin/python`."""
    settings: Settings

    def interpreter(self) -> tuple[str, ...]:
        """The argv prefix that runs the agent, whoever chose it."""
        return self.python or (f"{self.settings.state.rstrip('/')}/venv/bin/python",)


@dataclass(frozen=True)
class Inventory:
    path: Path
    default: str | None
    """None: there are several hosts, and none of them is meant where one has to be named."""
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
        """The hosts of `"a,b"`, each once, in the order given; None: all of them, or the default one.

        Raises `UsageError`: unknown_host, no_default_host.
        """
        if names is None and all_by_default:
            return tuple(self.hosts.values())
        if names is None and self.default is None:
            raise UsageError(
                "no_default_host",
                "it is not said which host is meant",
                why=f"{self.path} has {', '.join(self.hosts)}, and no default",
                hint=f"name one with --host; or add a line to that file: default: {next(iter(self.hosts))}",
            )
        if names is None:
            return (self.host(self.default or ""),)
        return tuple(self.host(name) for name in dict.fromkeys(part.strip() for part in names.split(",")))


def hosts_file(environ: Mapping[str, str], beside: Path | None) -> Path | None:
    """The file that is in force: `MLXOPS_HOSTS_FILE`, the user's own, or the one in `beside`; None: there is none.

    Raises `UsageError` if the variable names a file that does not exist: falling back to another file would
    send a command to another machine.
    """
    named = environ.get("MLXOPS_HOSTS_FILE")
    if named:
        path = Path(os.path.expanduser(named))  # a user that is not known stays as it is written
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
    return next((path for path in candidates if _is_meant(path)), None)


def _is_meant(path: Path) -> bool:
    """Whether somebody has put a hosts file there, even if it cannot be read now: a link to a disk that is away, or a
    folder that is closed to us. The next file would be of other machines."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return any(os.path.islink(folder) and not os.path.exists(folder) for folder in list(path.parents)[:2])
    except OSError:
        pass
    return True


def load(path: Path) -> Inventory:
    """Raises `UsageError` bad_hosts_file for a file that cannot be read, or that says something impossible."""
    top = _Value(path.name, "", 1, _compose(path))
    entries = top.entries(("default", "hosts", "gateway"))
    if "hosts" not in entries or not entries["hosts"].mapping():
        raise top.bad("no hosts", "there is nothing to manage", "add a host: see the annotated hosts.yaml of mlxops")
    hosts = {name: _host(name, value) for name, value in entries["hosts"].mapping().items()}
    return Inventory(
        path=path,
        default=_default(entries.get("default"), hosts),
        hosts=hosts,
        gateway=_gateway(entries["gateway"]) if "gateway" in entries else None,
    )


def _compose(path: Path) -> yaml.Node:
    """Return the root node of a hosts file. Raises `UsageError` (bad_hosts_file)."""
    try:
        node = compose(read_text(path, MAX_BYTES, allow_pipe=True), max_depth=MAX_DEPTH, aliases=False)
        if node is None:
            raise FileProblem("is empty", "see the annotated hosts.yaml of mlxops")
        return node
    except FileProblem as problem:
        raise UsageError(
            "bad_hosts_file",
            f"{problem.place(path.name)}: {problem.what}",
            why=f"it was read as YAML from {path}",
            hint=problem.hint,
        ) from problem


# -- values with their place --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Value:
    """A value of the file, and where it stands."""

    file: str
    key: str
    line: int
    node: yaml.Node

    def bad(self, what: str, why: str, hint: str) -> UsageError:
        place = f"{self.file}:{self.line}: {self.key}: " if self.key else f"{self.file}: "
        return UsageError("bad_hosts_file", place + what, why=why, hint=hint)

    def below(self, key: str, line: int, node: yaml.Node) -> _Value:
        return _Value(self.file, f"{self.key}.{key}" if self.key else key, line, node)

    def mapping(self) -> dict[str, _Value]:
        """The entries of a mapping. Keys are strings, or plain numbers as their digits."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self.wrong_kind("a mapping (key: value)")
        found: dict[str, _Value] = {}
        for key_node, node in self.node.value:
            line = key_node.start_mark.line + 1
            raw = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
            value = self.below(raw if raw.isprintable() else ascii(raw), line, node)
            if key_node.tag == _BOOL:
                raise value.bad(f"YAML reads the key {raw} as true or false", _BOOL_WHY, f'quote it: "{raw}"')
            if key_node.tag not in (_STR, _INT) or not raw or not raw.isprintable():
                raise value.bad("is not a key", "a key is one line of plain text", "correct or quote the key")
            if raw in found:
                raise value.bad("is there twice", f"the first is in line {found[raw].line}", "remove one of them")
            found[raw] = value
        return found

    def entries(self, known: tuple[str, ...]) -> dict[str, _Value]:
        """The entries of a mapping that has no keys but `known`."""
        found = self.mapping()
        for key, value in found.items():
            if key not in known:
                import difflib

                close = difflib.get_close_matches(key, known, n=1)
                meant = f"did you mean {close[0]}?" if close else "remove it"
                raise value.bad("unknown key", f"known here: {', '.join(known)}", meant)
        return found

    def sequence(self) -> list[_Value]:
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.wrong_kind("a list: [one, two]")
        return [
            _Value(self.file, f"{self.key}[{index}]", node.start_mark.line + 1, node)
            for index, node in enumerate(self.node.value)
        ]

    def text(self, *, empty: bool = False) -> str:
        """One line of text without control or invisible characters."""
        node = self.node
        if not isinstance(node, yaml.ScalarNode) or node.tag != _STR:
            raise self.wrong_kind("text")
        if not node.value.isprintable():
            raise self.bad(
                f"has a character that cannot be shown: {shown(node.value)}",
                "line ends, NUL, escape sequences and invisible characters are never part of a setting",
                "remove it",
            )
        if not node.value and not empty:
            raise self.bad("is empty", "an empty value would be a silent default", "give it a value or remove the key")
        return str(node.value)

    def number(self) -> int:
        node = self.node
        if not isinstance(node, yaml.ScalarNode) or node.tag != _INT:
            raise self.wrong_kind("a whole number")
        if not _DECIMAL.fullmatch(node.value):
            raise self.bad(
                f"{node.value} is not a plain decimal number",
                "YAML would read leading zeros as octal and colons as sixtieths",
                "write digits only",
            )
        return int(node.value)

    def wrong_kind(self, wanted: str) -> UsageError:
        node = self.node
        if isinstance(node, yaml.MappingNode):
            return self.bad("is a mapping", f"it must be {wanted}", "see the annotated hosts.yaml of mlxops")
        if isinstance(node, yaml.SequenceNode):
            return self.bad("is a list", f"it must be {wanted}", "see the annotated hosts.yaml of mlxops")
        raw = str(node.value)
        if node.tag == _NULL:
            return self.bad(
                "has no value",
                "an empty value, null and a lone ~ are nothing in YAML",
                f"make it {wanted}, or remove the key",
            )
        if node.tag == _BOOL:
            return self.bad(f"YAML reads {raw} as true or false", _BOOL_WHY, f'it must be {wanted}; quote it: "{raw}"')
        if node.tag == _STR:
            return self.bad(f"{shown(raw)} is text", f"it must be {wanted}", "see the annotated hosts.yaml of mlxops")
        kind = _KINDS.get(node.tag, f"of the YAML type {shown(node.tag.rpartition(':')[2])}")
        hint = f'quote it: "{raw}"' if wanted == "text" and raw.isprintable() else f"make it {wanted}"
        return self.bad(f"{shown(raw)} is {kind}", f"it must be {wanted}", hint)


_BOOL_WHY = "in YAML 1.1 on, off, yes, no, true and false are all booleans"


# -- from nodes to hosts ------------------------------------------------------------------------------------------

_HOST_KEYS = (
    "ssh",
    "address",
    "bind",
    "hub",
    "registry",
    "state",
    "python",
    "engine",
    "launch",
    "env",
    "ports",
    "slots",
    "boot",
    "memory",
)


def _default(value: _Value | None, hosts: Mapping[str, Host]) -> str | None:
    if value is None:
        return next(iter(hosts)) if len(hosts) == 1 else None
    name = value.text()
    if name not in hosts:
        raise value.bad(f"{shown(name)} is not a host", f"the hosts are: {', '.join(hosts)}", "name one of those")
    return name


def _gateway(value: _Value) -> Gateway:
    entries = value.entries(("config", "env", "url", "key_env"))

    def optional(key: str, read: Callable[[_Value], str]) -> str | None:
        return read(entries[key]) if key in entries else None

    return Gateway(
        config=optional("config", _path),
        env=optional("env", _path),
        url=optional("url", _url),
        key_env=optional("key_env", _variable),
    )


def _host(name: str, value: _Value) -> Host:
    if not is_name(name):
        raise value.bad("is not a host name", "a name is 1-64 letters, digits, '.', '_' or '-'", "rename the host")
    entries = value.entries(_HOST_KEYS)
    defaults = Settings()
    ports = _ports(entries["ports"]) if "ports" in entries else defaults.ports
    engine = _engine(entries["engine"]) if "engine" in entries else DEFAULT_ENGINE
    bind = _bind(entries["bind"]) if "bind" in entries else defaults.bind
    python = _argv(entries["python"], program=_path) if "python" in entries else None
    return Host(
        name=name,
        ssh=_ssh(entries["ssh"]) if "ssh" in entries else name,
        python=python,
        settings=Settings(
            address=_address(entries["address"], bind) if "address" in entries else None,
            bind=bind,
            hub=_path(entries["hub"]) if "hub" in entries else None,
            registry=_path(entries["registry"]) if "registry" in entries else None,
            state=_path(entries["state"]) if "state" in entries else defaults.state,
            engine=engine,
            launch=_launch(entries["launch"], engine) if "launch" in entries else {},
            env=_env(entries["env"]) if "env" in entries else {},
            ports=ports,
            slots=_slots(entries["slots"], ports) if "slots" in entries else {},
            boot=_boot(entries["boot"], ports) if "boot" in entries else (),
            memory=_memory(entries["memory"]) if "memory" in entries else None,
        ),
    )


def _ssh(value: _Value) -> str:
    text = value.text()
    if text.startswith("-") or re.search(r"\s", text):
        raise value.bad(
            f"{shown(text)} is not a destination",
            "it is one word, as typed after ssh; a leading '-' would be an option",
            "use a Host alias of ~/.ssh/config, or user@name",
        )
    return text


def _path(value: _Value) -> str:
    text = value.text()
    if not text.startswith(("/", "~/")):
        raise value.bad(
            f"{shown(text)} is a relative path",
            "there is no folder on the host that it could be relative to",
            "begin it with / or ~/",
        )
    return text


def _url(value: _Value) -> str:
    text = value.text()
    if not _URL.fullmatch(text) or not _has_port(text):
        raise value.bad(
            f"{shown(text)} is not a URL of a gateway",
            "it is http:// or https://, host and port, without user or password",
            "for example: http://127.0.0.1:4000",
        )
    return text.rstrip("/")


def _has_port(url: str) -> bool:
    """Whether what stands where a URL has its port is one, or nothing."""
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def _variable(value: _Value) -> str:
    text = value.text()
    if not _VARIABLE.fullmatch(text):
        raise value.bad(
            f"{shown(text)} is not a variable's name",
            "this is the name of an environment variable, never the secret itself",
            "for example: LITELLM_MASTER_KEY",
        )
    return text


def _ports(value: _Value) -> PortRange:
    node = value.node
    text = str(node.value) if isinstance(node, yaml.ScalarNode) else ""
    matched = _RANGE.fullmatch(text)
    hint = f"for one port: {text}-{text}" if _DECIMAL.fullmatch(text) else "for example: 8100-8109"
    if matched is None or node.tag != _STR:
        raise value.bad("is not a range of ports", "a range is written first-last, both included", hint)
    first, last = int(matched[1]), int(matched[2])
    if not first <= last <= 65535:
        raise value.bad(f"{text} is not a range of ports", "1 <= first <= last <= 65535", "for example: 8100-8109")
    if last - first >= MAX_PORTS:
        raise value.bad(f"{last - first + 1} ports", f"at most {MAX_PORTS} are looked after", "narrow the range")
    return PortRange(first, last)


def _slots(value: _Value, ports: PortRange) -> dict[int, str]:
    slots: dict[int, str] = {}
    for key, entry in value.mapping().items():
        if not _DECIMAL.fullmatch(key):
            raise entry.bad("is not a port", "slots map ports to aliases", "for example: {8100: jerry-xl}")
        if int(key) not in ports:
            raise entry.bad("is outside the host's ports", f"they are {ports}", "correct the port, or widen ports")
        alias = entry.text()
        if not is_name(alias):
            raise entry.bad(
                f"{shown(alias)} is not an alias",
                "an alias is 1-64 letters, digits, '.', '_' or '-', a letter or digit first",
                "use the name that the gateway sends for this port",
            )
        if alias in slots.values():
            raise entry.bad(f"the alias {alias} is there twice", "an alias belongs to one port", "rename one of them")
        slots[int(key)] = alias
    return slots


def _engine_name(name: str, value: _Value) -> str:
    if name not in engines():
        raise value.bad(f"{shown(name)} is not an engine", f"known: {', '.join(engines())}", "name one of those")
    return name


def _engine(value: _Value) -> str:
    return _engine_name(value.text(), value)


def _program(value: _Value) -> str:
    text = value.text()
    return _path(value) if "/" in text else text


def _argv(value: _Value, program: Callable[[_Value], str]) -> tuple[str, ...]:
    items = value.sequence()
    if not items:
        raise value.bad("is empty", "without a program there is nothing to run", "name the program, or remove the key")
    return (program(items[0]), *(item.text() for item in items[1:]))


def _launch(value: _Value, engine: str) -> dict[str, tuple[str, ...]]:
    """An argv prefix of the host's own engine, or one per engine; an empty list is none."""
    if isinstance(value.node, yaml.MappingNode):
        given = {_engine_name(name, entry): entry for name, entry in value.mapping().items()}
    else:
        given = {engine: value}
    return {name: _argv(entry, _program) for name, entry in given.items() if entry.sequence()}


def _env(value: _Value) -> dict[str, str]:
    env: dict[str, str] = {}
    for key, entry in value.mapping().items():
        if not _VARIABLE.fullmatch(key):
            raise entry.bad("is not a variable's name", "letters, digits and _, no digit first", "correct the name")
        if key in _SECRETS:
            raise entry.bad(
                "does not belong here",
                "an engine needs no access to the hub, and this file is no place for a secret",
                "log in on the host instead: hf auth login",
            )
        env[key] = entry.text(empty=True)
    return env


def _bind(value: _Value) -> str:
    text = value.text()
    try:
        ipaddress.ip_address(text)
    except ValueError:
        raise value.bad(
            f"{shown(text)} is not an IP address",
            "servers listen on an address, not on a name",
            "0.0.0.0 is every interface, 127.0.0.1 this machine only",
        ) from None
    return text


def _address(value: _Value, bind: str) -> str:
    text = value.text()
    if not _is_ip(text) and not _DNS_NAME.fullmatch(text):
        raise value.bad(
            f"{shown(text)} is not an address",
            "it is a host name or an IP address, without scheme and port",
            "for example: studio.local",
        )
    if _is_loopback(bind) and not _is_loopback(text):
        raise value.bad(
            f"nobody can reach {text} while the servers listen on {bind}",
            "bind is a loopback address (127.0.0.1 unless given)",
            "add `bind: 0.0.0.0`, or remove address",
        )
    return text


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_loopback(text: str) -> bool:
    return ipaddress.ip_address(text).is_loopback if _is_ip(text) else text.lower().rstrip(".") == "localhost"


def _boot(value: _Value, ports: PortRange) -> tuple[BootJob, ...]:
    """Read one job, or a list of them."""
    several = isinstance(value.node, yaml.SequenceNode)
    jobs = tuple(_boot_job(each, ports) for each in (value.sequence() if several else [value]))
    for port in {job.port for job in jobs}:
        if sum(job.port == port for job in jobs) > 1:
            raise value.bad(f"port {port} is there twice", "one server, one port", "remove one of them")
    return jobs


def _boot_job(value: _Value, ports: PortRange) -> BootJob:
    entries = value.entries(("port", "script", "label"))
    if "port" not in entries:
        raise value.bad("port is missing", "it is where the boot job's server is", "add port")
    if "script" not in entries and "label" not in entries:
        raise value.bad(
            "script and label are missing",
            "one of them is needed to recognise the boot job's server",
            "add the path that the system runs (script), or the job's label",
        )
    port = entries["port"].number()
    if port not in ports:
        raise entries["port"].bad(f"{port} is outside the host's ports", f"they are {ports}", "correct the port")
    script = _path(entries["script"]) if "script" in entries else ""
    label = entries["label"].text() if "label" in entries else ""
    return BootJob(port, script, label)


def _memory(value: _Value) -> int | None:
    """Bytes; None for `auto`."""
    if value.node.tag == _INT:
        size = value.number()
    else:
        text = value.text()
        if text == "auto":
            return None
        matched = _SIZE.fullmatch(text)
        if matched is None:
            raise value.bad(
                f"{shown(text)} is not a size", "it is auto, 200GB, 186GiB or bytes", "for example: memory: 200GB"
            )
        base = 1024 if matched[3] else 1000
        size = round(float(matched[1]) * base ** {"M": 2, "G": 3, "T": 4}[matched[2]])
    if size < MIN_MEMORY:
        raise value.bad(f"{size} bytes hold no model", "a number without a unit is bytes", f"for example: {size}GB")
    return size
