"""The settings of a managed host: paths, ports, slots, engines.

`Settings` declares each setting once: its key in hosts.yaml, its default, the check of its value, its JSON form. To add
a setting, add a field here and an example in hosts.yaml.

The control node reads the settings from hosts.yaml and sends them with every request. The host stores them in
host.json. Paths may begin with `~`: the agent expands them, because only the host knows its home directory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field, fields, replace
from typing import Protocol, TypeVar

from mlxops.core.errors import UsageError
from mlxops.core.frozen import dataclass
from mlxops.core.names import is_name, shown
from mlxops.core.text import is_argument

DEFAULT_ENGINE = "mlx-openai-server"
AGREED = ("registry", "hub", "ports", "slots", "bind")
"""The settings on which all control nodes of a host must agree: others would write other files, or use other ports."""
MAX_PORTS = 100
MAX_HOLD = 3600
"""Seconds."""
KEEP = ("off", "notice", "restart")
MIN_MEMORY = 1_000_000
"""Bytes. A smaller number is probably gigabytes without the unit."""

NO_LIMIT = 0
"""The value of a limit that is switched off (`none`)."""

T = TypeVar("T")


@dataclass(frozen=True)
class PortRange:
    """An inclusive range of TCP ports."""

    first: int
    last: int

    def __contains__(self, port: object) -> bool:
        return isinstance(port, int) and self.first <= port <= self.last

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.last + 1))

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


@dataclass(frozen=True)
class BootJob:
    """A server that launchd or systemd starts at boot. mlxops recognises it and never stops or starts it."""

    port: int
    script: str = ""
    """The path of the script that the system runs."""
    label: str = ""
    """launchd's label, or systemd's unit. A job has a script, a label, or both."""

    @property
    def name(self) -> str:
        """Return the name to show to people."""
        return self.label or self.script

    def to_wire(self) -> dict[str, object]:
        return {"port": self.port, "script": self.script, "label": self.label}


@dataclass(frozen=True)
class SlotOptions:
    """What `slots` says about a port beside its alias. Hosts and control nodes need not agree on it.

    To add an option, add a field here and its check to `SLOT_CHECKS`.
    """

    hold: int | None = None
    """The seconds that a request may wait for a swap; None: the file does not say."""
    keep: str | None = None
    """What the keeper does for the port's server, one of `KEEP`; None: the file does not say."""


class Value(Protocol):
    """A value of hosts.yaml. It knows its place: file, line and key.

    Its methods raise `UsageError` (bad_hosts_file) for a value of another kind.
    """

    @property
    def kind(self) -> str:
        """`text`, `number`, `list`, `mapping`, or another kind of YAML."""

    @property
    def raw(self) -> str:
        """The characters in the file; "" for a list or mapping."""

    def text(self, *, empty: bool = False) -> str:
        """Return printable text of one line. `empty`: "" is allowed."""

    def number(self) -> int: ...

    def sequence(self) -> Sequence[Value]: ...

    def mapping(self) -> Mapping[str, Value]: ...

    def entries(self, known: Sequence[str]) -> Mapping[str, Value]:
        """Return the entries of a mapping that has no other keys than `known`."""

    def bad(self, what: str, why: str, hint: str) -> UsageError:
        """Return the error to raise, with the place of the value."""


# -- declare a setting --------------------------------------------------------------------------------------------


class Setting:
    """How the value of a field is read from hosts.yaml, written to JSON, and read from JSON."""

    def __init__(
        self,
        check: Callable[[Value, Settings, Sequence[str]], object],
        write: Callable[[T], object],
        read: Callable[[object, str], T],
        *,
        dependent: bool,
        key: str | None = None,
    ) -> None:
        self.check = check
        self.key = key
        self.write: Callable[..., object] = write
        self.read: Callable[[object, str], object] = read
        self.dependent = dependent


