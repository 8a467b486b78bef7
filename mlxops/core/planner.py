"""(registry, what was observed, what is asked) -> what to do. Pure: it looks at nothing and changes nothing.

A plan is a value that can be shown (`--dry-run`) before it is carried out. What must not be done is a `Refused`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from mlxops.core.errors import MlxopsError, Refused, UsageError
from mlxops.core.names import AUTO, is_model_name, is_repo_id, is_revision, shown
from mlxops.core.names import port as parse_port
from mlxops.core.ports import Orphan, Owner, PortView, State, World
from mlxops.core.records import Run, Server
from mlxops.core.registry import Model, Registry
from mlxops.core.settings import Settings


@dataclass(frozen=True)
class ModelRef:
    """The model that a load is about. `entry` is None if it has yet to be registered."""

    name: str
    repo_id: str
    revision: str | None = None
    entry: Model | None = None
    repoint: bool = False
    """The entry is to serve another repository or revision than it says."""


@dataclass(frozen=True)
class Wanted:
    """How the target would be served: what a running server is compared with."""

    repo_id: str
    revision: str
    engine: str
    argv: tuple[str, ...]
    path: str = ""
    """The real path of its snapshot."""


class Outcome(StrEnum):
    ALREADY = "already"
    ADOPT = "adopt"
    START = "start"


@dataclass(frozen=True)
class LoadPlan:
    target: ModelRef
    port: int
    alias: str
    outcome: Outcome
    stops: tuple[PortView, ...] = ()
    """What is stopped first, in this order."""
    previous: PortView | None = None
    """What serves the port now and is started again if the new one fails."""
    adopts: PortView | None = None
    """What becomes ours as it is."""
    proves: PortView | None = None
    """What serves already without being ours, and has to answer under the alias."""
    cleared: tuple[str, ...] = ()
    """Other entries that lose their claim on the port in the write that assigns it."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class UnloadPlan:
    port: int
    stop: PortView | None = None
    portless: tuple[Server, ...] = ()
    """Servers started by hand for this port that listen nowhere. They are stopped, too."""
    clear: tuple[str, ...] = ()
    model: str | None = None
    notes: tuple[str, ...] = ()
    cancelled: bool = False
    """A load that was on its way there was ended."""

    @property
    def changed(self) -> bool:
        return self.stop is not None or bool(self.portless) or bool(self.clear) or self.cancelled


@dataclass(frozen=True)
class ReconcilePlan:
    stops: tuple[PortView, ...] = ()
    clear: Mapping[str, int] | None = None
    """Model name -> the port that it loses."""
    forget: tuple[int, ...] = ()
    """Ports whose run record describes nothing that lives."""
    kept: tuple[str, ...] = ()
    """What was left alone, and why."""


def unknown_model(name: str, registry: Registry, port: str | None = None) -> Refused:
    """`port`: as it was typed, if any."""
    import difflib

    # Also by the part behind the organisation, which people leave out.
    known = {alike: model for model in registry.models for alike in (model, model.rpartition("/")[2])}
    close = [*dict.fromkeys(known[alike] for alike in difflib.get_close_matches(name, known, n=3))]
    return Refused(
        "unknown_model",
        f"there is no model {name!r} in the registry",
        why="did you mean " + " or ".join(close) + "?" if close else "it was neither registered nor found by init",
        hint=f"see: mlxctl list; or register it: mlxctl load {name} {_to(port)} --repo org/name",
    )


def _to(port: str | None) -> str:
    return port if port and port.isdecimal() else f"--port {AUTO}"


