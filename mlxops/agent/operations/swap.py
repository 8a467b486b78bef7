"""From a plan to a proven server in its place: old out, new in, the proof; or the old one back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from mlxops.agent.context import Context
from mlxops.agent.engines import engine_named
from mlxops.agent.engines.base import EngineCommand, ServerSpec
from mlxops.agent.hub.snapshot import completeness
from mlxops.agent.operations.model_files import cached
from mlxops.agent.operations.prefetch import warm
from mlxops.agent.operations.preflight import Prepared, commit, prepare
from mlxops.agent.operations.stop import stop
from mlxops.agent.serving import processes
from mlxops.agent.serving.launch import Launch, deadline_for
from mlxops.agent.serving.logs import previous_log
from mlxops.core.commands.load import Load
from mlxops.core.errors import Interrupted, MlxopsError, NotStarted, OutcomeUnknown
from mlxops.core.frozen import dataclass
from mlxops.core.planner import LoadPlan, ModelRef
from mlxops.core.ports import Owner, PortView
from mlxops.core.protocol import Phase
from mlxops.core.records import run_of
from mlxops.core.registry import Model, Registry


def start_in_place(
    ctx: Context,
    request: Load,
    registry: Registry,
    plan: LoadPlan,
    prepared: Prepared,
    launching: Callable[[], None] = lambda: None,
) -> float | None:
    """Carry out a plan whose new server passed every check. `launching` is called just before it is started.

    The caller holds the port, the model, and those of everything that is stopped. Returns the seconds for which the
    port did not answer; None if nothing had to be stopped. Whatever goes wrong, the servers that were stopped are
    started again, and the registry says what is true. If only the registry cannot be written, and the old server cannot
    come back, the new one stays.
    """
    with ExitStack() as stack:
        serving = [(view, _way_back(ctx, registry, view)) for view in plan.stops if view.orphan is None]
        if plan.stops:
            warm(ctx, prepared.files.path, plan.target.name)
        start = Launch(ctx.paths, ctx.store, ctx.system, prepared.engine, prepared.command, prepared.serving)
        try:
            with ctx.cancellation.shield():
                asked = [stop(ctx, view, ctx.drain) for view in plan.stops]
            ctx.cancellation.check()
            ctx.emit(Phase("start", f"{prepared.engine.name} on port {plan.port}, found by {prepared.command.source}"))
            launching()
            start.launch(dict(ctx.environ), plan.target.repo_id, prepared.files.revision, ctx.operation)
            run = start.wait(request.timeout or deadline_for(prepared.files.size_bytes), ctx.emit)
            downtime = time.monotonic() - asked[0] if asked else None
            # From here on it is quicker done than undone, and half of it would be an assignment without a server.
            stack.enter_context(ctx.cancellation.shield())
            ctx.store.save_run(run)
            ctx.emit(Phase("commit", f"{plan.target.name} gets port {plan.port}"))
            _commit(ctx, plan, prepared)
        except BaseException as error:
            with ctx.cancellation.shield():
                if isinstance(error, _NotCommitted) and serving and not all(_can_return(back) for _, back in serving):
                    start.detach()
                    raise _kept(ctx, plan, error) from None
                gone = _abort(ctx, start)
                # Where something of the new one is left, its record stays, and nothing is started beside it.
                _recover(ctx, [each for each in serving if gone or each[0].port != plan.port], error)
            raise
        start.detach()
        ctx.remember(
            command="load",
            model=plan.target.name,
            port=plan.port,
            repo_id=plan.target.repo_id,
            revision=prepared.files.revision,
            replaced=plan.previous.model if plan.previous else None,
            restore=request.restore,
        )
        return downtime


class _NotCommitted(NotStarted):
    """The new server was proven, and the registry could not be written."""


def _commit(ctx: Context, plan: LoadPlan, prepared: Prepared) -> None:
    """Raises what `RegistryFile.update` raises; `_NotCommitted` instead where a server was stopped for it."""
    try:
        ctx.store.registry.update(lambda current: commit(current, plan, prepared.files))
    except MlxopsError as error:
        name, port = plan.target.name, plan.port
        if not plan.stops:
            error.why = f"{error.why}; {name}, which had started on port {port}, was stopped again"
            raise
        raise _NotCommitted(
            "not_committed",
            f"{name} answered on port {port}, and could not be assigned to it: {error.message}",
            why=error.why,
            hint=error.marked_hint,
            details={"cause": error.code, "port": port},
        ) from None


def _kept(ctx: Context, plan: LoadPlan, error: MlxopsError) -> OutcomeUnknown:
    """Return the error for a new server that keeps serving because the old one could not come back."""
    name, port = plan.target.name, plan.port
    old = ", ".join(view.model or "a server" for view in plan.stops)
    ctx.note(f"{name} keeps serving port {port}: {old} could not be started again", "warning")
    return OutcomeUnknown(
        "not_committed",
        f"{name} serves port {port}, and the registry could not be written",
        why=f"{error.message}: {error.why}; {_registered_there(ctx, port)}; {old} could not be started again",
        hint=f"{error.marked_hint}; then: `mlxctl load {name} {port}`",
        details=error.details,
    )


def _registered_there(ctx: Context, port: int) -> str:
    """Say what the registry assigns to a port, for people."""
    registry = ctx.registry()
    if registry.unwritable:
        return "what it assigns to the port is not known"
    names = ", ".join(model.name for model in registry.on_port(port))
    return f"it assigns {names} to the port" if names else "it assigns nothing to the port"


def _can_return(back: RestartPlan | None) -> bool:
    """Whether there is a way back with all its files: the disk on which the registry cannot be written may be gone."""
    if back is None:
        return False
    try:
        return completeness(back.start.serving.path) is None
    except (OSError, ValueError):
        return False


def _abort(ctx: Context, start: Launch) -> bool:
    """Undo a start; whether nothing of it is left. What cannot be undone stays recorded, and is told: the reason of the
    failure matters more."""
    try:
        start.abort()
    except (MlxopsError, OSError) as error:
        ctx.note(f"what was started could not be removed: {error}", "warning")
        return False
    return True


@dataclass(frozen=True)
class RestartPlan:
    """What would bring a server back, found out while it still serves."""

    name: str
    start: Launch
    repo_id: str
    revision: str
    size_bytes: int


def _way_back(ctx: Context, registry: Registry, view: PortView) -> RestartPlan | None:
    """None for what is not known well enough to be started by us."""
    entry = registry.models.get(view.model or "")
    if entry is None:
        return None
    try:
        return _recorded(ctx, view, entry) if view.owner is Owner.MLXOPS else _registered(ctx, view, entry)
    except Interrupted:
        raise
    except MlxopsError:
        return None


def _recorded(ctx: Context, view: PortView, entry: Model) -> RestartPlan | None:
    """One of ours comes back exactly as it was started, whatever its entry says by now."""
    run = view.run
    if run is None:
        return None
    target = ModelRef(run.model, run.repo_id, run.revision, entry, repoint=run.repo_id != entry.repo_id)
    files = cached(ctx, target)
    if files is None or files.revision != run.revision:
        return None
    folder = ctx.store.run_folder(view.port)
    serving = ServerSpec(entry, run.alias, files.path, ctx.paths.settings.bind, view.port, folder)
    command = EngineCommand(run.argv, "its run record", run.engine_version)
    engine = engine_named(run.engine)
    start = Launch(ctx.paths, ctx.store, ctx.system, engine, command, serving, argv=run.argv)
    return RestartPlan(run.model, start, run.repo_id, run.revision, files.size_bytes)


def _registered(ctx: Context, view: PortView, entry: Model) -> RestartPlan | None:
    """One that was started by hand comes back as we would start it."""
    target = ModelRef(entry.name, entry.repo_id or "", entry.revision, entry)
    files = cached(ctx, target)
    if files is None or entry.port not in {None, view.port}:
        return None  # assigned elsewhere: it must not be served twice by us
    old = prepare(ctx, target, view.port, files)
    start = Launch(ctx.paths, ctx.store, ctx.system, old.engine, old.command, old.serving)
    return RestartPlan(entry.name, start, target.repo_id, files.revision, files.size_bytes)


def _recover(ctx: Context, serving: list[tuple[PortView, RestartPlan | None]], error: BaseException) -> None:
    """After a failed swap or move the old servers come back; the error tells both stories."""
    log = Path(str(error.details.get("log_path"))) if isinstance(error, MlxopsError) else None
    own = _inode(log)
    stories = [story for view, back in serving if (story := _bring_back(ctx, view, back))]
    for story in stories:
        ctx.note(story, "warning")
    if stories and isinstance(error, MlxopsError):
        if log and own is not None and _inode(log) != own == _inode(previous_log(log)):
            # The old server writes there now; what the new one said is in the log before.
            error.hint = error.hint.replace(str(log), str(previous_log(log)))
            error.details["log_path"] = str(previous_log(log))
        error.details["previous"] = "; ".join(stories)
        error.why = "; ".join(filter(None, [error.why, *stories]))


def _inode(path: Path | None) -> int | None:
    try:
        return path.stat().st_ino if path else None
    except OSError:
        return None


def _bring_back(ctx: Context, view: PortView, back: RestartPlan | None) -> str:
    """Start again what was stopped; says what came of it. Nothing, if it was not stopped."""
    known = view.run if view.owner is Owner.MLXOPS else None
    if known is None and view.server is not None:
        known = run_of(view.server, view.port, ctx.system.boot_id())
    if known is not None and processes.members(ctx.system, ctx.system.look(()), known):
        return ""
    if back is None:
        _clear(ctx, view.port)
        return f"the old server of {view.model} could not be started again"
    ctx.emit(Phase("restart", f"{back.name} comes back to port {view.port}"))
    try:
        back.start.launch(dict(ctx.environ), back.repo_id, back.revision, ctx.operation)
        ctx.store.save_run(back.start.wait(deadline_for(back.size_bytes), ctx.emit))
    except (MlxopsError, OSError) as second:
        _abort(ctx, back.start)
        _clear(ctx, view.port)
        return f"{back.name} did not come back to port {view.port} either: {second}"
    back.start.detach()
    return f"{back.name} serves port {view.port} again{_assign_again(ctx, back.name, view.port)}"


def _assign_again(ctx: Context, name: str, port: int) -> str:
    """Assign the port to the server that came back. Return what to add to the message if that cannot be written."""
    try:
        # Usually it is assigned already. Then do not write: that may be what failed.
        if not _assigned(ctx.registry(), name, port):
            ctx.store.registry.update(
                lambda current: current if _assigned(current, name, port) else current.assign(name, port)
            )
    except MlxopsError as error:
        return f", but the registry could not be written: {error.message}: {error.why}; {_registered_there(ctx, port)}"
    return ""


def _assigned(registry: Registry, name: str, port: int) -> bool:
    return [model.name for model in registry.on_port(port)] == [name]


def _clear(ctx: Context, port: int) -> None:
    with contextlib.suppress(MlxopsError):
        ctx.store.registry.update(lambda current: current.clear(m.name for m in current.on_port(port)))
