"""`load`: from a name to a proven server behind a port."""

from __future__ import annotations

import contextlib
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mlxops.agent import processes
from mlxops.agent.engines import engine_named
from mlxops.agent.engines.base import Command, Engine, NoCompletion, Serving
from mlxops.agent.observe import observe
from mlxops.agent.operations.context import DRAIN_SECONDS, Context
from mlxops.agent.operations.files import Files, cached
from mlxops.agent.operations.stopping import stop
from mlxops.agent.store import now
from mlxops.core import names, planner
from mlxops.core.errors import MlxopsError, Refused
from mlxops.core.planner import LoadPlan, Outcome, Target, Wanted
from mlxops.core.protocol import Phase
from mlxops.core.registry import Model, Registry
from mlxops.core.world import Owner, PortView, Run, World

if TYPE_CHECKING:
    from mlxops.agent.start import Start


@dataclass(frozen=True)
class Prepared:
    """Everything that can be known of a load before anything is stopped."""

    engine: Engine
    command: Command
    serving: Serving
    files: Files
    wanted: Wanted


def load(ctx: Context) -> dict[str, object]:
    began = time.monotonic()
    name = names.model_name(ctx.request.text("model") or "")
    repo_text = ctx.request.text("repo")
    repo_id, revision = names.repo(repo_text) if repo_text else (None, None)
    asked_port = ctx.request.text("port")
    registry = ctx.usable_registry()
    target = planner.resolve(registry, name, repo_id, revision)
    world = ctx.observe(registry) if asked_port == names.AUTO else World()
    port = planner.choose_port(ctx.where.settings, registry, world, target.name, asked_port)
    with ctx.locked(port, f"model-{target.name.replace('/', '--')}"):
        # What was read before the locks may be old by now.
        registry = ctx.registry()
        target = planner.resolve(registry, name, repo_id, revision)
        return _load_locked(ctx, target, port, began)


def _load_locked(ctx: Context, target: Target, port: int, began: float) -> dict[str, object]:
    registry = ctx.registry()
    files = cached(ctx, target)
    prepared = _prepare(ctx, target, port, files) if files else None
    plan = _plan(ctx, registry, target, port, prepared)
    if plan.outcome is Outcome.START and prepared is None:
        if ctx.request.dry_run:
            return _dry_load(ctx, plan, None, began)
        files = _download(ctx, target)
        registry, target = _register(ctx, target, files)
        prepared = _prepare(ctx, target, port, files)
        plan = _plan(ctx, registry, target, port, prepared)
    for note in plan.notes:
        ctx.note(note)
    if ctx.request.dry_run:
        return _dry_load(ctx, plan, prepared, began)
    if plan.outcome is Outcome.ALREADY or prepared is None:
        return _load_result(ctx, plan, began, changed=False)
    if plan.outcome is Outcome.ADOPT:
        return _adopt(ctx, plan, prepared, began)
    _preflight(ctx, registry, plan, prepared)
    return _apply_load(ctx, registry, plan, prepared, began)


def _plan(ctx: Context, registry: Registry, target: Target, port: int, prepared: Prepared | None) -> LoadPlan:
    return planner.plan_load(
        ctx.where.settings,
        registry,
        ctx.observe(registry),
        target,
        port,
        wanted=prepared.wanted if prepared else None,
        force=ctx.request.flag("force"),
    )


def _download(ctx: Context, target: Target) -> Files:
    from mlxops.agent.operations.pull import fetch

    ctx.emit(Phase("download", f"{target.repo_id} is not in the cache"))
    snapshot = fetch(ctx, target.repo_id, target.revision)
    return Files(snapshot.revision, snapshot.path, snapshot.size_bytes)


def _register(ctx: Context, target: Target, files: Files) -> tuple[Registry, Target]:
    """A finished download stays registered, unassigned. A repointed entry changes only with the proof."""
    if target.entry is not None:
        return ctx.registry(), target

    def add(registry: Registry) -> Registry:
        if target.name in registry.models:
            return registry
        return registry.set_fields(target.name, _fields(target, files) | {"port": None})

    registry = ctx.store.registry.update(add)
    return registry, replace(target, entry=registry.models[target.name])


def _fields(target: Target, files: Files) -> dict[str, object]:
    """What the registry says of the target once it serves; `port` apart."""
    fields = planner.entry_fields(target.repo_id, str(files.path))
    del fields["port"]
    if target.revision:
        return fields | {"revision": files.revision}
    # A revision that stands there is of the repository that the entry had before.
    return fields | ({"revision": None} if target.entry and target.entry.revision else {})


def _prepare(ctx: Context, target: Target, port: int, files: Files) -> Prepared:
    """Raises `Refused` for an engine that is not there or options that it cannot be given."""
    settings = ctx.where.settings
    entry = target.entry or Model(target.name, target.repo_id)
    engine = engine_named(entry.engine or settings.engine)
    command = engine.command(settings.launch.get(engine.name, ()), {**ctx.environ, **settings.env})
    serving = Serving(
        model=entry,
        alias=settings.alias(port, target.name),
        path=files.path,
        bind=settings.bind,
        port=port,
        folder=ctx.store.run_folder(port),
    )
    wanted = Wanted(
        target.repo_id, files.revision, engine.name, engine.argv(command, serving), os.path.realpath(files.path)
    )
    return Prepared(engine, command, serving, files, wanted)