def resolve(
    registry: Registry, name: str, repo_id: str | None, revision: str | None, port: str | None = None
) -> ModelRef:
    """Which entry and which repository `--model NAME [--repo ORG/NAME[@REVISION]]` means. `port` is for the errors.

    Raises `Refused`: unknown_model, ambiguous_model, entry_unusable.
    """
    entry = registry.models.get(name)
    if entry is None and is_repo_id(name):
        if repo_id not in (None, name):
            raise Refused(
                "ambiguous_model",
                f"--model {name} and --repo {repo_id} are two repositories",
                why="a model that is named by its repository cannot serve another one",
                hint=f"give it a name: mlxctl load {name.rpartition('/')[2]} {_to(port)} --repo {repo_id}",
            )
        named = registry.with_repo(name)
        if len(named) > 1:
            raise Refused(
                "ambiguous_model",
                f"several models are of {name}: {', '.join(model.name for model in named)}",
                why="a repository is only then a model's name when one entry has it",
                hint=f"name the one that you mean: mlxctl load {named[0].name} {_to(port)}",
            )
        entry = named[0] if named else None
        repo_id = name
    if entry is None:
        if repo_id is None:
            raise unknown_model(name, registry, port)
        return ModelRef(name, repo_id, revision)
    if repo_id is None and entry.repo_id is None:
        raise Refused(
            "entry_unusable",
            f"the registry entry {entry.name!r} does not say what it is",
            why="; ".join(entry.problems),
            hint=f"repoint it: mlxctl load {entry.name} {_to(port)} --repo org/name",
        )
    chosen = repo_id or entry.repo_id or ""
    repoint = chosen != entry.repo_id or (revision is not None and revision != entry.revision)
    kept = entry.revision if chosen == entry.repo_id else None
    return ModelRef(entry.name, chosen, revision or kept, entry, repoint)


def choose_port(settings: Settings, registry: Registry, world: World, name: str, asked: str | None) -> int:
    """The port of a load: as asked, or the model's own slot, or where it is now, or (auto) an idle one.

    Raises `UsageError` for a malformed port and where none can be told, `Refused` (no_idle_port).
    """
    if asked is not None and asked != AUTO:
        return parse_port(asked, settings.ports)
    entry = registry.models.get(name)
    current = entry.port if entry else None
    for own in (settings.slot_of(name), current):
        if own is not None and own in settings.ports:
            return own
    if asked is None:
        raise UsageError(
            "port_needed",
            f"no port is given, and {name!r} has none of its own",
            why="it is neither the alias of a slot nor assigned to a port",
            hint=f"let one be chosen: mlxctl load {name} --port auto; the ports: mlxctl status",
        )
    for port, view in sorted(world.ports.items()):
        if port in settings.ports and port not in settings.slots and view.unserved and not registry.on_port(port):
            return port
    idle = [f"{port} ({view.alias})" for port, view in sorted(world.ports.items()) if view.unserved and view.alias]
    raise Refused(
        "no_idle_port",
        "no port without an alias is idle",
        why=f"idle slots with an alias: {', '.join(idle) or 'none'}",
        hint="name one of them with --port, or unload a model first",
    )


def plan_load(
    settings: Settings,
    registry: Registry,
    world: World,
    target: ModelRef,
    port: int,
    *,
    wanted: Wanted | None,
    force: bool,
) -> LoadPlan:
    """What loading `target` on `port` takes. `wanted` is None while its files are not here.

    Raises `Refused`: alias_elsewhere, boot_port, foreign_port, unknown_port, port_in_use, model_elsewhere.
    """
    view = world.ports[port]
    alias = settings.alias(port, target.name)
    refuse_alias_elsewhere(settings, target.name, port)
    plan = _plan_for_port(view, target, port, alias, wanted, force)
    stops = [*plan.stops]
    if plan.outcome is not Outcome.ALREADY:
        for old in _elsewhere(world, target, port):
            _refuse_elsewhere(old, target, plan.outcome, force)
            stops.append(old)
    cleared = tuple(model.name for model in registry.on_port(port) if model.name != target.name)
    stale = [f"port {port} is taken over from {name}" for name in cleared]
    return LoadPlan(
        target,
        port,
        alias,
        plan.outcome,
        tuple(stops),
        plan.previous,
        view if plan.outcome is Outcome.ADOPT else None,
        plan.proves,
        cleared if plan.outcome is not Outcome.ALREADY else (),
        (*plan.notes, *(stale if plan.outcome is not Outcome.ALREADY else ())),
    )


def check_sent_names(port: int, answers_to: str, sent: Sequence[str], also: Sequence[str] = ()) -> None:
    """Check that the new server on a port will know all names that the gateway sends: `answers_to`, and those of its
    engine (`also`).

    Raises `Refused` (gateway_name), with `answers_to` in `details`.
    """
    wrong = [name for name in sent if name not in (answers_to, *also)]
    if not wrong:
        return
    raise Refused(
        "gateway_name",
        f"the gateway sends the name {', '.join(map(shown, wrong))} to port {port}, and the server would not know it",
        why=f"port {port} answers to {answers_to}, whatever model and engine is behind it",
        hint=f"in the gateway's entry for port {port}: model: openai/{answers_to}",
        details={"port": port, "answers_to": answers_to, "sent": list(sent)},
    )


