"""`restore`: start the assigned models that no server serves, after a reboot or a crash."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from mlxops.agent.context import RESTORE, Context, PortExcluded
from mlxops.agent.operations.load import hold, load
from mlxops.agent.operations.stop import add_left, name_left, stop
from mlxops.agent.paths import require_folder
from mlxops.core import wire
from mlxops.core.commands.load import Load
from mlxops.core.commands.restore import Restore, RestoreResult, RestoreRow
from mlxops.core.errors import Interrupted, MlxopsError, NotStarted, Refused
from mlxops.core.frozen import dataclass
from mlxops.core.hints import split
from mlxops.core.plan_restore import (
    Now,
    Record,
    RestorePlan,
    RestoreStep,
    in_vain,
    is_wanted,
    last_cleared,
    lasting,
    pause,
    plan_restore,
    starts_of,
)
from mlxops.core.ports import JobState, Owner

UNLOADED = "it was unloaded during the restore"


class _NotWanted(Refused):
    """The assignment was removed after the plan was made."""


@dataclass(frozen=True)
class _HostPlan:
    """The plan, and what messages about it need."""

    steps: RestorePlan
    attempts: Mapping[RestoreStep, Sequence[float]]
    """How many seconds ago each failed start of a step began, newest first."""
    inactive_jobs: tuple[JobState, ...]
    """Boot jobs of ports to start that are disabled or not installed. They do not reserve their ports."""


def run(ctx: Context, request: Restore) -> RestoreResult:
    """Start each assigned model that no server serves, in the order of the ports. If one fails, continue.

    Raises `NotStarted` (restore_incomplete) at the end if a start failed, or if a model stays down until a person acts.
    """
    # The locks of its ports are enough for one that the keeper has asked for: a server that died does not wait for
    # another model, which may load for minutes.
    if request.wedged:
        _stop_wedged(ctx, request)
    with contextlib.nullcontext() if request.ports else ctx.hold_lock(RESTORE):
        plan = _make_plan(ctx, request, record_lasting=not request.dry_run)
        for state in plan.inactive_jobs:
            ctx.note(f"the boot job {state.job.name} of port {state.job.port} is {state.standing}: {state.detail}")
        for step in plan.steps.skipped:
            _warn_skipped(ctx, step)
        return _dry_run(ctx, request, plan) if request.dry_run else _start_all(ctx, request, plan)


def _stop_wedged(ctx: Context, request: Restore) -> None:
    """Stop a server of ours that completes nothing. It stays assigned, so that it is started next. Raises what `stop`
    raises."""
    port = request.ports[0]
    with ctx.hold_port(port):
        view = ctx.observe_port(port)
        run = view.run
        same = run is not None and f"{run.pid} {run.start}" == request.wedged
        if run is None or not same or view.owner is not Owner.MLXOPS or run.adopted or run.stopped_by:
            raise Refused(
                "not_wedged",
                f"port {port} has another server now, or none",
                why="it changed after the keeper had judged it",
                hint="look: `mlxctl status`",
            )
        stop(ctx, view)


def pause_of(ctx: Context, step: RestoreStep) -> RestoreStep | None:
    """Return the reason not to start a step now, because its last starts did not last; None if there is none."""
    starts = starts_of(ctx.history())
    return pause(step, in_vain(starts, _records(ctx, starts), _now(ctx)).get(step, ()))


def current_plan(ctx: Context, request: Restore) -> RestorePlan:
    """Return what `restore` would do now. Start nothing, but record in the history which servers have lasted."""
    return _make_plan(ctx, request, record_lasting=True).steps


def _dry_run(ctx: Context, request: Restore, plan: _HostPlan) -> RestoreResult:
    """Return the starts with their argv, and the starts that would be refused."""
    starts: list[RestoreRow] = []
    failed: list[RestoreStep] = []
    for step in plan.steps.starts:
        try:
            with hold(ctx, replace(_load_request(request, step), dry_run=True)) as held:
                planned = load(held).plan
        except Interrupted:
            raise
        except MlxopsError as error:
            failed.append(_failed_step(ctx, step, error))
            continue
        argv = planned.argv if planned else None
        starts.append(replace(_restore_row(step), argv=argv))
        ctx.note(f"{step.model} on {step.port}: {shlex.join(argv) if argv else 'its files would be downloaded first'}")
    result = replace(_restore_result(ctx, (), failed, plan.steps.skipped), restored=tuple(starts))
    _raise_incomplete(plan, failed, plan.steps.skipped, result, "would not start")
    return result


def _start_all(ctx: Context, request: Restore, plan: _HostPlan) -> RestoreResult:
    restored: list[RestoreStep] = []
    failed: list[RestoreStep] = []
    errors: list[MlxopsError] = []
    skipped = list(plan.steps.skipped)
    with name_left(ctx, errors):
        for step in plan.steps.starts:
            ctx.cancellation.check()
            try:
                if _start_step(ctx, request, step, first=step not in plan.attempts):
                    restored.append(step)
            except (PortExcluded, _NotWanted):
                skipped.append(replace(step, why=UNLOADED, in_hand=True))
                _warn_skipped(ctx, skipped[-1])
            except Interrupted:
                raise
            except MlxopsError as error:
                failed.append(_failed_step(ctx, step, error))
                errors.append(error)
    result = _restore_result(ctx, restored, failed, skipped)
    _raise_incomplete(plan, failed, skipped, result, "did not start", errors)
    return result


def _failed_step(ctx: Context, step: RestoreStep, error: MlxopsError) -> RestoreStep:
    """Warn of the error. Return the step with the error as its reason."""
    ctx.note(f"{step.model} on {step.port}: {error.message}: {error.why}", "warning")
    return replace(step, why=f"{error.code}: {error.message}")


def _raise_incomplete(
    plan: _HostPlan,
    failed: Sequence[RestoreStep],
    skipped: Sequence[RestoreStep],
    result: RestoreResult,
    verb: str,
    errors: Sequence[MlxopsError] = (),
) -> None:
    """Raise `NotStarted` (restore_incomplete) if models are down. `errors`: of the failed starts."""
    down = [*failed, *(step for step in skipped if step.stuck)]
    if not down:
        return
    names = ", ".join(f"{step.model} on {step.port}" for step in down)
    count = len(plan.steps.starts) + len(down) - len(failed)
    incomplete = NotStarted(
        "restore_incomplete",
        f"{len(down)} of {count} {verb}: {names}",
        why="; ".join(step.why for step in down)[:600],
        hint=f"what serves now: `mlxctl status`; then for each: `mlxctl load {down[0].model} {down[0].port}`",
        details=wire.encode(result),
    )
    add_left(incomplete, errors)
    raise incomplete


def _warn_skipped(ctx: Context, step: RestoreStep) -> None:
    ctx.note(f"{step.model} on {step.port} is skipped: {step.why}", "warning")


def _make_plan(ctx: Context, request: Restore, *, record_lasting: bool) -> _HostPlan:
    registry = ctx.usable_registry()
    history = ctx.history()
    world = ctx.observe(registry)
    starts = starts_of(history)
    now = _now(ctx)
    if record_lasting:
        for step in lasting(starts, world, now):
            ctx.remember(command="lasted", model=step.model, port=step.port)
    attempts = in_vain(starts, _records(ctx, starts), now)
    steps = plan_restore(
        registry,
        world,
        slots=ctx.paths.settings.slots,
        cleared=last_cleared(history) if request.cleared else (),
        attempts=attempts,
    )
    if request.ports:
        steps = RestorePlan(*(_on(request.ports, each) for each in (steps.starts, steps.skipped)))
    if steps.starts:
        require_folder(ctx.paths.hub)
    inactive = {state.job.port: state for state in world.boot if not state.standing.reserves}
    return _HostPlan(steps, attempts, tuple(inactive[step.port] for step in steps.starts if step.port in inactive))


def _on(ports: Sequence[int], steps: Iterable[RestoreStep]) -> tuple[RestoreStep, ...]:
    return tuple(step for step in steps if step.port in ports)


def _now(ctx: Context) -> Now:
    return Now(ctx.system.boot_id(), ctx.system.booted_at(), time.time(), time.monotonic())


def _records(ctx: Context, steps: Iterable[RestoreStep]) -> dict[int, Record]:
    """Return the run records of the steps' ports. Skip records that cannot be read."""
    records = {}
    for port in {step.port for step in steps}:
        with contextlib.suppress(OSError, ValueError):
            if run := ctx.store.run(port):
                log_changed = None
                with contextlib.suppress(OSError):
                    log_changed = ctx.store.log_path(port).stat().st_mtime
                records[port] = Record(run.model, run.boot_id, run.proven_at is not None, log_changed)
    return records


