"""Replace the servers that a plan stops by the new one. If that fails, start the old ones again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from mlxops.agent.context import Context
from mlxops.agent.engines import engine_named
from mlxops.agent.engines.base import EngineCommand, ServerSpec
from mlxops.agent.hub.snapshot import completeness
from mlxops.agent.operations.model_files import cached
from mlxops.agent.operations.prefetch import prefetch_weights
from mlxops.agent.operations.preflight import Prepared, commit, prepare
from mlxops.agent.operations.stop import add_left, stop, stop_terms
from mlxops.agent.serving import processes
from mlxops.agent.serving.ending import STILL_ENDING
from mlxops.agent.serving.launch import Launch, deadline_for
from mlxops.agent.serving.logs import previous_log
from mlxops.core.budget import Limits
from mlxops.core.commands.load import Load
from mlxops.core.errors import Busy, Interrupted, MlxopsError, NotStarted, OutcomeUnknown
from mlxops.core.frozen import dataclass
from mlxops.core.planner import SWAP_UNDONE, LoadPlan, ModelRef
from mlxops.core.ports import Owner, PortView
from mlxops.core.protocol import Phase
from mlxops.core.records import run_of
from mlxops.core.refusals import merge_refusals
from mlxops.core.registry import Model, Registry


def start_in_place(ctx: Context, request: Load, registry: Registry, plan: LoadPlan, prepared: Prepared) -> float | None:
    """Carry out a plan whose new server passed all checks.

    The caller holds the locks of the port and the model, and of all ports and models that are stopped. Return the
    seconds for which the port did not answer; None if none of its servers was stopped.

    If anything fails, start the stopped servers again, and make the registry match. One exception: if only the registry
    cannot be written and an old server cannot be restarted, the new server stays.
    """
    with ExitStack() as stack:
        stops = [view for view in plan.stops if view.orphan is None and not view.ending]
        serving = [(view, _plan_restart(ctx, registry, view)) for view in stops]
        start = Launch(
            ctx.paths,
            ctx.store,
            ctx.system,
            prepared.engine,
            prepared.command,
            prepared.serving,
            argv=prepared.argv,
            budget=prepared.budget,
        )
        outages = _Outages()
        try:
            if plan.stops:
                prefetch_weights(ctx, prepared.files.path, plan.target.name)
                start.preload(ctx.environ, ctx.cancellation.check, ctx.emit)
            with ctx.cancellation.shield():
                _stop_all(ctx, request, plan, outages)
            ctx.cancellation.check()
            ctx.emit(Phase("start", f"{prepared.engine.name} on port {plan.port}, found by {prepared.command.source}"))
            if request.restore:
                _remember_attempt(ctx, request, plan)
            start.launch(ctx.environ, plan.target.repo_id, prepared.files.revision, ctx.operation)
            run = start.wait(request.timeout or deadline_for(prepared.files.size_bytes), ctx.emit)
            outages.end(plan.port)
            if request.require:
                from mlxops.agent.operations.required import check_started

                check_started(ctx, request, run, prepared.engine)
            # Do not cancel from here on: finishing is faster than undoing, and half of it would leave an assignment
            # without a server.
            stack.enter_context(ctx.cancellation.shield())
            ctx.store.save_run(run)
            ctx.emit(Phase("commit", f"{plan.target.name} gets port {plan.port}"))
            _commit(ctx, plan, prepared)
        except BaseException as error:
            with ctx.cancellation.shield():
                if outages.longest(plan.port) is not None:
                    outages.begin(plan.port)  # the new server had been ready
                restartable = all(_can_restart(restart) for _, restart in serving)
                if isinstance(error, _NotCommitted) and serving and not restartable:
                    start.detach()
                    raise _uncommitted(ctx, plan, error) from None
                left = _abort(ctx, start, error)
                # If processes of the new server remain, its record stays, and no other server is started on its port.
                taken = {plan.port} if left else _port_still_ending(error)
                waiting = [
                    f"{view.model} is not started again there" for view, _ in serving if left and view.port in taken
                ]
                _add_outcomes(error, [left])
                _recover(ctx, [each for each in serving if each[0].port not in taken], waiting, error, outages)
                _remember_undone(ctx, plan, outages)
            raise
        start.detach()
        downtime = outages.longest(plan.port)
        ctx.remember(
            command="load",
            model=plan.target.name,
            port=plan.port,
            repo_id=plan.target.repo_id,
            revision=prepared.files.revision,
            replaced=plan.previous.model if plan.previous else None,
            restore=request.restore,
            downtime_seconds=None if downtime is None else round(downtime, 3),
        )
        return downtime


def _remember_attempt(ctx: Context, request: Load, plan: LoadPlan) -> None:
    """Record a restore's attempt in the history, just before the launch.

    So a start that takes the host down counts as an attempt, and one that is refused before the launch does not.
    """
    ctx.remember(
        command="restore",
        model=plan.target.name,
        port=plan.port,
        boot_id=ctx.system.boot_id(),
        wall=round(time.time(), 3),
        monotonic=round(time.monotonic(), 3),
        afresh=request.first_attempt,
    )


class _Outages:
    """How long each port was without a server."""

    def __init__(self) -> None:
        self._began: dict[int, float] = {}
        self._longest: dict[int, float] = {}

    def begin(self, port: int, at: float | None = None) -> None:
        """`at`: monotonic time; None: now."""
        self._began.setdefault(port, time.monotonic() if at is None else at)

    def end(self, port: int) -> None:
        """Note that a server answers on the port. Do nothing if the port was not without one."""
        if port in self._began:
            seconds = time.monotonic() - self._began.pop(port)
            self._longest[port] = max(seconds, self._longest.get(port, 0.0))

    def longest(self, port: int) -> float | None:
        """Return the seconds of the longest outage that has ended; None if the port still is without a server."""
        return None if port in self._began else self._longest.get(port)


def _remember_undone(ctx: Context, plan: LoadPlan, outages: _Outages) -> None:
    """Record the downtime of each port whose old server came back."""
    for view in plan.stops:
        downtime = outages.longest(view.port)
        if downtime is not None:
            ctx.remember(
                command=SWAP_UNDONE,
                model=plan.target.name,
                port=view.port,
                restored=view.model,
                downtime_seconds=round(downtime, 3),
            )


def _stop_all(ctx: Context, request: Load, plan: LoadPlan, outages: _Outages) -> None:
    """Stop the servers of a plan. Raises what `stop` raises.

    If one has not ended, say that the new one was not started, and how to go on.
    """
    try:
        for view in plan.stops:
            outages.begin(view.port, stop(ctx, view))
    except Busy as error:
        if error.code != STILL_ENDING:
            raise
        repo, force = f" --repo {request.repo}" if request.repo else "", " --force" if request.force else ""
        again = f"{plan.target.name} {plan.port}{repo}{force}"
        error.why = f"{error.why}; {plan.target.name} was not started"
        error.set_hint(f"when it has ended: `mlxctl load {again}`; or kill it: `mlxctl load {again} --kill`")
        raise


def _port_still_ending(error: BaseException) -> set[object]:
    """Return the port whose server was to be stopped and has not ended. It is not started again."""
    still_ending = isinstance(error, MlxopsError) and error.code == STILL_ENDING
    return {error.details.get("port")} if isinstance(error, MlxopsError) and still_ending else set()


class _NotCommitted(NotStarted):
    """The new server was proven, but the registry could not be written."""


def _commit(ctx: Context, plan: LoadPlan, prepared: Prepared) -> None:
    """Assign the port. Raises what `RegistryFile.update` raises; `_NotCommitted` if another server was stopped."""
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


def _uncommitted(ctx: Context, plan: LoadPlan, error: MlxopsError) -> OutcomeUnknown:
    """Return the error for a new server that stays because the old one could not be restarted."""
    name, port = plan.target.name, plan.port
    old = ", ".join(view.model or "a server" for view in plan.stops)
    ctx.note(f"{name} keeps serving port {port}: {old} could not be started again", "warning")
    return OutcomeUnknown(
        "not_committed",
        f"{name} serves port {port}, and the registry could not be written",
        why=f"{error.message}: {error.why}; {_describe_assignment(ctx, port)}; {old} could not be started again",
        hint=f"{error.marked_hint}; then: `mlxctl load {name} {port}`",
        details=error.details,
    )


def _describe_assignment(ctx: Context, port: int) -> str:
    """Return a clause that says what the registry assigns to a port."""
    registry = ctx.registry()
    if registry.unwritable:
        return "its assignment of the port is not known"
    names = ", ".join(model.name for model in registry.on_port(port))
    return f"it assigns {names} to the port" if names else "it assigns nothing to the port"


def _can_restart(restart: RestartPlan | None) -> bool:
    """Return whether the model's files are complete. They may lie on the disk on which the registry is not writable."""
    if restart is None:
        return False
    try:
        return completeness(restart.start.serving.path) is None
    except (OSError, ValueError):
        return False


