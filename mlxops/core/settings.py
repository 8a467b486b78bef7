"""What a managed host is told about itself: paths, ports, slots, engines.

The control node reads it from hosts.yaml, sends it with every request, and the host keeps what it agreed to.
Paths may begin with `~`; the agent expands them, because only the host knows its home directory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

DEFAULT_ENGINE = "mlx-openai-server"
AGREED = ("registry", "hub", "ports", "slots", "bind")
"""The settings on which every control node of a host must agree: a difference would mean two truths."""


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
    """A server that the system itself starts at boot; mlxops recognises it and never touches it."""

    port: int
    script: str = ""
    """The path of the script that the system runs."""
    label: str = ""
    """launchd's label, or systemd's unit. At least one of the two is given."""

    @property
    def name(self) -> str:
        """Its name for people."""
        return self.label or self.script

    def to_wire(self) -> dict[str, object]:
        return {"port": self.port, "script": self.script, "label": self.label}


@dataclass(frozen=True)
class Settings:
    """One managed host's settings; the defaults are those that hosts.yaml documents."""

    address: str | None = None
    bind: str = "127.0.0.1"
    hub: str | None = None
    registry: str | None = None
    state: str = "~/.mlxops"
    engine: str = DEFAULT_ENGINE
    launch: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    ports: PortRange = PortRange(8100, 8109)
    slots: Mapping[int, str] = field(default_factory=dict)
    boot: tuple[BootJob, ...] = ()
    memory: int | None = None
    """Bytes for all servers together; None: the agent finds out."""

    def alias(self, port: int, model: str) -> str:
        """The name under which `model` is served on `port`: the slot's, else its own."""
        return self.slots.get(port, model)

    def slot_of(self, name: str) -> int | None:
        """The port whose fixed alias is `name`."""
        return next((port for port, alias in self.slots.items() if alias == name), None)

    def to_wire(self) -> dict[str, object]:
        """JSON-safe; the inverse of `settings_from_wire`."""
        return {
            "address": self.address,
            "bind": self.bind,
            "hub": self.hub,
            "registry": self.registry,
            "state": self.state,
            "engine": self.engine,
            "launch": {engine: list(argv) for engine, argv in self.launch.items()},
            "env": dict(self.env),
            "ports": [self.ports.first, self.ports.last],
            "slots": {str(port): alias for port, alias in self.slots.items()},
            "boot": _boot_to_wire(self.boot),
            "memory": self.memory,
        }


def settings_from_wire(wire: Mapping[str, object]) -> Settings:
    """The settings that `to_wire` described.

    Raises `ValueError` for anything that `to_wire` cannot have written.
    """
    ports = _list(wire, "ports")
    if len(ports) != 2:
        raise ValueError("ports: not a pair")
    return Settings(
        address=_optional(wire, "address"),
        bind=_string(wire, "bind"),
        hub=_optional(wire, "hub"),
        registry=_optional(wire, "registry"),
        state=_string(wire, "state"),
        engine=_string(wire, "engine"),
        launch={engine: tuple(map(str, _as_list(argv, "launch"))) for engine, argv in _map(wire, "launch").items()},
        env={key: str(value) for key, value in _map(wire, "env").items()},
        ports=PortRange(_as_int(ports[0], "ports"), _as_int(ports[1], "ports")),
        slots={int(port): str(alias) for port, alias in _map(wire, "slots").items()},
        boot=_boot(wire.get("boot")),
        memory=None if wire.get("memory") is None else _as_int(wire.get("memory"), "memory"),
    )


def _boot_to_wire(jobs: tuple[BootJob, ...]) -> object:
    """Write one job, or none, as version 0.1.0 does: after `deploy --rollback` it reads this host.json."""
    if len(jobs) < 2:
        return jobs[0].to_wire() if jobs else None
    return [job.to_wire() for job in jobs]


def _boot(value: object) -> tuple[BootJob, ...]:
    """Read null, one job, or a list of jobs."""
    jobs = value if isinstance(value, list) else [value] if isinstance(value, dict) else []
    found = []
    for job in jobs:
        if not isinstance(job, dict):
            raise ValueError("boot: not an object")
        found.append(BootJob(_as_int(job.get("port"), "boot"), str(job.get("script", "")), str(job.get("label", ""))))
    return tuple(found)


def _string(wire: Mapping[str, object], key: str) -> str:
    value = wire.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key}: not a string")
    return value


def _optional(wire: Mapping[str, object], key: str) -> str | None:
    return None if wire.get(key) is None else _string(wire, key)


def _list(wire: Mapping[str, object], key: str) -> list[object]:
    return _as_list(wire.get(key), key)


def _as_list(value: object, key: str) -> list[object]:
    if not isinstance(value, list):
        raise ValueError(f"{key}: not a list")
    return value


def _map(wire: Mapping[str, object], key: str) -> dict[str, object]:
    value = wire.get(key)
    if not isinstance(value, dict):
        raise ValueError(f"{key}: not an object")
    return value


def _as_int(value: object, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{key}: not an integer")
    return value
