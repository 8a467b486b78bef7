"""Who and what is at work on a host: recorded servers, running operations and detected servers. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Run:
    """The run record: what is known of the process that was started, or adopted, for a port.

    `start` and `boot_id` are the kernel's own marks (see the agent's `system`); with pid, pgid and `run_id`, which its
    environment has, they prove that a process is the recorded one. `*_at` are wall time, for display only.
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

    def to_wire(self) -> dict[str, object]:
        return {**asdict(self), "argv": list(self.argv)}


def run_from_wire(wire: Mapping[str, object]) -> Run:
    """Raises `ValueError` for anything that `to_wire` cannot have written."""
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
    optional = {key: wire.get(key) for key in ("proven_at", "engine_version")}
    if not all(type(value) is int and value > 1 for value in numbers.values()):
        raise ValueError("port, pid and pgid are not all numbers")
    if not all(isinstance(value, str) for value in texts.values()):
        raise ValueError("a text is missing")
    if not all(value is None or isinstance(value, str) for value in optional.values()):
        raise ValueError("proven_at or engine_version is not a text")
    return Run(
        **numbers,  # type: ignore[arg-type]
        **texts,  # type: ignore[arg-type]
        **optional,  # type: ignore[arg-type]
        argv=tuple(str(word) for word in argv),
        adopted=wire.get("adopted") is True,
    )


@dataclass(frozen=True)
class Operation:
    """A running operation, as the lock that it holds describes it."""

    id: str
    command: str
    model: str | None = None
    port: int | None = None
    asker: str = "?"
    since: str = "?"
    repo: str | None = None
    reserves: int | None = None
    """Bytes of memory that what it is about to start will take."""

    def __str__(self) -> str:
        return f"{self.command} {self.model or ''}".strip() + f", started by {self.asker} at {self.since} ({self.id})"


def operation_from_wire(wire: Mapping[str, object]) -> Operation:
    """Raises `ValueError` for anything that a lock's holder cannot have written into it."""
    texts = {key: wire.get(key) for key in ("id", "command", "asker", "since")}
    optional = {key: wire.get(key) for key in ("model", "repo")}
    if not all(isinstance(value, str) for value in texts.values()):
        raise ValueError("a text is missing")
    if not all(value is None or isinstance(value, str) for value in optional.values()):
        raise ValueError("model or repo is not a text")
    numbers = {key: wire.get(key) for key in ("port", "reserves")}
    if not all(value is None or type(value) is int for value in numbers.values()):
        raise ValueError("port or reserves is not a number")
    return Operation(**texts, **optional, **numbers)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Server:
    """A live server that is not recorded as ours: what its argv says."""

    pid: int
    pgid: int
    engine: str
    model: str
    argv: tuple[str, ...]
    start: str = ""
    path: str = ""
    """The real path of the model that it was given, if that is a path on this host."""
    wrappers: tuple[int, ...] = ()
    """The processes that only run it, such as `uv run` or a script: they end with it."""
    starter: str = ""
    """For people: its parent, which goes on without it."""


def run_of(server: Server, port: int, boot_id: str) -> Run:
    """A server that we did not start, as a run: enough to prove its identity, and nothing else."""
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
    )