def _abort(ctx: Context, start: Launch, cause: BaseException) -> str:
    """Undo a start. Return what is left of it; empty if nothing is.

    If it cannot be undone, its record stays. That is only a warning, so that it does not hide `cause`, which gets the
    error as `details.left`.
    """
    try:
        start.abort(stop_terms(ctx), ctx.emit)
    except (MlxopsError, OSError) as error:
        start.detach()
        hint = f"; {error.marked_hint}" if isinstance(error, MlxopsError) else ""
        ctx.note(f"the new server could not be removed: {error}{hint}", "warning")
        if isinstance(error, MlxopsError) and isinstance(cause, MlxopsError):
            cause.details["left"] = error.to_wire()
        return f"it could not be removed: {error}"
    return ""


def _add_outcomes(error: BaseException, outcomes: Iterable[str]) -> None:
    """Add what became of the servers to an error's reason."""
    if isinstance(error, MlxopsError):
        error.why = "; ".join(filter(None, [error.why, *outcomes]))


@dataclass(frozen=True)
class RestartPlan:
    """How to start a server again, determined while it still serves."""

    name: str
    start: Launch
    repo_id: str
    revision: str
    size_bytes: int


def _plan_restart(ctx: Context, registry: Registry, view: PortView) -> RestartPlan | None:
    """Return how to start a server again; None if too little is known about it."""
    entry = registry.models.get(view.model or "")
    if entry is None:
        return None
    try:
        return _plan_as_recorded(ctx, view, entry) if view.owner is Owner.MLXOPS else _plan_as_load(ctx, view, entry)
    except Interrupted:
        raise
    except MlxopsError:
        return None


