"""What was observed on a host, and the one judgement of what it means. Pure.

The agent collects `Signals` for each port; `judge` turns them into a `PortView`, the row that everybody sees and
that the planner decides on. No signal decides alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum

from mlxops.core.described import DescribedText
from mlxops.core.drift import Drift
from mlxops.core.protocol import Progress
from mlxops.core.records import Operation, Run, Server
from mlxops.core.registry import Model, Registry
from mlxops.core.settings import BootJob


class State(DescribedText):
    """The state of a port."""

    IDLE = "idle", "Nothing runs on the port."
    LOADING = "loading", "An operation starts a server here, or a server runs that does not serve yet."
    READY = "ready", "The server is the one that was proven at load, it listens, and it answers the probe."
    DRAINING = "draining", "An operation stops the server here."
    FAILED = "failed", "The server ended or is unhealthy; the detail says why."
    WEDGED = "wedged", "The server does not answer the probe, although no request is running."
    MISMATCH = "mismatch", "The server serves another model than the registry says, or another process listens here."
    FOREIGN = "foreign", "A process that is not ours holds the port; mlxops never signals it."
    ORPHAN = "orphan", "Processes of ours are left without their leader, their port or an assignment."
    UNKNOWN = "unknown", "The state could not be determined; mlxops changes nothing here."


class Owner(DescribedText):
    """Who started the server of a port."""

    MLXOPS = "mlxops", "mlxops started or adopted the server."
    HAND = "hand", "This user started the server by hand."
    BOOT = "boot", "A boot job of hosts.yaml starts the server."
    FOREIGN = "foreign", "Any other process that holds the port."


class Orphan(StrEnum):
    """Why processes of ours on a port count as left over; the value is told to people."""

    INTERRUPTED = "a load was interrupted before its proof"
    LEADERLESS = "the server's leader is gone, some of its processes are not"
    PORTLESS = "the server's processes live, but nothing listens"
    UNASSIGNED = "it serves, and the registry has no assignment for it"


class Health(StrEnum):
    """What the cheap probe of a server brought."""

    SERVING = "serving"
    LOADING = "loading"
    BROKEN = "broken"
    SILENT = "silent"
    NOT_ASKED = "not asked"
    """The question could not even be sent, for reasons of our own, or nobody asked it."""


class Standing(StrEnum):
    """Whether the system starts a boot job's server; the value is shown to people."""

    ACTIVE = "running"
    """It runs, or is about to be started again."""
    LOADED = "loaded"
    """The service manager knows it; it does not run now."""
    INSTALLED = "installed"
    """Its file exists; the service manager reads it at the next boot or login."""
    DISABLED = "disabled"
    """The service manager knows it, and does not start it."""
    MISSING = "not installed"
    UNKNOWN = "unknown"

    @property
    def reserves(self) -> bool:
        """Whether the job's port is reserved for it. An unknown standing reserves it, too."""
        return self not in {Standing.DISABLED, Standing.MISSING}


@dataclass(frozen=True)
class JobState:
    """What a host knows about one of its boot jobs."""

    job: BootJob
    standing: Standing
    detail: str = ""
    """For people: what the service manager says; or why the job is missing or unknown."""
    stop: str = ""
    """The operator's command that stops it."""
    enable: str = ""
    """The operator's command that makes the system start it again, if it is disabled."""


@dataclass(frozen=True)
class BootClaim:
    """Why a server, or an idle port, is a boot job's; and the operator's command that stops the job."""

    job: BootJob
    how: str
    stop: str


@dataclass(frozen=True)
class Signals:
    """Everything that was seen about one port, before it is judged."""

    port: int
    alias: str | None
    run: Run | None = None
    broken_record: bool = False
    leader_proven: bool = False
    members: tuple[int, ...] = ()
    """Living members of the recorded group that are proven ours."""
    listening: bool = False
    """Something listens that a server of this port would collide with."""
    listener_pids: frozenset[int] = frozenset()
    unowned: bool = False
    """A listener's process cannot be seen, and nothing says that it is another user's."""
    hand: Server | None = None
    """This user's server that listens; or if nothing listens, one that was given this port."""
    portless: tuple[Server, ...] = ()
    """Further servers of this user that were given this port and listen nowhere: an mlx_lm.server that lost its port to
    another process keeps its model in memory."""
    boot: BootClaim | None = None
    """Why a boot job owns the server, or the idle port that the running job is about to take."""
    operation: Operation | None = None
    activity: str = ""
    """What that operation is doing."""
    progress: Progress | None = None
    """How far it is, where that is a matter of bytes."""
    answer: Health = Health.NOT_ASKED
    busy: bool = False
    """Somebody is connected to it, so a probe without an answer may just have to wait."""
    stranger: str = ""
    """For people: what listens there, if it is not ours."""
    memory_bytes: int | None = None
    error: str | None = None
    """Why the port could not be looked at."""
    last_words: str = ""
    rebooted: bool = False
    """The recorded run is of an earlier boot of the host."""


