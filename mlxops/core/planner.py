"""Decide what an operation does, from the registry, the observed ports and the request. Pure.

A plan is a value: `--dry-run` shows it, an operation executes it. A plan that is not allowed raises `Refused`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum

from mlxops.core import refusals
from mlxops.core.budget import without_limits
from mlxops.core.errors import Refused
from mlxops.core.frozen import dataclass
from mlxops.core.names import AUTO, is_model_name, is_repo_id, is_revision
from mlxops.core.names import port as parse_port
from mlxops.core.ports import Orphan, Owner, PortView, State, World
from mlxops.core.records import Run, Server
from mlxops.core.redaction import command_line
from mlxops.core.registry import Model, Registry
from mlxops.core.settings import Settings


@dataclass(frozen=True)
class ModelRef:
    """The model to load. `entry` is None if it is not registered yet."""

    name: str
    repo_id: str
    revision: str | None = None
    entry: Model | None = None
    repoint: bool = False
    """The load changes the entry's repository or revision."""


@dataclass(frozen=True)
class Wanted:
    """How the model would be served. Running servers are compared with this."""

    repo_id: str
    revision: str
    engine: str
    argv: tuple[str, ...]
    path: str = ""
    """The real path of the snapshot."""
    limits: tuple[str, ...] = ()
    """The options that a load adds to `argv` from the memory that is left. They are not compared."""


class Outcome(StrEnum):
    """What a load does on its port."""

    ALREADY = "already"
    """Nothing: the model is served there."""
    ADOPT = "adopt"
    """Take over the running server."""
    START = "start"
    """Start a server."""