def setting(
    check: Callable[[Value], T], form: tuple[Callable[[T], object], Callable[[object, str], T]]
) -> dict[str, Setting]:
    """Declare a setting: metadata for a field of `Settings`.

    `check` returns the value for the field, or raises `value.bad(...)`. `form` is the JSON form: a pair of functions
    that write and read it. The second argument of the latter is the key, for messages.
    """
    return {"setting": Setting(lambda value, _settings, _engines: check(value), *form, dependent=False)}


def dependent_setting(
    check: Callable[[Value, Settings, Sequence[str]], T],
    form: tuple[Callable[[T], object], Callable[[object, str], T]],
    key: str | None = None,
) -> dict[str, Setting]:
    """Declare a setting whose check needs other settings, or the names of the engines.

    Dependent settings are read after all the others, in the order of the fields. Their checks get what was read before.
    `key`: its key in hosts.yaml, if that is another field's.
    """
    return {"setting": Setting(check, *form, dependent=True, key=key)}


def read_settings(entries: Mapping[str, Value], engines: Sequence[str]) -> Settings:
    """Return the settings of a host's entries in hosts.yaml; other entries are ignored.

    Raises `UsageError` (bad_hosts_file).
    """
    declared = {name: one for name, one in _declared().items() if (one.key or name) in entries}
    settings = Settings()
    for name in sorted(declared, key=lambda name: declared[name].dependent):
        value = declared[name].check(entries[declared[name].key or name], settings, engines)
        settings = replace(settings, **{name: value})  # type: ignore[arg-type]  # the check returns the field's type
    return settings


def settings_from_wire(wire: Mapping[str, object]) -> Settings:
    """Return the settings that `Settings.to_wire` wrote.

    Raises `ValueError` for anything that `to_wire` cannot have written.
    """
    values = {name: one.read(wire.get(name), name) for name, one in _declared().items()}
    return Settings(**values)  # type: ignore[arg-type]  # `read` returns the field's type


def settings_keys() -> tuple[str, ...]:
    """Return the keys of a host in hosts.yaml that are settings."""
    return tuple(dict.fromkeys(one.key or name for name, one in _declared().items()))


def _declared() -> dict[str, Setting]:
    return {each.name: each.metadata["setting"] for each in fields(Settings)}


def stricter_kill_limit(one: int | None, other: int | None) -> int | None:
    """Return the smaller of two limits; None if neither is given."""
    given = [limit for limit in (one, other) if limit is not None]
    return min((limit for limit in given if limit != NO_LIMIT), default=NO_LIMIT if given else None)


# -- checks of hosts.yaml -----------------------------------------------------------------------------------------


def absolute_path(value: Value) -> str:
    text = value.text()
    if not text.startswith(("/", "~/")):
        raise value.bad(
            f"{shown(text)} is a relative path",
            "a relative path has no meaning here: there is no working folder",
            "begin it with / or ~/",
        )
    return text


def variable_name(value: Value) -> str:
    text = value.text()
    if not _is_variable(text):
        raise value.bad(
            f"{shown(text)} is not a variable's name",
            "this is the name of an environment variable, never the secret itself",
            "for example: LITELLM_MASTER_KEY",
        )
    return text


def argv(value: Value, program: Callable[[Value], str] = absolute_path) -> tuple[str, ...]:
    """Return a program and its arguments. `program` checks the first item."""
    items = value.sequence()
    if not items:
        raise value.bad("is empty", "without a program there is nothing to run", "name the program, or remove the key")
    return (program(items[0]), *(item.text() for item in items[1:]))


def _program(value: Value) -> str:
    """Return a path, or the name of a program to look for."""
    return absolute_path(value) if "/" in value.text() else value.text()


def _is_variable(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text) is not None


def _bind(value: Value) -> str:
    text = value.text()
    if not _is_ip(text):
        raise value.bad(
            f"{shown(text)} is not an IP address",
            "servers listen on an address, not on a name",
            "an address of the host; 0.0.0.0 is every interface, 127.0.0.1 this machine only",
        )
    return text


