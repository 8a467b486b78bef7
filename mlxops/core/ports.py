"""Decide the state of a port from what was observed on the host. Pure.

The agent collects `Signals` for each port. `judge` turns them into a `PortView`, which `status` shows and on which
plans are made. It weighs all signals together: no single one is proof.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from enum import StrEnum

from mlxops.core.described import DescribedText
from mlxops.core.drift import Drift
from mlxops.core.frozen import dataclass
from mlxops.core.protocol import Progress
from mlxops.core.records import Operation, Run, Server, Stranded
from mlxops.core.registry import Model, Registry
from mlxops.core.settings import BootJob


class State(DescribedText):
    """The state of a port."""

    IDLE = "idle", "Nothing runs on the port."
    LOADING = "loading", "An operation starts a server here, or a server runs that does not serve yet."
    READY = "ready", "The server is the one that was proven at load, it listens, and it answers the probe."
    DRAINING = "draining", "An operation stops the server here, or began to, and gave up or was interrupted."
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
    """Why processes of ours count as left over. The values are shown to people."""

    INTERRUPTED = "a load was interrupted before its proof"
    LEADERLESS = "the server's leader is gone, some of its processes are not"
    PORTLESS = "the server's processes live, but nothing listens"
    UNASSIGNED = "it serves, and the registry has no assignment for it"


class Health(StrEnum):
    """The result of a server's cheap probe."""

    SERVING = "serving"
    LOADING = "loading"
    BROKEN = "broken"
    SILENT = "silent"
    NOT_ASKED = "not asked"
    """The probe was not sent, or could not be sent because of a problem on our side."""


class Standing(StrEnum):
    """Whether the system starts a boot job's server. The values are shown to people."""

    ACTIVE = "running"
    """It runs, or the system is about to restart it."""
    LOADED = "loaded"
    """The service manager has it; it does not run now."""
    INSTALLED = "installed"
    """Its file exists; the service manager reads it at the next boot or login."""
    DISABLED = "disabled"
    """The service manager has it and does not start it."""
    MISSING = "not installed"
    UNKNOWN = "unknown"

    @property
    def reserves(self) -> bool:
        """Whether the job's port is reserved for it. If the standing is unknown, it is."""
        return self not in {Standing.DISABLED, Standing.MISSING}


@dataclass(frozen=True)
class JobState:
    """One boot job of a host."""

    job: BootJob
    standing: Standing
    detail: str = ""
    """For people: the service manager's words, or why the job is missing or unknown."""
    stop: str = ""
    """The operator's command that stops it."""
    enable: str = ""
    """The operator's command that makes the system start it again, if it is disabled."""


@dataclass(frozen=True)
class BootClaim:
    """Why a server or an idle port belongs to a boot job (`how`), and the operator's command that stops the job."""

    job: BootJob
    how: str
    stop: str


@dataclass(frozen=True)
class Signals:
    """All observations of one port."""

    port: int
    alias: str | None
    run: Run | None = None
    broken_record: bool = False
    leader_proven: bool = False
    members: tuple[int, ...] = ()
    """The pids of living processes of the recorded group that are proven ours."""
    listening: bool = False
    """A process listens on an address that a server of this port would collide with."""
    listener_pids: frozenset[int] = frozenset()
    unowned: bool = False
    """The process of a listener cannot be seen, and nothing shows that it is another user's."""
    hand: Server | None = None
    """This user's server that listens here. If nothing listens, a server whose argv has this port."""
    portless: tuple[Server, ...] = ()
    """Further servers of this user whose argv has this port and that do not listen. An mlx_lm.server that lost its port
    to another process keeps its model in memory."""
    boot: BootClaim | None = None
    """Set if a boot job owns the server, or is about to start its server on the idle port."""
    operation: Operation | None = None
    activity: str = ""
    """For people: the current step of the operation."""
    progress: Progress | None = None
    """How far the operation is, for steps that count bytes."""
    health: Health = Health.NOT_ASKED
    busy: bool = False
    """A client is connected, so an unanswered probe may only have to wait."""
    other_listener: str = ""
    """For people: the process that listens, if it is not ours."""
    memory_bytes: int | None = None
    error: str | None = None
    """Why the port could not be observed."""
    last_words: str = ""
    """The end of the log of a server that ended."""
    rebooted: bool = False
    """The recorded run is of an earlier boot of the host."""