def _preflight(ctx: Context, registry: Registry, plan: LoadPlan, prepared: Prepared) -> None:
    """All that can be known of the new server before an old one is stopped. Raises `Refused`."""
    from mlxops.agent.memory import check_fits
    from mlxops.agent.snapshot import inspect

    ctx.emit(Phase("check", f"{plan.target.repo_id} at {prepared.files.revision[:12]}"))
    facts = inspect(prepared.files.path)
    if facts.problems:
        raise Refused(
            "not_servable",
            f"{plan.target.repo_id} cannot be served",
            why="; ".join(facts.problems)[:400],
            hint="if its files are damaged, delete its folder in the cache and load again",
        )
    entry = prepared.serving.model
    if facts.runs_code and not (entry.trust_remote_code and entry.revision):
        raise Refused(
            "code_would_run",
            f"loading {plan.target.repo_id} would run code of that repository",
            why="; ".join(facts.runs_code)[:400],
            hint="read that code; then set trust_remote_code: true and a revision in its registry entry",
        )
    if not ctx.request.flag("overcommit"):
        check_fits(ctx.where, registry, ctx.observe(registry), plan, facts.weight_bytes)


def _apply_load(
    ctx: Context, registry: Registry, plan: LoadPlan, prepared: Prepared, began: float
) -> dict[str, object]:
    from mlxops.agent.start import Start, deadline_for

    previous = _restartable(ctx, registry, plan)
    start = Start(ctx.where, ctx.store, ctx.system, prepared.engine, prepared.command, prepared.serving)
    timeout = ctx.request.number("timeout") or deadline_for(prepared.files.size_bytes)
    downtime_from = time.monotonic() if plan.stops else None
    with ExitStack() as stack:
        for view in plan.stops:
            if view.port != plan.port:
                stack.enter_context(ctx.locked(view.port))
        try:
            with ctx.cancellation.shield():
                for view in plan.stops:
                    stop(ctx, view, DRAIN_SECONDS)
            ctx.cancellation.check()
            ctx.emit(Phase("start", f"{prepared.engine.name} on port {plan.port}, found by {prepared.command.source}"))
            start.launch(dict(ctx.environ), plan.target.repo_id, prepared.files.revision, ctx.operation)
            run = start.wait(timeout, ctx.emit)
            # From here on it is quicker done than undone, and half of it would be an assignment without a server.
            stack.enter_context(ctx.cancellation.shield())
            ctx.store.save_run(run)
            ctx.emit(Phase("commit", f"{plan.target.name} gets port {plan.port}"))
            ctx.store.registry.update(lambda current: _commit(current, plan, prepared.files))
        except BaseException as error:
            with ctx.cancellation.shield():
                _abort(ctx, start)
                _recover(ctx, previous, error)
            raise
        start.detach()
        downtime = None if downtime_from is None else time.monotonic() - downtime_from
        ctx.remember(
            command="load",
            model=plan.target.name,
            port=plan.port,
            repo_id=plan.target.repo_id,
            revision=prepared.files.revision,
            replaced=plan.previous.model if plan.previous else None,
            restore=ctx.request.flag("restore"),
        )
        return _load_result(ctx, plan, began, changed=True, downtime=downtime)


def _commit(registry: Registry, plan: LoadPlan, files: Files) -> Registry:
    entry = registry.models.get(plan.target.name)
    changed = entry is None or plan.target.repoint or entry.cache_path != str(files.path)
    if changed:
        registry = registry.set_fields(plan.target.name, _fields(plan.target, files))
    return registry.assign(plan.target.name, plan.port)


def _restartable(ctx: Context, registry: Registry, plan: LoadPlan) -> tuple[tuple[PortView, Prepared | None], ...]:
    """What is stopped although it serves, each with what would bring it back, found out while it still serves."""
    serving = [view for view in plan.stops if view is plan.previous or (view.port != plan.port and view.orphan is None)]
    return tuple((view, _restart_of(ctx, registry, view)) for view in serving)


def _restart_of(ctx: Context, registry: Registry, view: PortView) -> Prepared | None:
    run = view.run if view.owner is Owner.MLXOPS else None
    entry = registry.models.get(run.model) if run else None
    if run is None or entry is None:
        return None
    with contextlib.suppress(MlxopsError):
        target = Target(run.model, run.repo_id, run.revision, entry, repoint=run.repo_id != entry.repo_id)
        files = cached(ctx, target)
        return _prepare(ctx, target, view.port, files) if files else None
    return None


def _abort(ctx: Context, start: Start) -> None:
    """Undo a start. What cannot be undone stays recorded, and is told: the reason of the failure matters more."""
    try:
        start.abort()
    except (MlxopsError, OSError) as error:
        ctx.note(f"what was started could not be removed: {error}", "warning")


