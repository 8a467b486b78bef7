"""`load`: start a model's server on a port, and prove that it answers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from mlxops.agent.context import Context, busy, model_lock, repo_lock
from mlxops.agent.operations.adopt import adopt, prove_boot_job
from mlxops.agent.operations.model_files import ModelFiles, cached
from mlxops.agent.operations.preflight import (
    Prepared,
    check_before_download,
    check_name,
    entry_fields,
    preflight,
    prepare,
)
from mlxops.agent.operations.server_names import name_fields, names_of
from mlxops.agent.operations.stop import look_for_memory, shown_stop
from mlxops.agent.operations.swap import start_in_place
from mlxops.agent.paths import require_folder
from mlxops.core import names, planner
from mlxops.core.commands.load import Load, LoadResult, PlanRow
from mlxops.core.errors import Busy, NotStarted, UsageError
from mlxops.core.frozen import dataclass
from mlxops.core.planner import LoadPlan, ModelRef, Outcome
from mlxops.core.ports import PortView, State, World
from mlxops.core.protocol import Phase
from mlxops.core.records import Operation
from mlxops.core.redaction import redact_argv
from mlxops.core.registry import Registry

READY_SECONDS = 5.0
"""Time for a server that has answered a completion to become ready."""


@dataclass(frozen=True)
class Held:
    """A load that holds the locks of its port and its model. A dry run holds none."""

    ctx: Context
    """Its request names the model as the registry does."""
    request: Load
    """The load as requested. It may name the model by its repository."""
    port: int
    target: ModelRef
    registry: Registry
    """As it was read after the locks were taken."""
    began: float
    """Monotonic time at which the load began."""


def run(ctx: Context, request: Load) -> LoadResult:
    with hold(ctx, request) as held:
        return load(held)


def load(held: Held) -> LoadResult:
    """Load the model whose port and name are held."""
    ctx, request, port = held.ctx, held.request, held.port
    if request.dry_run and (running := _find_running(held)):
        return _dry_attach(held, running)
    _refuse_during_removal(held)
    files = cached(ctx, held.target)
    prepared = prepare(ctx, held.target, port, files) if files else None
    plan = _make_plan(held, prepared)
    if plan.outcome is not Outcome.ALREADY:
        check_name(ctx, request, held.target, port)
        if prepared is None and request.dry_run:
            return _dry_load(held, plan, None)
        if prepared is None:
            held, files = _download(held)
            prepared = prepare(ctx, held.target, port, files)
            plan = _make_plan(held, prepared)
    with _hold_stops(held, plan, prepared) as (held, plan):
        return _carry_out(held, plan, prepared)


def _carry_out(held: Held, plan: LoadPlan, prepared: Prepared | None) -> LoadResult:
    """Carry out a plan, or show it in a dry run. What it stops is held."""
    ctx, request = held.ctx, held.request
    with ExitStack() as reserved:
        for note in plan.notes:
            ctx.note(note)
        if plan.outcome is Outcome.START and prepared is not None:
            if request.require:
                from mlxops.agent.operations.required import refuse_impossible

                refuse_impossible(request, prepared.engine, prepared.command.version)
            if not request.dry_run:
                look_for_memory(ctx, plan.port)
            prepared, warnings = preflight(ctx, request, reserved, held.registry, plan, prepared)
            plan = replace(plan, notes=(*plan.notes, *warnings))
        if request.dry_run:
            return _dry_load(held, plan, prepared)
        if plan.proves is not None:
            prove_boot_job(ctx, request, plan, plan.proves)
        if request.require and plan.outcome is not Outcome.START:
            from mlxops.agent.operations.required import check_serving

            check_serving(ctx, request, ctx.observe_port(plan.port))
        if plan.outcome is Outcome.ALREADY or prepared is None:
            return _load_result(held, plan, changed=False)
        if plan.outcome is Outcome.ADOPT:
            adopt(ctx, request, plan, prepared)
            return _load_result(held, plan, changed=False)
        downtime = start_in_place(ctx, request, held.registry, plan, prepared)
        with ctx.cancellation.shield():  # it serves: there is nothing left to cancel
            return _load_result(held, plan, changed=True, downtime=downtime)


@contextmanager
def hold(ctx: Context, request: Load) -> Iterator[Held]:
    """Hold the port and the model of a load.

    With `auto`, if another operation takes the chosen port first, try the next idle one. Raises `Busy`, and what
    `planner.choose_port` and `planner.resolve` raise.
    """
    began = time.monotonic()
    _check_alias(ctx, request)
    registry = ctx.usable_registry()
    require_folder(ctx.paths.hub)
    taken_ports: set[int] = set()
    with ExitStack() as held:
        while True:
            try:
                port, target = _choose(ctx, request, registry, taken_ports)
            except UsageError:
                port, target = _choose_after_other_load(ctx, request, registry)
            named = ctx.with_request(replace(request, model=target.name))
            try:
                with ExitStack() as locks:
                    locks.enter_context(named.hold_port(port, model_lock(target.name)))
                    # The registry and the ports may have changed before the locks were taken. So choose again.
                    registry = ctx.registry()
                    port_now, target_now = _choose(ctx, request, registry, taken_ports)
                    if (port_now, target_now.name) == (port, target.name):
                        held.push(locks.pop_all())
                        break
            except Busy as error:
                taken = error.details.get("lock") == f"port-{port}" and "attach" not in error.details
                if request.port != names.AUTO or not taken or port in taken_ports:
                    raise
                taken_ports.add(port)
        yield Held(named, request, port, target_now, registry, began)


def _check_alias(ctx: Context, request: Load) -> None:
    """Raises `Refused` (alias_elsewhere) if the name is the alias of another port than the requested one."""
    name, settings = names.model_name(request.model or ""), ctx.paths.settings
    if request.port not in (None, names.AUTO):
        planner.refuse_alias_elsewhere(settings, name, names.port(request.port, settings.ports))


def _resolve(request: Load, registry: Registry) -> ModelRef:
    repo_id, revision = names.repo(request.repo) if request.repo else (None, None)
    return planner.resolve(registry, names.model_name(request.model or ""), repo_id, revision, request.port)


def _choose(ctx: Context, request: Load, registry: Registry, taken_ports: set[int]) -> tuple[int, ModelRef]:
    """Return the port and the model that the request means now. `taken_ports`: ports to leave out for `auto`."""
    target = _resolve(request, registry)
    world = ctx.observe(registry) if request.port == names.AUTO else World()
    idle = World(ports={port: view for port, view in world.ports.items() if port not in taken_ports})
    return planner.choose_port(ctx.paths.settings, registry, idle, target.name, request.port), target


def _choose_after_other_load(ctx: Context, request: Load, registry: Registry) -> tuple[int, ModelRef]:
    """Choose for a request without a port, of a model that has no port.

    If another load of the model runs, raise `Busy` with that load, for the client to follow. If one has just ended, the
    model has a port now.
    """
    name = _resolve(request, registry).name
    with ctx.with_request(replace(request, model=name)).hold_lock(model_lock(name)):
        return _choose(ctx, request, ctx.registry(), set())


def _find_running(held: Held) -> Operation | None:
    """Return the same load if it is running. For a dry run, which holds no locks. Raises `Busy` for another holder."""
    ctx = held.ctx
    for lock in (f"port-{held.port}", model_lock(held.target.name)):
        holder = ctx.store.holder(lock)
        if holder is not None and not ctx.is_same_request(holder, held.port):
            raise busy(lock, holder)
        if holder is not None:
            return holder
    return None


def _refuse_during_removal(held: Held) -> None:
    """Raises `Busy` if the repository's files are being removed.

    A load checks this after it has locked its port. A removal checks the ports after it has locked the repository. So
    at least one of them sees the other.
    """
    lock = repo_lock(held.target.repo_id)
    holder = None if held.request.dry_run else held.ctx.store.holder(lock)
    if holder is not None and holder.command == "remove":
        raise busy(lock, holder)


def _make_plan(held: Held, prepared: Prepared | None) -> LoadPlan:
    return planner.plan_load(
        held.ctx.paths.settings,
        held.registry,
        held.ctx.observe(held.registry),
        held.target,
        held.port,
        wanted=prepared.wanted if prepared else None,
        force=held.request.force,
        expect=held.request.expect,
    )


def _download(held: Held) -> tuple[Held, ModelFiles]:
    """Download the files, and register the model without a port if it is new.

    An entry that the load repoints does not change before the new server is proven.
    """
    from mlxops.agent.operations.pull import fetch

    ctx, target = held.ctx, held.target
    ctx.emit(Phase("download", f"{target.repo_id} is not in the cache"))
    snapshot = fetch(ctx, target.repo_id, target.revision, check_before_download(ctx, target))
    files = ModelFiles(snapshot.revision, snapshot.path, snapshot.size_bytes)
    # A person may have edited the registry during the download, which may take hours.
    registry = ctx.registry()
    target = _resolve_unchanged(held, registry)
    if target.entry is None:
        registry = ctx.store.registry.update(lambda current: _register(current, target, files))
        target = replace(target, entry=registry.models[target.name])
    return replace(held, registry=registry, target=target), files


def _resolve_unchanged(held: Held, registry: Registry) -> ModelRef:
    """Resolve the name again. Raises `Busy` (changed_meanwhile) if it means another model or repository now."""
    before, now = held.target, _resolve(held.request, registry)
    if (now.name, now.repo_id, now.revision) == (before.name, before.repo_id, before.revision):
        return now
    raise Busy(
        "changed_meanwhile",
        f"{held.request.model} now means {_shown(now)}; when the load began it meant {_shown(before)}",
        why="the registry was changed a moment ago",
        hint="look first: `mlxctl list`; then try again",
    )


def _shown(target: ModelRef) -> str:
    return f"{target.name} ({target.repo_id}{f'@{target.revision}' if target.revision else ''})"


def _register(registry: Registry, target: ModelRef, files: ModelFiles) -> Registry:
    """Add a downloaded model to the registry, without a port. An existing entry stays as it is."""
    if target.name in registry.models:
        return registry
    return registry.set_fields(target.name, entry_fields(target, files) | {"port": None})


@contextmanager
def _hold_stops(held: Held, plan: LoadPlan, prepared: Prepared | None) -> Iterator[tuple[Held, LoadPlan]]:
    """Hold what the plan stops. The state may change before these locks are taken, so plan again under them."""
    with ExitStack() as stack:
        locks: list[str] = []
        while more := [lock for lock in _locks_of_stops(held, plan) if lock not in locks]:
            for lock in more:
                stack.enter_context(held.ctx.hold_lock(lock, held.port))
            locks += more
            held = replace(held, registry=held.ctx.registry())
            plan = _make_plan(held, prepared)
        yield held, plan


def _locks_of_stops(held: Held, plan: LoadPlan) -> list[str]:
    """Return the locks of the ports and models that a plan stops, apart from this load's own.

    No other operation may change these ports. And no other may start these models, because they may have to be
    restarted here.
    """
    if held.request.dry_run:
        return []
    registered = held.registry.models
    ports = [f"port-{view.port}" for view in plan.stops if view.port != plan.port]
    models = {view.model for view in plan.stops if view.model in registered and view.model != plan.target.name}
    return [*ports, *(model_lock(model) for model in models if model)]


def _wait_until_ready(ctx: Context, plan: LoadPlan) -> PortView:
    """Wait until the port is ready, and return its view. On a busy host, the cheap probe may need several attempts.

    Raises `NotStarted` (not_ready) after `READY_SECONDS`, or if no server is left.
    """
    deadline = time.monotonic() + READY_SECONDS
    while (view := ctx.observe_port(plan.port)).state is not State.READY:
        if time.monotonic() > deadline or view.owner is None:
            raise NotStarted(
                "not_ready",
                f"{plan.target.name} answered on port {plan.port}, but is {view.state} a moment later",
                why=view.detail or f"owner {view.owner}, pid {view.pid}",
                hint=f"see `mlxctl logs --port {plan.port}`; "
                f"then: `mlxctl load {plan.target.name} {plan.port} --force`",
            )
        time.sleep(0.1)
    return view


def _load_result(held: Held, plan: LoadPlan, *, changed: bool, downtime: float | None = None) -> LoadResult:
    """Observe the port again and report what is there. Raises `NotStarted` if that is not a ready server."""
    ctx = held.ctx
    view = ctx.observe_port(plan.port) if held.request.dry_run else _wait_until_ready(ctx, plan)
    answers = name_fields(names_of(view))
    return LoadResult(
        model=view.model or plan.target.name,
        port=plan.port,
        alias=plan.alias,
        url=ctx.paths.url(plan.port),
        state=view.state.value,
        changed=changed,
        seconds=round(time.monotonic() - held.began, 3),
        downtime_seconds=None if downtime is None else round(downtime, 3),
        log_path=view.run.log_path if view.run else None,
        pid=view.pid,
        notes=tuple(plan.notes),
        answers_to=answers.answers_to,
        also_answers_to=answers.also_answers_to,
        answers_to_any=answers.answers_to_any,
        drops_for_others=answers.drops_for_others,
        not_asked=answers.not_asked,
    )


def _dry_attach(held: Held, running: Operation) -> LoadResult:
    port = running.port or held.port
    note = f"this is running already and would be followed: {running}"
    alias = held.ctx.paths.settings.alias(port, held.target.name)
    result = _dry_load(held, LoadPlan(held.target, port, alias, Outcome.ALREADY, notes=(note,)), None)
    return replace(result, plan=PlanRow("attach", operation=running.id))


def _dry_load(held: Held, plan: LoadPlan, prepared: Prepared | None) -> LoadResult:
    from mlxops.agent.operations.list import estimate_row

    downloads = prepared is None and plan.outcome is not Outcome.ALREADY
    return replace(
        _load_result(held, plan, changed=False),
        model=plan.target.name,
        dry_run=True,
        plan=PlanRow(
            outcome=plan.outcome.value,
            download=plan.target.repo_id if downloads else None,
            stops=tuple(shown_stop(view) for view in plan.stops),
            clears=tuple(plan.cleared),
            argv=redact_argv(prepared.argv) if prepared else None,
            memory=estimate_row(prepared.estimate) if prepared and prepared.estimate else None,
        ),
    )