def _plan_as_recorded(ctx: Context, view: PortView, entry: Model) -> RestartPlan | None:
    """Plan the restart of our own server with the recorded argv, even if its entry has changed since."""
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
    start = Launch(ctx.paths, ctx.store, ctx.system, engine, command, serving, argv=run.argv, budget=run.budget)
    return RestartPlan(run.model, start, run.repo_id, run.revision, files.size_bytes)


def _plan_as_load(ctx: Context, view: PortView, entry: Model) -> RestartPlan | None:
    """Plan the restart of a server that was started by hand: as a load would start it, with the limits that it had."""
    target = ModelRef(entry.name, entry.repo_id or "", entry.revision, entry)
    files = cached(ctx, target)
    if files is None or entry.port not in {None, view.port}:
        return None  # assigned to another port: mlxops must not serve it on two
    old = prepare(ctx, target, view.port, files)
    if view.server is not None and view.server.engine == old.engine.name:
        old = replace(old, budget=old.limit_options.words(old.engine.read_limits(view.server.argv)))
    start = Launch(
        ctx.paths, ctx.store, ctx.system, old.engine, old.command, old.serving, argv=old.argv, budget=old.budget
    )
    return RestartPlan(entry.name, start, target.repo_id, files.revision, files.size_bytes)


def _recover(
    ctx: Context,
    serving: list[tuple[PortView, RestartPlan | None]],
    waiting: Iterable[str],
    error: BaseException,
    outages: _Outages,
) -> None:
    """Start the old servers again after a failed swap or move. Add the outcome to `error`.

    `waiting`: what became of those that cannot be started.
    """
    log = Path(str(error.details.get("log_path"))) if isinstance(error, MlxopsError) else None
    inode = _inode(log)
    results = [result for view, restart in serving if (result := _restart(ctx, view, restart, outages))]
    outcomes = [*waiting, *(outcome for outcome, _ in results)]
    for outcome in outcomes:
        ctx.note(outcome, "warning")
    failures = [failure for _, failure in results if failure]
    if failures and isinstance(error, MlxopsError):
        add_left(error, failures)
        error.details["not_restarted"] = merge_refusals(failures).to_wire()
    if outcomes and isinstance(error, MlxopsError):
        if log and inode is not None and _inode(log) != inode == _inode(previous_log(log)):
            # The old server writes to this path again. The new server's log was rotated.
            error.hint = error.hint.replace(str(log), str(previous_log(log)))
            error.details["log_path"] = str(previous_log(log))
        error.details["previous"] = "; ".join(outcomes)
    _add_outcomes(error, outcomes)