def _recover(ctx: Context, previous: tuple[tuple[PortView, Prepared | None], ...], error: BaseException) -> None:
    """After a failed swap or move the old server comes back; the error tells both stories."""
    stories = [story for view, prepared in previous if (story := _bring_back(ctx, view, prepared))]
    if not stories:
        return
    story = "; ".join(stories)
    if isinstance(error, MlxopsError):
        error.details["previous"] = story
        error.why = f"{error.why}; {story}" if error.why else story
    ctx.note(story, "warning")


def _bring_back(ctx: Context, view: PortView, prepared: Prepared | None) -> str:
    """Start again what was stopped; says what came of it. Nothing, if it was not stopped."""
    from mlxops.agent.start import Start, deadline_for

    look = ctx.system.look(())
    if view.run is not None and processes.members(ctx.system, look, view.run):
        return ""
    if prepared is None:
        _clear(ctx, view.port)
        return f"the old server of {view.model} could not be started again"
    ctx.emit(Phase("restart", f"{view.model} comes back to port {view.port}"))
    start = Start(ctx.where, ctx.store, ctx.system, prepared.engine, prepared.command, prepared.serving)
    try:
        start.launch(dict(ctx.environ), prepared.wanted.repo_id, prepared.wanted.revision, ctx.operation)
        ctx.store.save_run(start.wait(deadline_for(prepared.files.size_bytes), ctx.emit))
    except (MlxopsError, OSError) as second:
        _abort(ctx, start)
        _clear(ctx, view.port)
        return f"{view.model} did not come back either: {second}"
    start.detach()
    return f"{view.model} serves port {view.port} again"


def _clear(ctx: Context, port: int) -> None:
    with contextlib.suppress(MlxopsError):
        ctx.store.registry.update(lambda current: current.clear(m.name for m in current.on_port(port)))


def _adopt(ctx: Context, plan: LoadPlan, prepared: Prepared, began: float) -> dict[str, object]:
    """A live server that is as wanted becomes ours: the same proof, then the record, then the assignment."""
    from mlxops.agent.start import COMPLETION_SECONDS, prove

    view = ctx.observe(ctx.registry()).ports[plan.port]
    run = view.run if view.owner is Owner.MLXOPS and view.run else _adopted_run(ctx, view, plan, prepared)
    try:
        prove(ctx.where, plan.alias, run, ctx.system, ctx.request.number("timeout") or COMPLETION_SECONDS)
    except (OSError, NoCompletion) as error:
        raise Refused(
            "not_adopted",
            f"the server on port {plan.port} does not answer as {plan.alias}",
            why=str(error)[:300],
            hint=f"replace it: mlxctl load {plan.target.name} {plan.port} --force",
        ) from None
    ctx.store.save_run(replace(run, proven_at=now()))
    ctx.store.registry.update(lambda current: _commit(current, plan, prepared.files))
    ctx.remember(command="load", adopted=True, model=plan.target.name, port=plan.port, pid=run.pid)
    return _load_result(ctx, plan, began, changed=False)


def _adopted_run(ctx: Context, view: PortView, plan: LoadPlan, prepared: Prepared) -> Run:
    server = view.server
    if server is None:
        raise Refused("not_adopted", f"the server on port {plan.port} is gone", hint="try again")
    return Run(
        port=plan.port,
        model=plan.target.name,
        alias=plan.alias,
        repo_id=plan.target.repo_id,
        revision=prepared.files.revision,
        engine=server.engine,
        argv=server.argv,
        run_id="",
        pid=server.pid,
        pgid=server.pgid,
        start=server.start,
        boot_id=ctx.system.boot_id(),
        operation=ctx.operation,
        log_path=str(ctx.store.log_path(plan.port)),
        started_at=now(),
        adopted=True,
    )


def _load_result(
    ctx: Context, plan: LoadPlan, began: float, *, changed: bool, downtime: float | None = None
) -> dict[str, object]:
    """Looked at again: what is told is what is there."""
    view = observe(ctx.where, ctx.store, ctx.registry(), ctx.system, own=ctx.operation or None, only=[plan.port]).ports[
        plan.port
    ]
    return {
        "model": view.model or plan.target.name,
        "port": plan.port,
        "alias": plan.alias,
        "url": ctx.where.url(plan.port),
        "state": view.state.value,
        "changed": changed,
        "seconds": round(time.monotonic() - began, 3),
        "downtime_seconds": None if downtime is None else round(downtime, 3),
        "log_path": view.run.log_path if view.run else None,
        "pid": view.pid,
        "notes": list(plan.notes),
    }


def _dry_load(ctx: Context, plan: LoadPlan, prepared: Prepared | None, began: float) -> dict[str, object]:
    result = _load_result(ctx, plan, began, changed=False)
    return result | {
        "model": plan.target.name,
        "dry_run": True,
        "plan": {
            "outcome": plan.outcome.value,
            "download": plan.target.repo_id if prepared is None else None,
            "stops": [f"{view.model} on {view.port}, pid {view.pid}" for view in plan.stops],
            "clears": list(plan.cleared),
            "argv": list(prepared.wanted.argv) if prepared else None,
        },
    }