def _address(value: Value, settings: Settings, _engines: Sequence[str]) -> str:
    text = value.text()
    if not _is_ip(text) and not _is_dns_name(text):
        raise value.bad(
            f"{shown(text)} is not an address",
            "it is a host name or an IP address, without scheme and port",
            "for example: studio.local",
        )
    if is_loopback(settings.bind) and not is_loopback(text):
        raise value.bad(
            f"{text} cannot be reached while the servers listen on {settings.bind}",
            "bind is a loopback address (127.0.0.1 by default)",
            "set `bind` to an address that the gateway reaches, or remove address",
        )
    return text


def _is_ip(text: str) -> bool:
    import ipaddress

    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_loopback(text: str) -> bool:
    """Return whether a name or an IP address means this machine only."""
    import ipaddress

    return ipaddress.ip_address(text).is_loopback if _is_ip(text) else text.lower().rstrip(".") == "localhost"


def _is_dns_name(text: str) -> bool:
    label = "[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?"
    return re.fullmatch(rf"(?=.{{1,253}}$){label}(\.{label})*", text) is not None


def _engine(value: Value, _settings: Settings, engines: Sequence[str]) -> str:
    return _engine_name(value.text(), value, engines)


def _engine_name(name: str, value: Value, engines: Sequence[str]) -> str:
    if name not in engines:
        raise value.bad(f"{shown(name)} is not an engine", f"known: {', '.join(engines)}", "use one of those")
    return name


