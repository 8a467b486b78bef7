"""`load`: start a model's server on a port, and prove that it answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from mlxops.agent.context import Context, busy, model_lock, repo_lock
from mlxops.agent.operations.model_files import ModelFiles, cached
from mlxops.agent.operations.preflight import (
    Prepared,
    check_before_download,
    check_name,
    commit,
    entry_fields,
    preflight,
    prepare,
)
from mlxops.agent.operations.server_names import name_fields, names_of
from mlxops.agent.operations.stop import shown_stop
from mlxops.agent.operations.swap import start_in_place
from mlxops.agent.paths import require_folder
from mlxops.agent.state.store import utc_now
from mlxops.common.http import NoCompletion
from mlxops.core import names, planner, refusals
from mlxops.core.commands.load import Load, LoadResult, PlanRow
from mlxops.core.errors import Busy, MlxopsError, NotStarted, Refused, UsageError
from mlxops.core.names import shown
from mlxops.core.planner import LoadPlan, ModelRef, Outcome
from mlxops.core.ports import Owner, PortView, State, World
from mlxops.core.protocol import Phase
from mlxops.core.records import Operation, Run, run_of
from mlxops.core.registry import Registry

READY_SECONDS = 5.0
"""Time for a server that has answered a completion to become ready."""


def run(ctx: Context, request: Load) -> LoadResult:
    return load(ctx, request)


def load(
    ctx: Context,
    request: Load,
    check_held: Callable[[Registry], None] = lambda _: None,
    before_launch: Callable[[], None] = lambda: None,
) -> LoadResult:
    """Load a model.

    `check_held` is called once the locks of the port and the model are held; it may raise. `before_launch` is called
    after all checks, just before the server is started.
    """
    began = time.monotonic()
    name = names.model_name(request.model or "")
    repo_id, revision = names.repo(request.repo) if request.repo else (None, None)
    ctx.usable_registry()
    require_folder(ctx.paths.hub)
    if request.port not in (None, names.AUTO):
        planner.refuse_alias_elsewhere(ctx.paths.settings, name, names.port(request.port, ctx.paths.settings.ports))

    def resolve() -> ModelRef:
        return planner.resolve(ctx.registry(), name, repo_id, revision, request.port)

    with _hold_port_and_model(ctx, request, resolve) as (port, model):

        def resolve_again() -> ModelRef:
            """Resolve the name again. Raises `Busy` if an editor has changed which model it means: that is not held."""
            target = resolve()
            if target.name != model:
                raise Busy(
                    "changed_meanwhile",
                    f"{name} now means {target.name}, and meant {model}",
                    why="the registry was changed a moment ago",
                    hint="look first: `mlxctl list`; then try again",
                )
            return target

        check_held(ctx.registry())
        request = replace(request, model=model)
        ctx = ctx.with_request(request)
        if request.dry_run and (running := _find_running(ctx, port, model)):
            return _dry_attach(ctx, resolve_again(), running, running.port or port, began)
        return _load_locked(ctx, request, resolve_again, port, began, before_launch)


def _find_running(ctx: Context, port: int, model: str) -> Operation | None:
    """Return the same load if it is running. For a dry run, which holds no locks. Raises `Busy` for another holder."""
    for name in (f"port-{port}", model_lock(model)):
        holder = ctx.store.holder(name)
        if holder is not None and not ctx.is_same_request(holder, port):
            raise busy(name, holder)
        if holder is not None:
            return holder
    return None


def _refuse_during_removal(ctx: Context, repo_id: str) -> None:
    """Raises `Busy` if the repository's files are being removed.

    A load checks this after it has locked its port. A removal checks the ports after it has locked the repository. So
    at least one of them sees the other.
    """
    name = repo_lock(repo_id)
    holder = None if ctx.request.dry_run else ctx.store.holder(name)
    if holder is not None and holder.command == "remove":
        raise busy(name, holder)


@contextmanager
def _hold_port_and_model(ctx: Context, request: Load, resolve: Callable[[], ModelRef]) -> Iterator[tuple[int, str]]:
    """Hold the requested port and model, and yield them.

    With `auto`, if another operation takes the chosen port first, try the next idle one. Raises `Busy`, and what
    `planner.choose_port` raises.
    """
    requested = request.port
    taken_ports: set[int] = set()

    def choose() -> tuple[int, str]:
        registry, model = ctx.registry(), resolve().name
        world = ctx.observe(registry) if requested == names.AUTO else World()
        idle = World(ports={port: view for port, view in world.ports.items() if port not in taken_ports})
        try:
            return planner.choose_port(ctx.paths.settings, registry, idle, model, requested), model
        except UsageError:
            # No port is given, and the model has none. If a load of it is running, this raises `Busy` with that load.
            # If one has just ended, the model has a port now.
            with ctx.with_request(replace(request, model=model)).hold_lock(model_lock(model)):
                return planner.choose_port(ctx.paths.settings, ctx.registry(), idle, model, requested), model

    with ExitStack() as held:
        while True:
            port, model = choose()
            try:
                with ExitStack() as locks:
                    model_ctx = ctx.with_request(replace(request, model=model))
                    locks.enter_context(model_ctx.hold_port(port, model_lock(model)))
                    # The registry and the ports may have changed before the locks were taken. So choose again.
                    if choose() == (port, model):
                        held.push(locks.pop_all())
                        break
            except Busy as error:
                taken = error.details.get("lock") == f"port-{port}" and "attach" not in error.details
                if requested != names.AUTO or not taken or port in taken_ports:
                    raise
                taken_ports.add(port)
        yield port, model


def _load_locked(
    ctx: Context,
    request: Load,
    resolve: Callable[[], ModelRef],
    port: int,
    began: float,
    before_launch: Callable[[], None],
) -> LoadResult:
    registry, target = ctx.registry(), resolve()
    _refuse_during_removal(ctx, target.repo_id)
    files = cached(ctx, target)
    prepared = prepare(ctx, target, port, files) if files else None
    plan = _make_plan(ctx, request, registry, target, port, prepared)
    if plan.outcome is not Outcome.ALREADY:
        check_name(ctx, request, target, port)
    if plan.outcome is Outcome.START and prepared is None:
        if ctx.request.dry_run:
            return _dry_load(ctx, plan, None, began)
        files = _download(ctx, target)
        # The entry may have changed during the download, which may take hours.
        registry, target = _register(ctx, resolve(), files)
        prepared = prepare(ctx, target, port, files)
        plan = _make_plan(ctx, request, registry, target, port, prepared)
    with ExitStack() as held:
        locks: list[str] = []
        while more := [name for name in _locks_of_stops(ctx, registry, plan) if name not in locks]:
            for name in more:
                held.enter_context(ctx.hold_lock(name, port))
            locks += more
            # The state may have changed before these locks were taken. So plan again.
            registry = ctx.registry()
            plan = _make_plan(ctx, request, registry, target, port, prepared)
        return _execute_plan(ctx, request, held, registry, plan, prepared, began, before_launch)


def _locks_of_stops(ctx: Context, registry: Registry, plan: LoadPlan) -> list[str]:
    """Return the locks of the ports and models that a plan stops, apart from this load's own.

    No other operation may change these ports. And no other may start these models, because they may have to be
    restarted here.
    """
    if ctx.request.dry_run:
        return []
    ports = [f"port-{view.port}" for view in plan.stops if view.port != plan.port]
    models = {view.model for view in plan.stops if view.model in registry.models and view.model != plan.target.name}
    return [*ports, *(model_lock(model) for model in models if model)]


def _execute_plan(
    ctx: Context,
    request: Load,
    held: ExitStack,
    registry: Registry,
    plan: LoadPlan,
    prepared: Prepared | None,
    began: float,
    before_launch: Callable[[], None],
) -> LoadResult:
    """Carry out the plan. `held` collects what to release at the end of the load."""
    for note in plan.notes:
        ctx.note(note)
    if plan.outcome is Outcome.START and prepared is not None:
        plan = replace(plan, notes=(*plan.notes, *preflight(ctx, request, held, registry, plan, prepared)))
    if ctx.request.dry_run:
        return _dry_load(ctx, plan, prepared, began)
    if plan.proves is not None:
        _prove_boot_job(ctx, request, plan, plan.proves)
    if plan.outcome is Outcome.ALREADY or prepared is None:
        return _load_result(ctx, plan, began, changed=False)
    if plan.outcome is Outcome.ADOPT:
        return _adopt(ctx, request, plan, prepared, began)
    downtime = start_in_place(ctx, request, registry, plan, prepared, before_launch)
    with ctx.cancellation.shield():  # it serves: there is nothing left to cancel
        return _load_result(ctx, plan, began, changed=True, downtime=downtime)


def _make_plan(
    ctx: Context, request: Load, registry: Registry, target: ModelRef, port: int, prepared: Prepared | None
) -> LoadPlan:
    return planner.plan_load(
        ctx.paths.settings,
        registry,
        ctx.observe(registry),
        target,
        port,
        wanted=prepared.wanted if prepared else None,
        force=request.force,
    )


def _download(ctx: Context, target: ModelRef) -> ModelFiles:
    from mlxops.agent.operations.pull import fetch

    ctx.emit(Phase("download", f"{target.repo_id} is not in the cache"))
    snapshot = fetch(ctx, target.repo_id, target.revision, check_before_download(ctx, target))
    return ModelFiles(snapshot.revision, snapshot.path, snapshot.size_bytes)


def _register(ctx: Context, target: ModelRef, files: ModelFiles) -> tuple[Registry, ModelRef]:
    """Register a finished download, unassigned. A repointed entry does not change before the new server is proven."""
    if target.entry is not None:
        return ctx.registry(), target

    def add(registry: Registry) -> Registry:
        if target.name in registry.models:
            return registry
        return registry.set_fields(target.name, entry_fields(target, files) | {"port": None})

    registry = ctx.store.registry.update(add)
    return registry, replace(target, entry=registry.models[target.name])


def _adopt(ctx: Context, request: Load, plan: LoadPlan, prepared: Prepared, began: float) -> LoadResult:
    """Adopt a live server that matches the request: prove it, record it, assign the port. Raises `Refused`."""
    from mlxops.agent.serving.launch import COMPLETION_SECONDS, prove

    view = plan.adopts
    assert view is not None
    run = view.run if view.owner is Owner.MLXOPS and view.run else _adopted_run(ctx, view, plan, prepared)
    try:
        prove(ctx.paths, plan.alias, run, ctx.system, request.timeout or COMPLETION_SECONDS)
    except (OSError, NoCompletion) as error:
        raise Refused(
            "not_adopted",
            f"the server on port {plan.port} does not answer as {plan.alias}",
            why=str(error)[:300],
            hint=f"replace it: `mlxctl load {plan.target.name} {plan.port} --force`",
        ) from None
    with ctx.cancellation.shield():  # a cancellation in between would leave a record without an assignment
        ctx.store.save_run(replace(run, proven_at=utc_now()))
        try:
            ctx.store.registry.update(lambda current: commit(current, plan, prepared.files))
        except MlxopsError:
            # The server keeps serving. Restore its previous record.
            if view.run:
                ctx.store.save_run(view.run)
            else:
                ctx.store.forget_run(plan.port)
            raise
    ctx.remember(
        command="load",
        adopted=True,
        model=plan.target.name,
        port=plan.port,
        repo_id=plan.target.repo_id,
        revision=prepared.files.revision,
        pid=run.pid,
    )
    return _load_result(ctx, plan, began, changed=False)


def _prove_boot_job(ctx: Context, request: Load, plan: LoadPlan, view: PortView) -> None:
    """Check that the boot job's server answers under the alias. Raises `Refused` (boot_port)."""
    from mlxops.agent.serving.launch import COMPLETION_SECONDS, prove

    if view.server is None:
        raise refusals.boot_port(view, "its server is gone")
    names = names_of(view)
    if names.not_asked:
        raise refusals.boot_port(view, f"its server is not asked: {names.not_asked}")
    if names.sure and not names.any and plan.alias not in names.known:
        why = f"its server answers to {' and '.join(map(shown, names.known))}, not to {plan.alias}"
        refused = refusals.boot_port(view, why[:300])
        refused.set_hint(f"have the boot job start it under the name {plan.alias}; or, {refused.marked_hint}")
        raise refused
    run = run_of(view.server, plan.port, ctx.system.boot_id())
    try:
        prove(ctx.paths, plan.alias, run, ctx.system, request.timeout or COMPLETION_SECONDS)
    except (OSError, NoCompletion) as error:
        why = f"its server does not answer as {plan.alias}: {error}"
        raise refusals.boot_port(view, why[:300]) from None