@dataclass(frozen=True)
class LoadPlan:
    target: ModelRef
    port: int
    alias: str
    outcome: Outcome
    stops: tuple[PortView, ...] = ()
    """The servers to stop first, in this order."""
    previous: PortView | None = None
    """The server that the port has now. It is started again if the new one fails."""
    adopts: PortView | None = None
    """The running server to adopt."""
    proves: PortView | None = None
    """A server that is not ours, serves already, and must answer under the alias."""
    cleared: tuple[str, ...] = ()
    """Other entries that are assigned to the port. The write that assigns it clears them."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class UnloadPlan:
    port: int
    stop: PortView | None = None
    portless: tuple[Server, ...] = ()
    """Servers started by hand for this port that do not listen. They are stopped too."""
    clear: tuple[str, ...] = ()
    model: str | None = None
    notes: tuple[str, ...] = ()
    cancelled: bool = False
    """A running load of this port was cancelled."""

    @property
    def changed(self) -> bool:
        return self.stop is not None or bool(self.portless) or bool(self.clear) or self.cancelled


@dataclass(frozen=True)
class ReconcilePlan:
    stops: tuple[PortView, ...] = ()
    clear: Mapping[str, int] | None = None
    """Model name -> the port that is cleared."""
    forget: tuple[int, ...] = ()
    """Ports whose run record describes no living process."""
    kept: tuple[str, ...] = ()
    """A sentence for each port that is left alone, with the reason."""
    again: Mapping[str, int] | None = None
    """Model name -> port of those that lost their server to a load that did not start another one there."""


def resolve(
    registry: Registry, name: str, repo_id: str | None, revision: str | None, port: str | None = None
) -> ModelRef:
    """Return the model that `--model NAME [--repo ORG/NAME[@REVISION]]` means. `port` is used in error texts only.

    Raises `Refused`: unknown_model, ambiguous_model, entry_unusable.
    """
    entry = registry.models.get(name)
    if entry is None and is_repo_id(name):
        if repo_id not in (None, name):
            raise refusals.two_repositories(name, repo_id, port)
        named = registry.with_repo(name)
        if len(named) > 1:
            raise refusals.several_entries(name, named, port)
        entry = named[0] if named else None
        repo_id = name
    if entry is None:
        if repo_id is None:
            raise refusals.unknown_model(name, registry, port)
        return ModelRef(name, repo_id, revision)
    if repo_id is None and entry.repo_id is None:
        raise refusals.entry_without_repo(entry, port)
    repo = repo_id or entry.repo_id or ""
    repoint = repo != entry.repo_id or (revision is not None and revision != entry.revision)
    pinned = entry.revision if repo == entry.repo_id else None
    return ModelRef(entry.name, repo, revision or pinned, entry, repoint)


def choose_port(settings: Settings, registry: Registry, world: World, name: str, typed: str | None) -> int:
    """Return the port of a load: the typed one, else the model's own slot, else its current port. If "auto" is typed
    and the model has neither, return the lowest idle port without an alias.

    Raises `UsageError` (bad_port, port_needed) and `Refused` (no_idle_port).
    """
    if typed is not None and typed != AUTO:
        return parse_port(typed, settings.ports)
    entry = registry.models.get(name)
    current = entry.port if entry else None
    for own in (settings.slot_of(name), current):
        if own is not None and own in settings.ports:
            return own
    if typed is None:
        raise refusals.port_needed(name)
    for port, view in sorted(world.ports.items()):
        if port in settings.ports and port not in settings.slots and view.unserved and not registry.on_port(port):
            return port
    raise refusals.no_idle_port(world)


def plan_load(
    settings: Settings,
    registry: Registry,
    world: World,
    target: ModelRef,
    port: int,
    *,
    wanted: Wanted | None,
    force: bool,
    expect: str | None = None,
) -> LoadPlan:
    """Return the plan to load `target` on `port`. `wanted` is None if the files are not in the cache yet.

    `expect`: the model that the port must hold, unless there is nothing to do.
    Raises `Refused`: alias_elsewhere, boot_port, foreign_port, unknown_port, unexpected_model, port_in_use,
    model_elsewhere.
    """
    view = world.ports[port]
    alias = settings.alias(port, target.name)
    refuse_alias_elsewhere(settings, target.name, port)
    plan = _plan_for_port(view, target, port, alias, wanted, force)
    if expect is not None and plan.outcome is not Outcome.ALREADY:
        _refuse_unexpected(expect, registry, view, target)
    stops = [*plan.stops]
    if plan.outcome is not Outcome.ALREADY:
        for old in _elsewhere(world, target, port):
            _refuse_second_server(old, target, plan.outcome, force)
            stops.append(old)
    if plan.outcome is Outcome.ALREADY:
        return plan
    cleared = tuple(model.name for model in registry.on_port(port) if model.name != target.name)
    return replace(
        plan,
        stops=tuple(stops),
        adopts=view if plan.outcome is Outcome.ADOPT else None,
        cleared=cleared,
        notes=(*plan.notes, *(f"port {port} is taken over from {name}" for name in cleared)),
    )


def check_sent_names(port: int, answers_to: str, sent: Sequence[str], also: Collection[str] = ()) -> None:
    """Check that the new server on a port will know all names that the gateway sends.

    It knows `answers_to` and the names of its engine (`also`). Raises `Refused` (gateway_name), with `answers_to` in
    `details`.
    """
    unknown = [name for name in sent if name not in (answers_to, *also)]
    if unknown:
        raise refusals.gateway_name(port, answers_to, sent, unknown)


def refuse_alias_elsewhere(settings: Settings, name: str, port: int) -> None:
    """Raises `Refused` (alias_elsewhere) if `name` is the alias of another slot than `port`."""
    own = settings.slot_of(name)
    if own is not None and own != port:
        raise refusals.alias_elsewhere(name, own, port)


def _refuse_unexpected(expect: str, registry: Registry, view: PortView, target: ModelRef) -> None:
    """Raises `Refused` (unexpected_model) unless the port serves the model, or is assigned to it and serves none."""
    names = [view.model] if view.model else [model.name for model in registry.on_port(view.port)]
    entry = registry.named(expect)
    if not {expect, entry.name if entry else expect}.intersection(names):
        raise refusals.unexpected_model(expect, names, view, target.name)


def _refuse_second_server(old: PortView, target: ModelRef, outcome: Outcome, force: bool) -> None:
    """Refuse to serve a model on two ports. The load may stop the server on the other port (`old`) if `force` is set,
    or if that server is broken."""
    if old.state is State.UNKNOWN:
        raise refusals.unknown_port(old)
    if outcome is Outcome.ADOPT:
        raise refusals.adopted_twice(target.name, old)
    if old.state not in {State.ORPHAN, State.FAILED} and not old.ending and not force:
        raise refusals.served_elsewhere(target.name, old)
    if old.owner is not Owner.MLXOPS:
        raise refusals.not_ours_elsewhere(target.name, old)


def _plan_for_port(
    view: PortView, target: ModelRef, port: int, alias: str, wanted: Wanted | None, force: bool
) -> LoadPlan:
    """Return the plan as far as this port decides it."""
    start = LoadPlan(target, port, alias, Outcome.START)
    if view.state is State.UNKNOWN:
        raise refusals.unknown_port(view)
    if view.owner is Owner.BOOT:
        return _plan_on_boot(view, target, start)
    if view.owner is Owner.FOREIGN or view.state is State.FOREIGN:
        raise refusals.foreign_port(view, after=", then try again")
    if view.owner is None:
        return start
    if view.ending:
        return replace(start, stops=(view,), notes=(f"{port}: {view.model or 'its server'} has not ended yet",))
    if view.owner is Owner.MLXOPS and view.run is not None and view.run.model == target.name:
        return _plan_on_same(view, wanted, start, force)
    if view.owner is Owner.HAND and view.server is not None and _is_as_wanted(view.server, wanted):
        notes = ("it was started by hand and is adopted", *_parent_note(view))
        return replace(start, outcome=Outcome.ADOPT, notes=notes)
    if view.orphan in {Orphan.INTERRUPTED, Orphan.LEADERLESS, Orphan.PORTLESS}:
        return replace(start, stops=(view,), notes=(f"{port}: {view.detail}; it is stopped",))
    if not force:
        raise refusals.port_in_use(view)
    return replace(start, stops=(view,), previous=view, notes=_parent_note(view))


def _plan_on_boot(view: PortView, target: ModelRef, start: LoadPlan) -> LoadPlan:
    if view.model == target.name and view.state is State.READY:
        return replace(start, outcome=Outcome.ALREADY, proves=view, notes=("served by the boot job",))
    raise refusals.boot_port(view, _serves(view))


def _serves(view: PortView) -> str:
    return f"it serves {view.model or 'an unknown model'}" if view.pid else ""


def _plan_on_same(view: PortView, wanted: Wanted | None, start: LoadPlan, force: bool) -> LoadPlan:
    """Plan a load of the model that our own server on the port has already."""
    run = view.run
    assert run is not None
    same_files = _has_repo_of(run, start.target) if wanted is None else _has_files_of(run, wanted)
    as_wanted = same_files and (wanted is None or (run.engine, run.settings) == (wanted.engine, wanted.argv))
    if view.state is State.READY and not force:
        if not same_files:
            raise refusals.serves_other_files(view.port, run)
        notes = () if as_wanted else ("its settings differ from those it was started with; --force restarts it",)
        return replace(start, outcome=Outcome.ALREADY, notes=notes)
    if view.state is State.READY and as_wanted:
        return replace(start, outcome=Outcome.ALREADY)
    if (view.orphan is Orphan.UNASSIGNED or (view.reassigned and not force)) and as_wanted:
        return replace(start, outcome=Outcome.ADOPT, notes=("it serves; its assignment returns",))
    notes = () if view.state is State.READY else (f"{view.port}: {view.detail}; it is restarted",)
    proven = run.proven_at is not None
    return replace(start, stops=(view,), previous=view if proven and force else None, notes=notes)


def _has_files_of(run: Run, wanted: Wanted) -> bool:
    return (run.repo_id, run.revision) == (wanted.repo_id, wanted.revision)


def _has_repo_of(run: Run, target: ModelRef) -> bool:
    """Whether the run has the target's repository and revision. Use it for a target whose files are not in the cache.

    If the target's revision is a branch, the answer is False: a run has a commit.
    """
    return run.repo_id == target.repo_id and run.revision.startswith(target.revision or "")


def _is_as_wanted(server: Server, wanted: Wanted | None) -> bool:
    """Whether a server has the wanted files, and an argv that ends with our arguments. How it was launched may
    differ."""
    if wanted is None or (server.engine, server.path) != (wanted.engine, wanted.path):
        return False
    argv, tail = without_limits(server.argv, wanted.limits), wanted.argv[1:]
    return argv[len(argv) - len(tail) :] == tail


def _elsewhere(world: World, target: ModelRef, port: int) -> list[PortView]:
    """Return the other ports on which the target is served, and its assigned port if that could not be observed."""
    own = target.entry.port if target.entry else None
    return [
        view
        for view in world.ports.values()
        if view.port != port
        and (
            (view.owner is not None and view.model == target.name) or (view.port == own and view.state is State.UNKNOWN)
        )
    ]


def plan_unload(registry: Registry, world: World, port: int, *, force: bool) -> UnloadPlan:
    """Raises `Refused`: boot_port, foreign_port, unknown_port, hand_started."""
    view = world.ports[port]
    clear = tuple(model.name for model in registry.on_port(port))
    name = view.model if view.owner is Owner.MLXOPS or not clear else clear[0]
    if view.state is State.UNKNOWN:
        raise refusals.unknown_port(view)
    if view.owner is None:
        return UnloadPlan(port, clear=clear, model=name)
    if view.owner in {Owner.BOOT, Owner.FOREIGN} and force and view.portless:
        note = f"{port} is still held by another process: {view.detail or f'pid {view.pid}'}"
        return UnloadPlan(port, portless=view.portless, model=name, notes=(note,))
    if view.owner is Owner.BOOT:
        raise refusals.boot_port(view, _serves(view))
    if view.owner is Owner.FOREIGN:
        raise refusals.foreign_port(view)
    if view.owner is Owner.HAND and not force:
        raise refusals.hand_started(view, command_line(view.server.argv if view.server else ()), _parent_note(view))
    notes = [*_parent_note(view)]
    if view.portless and not force:
        pids = ", ".join(str(server.pid) for server in view.portless)
        notes.append(f"pid {pids}, started by hand for port {port}, does not listen and stays; --force stops it too")
    return UnloadPlan(port, view, view.portless if force else (), clear, name, tuple(notes))


def _parent_note(view: PortView) -> tuple[str, ...]:
    """Note that the parent of a server started by hand is not stopped with it."""
    if view.owner is not Owner.HAND or view.server is None or not view.server.starter:
        return ()
    return (f"its parent, {view.server.starter}, is left alone, and may start it again",)


SWAP_UNDONE = "swap_undone"
"""The command of the history's line about a failed swap whose old server came back."""
SWAPS = 10
"""The latest swaps of a port that count: earlier ones may have been of other models."""
LONGEST_SWAP = 86_400.0
"""Seconds. More is not a time that a swap took."""