def _inode(path: Path | None) -> int | None:
    try:
        return path.stat().st_ino if path else None
    except OSError:
        return None


def _restart(
    ctx: Context, view: PortView, restart: RestartPlan | None, outages: _Outages
) -> tuple[str, MlxopsError | None] | None:
    """Start a stopped server again. Return the outcome for the message, and the error if it does not serve.

    Return None if the server was not stopped.
    """
    run = view.run if view.owner is Owner.MLXOPS else None
    if run is None and view.server is not None:
        run = run_of(view.server, view.port, ctx.system.boot_id())
    if run is not None and processes.members(ctx.system, ctx.system.process_table(()), run):
        return None
    if restart is None:
        _clear_port(ctx, view.port)
        outcome = f"the old server of {view.model} could not be started again"
        return outcome, _not_restarted(view, outcome, "too little is known about it, or its files are gone")
    ctx.emit(Phase("restart", f"{restart.name} comes back to port {view.port}"))
    try:
        restart.start.launch(ctx.environ, restart.repo_id, restart.revision, ctx.operation)
        ctx.store.save_run(restart.start.wait(deadline_for(restart.size_bytes), ctx.emit))
    except (MlxopsError, OSError) as error:
        outcome = f"{restart.name} did not come back to port {view.port} either: {error}"
        failure = error if isinstance(error, MlxopsError) else _not_restarted(view, outcome, str(error))
        left = _abort(ctx, restart.start, failure)
        _clear_port(ctx, view.port)
        return f"{outcome}; {left}" if left else outcome, failure
    outages.end(view.port)
    restart.start.detach()
    again = f"{restart.name} serves port {view.port} again{_without_limits(restart.start)}"
    return f"{again}{_assign_again(ctx, restart.name, view.port)}", None


def _not_restarted(view: PortView, outcome: str, why: str) -> NotStarted:
    return NotStarted(
        "not_restarted", outcome, why=why, hint="what serves now: `mlxctl status`", details={"port": view.port}
    )


def _without_limits(start: Launch) -> str:
    """Return what to add to the message if the restarted server has no limits, although its engine has such options."""
    has_none = start.engine.limits.all and start.engine.read_limits(start.argv) == Limits()
    return ", as before without limits of its memory" if has_none else ""


def _assign_again(ctx: Context, name: str, port: int) -> str:
    """Assign the port to the restarted server. Return what to add to the message if the registry cannot be written."""
    try:
        # Usually it is still assigned. Then do not write, because writing may be what failed.
        if not _assigned(ctx.registry(), name, port):
            ctx.store.registry.update(
                lambda current: current if _assigned(current, name, port) else current.assign(name, port)
            )
    except MlxopsError as error:
        assignment = _describe_assignment(ctx, port)
        return f", but the registry could not be written: {error.message}: {error.why}; {assignment}"
    return ""


def _assigned(registry: Registry, name: str, port: int) -> bool:
    return [model.name for model in registry.on_port(port)] == [name]


def _clear_port(ctx: Context, port: int) -> None:
    with contextlib.suppress(MlxopsError):
        ctx.store.registry.update(lambda current: current.clear(m.name for m in current.on_port(port)))