def _launch(value: Value, settings: Settings, engines: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read one list for the host's own engine, or a list for each engine. An empty list counts as no entry."""
    if value.kind == "mapping":
        entries = {_engine_name(name, entry, engines): entry for name, entry in value.mapping().items()}
    else:
        entries = {settings.engine: value}
    return {name: argv(entry, _program) for name, entry in entries.items() if entry.sequence()}


def _env(value: Value) -> dict[str, str]:
    env: dict[str, str] = {}
    for key, entry in value.mapping().items():
        if not _is_variable(key):
            raise entry.bad("is not a variable's name", "letters, digits and _, no digit first", "correct the name")
        if key in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            raise entry.bad(
                "does not belong here",
                "an engine needs no access to the hub, and this file is no place for a secret",
                "log in on the host instead: hf auth login",
            )
        env[key] = entry.text(empty=True)
    return env


def _ports(value: Value) -> PortRange:
    raw = value.raw
    matched = re.fullmatch(r"([1-9][0-9]{0,4})-([1-9][0-9]{0,4})", raw)
    if matched is None or value.kind != "text":
        hint = f"for one port: {raw}-{raw}" if re.fullmatch(r"[0-9]{1,5}", raw) else "for example: 8100-8109"
        raise value.bad("is not a range of ports", "a range is written first-last, both included", hint)
    first, last = int(matched[1]), int(matched[2])
    if not first <= last <= 65535:
        raise value.bad(f"{raw} is not a range of ports", "1 <= first <= last <= 65535", "for example: 8100-8109")
    if last - first >= MAX_PORTS:
        raise value.bad(f"{last - first + 1} ports are too many", f"the limit is {MAX_PORTS}", "use a smaller range")
    return PortRange(first, last)


def _slots(value: Value, settings: Settings, _engines: Sequence[str]) -> dict[int, str]:
    slots: dict[int, str] = {}
    for key, entry in value.mapping().items():
        if not re.fullmatch(r"0|[1-9][0-9]{0,17}", key):
            raise entry.bad("is not a port", "slots map ports to aliases", "for example: {8100: jerry-xl}")
        if int(key) not in settings.ports:
            raise entry.bad(
                "is outside the host's ports", f"they are {settings.ports}", "correct the port, or extend `ports`"
            )
        alias = _alias(entry)
        if alias in slots.values():
            raise entry.bad(f"the alias {alias} appears twice", "an alias belongs to one port", "rename one of them")
        slots[int(key)] = alias
    return slots


def _alias(value: Value) -> str:
    """Read the alias of a slot: text, or `alias` in a mapping."""
    if value.kind == "mapping":
        entries = value.entries(("alias", *SLOT_CHECKS))
        if "alias" not in entries:
            raise value.bad("alias is missing", "a slot is a port with an alias", "for example: {alias: jerry-xl}")
        value = entries["alias"]
    alias = value.text()
    if not is_name(alias):
        raise value.bad(
            f"{shown(alias)} is not an alias",
            "an alias is 1-64 letters, digits, '.', '_' or '-', a letter or digit first",
            "use the name that the gateway sends for this port",
        )
    return alias


def _slot_options(value: Value, _settings: Settings, _engines: Sequence[str]) -> dict[int, SlotOptions]:
    """Read what the slots have beside their aliases; `_slots` has checked the ports and the keys."""
    mappings = {int(port): entry.mapping() for port, entry in value.mapping().items() if entry.kind == "mapping"}
    options = {
        port: {key: check(entries[key]) for key, check in SLOT_CHECKS.items() if key in entries}
        for port, entries in mappings.items()
    }
    return {port: SlotOptions(**given) for port, given in options.items() if given}  # type: ignore[arg-type]


def _hold(value: Value) -> int:
    seconds = value.number()
    if seconds > MAX_HOLD:
        raise value.bad(
            f"{seconds} seconds are too long", f"the limit is {MAX_HOLD}", "use the length of a swap, for example 60"
        )
    return seconds


def _keep(value: Value) -> str:
    text = value.raw  # YAML reads a bare `off` as false
    if text not in KEEP:
        raise value.bad(f"{shown(text)} is no way to keep a server", f"known: {', '.join(KEEP)}", "use one of those")
    return text


SLOT_CHECKS: Mapping[str, Callable[[Value], object]] = {"hold": _hold, "keep": _keep}
"""The keys of a slot beside `alias`."""


def _boot(value: Value, settings: Settings, _engines: Sequence[str]) -> tuple[BootJob, ...]:
    """Read one job, or a list of jobs."""
    values = value.sequence() if value.kind == "list" else [value]
    jobs = tuple(_boot_job(each, settings.ports) for each in values)
    ports = [job.port for job in jobs]
    for port in ports:
        if ports.count(port) > 1:
            raise value.bad(f"port {port} appears twice", "a port has one server", "remove one of the jobs")
    return jobs


def _boot_job(value: Value, ports: PortRange) -> BootJob:
    entries = value.entries(("port", "script", "label"))
    if "port" not in entries:
        raise value.bad("port is missing", "mlxops must know the port of the boot job's server", "add port")
    if "script" not in entries and "label" not in entries:
        raise value.bad(
            "script and label are missing",
            "mlxops recognises the boot job's server by one of them",
            "add the path that the system runs (script), or the job's label",
        )
    port = entries["port"].number()
    if port not in ports:
        raise entries["port"].bad(f"{port} is outside the host's ports", f"they are {ports}", "correct the port")
    script = absolute_path(entries["script"]) if "script" in entries else ""
    label = entries["label"].text() if "label" in entries else ""
    return BootJob(port, script, label)


def _memory(value: Value) -> int | None:
    """Return bytes; None for `auto`."""
    return None if value.kind == "text" and value.text() == "auto" else _size(value, "memory", "auto")


def _kill_limit(value: Value) -> int:
    """Return bytes; `NO_LIMIT` for `none`."""
    return NO_LIMIT if value.kind == "text" and value.text() == "none" else _size(value, "kill_limit", "none")


def _size(value: Value, key: str, word: str) -> int:
    """Return bytes. `word`: what the key may be instead, for the message."""
    if value.kind == "number":
        size = value.number()
    else:
        text = value.text()
        matched = re.fullmatch(r"([1-9][0-9]{0,6}(?:\.[0-9]{1,3})?) ?([MGT])(i?)B", text)
        if matched is None:
            raise value.bad(
                f"{shown(text)} is not a size", f"it is {word}, 200GB, 186GiB or bytes", f"for example: {key}: 200GB"
            )
        base = 1024 if matched[3] else 1000
        size = round(float(matched[1]) * base ** {"M": 2, "G": 3, "T": 4}[matched[2]])
    if size < MIN_MEMORY:
        raise value.bad(
            f"{size} bytes are too few for a model", "a number without a unit is bytes", f"for example: {size}GB"
        )
    return size


def _exposure(value: Value) -> str:
    text = value.text()
    if text != "accepted":
        raise value.bad(
            f"{shown(text)} is not `accepted`", "it is the only value", "write `exposure: accepted`, or remove the key"
        )
    return text


# -- JSON forms ---------------------------------------------------------------------------------------------------


def _same(value: T) -> T:
    return value


def _text_from(value: object, key: str) -> str:
    if not isinstance(value, str) or not is_argument(value):
        raise ValueError(f"{key}: not a string")
    return value


def _bind_from(value: object, key: str) -> str:
    text = _text_from(value, key)
    if not _is_ip(text):
        raise ValueError(f"{key}: not an IP address")
    return text


def _integer_from(value: object, key: str) -> int:
    if type(value) is not int or abs(value) >= 2**63:
        raise ValueError(f"{key}: not an integer")
    return value


def _list_from(value: object, key: str) -> list[object]:
    if not isinstance(value, list):
        raise ValueError(f"{key}: not a list")
    return value


def _object_from(value: object, key: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"{key}: not an object")
    return value


def _optional(read: Callable[[object, str], T]) -> Callable[[object, str], T | None]:
    return lambda value, key: None if value is None else read(value, key)


def _ports_from(value: object, key: str) -> PortRange:
    pair = _list_from(value, key)
    if len(pair) != 2:
        raise ValueError(f"{key}: not a pair")
    first, last = (_integer_from(port, key) for port in pair)
    if not (1 <= first <= last <= 65535 and last - first < MAX_PORTS):
        raise ValueError(f"{key}: not a range of at most {MAX_PORTS} ports")
    return PortRange(first, last)


def _boot_to_wire(jobs: Iterable[BootJob]) -> object:
    """Write no job as null and one job as an object: version 0.1.0 reads only those, after `deploy --rollback`."""
    written = [job.to_wire() for job in jobs]
    if len(written) < 2:
        return written[0] if written else None
    return written


def _boot_from(value: object, key: str) -> tuple[BootJob, ...]:
    """Read null, one job, or a list of jobs."""
    jobs = value if isinstance(value, list) else [value] if isinstance(value, dict) else []
    return tuple(_boot_job_from(_object_from(job, key), key) for job in jobs)


def _boot_job_from(job: Mapping[str, object], key: str) -> BootJob:
    return BootJob(_integer_from(job.get("port"), key), str(job.get("script", "")), str(job.get("label", "")))


def _slot_options_to_wire(slots: Mapping[int, SlotOptions]) -> object:
    return {str(port): {"hold": options.hold, "keep": options.keep} for port, options in slots.items()}


def _slot_options_from(value: object, key: str) -> dict[int, SlotOptions]:
    """Read the options of all slots; none if another version wrote the settings."""
    slots = {} if value is None else _object_from(value, key)
    return {int(port): _options_from(_object_from(options, key), key) for port, options in slots.items()}


def _options_from(options: Mapping[str, object], key: str) -> SlotOptions:
    keep = _optional(_text_from)(options.get("keep"), key)
    return SlotOptions(hold=_optional(_integer_from)(options.get("hold"), key), keep=keep)


TEXT = (_same, _text_from)
OPTIONAL_TEXT = (_same, _optional(_text_from))
OPTIONAL_INTEGER = (_same, _optional(_integer_from))
TEXTS = (
    dict[str, str],
    lambda value, key: {name: _text_from(str(text), key) for name, text in _object_from(value, key).items()},
)
ARGVS = (
    lambda argvs: {engine: list(argv) for engine, argv in argvs.items()},
    lambda value, key: {
        engine: tuple(_text_from(str(word), key) for word in _list_from(argv, key))
        for engine, argv in _object_from(value, key).items()
    },
)
PORTS = (lambda ports: [ports.first, ports.last], _ports_from)
SLOTS = (
    lambda slots: {str(port): alias for port, alias in slots.items()},
    lambda value, key: {int(port): str(alias) for port, alias in _object_from(value, key).items()},
)
SLOT_OPTIONS = (_slot_options_to_wire, _slot_options_from)
BOOT = (_boot_to_wire, _boot_from)


@dataclass(frozen=True)
class Settings:
    """One managed host's settings, with the defaults that hosts.yaml documents."""

    address: str | None = field(default=None, metadata=dependent_setting(_address, OPTIONAL_TEXT))
    bind: str = field(default="127.0.0.1", metadata=setting(_bind, (_same, _bind_from)))
    hub: str | None = field(default=None, metadata=setting(absolute_path, OPTIONAL_TEXT))
    registry: str | None = field(default=None, metadata=setting(absolute_path, OPTIONAL_TEXT))
    state: str = field(default="~/.mlxops", metadata=setting(absolute_path, TEXT))
    engine: str = field(default=DEFAULT_ENGINE, metadata=dependent_setting(_engine, TEXT))
    launch: Mapping[str, tuple[str, ...]] = field(default_factory=dict, metadata=dependent_setting(_launch, ARGVS))
    env: Mapping[str, str] = field(default_factory=dict, metadata=setting(_env, TEXTS))
    ports: PortRange = field(default=PortRange(8100, 8109), metadata=setting(_ports, PORTS))
    slots: Mapping[int, str] = field(default_factory=dict, metadata=dependent_setting(_slots, SLOTS))
    slot_options: Mapping[int, SlotOptions] = field(
        default_factory=dict, metadata=dependent_setting(_slot_options, SLOT_OPTIONS, key="slots")
    )
    """Port -> what `slots` says about it beside its alias."""
    boot: tuple[BootJob, ...] = field(default=(), metadata=dependent_setting(_boot, BOOT))
    memory: int | None = field(default=None, metadata=setting(_memory, OPTIONAL_INTEGER))
    """Bytes for all servers together; None: the agent decides."""
    kill_limit: int | None = field(default=None, metadata=setting(_kill_limit, OPTIONAL_INTEGER))
    """A server that holds more bytes is killed only with `--kill`; None: the agent decides."""
    exposure: str | None = field(default=None, metadata=setting(_exposure, OPTIONAL_TEXT))
    """`accepted`: the operator knows that other machines reach the servers; `doctor` does not warn of it."""

    def alias(self, port: int, model: str) -> str:
        """Return the name under which `model` is served on `port`: the slot's alias, else its own name."""
        return self.slots.get(port, model)

    def hold(self, port: int) -> int | None:
        """Return the seconds that a request to this port's alias may wait for a swap; None: not said."""
        return self.slot_options.get(port, SlotOptions()).hold

    def keep(self, port: int) -> str:
        """Return what the keeper does for this port's server: one of `KEEP`."""
        return self.slot_options.get(port, SlotOptions()).keep or "notice"

    def slot_of(self, name: str) -> int | None:
        """Return the port whose alias is `name`."""
        return next((port for port, alias in self.slots.items() if alias == name), None)

    def to_wire(self) -> dict[str, object]:
        """Return the settings as JSON; `settings_from_wire` reads them."""
        return {name: one.write(getattr(self, name)) for name, one in _declared().items()}