@dataclass(frozen=True)
class Served:
    """A model that a port serves, or served."""

    model: str
    repo_id: str
    revision: str


def served_before(history: Sequence[Mapping[str, object]], port: int, now: Served | None) -> Served | None:
    """Return the model of the latest load on `port` that differs from `now`, the model that it serves; None if there
    was none.

    `history` is oldest first. Lines that a load cannot have written are skipped. Two rollbacks in a row end where they
    began, as with `cd -`.
    """
    for entry in reversed(history):
        if entry.get("command") != "load" or entry.get("port") != port:
            continue
        model, repo_id, revision = (entry.get(key) for key in ("model", "repo_id", "revision"))
        if not (isinstance(model, str) and isinstance(repo_id, str) and isinstance(revision, str)):
            continue
        served = Served(model, repo_id, revision)
        if served != now and is_model_name(model) and is_repo_id(repo_id) and is_revision(revision):
            return served
    return None


def swap_seconds(history: Iterable[Mapping[str, object]]) -> dict[int, float]:
    """Return port -> the longest time that one of its latest `SWAPS` swaps left it without a server.

    `history` is oldest first. Failed swaps count if the old server came back. Loads into an idle port do not count, nor
    those of a version that did not note the time.
    """
    swaps: dict[int, list[float]] = {}
    for line in history:
        port, seconds = line.get("port"), line.get("downtime_seconds")
        if (
            line.get("command") not in ("load", SWAP_UNDONE)
            or type(port) is not int
            or not isinstance(seconds, int | float)
        ):
            continue
        if 0 <= seconds < LONGEST_SWAP:
            swaps[port] = [*swaps.get(port, []), float(seconds)][-SWAPS:]
    return {port: max(each) for port, each in swaps.items()}


