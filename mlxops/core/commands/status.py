"""`status`: what is on each port."""

from __future__ import annotations

from collections.abc import Sequence

from mlxops.core.command import Group, Hosts, Request, option, switch
from mlxops.core.frozen import dataclass
from mlxops.core.hints import Commands
from mlxops.core.protocol import Progress
from mlxops.core.replies import HostReply
from mlxops.core.tables import host_table, one_line, size
from mlxops.core.wire import omitted


@dataclass(frozen=True)
class ProbeRow:
    """One small completion that a port was asked for."""

    ok: bool | None
    """None: it was not asked."""
    seconds: float
    error: str | None
    name: str | None = None
    """The model name that the request had. Builds up to 0.1.0 send neither this nor `not_asked`."""
    not_asked: str | None = None
    """Why it was not asked."""


@dataclass(frozen=True)
class PortRow:
    """One port. `state` and `owner` are those of `mlxops.core.ports`."""

    port: int
    alias: str | None
    """The slot's alias, or the model's name."""
    state: str
    owner: str | None = None
    model: str | None = None
    repo_id: str | None = None
    revision: str | None = None
    """The commit of the files."""
    pid: int | None = None
    pgid: int | None = None
    """The process group of the server."""
    engine: str | None = None
    engine_version: str | None = None
    since: str | None = None
    """When the server was started, in UTC."""
    proven_at: str | None = None
    """When it gave its first completion, in UTC."""
    memory_bytes: int | None = None
    """What all processes of the server hold; null if there is none, or if it is hidden."""
    detail: str = ""
    """What is special about the state, for people."""
    progress: Progress | None = None
    """Only while an operation counts bytes."""
    log_path: str | None = None
    """The server's log on the host."""
    operation: str | None = None
    """The id of the operation that changes the port now."""
    portless: tuple[int, ...] = ()
    """Pids of further servers that were started for this port and listen nowhere."""
    probe: ProbeRow | None = None
    """With `--probe`: its completion; None if the port is not ready."""
    checks: str | None = None
    """The worst verdict of the server's last `probe`: pass, warn or fail; None if it was not checked."""


@dataclass(frozen=True)
class DriftRow:
    """A difference between the registry and what runs, and what to do about it."""

    code: str
    port: int | None
    """None if it concerns no port."""
    model: str | None
    """None if it concerns no model."""
    message: str
    hint: str
    """What to do next."""
    commands: Commands = omitted(())
    """The commands that the hint names."""


@dataclass(frozen=True)
class RunningRow:
    """A running operation that belongs to no port, such as a download."""

    operation: str
    """Its id."""
    command: str
    detail: str
    """How far it is, for people."""
    progress: Progress | None = None


@dataclass(frozen=True)
class StatusResult:
    operations: tuple[RunningRow, ...]
    """Running operations that belong to no port."""
    ports: tuple[PortRow, ...]
    drift: tuple[DriftRow, ...]
    registry: str
    """The path of registry.json."""
    keeper: str | None = None
    """The running keeper; None if none runs."""


@dataclass(frozen=True)
class Status(
    Request[StatusResult],
    group=Group.LOOK,
    example="mlxctl status --watch",
    hosts=Hosts.ALL,
    repeatable=True,
):
    """Show what is on each port, on all hosts."""

    probe: bool = switch("also ask each ready port for one small completion")
    strict: bool = switch("exit 3 if there is any drift; with --watch at the first drift", sent=False)
    watch: bool = switch("keep running and show changes", sent=False)
    interval: str | None = option("with --watch: seconds between two reads of a host (2)", sent=False)


def show(replies: Sequence[HostReply[StatusResult]]) -> str:
    many = len(replies) > 1
    rows: list[list[object]] = []
    for reply in replies:
        if reply.result is None and reply.error is not None:
            rows.append([reply.host, "", "", reply.error.code, "", "", "", reply.error.message])
        for row in reply.result.ports if reply.result else ():
            memory = size(row.memory_bytes)
            rows.append([reply.host, row.port, row.alias, row.state, row.owner, row.model, memory, _detail(row)])
    columns = ["HOST", "PORT", "ALIAS", "STATE", "OWNER", "MODEL", "MEMORY", "DETAIL"]
    results = [(reply.host, reply.result) for reply in replies if reply.result]
    running = [
        one_line(f"running: {row.command} {row.operation}: {row.detail}")
        for _, result in results
        for row in result.operations
    ]
    drift = [
        f"drift: {f'{host}: ' if many else ''}{one_line(row.message)}; {one_line(row.hint)}"
        for host, result in results
        for row in result.drift
    ]
    return "\n".join([host_table(columns, rows, many=many), *running, *drift])


def _detail(row: PortRow) -> str:
    """Return a port's detail, with the outcomes of its checks and its probe."""
    checks = f"checks: {row.checks}" if row.checks else ""
    return "; ".join(filter(None, [row.detail, checks, _probe(row, row.probe) if row.probe else ""]))


def _probe(row: PortRow, probe: ProbeRow) -> str:
    if probe.not_asked:
        return f"not asked: {probe.not_asked}"
    if not probe.ok:
        return "no completion"
    other = probe.name not in (None, row.alias, row.model)
    return f"completion in {probe.seconds} s" + (f" as {probe.name}" if other else "")