def _load_request(request: Restore, step: RestoreStep) -> Load:
    return Load(model=step.model, port=str(step.port), restore=True, kill=request.kill)


def _start_step(ctx: Context, request: Restore, step: RestoreStep, *, first: bool) -> bool:
    """Load a step's model. Return whether a server was started. `first`: no earlier start failed.

    Raises what `load` raises, `PortExcluded`, `_NotWanted`.
    """
    load_request = replace(_load_request(request, step), first_attempt=first)
    with ctx.cancellation.for_port(step.port), hold(ctx, load_request) as held:
        if not is_wanted(held.registry, step, cleared=request.cleared):
            raise _NotWanted("not_wanted", f"{step.model} is not assigned to port {step.port} any more")
        return load(held).changed


def _restore_result(
    ctx: Context, restored: Sequence[RestoreStep], failed: Sequence[RestoreStep], skipped: Sequence[RestoreStep]
) -> RestoreResult:
    return RestoreResult(
        restored=tuple(map(_restore_row, restored)),
        failed=tuple(map(_restore_row, failed)),
        skipped=tuple(map(_restore_row, skipped)),
        changed=bool(restored) and not ctx.request.dry_run,
        dry_run=ctx.request.dry_run,
    )


def _restore_row(step: RestoreStep) -> RestoreRow:
    again_in = None if step.again_in is None else round(step.again_in, 3)
    why, commands = split(step.why)
    return RestoreRow(step.model, step.port, why, commands, again_in)