def recent_models(history: Iterable[Mapping[str, object]]) -> dict[int, tuple[str, ...]]:
    """Return port -> the models of its latest `SWAPS` loads. `history` is oldest first.

    Other lines may name a model that the port never had, such as that of a failed swap.
    """
    models: dict[int, tuple[str, ...]] = {}
    for line in history:
        port, model = line.get("port"), line.get("model")
        if line.get("command") == "load" and type(port) is int and isinstance(model, str):
            models[port] = (*models.get(port, ()), model)[-SWAPS:]
    return models


def port_of(registry: Registry, world: World, name: str) -> int | None:
    """Return the port for `unload --model NAME`: the assigned one, else that of a server of the model; None if it has
    neither.

    Raises `Refused` (unknown_model).
    """
    entry = registry.named(name)
    if entry is not None and entry.port is not None:
        return entry.port
    known_as = entry.name if entry is not None else name
    for view in world.ports.values():
        if view.owner in {Owner.MLXOPS, Owner.HAND} and view.model == known_as:
            return view.port
    if entry is None:
        unknown = refusals.unknown_model(name, registry)
        unknown.set_hint("what serves where: `mlxctl status`; what is registered: `mlxctl list`")
        raise unknown
    return None


def plan_unload_all(registry: Registry, world: World) -> tuple[UnloadPlan, ...]:
    """Plan to stop every server of the owners mlxops and hand, and to clear every assignment of a port that can be
    freed. Servers of the owners boot and foreign are left alone."""
    plans = []
    for port, view in sorted(world.ports.items()):
        try:
            plan = plan_unload(registry, world, port, force=True)
        except Refused as error:
            if registry.on_port(port) or view.owner is Owner.BOOT:
                plans.append(UnloadPlan(port, notes=(f"{port} is left alone: {error.message}",)))
            continue
        if plan.changed:
            plans.append(plan)
    return tuple(plans)