def refuse_alias_elsewhere(settings: Settings, name: str, port: int) -> None:
    """Raises `Refused` (alias_elsewhere) if `name` is the alias of another slot than `port`."""
    own = settings.slot_of(name)
    if own is not None and own != port:
        raise Refused(
            "alias_elsewhere",
            f"{name} is the alias of port {own}",
            why="an alias never changes its port: the gateway's entry for it is fixed",
            hint=f"load it there: --port {own}; or another model on {port}",
        )


def _refuse_elsewhere(old: PortView, target: ModelRef, outcome: Outcome, force: bool) -> None:
    """One model, one port: what is on another one is moved if that is wished, or cleaned up; never served twice."""
    if old.state is State.UNKNOWN:
        raise unknown_port(old)
    if outcome is Outcome.ADOPT:
        raise Refused(
            "model_elsewhere",
            f"{target.name} is served on port {old.port} too",
            why="one model, one port; a running server is adopted only where it is the only one",
            hint=f"first: mlxctl unload {old.port}{_force_for(old)}",
        )
    if old.state not in {State.ORPHAN, State.FAILED} and not force:
        raise Refused(
            "model_elsewhere",
            f"{target.name} is served on port {old.port}",
            why="one model, one port",
            hint=f"move it: add --force; or first: mlxctl unload {old.port}{_force_for(old)}",
        )
    if old.owner is not Owner.MLXOPS:
        raise Refused(
            "model_elsewhere",
            f"{target.name} is served on port {old.port} by a process that mlxops did not start",
            why="only servers of ours are moved",
            hint=f"first: mlxctl unload {old.port} --force",
        )


def unknown_port(view: PortView) -> Refused:
    return Refused(
        "unknown_port",
        f"what is on port {view.port} could not be determined",
        why=view.detail,
        hint="nothing is changed while it is unknown; try again, then look on the host itself",
    )


def _plan_for_port(
    view: PortView, target: ModelRef, port: int, alias: str, wanted: Wanted | None, force: bool
) -> LoadPlan:
    start = LoadPlan(target, port, alias, Outcome.START)
    if view.state is State.UNKNOWN:
        raise unknown_port(view)
    if view.owner is Owner.BOOT:
        return _plan_on_boot(view, target, start)
    if view.owner is Owner.FOREIGN or view.state is State.FOREIGN:
        raise Refused(
            "foreign_port",
            f"port {port} is held by a process that is not ours",
            why=view.detail,
            hint=f"mlxops never signals it; stop it yourself on the host{_kill(view)}, then try again",
        )
    if view.owner is None:
        return start
    if view.owner is Owner.MLXOPS and view.run is not None and view.run.model == target.name:
        return _plan_on_same(view, wanted, start, force)
    if view.owner is Owner.HAND and view.server is not None and _is_as_wanted(view.server, wanted):
        notes = ("it was started by hand and is adopted", *_what_stays(view))
        return LoadPlan(target, port, alias, Outcome.ADOPT, notes=notes)
    if view.orphan in {Orphan.INTERRUPTED, Orphan.LEADERLESS, Orphan.PORTLESS}:
        return LoadPlan(
            target, port, alias, Outcome.START, stops=(view,), notes=(f"{port}: {view.detail}; it is stopped",)
        )
    if not force:
        raise Refused(
            "port_in_use",
            f"port {port} serves {view.model or 'another model'}",
            why=f"it is {view.state}, owner {view.owner}, pid {view.pid}",
            hint=f"swap it: add --force; or first: mlxctl unload {port}{_force_for(view)}",
        )
    return LoadPlan(target, port, alias, Outcome.START, stops=(view,), previous=view, notes=_what_stays(view))


def _force_for(view: PortView) -> str:
    """What `unload` wants for a server that somebody has started by hand."""
    return " --force" if view.owner is Owner.HAND else ""