def _adopted_run(ctx: Context, view: PortView, plan: LoadPlan, prepared: Prepared) -> Run:
    server = view.server
    if server is None:
        raise Refused(
            "not_adopted", f"the server on port {plan.port} is gone", why="it ended a moment ago", hint="try again"
        )
    return replace(
        run_of(server, plan.port, ctx.system.boot_id()),
        model=plan.target.name,
        alias=plan.alias,
        repo_id=plan.target.repo_id,
        revision=prepared.files.revision,
        operation=ctx.operation,
        log_path=str(ctx.store.log_path(plan.port)),
        started_at=utc_now(),
    )


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


def _load_result(
    ctx: Context, plan: LoadPlan, began: float, *, changed: bool, downtime: float | None = None
) -> LoadResult:
    """Observe the port again and report what is there. Raises `NotStarted` if that is not a ready server."""
    view = ctx.observe_port(plan.port) if ctx.request.dry_run else _wait_until_ready(ctx, plan)
    names = name_fields(names_of(view))
    return LoadResult(
        model=view.model or plan.target.name,
        port=plan.port,
        alias=plan.alias,
        url=ctx.paths.url(plan.port),
        state=view.state.value,
        changed=changed,
        seconds=round(time.monotonic() - began, 3),
        downtime_seconds=None if downtime is None else round(downtime, 3),
        log_path=view.run.log_path if view.run else None,
        pid=view.pid,
        notes=tuple(plan.notes),
        answers_to=names.answers_to,
        also_answers_to=names.also_answers_to,
        answers_to_any=names.answers_to_any,
        drops_for_others=names.drops_for_others,
        not_asked=names.not_asked,
    )


def _dry_attach(ctx: Context, target: ModelRef, running: Operation, port: int, began: float) -> LoadResult:
    note = f"this is running already and would be followed: {running}"
    alias = ctx.paths.settings.alias(port, target.name)
    result = _dry_load(ctx, LoadPlan(target, port, alias, Outcome.ALREADY, notes=(note,)), None, began)
    return replace(result, plan=PlanRow("attach", operation=running.id))


def _dry_load(ctx: Context, plan: LoadPlan, prepared: Prepared | None, began: float) -> LoadResult:
    return replace(
        _load_result(ctx, plan, began, changed=False),
        model=plan.target.name,
        dry_run=True,
        plan=PlanRow(
            outcome=plan.outcome.value,
            download=plan.target.repo_id if prepared is None and plan.outcome is Outcome.START else None,
            stops=tuple(shown_stop(view) for view in plan.stops),
            clears=tuple(plan.cleared),
            argv=tuple(prepared.wanted.argv) if prepared else None,
        ),
    )