def plan_reconcile(registry: Registry, world: World) -> ReconcilePlan:
    """Plan to clear the assignments of ports where no signal shows a server, and to stop our own leftover processes."""
    clear: dict[str, int] = {}
    again: dict[str, int] = {}
    stops, forget, kept = list[PortView](), list[int](), list[str]()
    for port, view in sorted(world.ports.items()):
        claims = registry.on_port(port)
        names = [model.name for model in claims]
        if names and (loser := _stopped_by_load(view)):
            again |= dict.fromkeys(names, port)
            if loser.model not in names:  # a failed load left it: it never had the port
                kept.append(f"{port}: {', '.join(names)} stays assigned, and nothing serves it")
                claims = ()
        if view.unserved:
            clear |= {model.name: port for model in claims}
            if view.run is not None:
                forget.append(port)
        elif view.orphan is Orphan.UNASSIGNED:
            kept.append(f"{port}: serves {view.model} without an assignment; load or unload it")
        elif view.ending or (view.orphan is not None and view.operation is None):
            stops.append(view)
            clear |= {model.name: port for model in claims}
        elif claims and view.state is not State.READY:
            kept.append(f"{port}: {view.state}; {view.detail}".rstrip("; "))
    return ReconcilePlan(tuple(stops), clear, tuple(forget), tuple(kept), again)


def _stopped_by_load(view: PortView) -> Run | None:
    """Return the run of a server that no unload but another command stopped, and that has ended or is about to."""
    run = view.run if view.ending or view.unserved else None
    return run if run and run.stopped_by not in {None, "unload", "unload-all"} else None


def init_entries(registry: Registry, snapshots: Iterable[tuple[str, str, str]]) -> dict[str, dict[str, object]]:
    """Return new entries for the snapshots (repo id, revision, cache path) whose repository has no entry."""
    known = {model.repo_id for model in registry.models.values()} | set(registry.models)
    return {repo_id: entry_fields(repo_id, cache_path) for repo_id, _, cache_path in snapshots if repo_id not in known}


def entry_fields(repo_id: str, cache_path: str) -> dict[str, object]:
    """Return the five fields of version 1 for a model without a port."""
    return {"repo_id": repo_id, "model_id": repo_id, "cache_path": cache_path, "format": "mlx", "port": None}