def _plan_on_boot(view: PortView, target: ModelRef, start: LoadPlan) -> LoadPlan:
    if view.model == target.name and view.state is State.READY:
        return replace(start, outcome=Outcome.ALREADY, proves=view, notes=("served by the boot job",))
    raise boot_port(view, _served_by(view))


def _served_by(view: PortView) -> str:
    return f"it serves {view.model or 'something unknown'}" if view.pid else ""


def boot_port(view: PortView, what: str) -> Refused:
    """`what` is there instead of what is wanted."""
    claim = view.boot
    name = f" {claim.job.name}" if claim else ""
    other = f", which hosts.yaml gives port {claim.job.port}" if claim and claim.job.port != view.port else ""
    why = [claim.how if claim else "", what, "the system starts it again when it is stopped"]
    return Refused(
        "boot_port",
        f"port {view.port} belongs to the boot job{name}{other}",
        why="; ".join(filter(None, why)),
        hint=f"as the operator of the host: {claim.stop if claim else 'stop the job'}; then try again",
    )


def _plan_on_same(view: PortView, wanted: Wanted | None, start: LoadPlan, force: bool) -> LoadPlan:
    """The port's server is of ours and serves this very model."""
    run = view.run
    assert run is not None
    same = _is_of_target(run, start.target) if wanted is None else _is_of(run, wanted)
    as_wanted = same and (wanted is None or (run.engine, run.argv) == (wanted.engine, wanted.argv))
    if view.state is State.READY and not force:
        if not same:
            raise Refused(
                "port_in_use",
                f"port {view.port} serves {run.model} from {run.repo_id} at {run.revision[:12]}",
                why="another repository or revision is asked for",
                hint="swap it: add --force",
            )
        notes = () if as_wanted else ("its settings differ from those it was started with; --force restarts it",)
        return LoadPlan(start.target, start.port, start.alias, Outcome.ALREADY, notes=notes)
    if view.state is State.READY and as_wanted:
        return LoadPlan(start.target, start.port, start.alias, Outcome.ALREADY)
    if (view.orphan is Orphan.UNASSIGNED or (view.reassigned and not force)) and as_wanted:
        return LoadPlan(
            start.target, start.port, start.alias, Outcome.ADOPT, notes=("it serves; its assignment returns",)
        )
    proven = run.proven_at is not None
    note = () if view.state is State.READY else (f"{view.port}: {view.detail}; it is started anew",)
    return LoadPlan(
        start.target, start.port, start.alias, Outcome.START, (view,), view if proven and force else None, notes=note
    )


def _is_of(run: Run, wanted: Wanted) -> bool:
    return (run.repo_id, run.revision) == (wanted.repo_id, wanted.revision)


def _is_of_target(run: Run, target: ModelRef) -> bool:
    """The same, where the target's files are not here: its revision may be a branch, which then proves nothing."""
    return run.repo_id == target.repo_id and run.revision.startswith(target.revision or "")


def _is_as_wanted(server: Server, wanted: Wanted | None) -> bool:
    """The same files, and an argv that ends with what we would give it: how it was launched may differ."""
    if wanted is None or (server.engine, server.path) != (wanted.engine, wanted.path):
        return False
    argv, tail = server.argv, wanted.argv[1:]
    return argv[len(argv) - len(tail) :] == tail


def _elsewhere(world: World, target: ModelRef, port: int) -> list[PortView]:
    """The other ports on which the target is served, and its own one if that could not be looked at."""
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
        raise unknown_port(view)
    if view.owner is None:
        return UnloadPlan(port, clear=clear, model=name)
    if view.owner in {Owner.BOOT, Owner.FOREIGN} and force and view.portless:
        note = f"{port} is still held by another process: {view.detail or f'pid {view.pid}'}"
        return UnloadPlan(port, portless=view.portless, model=name, notes=(note,))
    if view.owner is Owner.BOOT:
        raise boot_port(view, _served_by(view))
    if view.owner is Owner.FOREIGN:
        raise Refused(
            "foreign_port",
            f"port {port} is held by a process that is not ours",
            why=view.detail or f"its pid is {view.pid}",
            hint=f"mlxops never signals it; stop it yourself as the operator of the host{_kill(view)}",
        )
    if view.owner is Owner.HAND and not force:
        words = f"pid {view.pid}: {shlex.join(view.server.argv if view.server else ())[:200]}"
        raise Refused(
            "hand_started",
            f"the server on port {port} was started by hand",
            why="; ".join([words, *_what_stays(view)]),
            hint=f"to stop it anyway: mlxctl unload {port} --force",
        )
    notes = [*_what_stays(view)]
    if view.portless and not force:
        pids = ", ".join(str(each.pid) for each in view.portless)
        notes.append(f"pid {pids}, started by hand for port {port}, listens nowhere and stays; --force stops it, too")
    return UnloadPlan(port, view, view.portless if force else (), clear, name, tuple(notes))


