"""What a host records: runs, operations and stranded memory; and servers without a record. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict

from mlxops.core.frozen import dataclass


@dataclass(frozen=True)
class Run:
    """The run record: the process that mlxops started or adopted for a port.

    `start` (the process's raw start time) and `boot_id` come from the kernel, see the agent's `system`. Together with
    pid, pgid and `run_id`, which is in the process's environment, they prove that a process is the recorded one.
    `*_at` are wall time, for display only.
    """

    port: int
    model: str
    alias: str
    repo_id: str
    revision: str
    engine: str
    argv: tuple[str, ...]
    run_id: str
    pid: int
    pgid: int
    start: str
    boot_id: str
    operation: str
    log_path: str
    started_at: str
    proven_at: str | None = None
    engine_version: str | None = None
    adopted: bool = False
    budget: tuple[str, ...] = ()
    """The last words of `argv`: the limits that were chosen from the memory that was left. Builds up to 0.2.0 record
    none."""
    stopped_by: str | None = None
    """The command that began to stop it. It may have given up, or may have been killed, before the server ended."""
    stopping_since: str | None = None
    """When its first stop began."""
    stopping: tuple[tuple[int, str], ...] = ()
    """Pid and start of each process that its first stop had to end: its leader may end long before the others."""
    overdue: bool = False
    """A stop has given it all the time that its size needs, and it had not ended."""
    held_bytes: int | None = None
    """What it held just before that; None if that is not known, or if no memory is looked for after its end."""
    unexplained_bytes: int | None = None
    """What the host had in use then that no process explained."""
    slept_seconds: int | None = None
    """How long the host had slept then, since its boot."""

    @property
    def settings(self) -> tuple[str, ...]:
        """The argv without the limits of the budget. A load would choose other limits each time."""
        count = len(self.budget)
        return self.argv[:-count] if count and self.argv[-count:] == self.budget else self.argv

    def pid_among(self, members: Collection[int]) -> int:
        """Return the pid to show: the leader's, but that of another member if only the leader has ended."""
        return self.pid if self.pid in members or not members else min(members)

    def to_wire(self) -> dict[str, object]:
        return {
            **asdict(self),
            "argv": list(self.argv),
            "budget": list(self.budget),
            "stopping": [list(each) for each in self.stopping],
        }


_OPTIONAL_TEXTS = ("proven_at", "engine_version", "stopped_by", "stopping_since")
_OPTIONAL_NUMBERS = ("held_bytes", "unexplained_bytes", "slept_seconds")


def run_from_wire(wire: Mapping[str, object]) -> Run:
    """Read a run record. Raises `ValueError` for anything that `to_wire` cannot have written."""
    argv = wire.get("argv")
    if not isinstance(argv, list):
        raise ValueError("argv is not a list")
    numbers = {key: wire.get(key) for key in ("port", "pid", "pgid")}
    texts = {
        key: wire.get(key)
        for key in (
            *("model", "alias", "repo_id", "revision", "engine", "run_id", "start", "boot_id"),
            *("operation", "log_path", "started_at"),
        )
    }
    optional = {key: wire.get(key) for key in _OPTIONAL_TEXTS}
    if not all(_is_number(value, 2) for value in numbers.values()):
        raise ValueError("port, pid and pgid are not all numbers")
    if not all(isinstance(value, str) for value in texts.values()):
        raise ValueError("a text is missing")
    if not all(value is None or isinstance(value, str) for value in optional.values()):
        raise ValueError(f"one of {', '.join(_OPTIONAL_TEXTS)} is not a text")
    sizes = {key: wire.get(key) for key in _OPTIONAL_NUMBERS}
    if not all(value is None or _is_number(value, 0) for value in sizes.values()):
        raise ValueError(f"one of {', '.join(_OPTIONAL_NUMBERS)} is not a number")
    stopping = wire.get("stopping", [])
    if not isinstance(stopping, list) or not all(_is_process(each) for each in stopping):
        raise ValueError("stopping is not a list of processes")
    budget = wire.get("budget", [])
    if not isinstance(budget, list) or not all(isinstance(word, str) for word in budget):
        raise ValueError("budget is not a list of words")
    return Run(
        **numbers,  # type: ignore[arg-type]
        **texts,  # type: ignore[arg-type]
        **optional,  # type: ignore[arg-type]
        **sizes,  # type: ignore[arg-type]
        argv=tuple(str(word) for word in argv),
        adopted=wire.get("adopted") is True,
        overdue=wire.get("overdue") is True,
        budget=tuple(budget),
        stopping=tuple((pid, start) for pid, start in stopping),
    )


def _is_process(value: object) -> bool:
    return isinstance(value, list) and [type(each) for each in value] == [int, str] and _is_number(value[0], 2)


def _is_number(value: object, least: int = -(2**63)) -> bool:
    """Return whether a value is an integer of 64 bits. Python reads larger ones, and cannot convert them to floats."""
    return type(value) is int and least <= value < 2**63


@dataclass(frozen=True)
class Operation:
    """A running operation, as it describes itself in the locks that it holds."""

    id: str
    command: str
    model: str | None = None
    port: int | None = None
    asker: str = "?"
    since: str = "?"
    repo: str | None = None
    reserves: int | None = None
    """Bytes of memory that the server which it starts is expected to take."""

    def __str__(self) -> str:
        return f"{self.command} {self.model or ''}".strip() + f", started by {self.asker} at {self.since} ({self.id})"


def operation_from_wire(wire: Mapping[str, object]) -> Operation:
    """Read the holder of a lock. Raises `ValueError` for anything that no holder can have written."""
    texts = {key: wire.get(key) for key in ("id", "command", "asker", "since")}
    optional = {key: wire.get(key) for key in ("model", "repo")}
    if not all(isinstance(value, str) for value in texts.values()):
        raise ValueError("a text is missing")
    if not all(value is None or isinstance(value, str) for value in optional.values()):
        raise ValueError("model or repo is not a text")
    numbers = {key: wire.get(key) for key in ("port", "reserves")}
    if not all(value is None or _is_number(value, 0) for value in numbers.values()):
        raise ValueError("port or reserves is not a number")
    return Operation(**texts, **optional, **numbers)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Server:
    """A live server without a run record. Engine, model and path are read from its argv."""

    pid: int
    pgid: int
    engine: str
    model: str
    argv: tuple[str, ...]
    start: str = ""
    path: str = ""
    """The real path of its model, if the model in its argv is a path on this host."""
    wrappers: tuple[int, ...] = ()
    """Processes that only run the server, such as `uv run` or a script. They end with it."""
    starter: str = ""
    """For people: its parent process, which does not end with it."""


def run_of(server: Server, port: int, boot_id: str) -> Run:
    """Return a run record for a server that we did not start. It has only what proves the server's identity."""
    unknown = dict.fromkeys(("model", "alias", "repo_id", "revision", "run_id", "operation", "log_path"), "")
    return Run(
        **unknown,
        port=port,
        engine=server.engine,
        argv=server.argv,
        pid=server.pid,
        pgid=server.pgid,
        start=server.start,
        boot_id=boot_id,
        started_at="",
        adopted=True,
        overdue=False,
        budget=(),
        stopping=(),
        held_bytes=None,
        unexplained_bytes=None,
        slept_seconds=None,
    )


@dataclass(frozen=True)
class Silence:
    """A live server that completes nothing, as the keeper has found."""

    since: str
    """When it was found; wall time, for display only."""
    stays: str = ""
    """Why the keeper does not restart it."""


@dataclass(frozen=True)
class Stranded:
    """Memory that did not return when servers were stopped since the last boot. All sizes are bytes."""

    boot_id: str
    size: int
    """What was missing, over all such stops."""
    baseline: int
    """What no process explained before the first of them."""
    port: int
    """The port of the last of them."""
    model: str
    stopped_at: str
    """Wall time, for display only."""

    def to_wire(self) -> dict[str, object]:
        return asdict(self)


def stranded_from_wire(wire: Mapping[str, object]) -> Stranded:
    """Read the record of stranded memory. Raises `ValueError` for anything that `to_wire` cannot have written."""
    texts = {key: wire.get(key) for key in ("boot_id", "model", "stopped_at")}
    numbers = {key: wire.get(key) for key in ("size", "baseline", "port")}
    if not all(isinstance(value, str) for value in texts.values()):
        raise ValueError("a text is missing")
    if not all(map(_is_number, numbers.values())):
        raise ValueError("size, baseline and port are not all numbers")
    return Stranded(**texts, **numbers)  # type: ignore[arg-type]