@dataclass(frozen=True)
class PortView:
    """One row of the status; `run` and `operation` go with it for the planner."""

    port: int
    alias: str | None
    state: State
    owner: Owner | None = None
    model: str | None = None
    repo_id: str | None = None
    revision: str | None = None
    pid: int | None = None
    pgid: int | None = None
    engine: str | None = None
    engine_version: str | None = None
    since: str | None = None
    proven_at: str | None = None
    memory_bytes: int | None = None
    detail: str = ""
    progress: Progress | None = None
    run: Run | None = None
    server: Server | None = None
    operation: Operation | None = None
    members: tuple[int, ...] = ()
    orphan: Orphan | None = None
    rebooted: bool = False
    reassigned: bool = False
    """Its server is in order, and the registry assigns the port to another model."""
    portless: tuple[Server, ...] = ()
    boot: BootClaim | None = None

    def to_wire(self) -> dict[str, object]:
        """The row of the status document."""
        hidden = {"run", "server", "operation", "members", "orphan", "rebooted", "reassigned", "portless", "boot"}
        row = {key: value for key, value in asdict(self).items() if key not in hidden}
        row["log_path"] = self.run.log_path if self.run else None
        row["operation"] = self.operation.id if self.operation else None
        row["portless"] = [each.pid for each in self.portless]
        return row

    @property
    def overtaken(self) -> bool:
        """Something seems wrong just where somebody is at work: it was probably seen half before and half after."""
        return self.operation is not None and self.state in {State.FOREIGN, State.ORPHAN, State.MISMATCH, State.FAILED}

    @property
    def unserved(self) -> bool:
        """Listener, process and operation all say that nothing is there."""
        return (
            self.state in {State.IDLE, State.FAILED}
            and self.owner is None
            and not self.members
            and self.operation is None
        )


@dataclass(frozen=True)
class World:
    """All ports of a host's range, observed in one pass."""

    ports: Mapping[int, PortView] = field(default_factory=dict)
    drift: tuple[Drift, ...] = ()
    boot: tuple[JobState, ...] = ()
    """The boot jobs of the ports that were looked at."""


def judge(signals: Signals, registry: Registry) -> PortView:
    """What the signals of one port mean. `unknown` only where they could not be had."""
    run = signals.run
    assigned = registry.on_port(signals.port)
    ours = _ours(signals)
    if signals.error is not None:
        return _view(signals, State.UNKNOWN, None, detail=signals.error)
    operation = signals.operation
    if operation is not None and operation.command == "load" and not (run and run.proven_at and ours):
        return _loading(signals, operation)
    if operation is not None and operation.command in {"unload", "unload-all"} and (ours or signals.hand):
        return _view(signals, State.DRAINING, Owner.MLXOPS if ours else Owner.HAND, detail=_at_work(signals, operation))
    # A boot job's server that was adopted before hosts.yaml named the job is the job's: the system starts it again.
    if run is not None and ours and not (run.adopted and signals.boot):
        # A registry that cannot be read does not say that a server is not assigned.
        unknown = bool(registry.unwritable) and not assigned
        return _judge_ours(signals, run, (run.model,) if unknown else tuple(model.name for model in assigned))
    if signals.boot is not None:
        if signals.listening or signals.hand is not None:
            return _stranger(signals, registry, Owner.BOOT)
        return _view(signals, State.LOADING, Owner.BOOT, detail=f"{signals.boot.how}, and does not listen yet")
    if signals.unowned:
        return _view(signals, State.UNKNOWN, None, detail=_UNOWNED)
    if signals.hand is not None:
        return _stranger(signals, registry, Owner.HAND)
    if signals.listening:
        return _view(signals, State.FOREIGN, Owner.FOREIGN, detail=signals.stranger)
    if signals.broken_record:
        return _view(signals, State.IDLE, None, detail="its run record is unreadable; nothing serves the port")
    if run is not None and assigned:
        ended = "it went down with the host" if signals.rebooted else "its server ended"
        why = ended + (f": {signals.last_words}" if signals.last_words and not signals.rebooted else "")
        return _view(signals, State.FAILED, None, model=assigned[0].name, detail=why)
    return _view(signals, State.IDLE, None)


_UNOWNED = "something listens, and its process cannot be seen: it is just ending, or another user's"


def _ours(signals: Signals) -> bool:
    return signals.run is not None and (signals.leader_proven or bool(signals.members))


def _loading(signals: Signals, operation: Operation) -> PortView:
    return _view(signals, State.LOADING, Owner.MLXOPS, model=operation.model, detail=_at_work(signals, operation))


def _at_work(signals: Signals, operation: Operation) -> str:
    return "; ".join(filter(None, [signals.activity, str(operation)]))