def _kill(view: PortView) -> str:
    """Return the command that ends a foreign process, if its pid is known. A boot job would only start it again."""
    return f": kill {view.pid}" if view.pid is not None and view.owner is Owner.FOREIGN else ""


def _what_stays(view: PortView) -> tuple[str, ...]:
    """Note that the parent of a server started by hand is not stopped with it."""
    if view.owner is not Owner.HAND or view.server is None or not view.server.starter:
        return ()
    return (f"its parent, {view.server.starter}, is left alone, and may start it again",)


@dataclass(frozen=True)
class Served:
    """What a port served, or serves."""

    model: str
    repo_id: str
    revision: str


def served_before(history: Sequence[Mapping[str, object]], port: int, now: Served | None) -> Served | None:
    """The latest load on `port` of something other than what it serves `now`; None: there was none.

    `history` is oldest first; lines that no load can have written are skipped. Twice in a row leads back to where it
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


def port_of(registry: Registry, world: World, name: str) -> int | None:
    """Where `unload --model NAME` has something to do: the assignment, else a server of it; None: nowhere.

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
        raise unknown_model(name, registry)
    return None


def plan_unload_all(registry: Registry, world: World) -> tuple[UnloadPlan, ...]:
    """Every server of owner mlxops and hand, and every assignment; boot and foreign ones are left alone."""
    plans = []
    for port, view in sorted(world.ports.items()):
        try:
            plan = plan_unload(registry, world, port, force=True)
        except Refused as refusal:
            if registry.on_port(port) or view.owner is Owner.BOOT:
                plans.append(UnloadPlan(port, notes=(f"{port} is left alone: {refusal.message}",)))
            continue
        if plan.changed:
            plans.append(plan)
    return tuple(plans)


def plan_reconcile(registry: Registry, world: World) -> ReconcilePlan:
    """Clear what is absent by every signal; stop what is proven ours and belongs to nothing."""
    clear: dict[str, int] = {}
    stops, forget, kept = [], [], []
    for port, view in sorted(world.ports.items()):
        claims = registry.on_port(port)
        if view.unserved:
            clear |= {model.name: port for model in claims}
            if view.run is not None:
                forget.append(port)
        elif view.orphan is Orphan.UNASSIGNED:
            kept.append(f"{port}: serves {view.model} without an assignment; load or unload it")
        elif view.orphan is not None and view.operation is None:
            stops.append(view)
            clear |= {model.name: port for model in claims}
        elif claims and view.state is not State.READY:
            kept.append(f"{port}: {view.state}; {view.detail}".rstrip("; "))
    return ReconcilePlan(tuple(stops), clear, tuple(forget), tuple(kept))


def init_entries(registry: Registry, found: Iterable[tuple[str, str, str]]) -> dict[str, dict[str, object]]:
    """New entries for (repo id, revision, cache path) rows whose repository has none. Existing ones never change."""
    have = {model.repo_id for model in registry.models.values()} | set(registry.models)
    return {repo_id: entry_fields(repo_id, cache_path) for repo_id, _, cache_path in found if repo_id not in have}


def entry_fields(repo_id: str, cache_path: str) -> dict[str, object]:
    """The five fields of version 1 for a model that is not assigned."""
    return {"repo_id": repo_id, "model_id": repo_id, "cache_path": cache_path, "format": "mlx", "port": None}


def merge_refusals(errors: Sequence[MlxopsError]) -> MlxopsError:
    """Merge errors into the first one with the largest exit status, and name the others in it."""
    first, *others = sorted(errors, key=lambda error: -error.exit)
    if others:
        first.why = "; ".join(filter(None, [first.why, *(error.message for error in others)]))
    return first