@dataclass(frozen=True)
class PortView:
    """The judged state of a port. Plans use all of it; `to_wire` is its row of the status."""

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
    """Our server is healthy, and the registry assigns the port to another model."""
    portless: tuple[Server, ...] = ()
    boot: BootClaim | None = None

    @property
    def half_changed(self) -> bool:
        """Whether the port looks wrong while an operation changes it. It was probably observed half before and half
        after a change."""
        return self.operation is not None and self.state in {State.FOREIGN, State.ORPHAN, State.MISMATCH, State.FAILED}

    @property
    def ending(self) -> bool:
        """Whether a stop began and gave up or was interrupted. The server still holds the port and memory."""
        return self.state is State.DRAINING and self.operation is None

    @property
    def unserved(self) -> bool:
        """Whether there is neither a listener nor a process of ours nor an operation."""
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
    """The boot jobs of the observed ports."""
    stranded: Stranded | None = None
    """Memory that stopped servers did not return; None if there is none, or if that is not known."""
    contexts: Mapping[str, int] = field(default_factory=dict)
    """Model -> `context_length` of its entry. mlx-lm has no option for it, so its commands do not say."""


def judge(signals: Signals, registry: Registry) -> PortView:
    """Return the state of a port. It is `unknown` only if a necessary signal is missing."""
    run = signals.run
    assigned = registry.on_port(signals.port)
    ours = _is_ours(signals)
    if signals.error is not None:
        return _view(signals, State.UNKNOWN, None, detail=signals.error)
    operation = signals.operation
    if operation is not None and operation.command == "load" and not (run and run.proven_at and ours):
        return _view_of_load(signals, operation)
    if operation is not None and operation.command in {"unload", "unload-all"} and (ours or signals.hand):
        return _view(
            signals,
            State.DRAINING,
            Owner.MLXOPS if ours else Owner.HAND,
            detail=_describe_operation(signals, operation),
        )
    # A server that was adopted before hosts.yaml named its boot job belongs to the job: the system restarts it.
    if run is not None and ours and not (run.adopted and signals.boot):
        # If the registry cannot be read, the server may be assigned: assume that it is.
        unreadable = bool(registry.unwritable) and not assigned
        return _judge_ours(signals, run, (run.model,) if unreadable else tuple(model.name for model in assigned))
    if signals.boot is not None:
        if signals.listening or signals.hand is not None:
            return _judge_unrecorded(signals, registry, Owner.BOOT)
        return _view(signals, State.LOADING, Owner.BOOT, detail=f"{signals.boot.how}, and does not listen yet")
    if signals.unowned:
        return _view(signals, State.UNKNOWN, None, detail=_UNOWNED)
    if signals.hand is not None:
        return _judge_unrecorded(signals, registry, Owner.HAND)
    if signals.listening:
        return _view(signals, State.FOREIGN, Owner.FOREIGN, detail=signals.other_listener)
    if signals.broken_record:
        return _view(signals, State.IDLE, None, detail="its run record is unreadable; nothing serves the port")
    if run is not None and assigned:
        ended = "it went down with the host" if signals.rebooted else "its server ended"
        why = ended + (f": {signals.last_words}" if signals.last_words and not signals.rebooted else "")
        return _view(signals, State.FAILED, None, model=assigned[0].name, detail=why)
    return _view(signals, State.IDLE, None)


_UNOWNED = "something listens, and its process cannot be seen: it is just ending, or another user's"