def _judge_ours(signals: Signals, run: Run, assigned: tuple[str, ...]) -> PortView:
    """A port where processes of ours live and no load is running."""
    owner = Owner.MLXOPS
    orphan = _orphan(signals, run, assigned)
    if orphan is not None:
        return _view(signals, State.ORPHAN, owner, orphan.value, orphan=orphan)
    if signals.unowned:
        return _view(signals, State.UNKNOWN, None, _UNOWNED)
    if not signals.listener_pids or not signals.listener_pids <= set(signals.members):
        # A listener whose process cannot be seen is another user's: our own are always seen.
        return _view(signals, State.MISMATCH, owner, f"somebody else listens on its port: {signals.stranger}")
    if run.model not in assigned:
        return replace(_view(signals, State.MISMATCH, owner, f"the registry says {assigned[0]}"), reassigned=True)
    match signals.answer:
        case Health.SILENT if signals.busy:
            return _view(signals, State.READY, owner, "busy")
        case Health.SILENT:
            return _view(signals, State.WEDGED, owner, "no answer to the probe")
        case Health.BROKEN:
            return _view(signals, State.FAILED, owner, "the server says that it is unhealthy")
        case Health.LOADING:
            return _view(signals, State.LOADING, owner, "the server says that it is loading")
        case Health.NOT_ASKED:
            return _view(signals, State.UNKNOWN, None, detail="its server could not be asked")
        case Health.SERVING:
            return _view(signals, State.READY, owner)


def _orphan(signals: Signals, run: Run, assigned: tuple[str, ...]) -> Orphan | None:
    if run.proven_at is None:
        return Orphan.INTERRUPTED
    if not signals.leader_proven:
        return Orphan.LEADERLESS
    if not signals.listening:
        return Orphan.PORTLESS
    return None if assigned else Orphan.UNASSIGNED


def _stranger(signals: Signals, registry: Registry, owner: Owner) -> PortView:
    """A server that we did not start: what it serves is matched with the registry by path, repo or name."""
    server = signals.hand
    model = next((m.name for m in registry.models.values() if server and server.model in _known_as(m)), None)
    assigned = registry.on_port(signals.port)
    if server is not None and signals.listening and signals.answer is Health.NOT_ASKED:
        return _view(signals, State.UNKNOWN, None, detail="its server could not be asked")
    if signals.answer is Health.SILENT and signals.busy:
        state, detail = State.READY, "busy"
    elif signals.answer is Health.SILENT:
        state, detail = (State.WEDGED, "no answer to the probe") if signals.listening else (State.LOADING, "")
    elif not signals.listening:
        state, detail = State.LOADING, "it does not listen yet"
    elif signals.answer is Health.LOADING:
        state, detail = State.LOADING, "the server says that it is loading"
    elif signals.answer is Health.BROKEN:
        state, detail = State.FAILED, "the server says that it is unhealthy"
    elif assigned and model is not None and model not in {entry.name for entry in assigned}:
        state, detail = State.MISMATCH, f"the registry says {assigned[0].name}"
    else:
        state, detail = State.READY, ""
    entry = registry.models.get(model) if model else None
    return PortView(
        port=signals.port,
        alias=signals.alias,
        state=state,
        owner=owner,
        model=model or (server.model if server else None),
        repo_id=entry.repo_id if entry else None,
        revision=entry.revision if entry else None,
        pid=server.pid if server else None,
        pgid=server.pgid if server else None,
        engine=server.engine if server else None,
        memory_bytes=signals.memory_bytes,
        detail=_told(signals, server, detail),
        run=signals.run,
        server=server,
        operation=signals.operation,
        portless=signals.portless,
        boot=signals.boot,
    )


def _told(signals: Signals, server: Server | None, detail: str) -> str:
    """Describe a server for people: `detail`, else what listens; and its boot job or parent."""
    if signals.boot:
        return "; ".join(filter(None, [detail, signals.boot.how]))
    parent = f"its parent: {server.starter}" if server and server.starter else ""
    return detail or "; ".join(filter(None, [signals.stranger, parent]))


def _known_as(model: Model) -> frozenset[str]:
    names = (model.name, model.repo_id, model.model_id, model.cache_path)
    return frozenset(name for name in names if name)


def _view(
    signals: Signals,
    state: State,
    owner: Owner | None,
    detail: str = "",
    *,
    model: str | None = None,
    orphan: Orphan | None = None,
) -> PortView:
    run = signals.run if owner is Owner.MLXOPS else None
    return PortView(
        port=signals.port,
        alias=signals.alias,
        state=state,
        owner=owner,
        model=model or (run.model if run else None),
        repo_id=run.repo_id if run else None,
        revision=run.revision if run else None,
        pid=run.pid if run else (signals.hand.pid if signals.hand else min(signals.listener_pids, default=None)),
        pgid=run.pgid if run else None,
        engine=run.engine if run else None,
        engine_version=run.engine_version if run else None,
        since=run.started_at if run else None,
        proven_at=run.proven_at if run else None,
        memory_bytes=signals.memory_bytes,
        detail=detail,
        progress=signals.progress,
        run=signals.run,
        server=signals.hand,
        operation=signals.operation,
        members=signals.members,
        portless=signals.portless,
        orphan=orphan,
        rebooted=signals.rebooted,
        boot=signals.boot,
    )