def _is_ours(signals: Signals) -> bool:
    return signals.run is not None and (signals.leader_proven or bool(signals.members))


def _view_of_load(signals: Signals, operation: Operation) -> PortView:
    return _view(
        signals, State.LOADING, Owner.MLXOPS, model=operation.model, detail=_describe_operation(signals, operation)
    )


def _describe_operation(signals: Signals, operation: Operation) -> str:
    return "; ".join(filter(None, [signals.activity, str(operation)]))


def _judge_ours(signals: Signals, run: Run, assigned: tuple[str, ...]) -> PortView:
    """Judge a port where processes of ours live and no load runs. `assigned` has the names of its models."""
    owner = Owner.MLXOPS
    if run.stopped_by is not None:
        return _view(signals, State.DRAINING, owner, _describe_ending(signals, run))
    orphan = _orphan_reason(signals, run, assigned)
    if orphan is not None:
        return _view(signals, State.ORPHAN, owner, orphan.value, orphan=orphan)
    if signals.unowned:
        return _view(signals, State.UNKNOWN, None, _UNOWNED)
    if not signals.listener_pids or not signals.listener_pids <= set(signals.members):
        # We can see all our own processes, so a listener without a visible process is another user's.
        return _view(signals, State.MISMATCH, owner, f"another process listens on its port: {signals.other_listener}")
    if run.model not in assigned:
        return replace(_view(signals, State.MISMATCH, owner, f"the registry says {assigned[0]}"), reassigned=True)
    match signals.health:
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


def _describe_ending(signals: Signals, run: Run) -> str:
    if signals.operation is not None:
        return _describe_operation(signals, signals.operation)
    return f"{run.stopped_by} began to stop it at {run.stopping_since}, and gave up or was interrupted"


def _orphan_reason(signals: Signals, run: Run, assigned: tuple[str, ...]) -> Orphan | None:
    if run.proven_at is None:
        return Orphan.INTERRUPTED
    if not signals.leader_proven:
        return Orphan.LEADERLESS
    if not signals.listening:
        return Orphan.PORTLESS
    return None if assigned else Orphan.UNASSIGNED


def _judge_unrecorded(signals: Signals, registry: Registry, owner: Owner) -> PortView:
    """Judge a port with a server that we did not start. Its model is found in the registry by path, repo or name."""
    server = signals.hand
    model = next((m.name for m in registry.models.values() if server and server.model in _names_of(m)), None)
    assigned = registry.on_port(signals.port)
    if server is not None and signals.listening and signals.health is Health.NOT_ASKED:
        return _view(signals, State.UNKNOWN, None, detail="its server could not be asked")
    if signals.health is Health.SILENT and signals.busy:
        state, detail = State.READY, "busy"
    elif signals.health is Health.SILENT:
        state, detail = (State.WEDGED, "no answer to the probe") if signals.listening else (State.LOADING, "")
    elif not signals.listening:
        state, detail = State.LOADING, "it does not listen yet"
    elif signals.health is Health.LOADING:
        state, detail = State.LOADING, "the server says that it is loading"
    elif signals.health is Health.BROKEN:
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
        detail=_describe_server(signals, server, detail),
        run=signals.run,
        server=server,
        operation=signals.operation,
        portless=signals.portless,
        boot=signals.boot,
    )


def _describe_server(signals: Signals, server: Server | None, detail: str) -> str:
    """Return `detail` or else the listener, with the boot job or the parent."""
    if signals.boot:
        return "; ".join(filter(None, [detail, signals.boot.how]))
    parent = f"its parent: {server.starter}" if server and server.starter else ""
    return detail or "; ".join(filter(None, [signals.other_listener, parent]))


def _names_of(model: Model) -> frozenset[str]:
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
        pid=run.pid_among(signals.members)
        if run
        else (signals.hand.pid if signals.hand else min(signals.listener_pids, default=None)),
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
