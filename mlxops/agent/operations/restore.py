"""`restore`: start what the registry assigns and nothing serves; after a reboot, and when servers crash."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from mlxops.agent.context import RESTORE, Context, PortExcluded
from mlxops.agent.operations.load import load
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
    plan_restore,
    starts_of,
)
from mlxops.core.ports import JobState
from mlxops.core.registry import Registry

UNLOADED = "it was unloaded meanwhile"


class _NotWanted(Refused):
    """Somebody has unloaded it since the plan was made."""


@dataclass(frozen=True)
class _Plan:
    steps: RestorePlan
    attempts: Mapping[RestoreStep, Sequence[float]]
    """How many seconds ago each was started in vain, newest first."""
    gone: tuple[JobState, ...]
    """Boot jobs of ports to start that are disabled or not installed: they do not reserve their ports."""


def run(ctx: Context, request: Restore) -> RestoreResult:
    """Start each assignment that nothing serves, in the order of the ports. One that fails does not stop the others.

    Raises `NotStarted` (restore_incomplete) at the end if one failed, or stays down until a person acts."""
    with ctx.hold_lock(RESTORE):
        plan = _plan(ctx, request, keep=not request.dry_run)
        for state in plan.gone:
            ctx.note(f"the boot job {state.job.name} of port {state.job.port} is {state.standing}: {state.detail}")
        for step in plan.steps.skipped:
            _tell_left(ctx, step)
        return _try_out(ctx, plan) if request.dry_run else _carry_out(ctx, request, plan)


def look(ctx: Context, request: Restore) -> RestorePlan:
    """What `restore` would do now. Nothing is changed, but what is seen to last is remembered."""
    return _plan(ctx, request, keep=True).steps


def _try_out(ctx: Context, plan: _Plan) -> RestoreResult:
    """What would be started, and how; and what would be refused."""
    starts: list[RestoreRow] = []
    failed: list[RestoreStep] = []
    for step in plan.steps.starts:
        wanted = replace(_load_of(step), dry_run=True)
        try:
            tried = load(ctx.with_request(wanted), wanted).plan
        except Interrupted:
            raise
        except MlxopsError as error:
            failed.append(_not_started(ctx, step, error))
            continue
        argv = tried.argv if tried else None
        starts.append(replace(_row(step), argv=argv))
        ctx.note(f"{step.model} on {step.port}: {shlex.join(argv) if argv else 'its files would be downloaded first'}")
    result = replace(_result(ctx, (), failed, plan.steps.skipped), restored=tuple(starts))
    _raise_incomplete(plan, failed, plan.steps.skipped, result, "would not start")
    return result


def _carry_out(ctx: Context, request: Restore, plan: _Plan) -> RestoreResult:
    restored: list[RestoreStep] = []
    failed: list[RestoreStep] = []
    left = list(plan.steps.skipped)
    for step in plan.steps.starts:
        ctx.cancellation.check()
        try:
            if _start(ctx, request, step, afresh=step not in plan.attempts):
                restored.append(step)
        except (PortExcluded, _NotWanted):
            left.append(replace(step, why=UNLOADED, in_hand=True))
            _tell_left(ctx, left[-1])
        except Interrupted:
            raise
        except MlxopsError as error:
            failed.append(_not_started(ctx, step, error))
    result = _result(ctx, restored, failed, left)
    _raise_incomplete(plan, failed, left, result, "did not start")
    return result


def _not_started(ctx: Context, step: RestoreStep, error: MlxopsError) -> RestoreStep:
    ctx.note(f"{step.model} on {step.port}: {error.message}: {error.why}", "warning")
    return replace(step, why=f"{error.code}: {error.message}")


def _raise_incomplete(
    plan: _Plan, failed: Sequence[RestoreStep], skipped: Sequence[RestoreStep], result: RestoreResult, verb: str
) -> None:
    down = [*failed, *(step for step in skipped if step.stuck)]
    if not down:
        return
    named = ", ".join(f"{step.model} on {step.port}" for step in down)
    count = len(plan.steps.starts) + len(down) - len(failed)
    raise NotStarted(
        "restore_incomplete",
        f"{len(down)} of {count} {verb}: {named}",
        why="; ".join(step.why for step in down)[:600],
        hint=f"what serves now: `mlxctl status`; then for each: `mlxctl load {down[0].model} {down[0].port}`",
        details=wire.encode(result),
    )


def _tell_left(ctx: Context, step: RestoreStep) -> None:
    ctx.note(f"{step.model} on {step.port} is left: {step.why}", "warning")


def _plan(ctx: Context, request: Restore, *, keep: bool) -> _Plan:
    registry = ctx.usable_registry()
    history = ctx.history()
    world = ctx.observe(registry)
    starts = starts_of(history)
    now = _now(ctx)
    if keep:
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
    if steps.starts:
        require_folder(ctx.paths.hub)
    gone = {state.job.port: state for state in world.boot if not state.standing.reserves}
    return _Plan(steps, attempts, tuple(gone[step.port] for step in steps.starts if step.port in gone))


def _now(ctx: Context) -> Now:
    return Now(ctx.system.boot_id(), ctx.system.booted_at(), time.time(), time.monotonic())


def _records(ctx: Context, steps: Iterable[RestoreStep]) -> dict[int, Record]:
    """What is recorded of the ports of these steps; what cannot be read says nothing."""
    found = {}
    for port in {step.port for step in steps}:
        with contextlib.suppress(OSError, ValueError):
            if run := ctx.store.run(port):
                sign = None
                with contextlib.suppress(OSError):
                    sign = ctx.store.log_path(port).stat().st_mtime
                found[port] = Record(run.model, run.boot_id, run.proven_at is not None, sign)
    return found


def _load_of(step: RestoreStep) -> Load:
    return Load(model=step.model, port=str(step.port), restore=True)


def _start(ctx: Context, request: Restore, step: RestoreStep, *, afresh: bool) -> bool:
    """Remembered just before its server is launched: what takes the whole host down counts as well, and what is
    refused before does not. `afresh`: none was started in vain before. Raises what `load` raises, `PortExcluded` and
    `_NotWanted`."""

    def check(registry: Registry) -> None:
        if not is_wanted(registry, step, cleared=request.cleared):
            raise _NotWanted("not_wanted", f"{step.model} is not assigned to port {step.port} any more")

    def remember() -> None:
        ctx.remember(
            command="restore",
            model=step.model,
            port=step.port,
            boot_id=ctx.system.boot_id(),
            wall=round(time.time(), 3),
            monotonic=round(time.monotonic(), 3),
            afresh=afresh,
        )

    wanted = _load_of(step)
    with ctx.cancellation.for_port(step.port):
        return load(ctx.with_request(wanted), wanted, check, remember).changed


def _result(
    ctx: Context, restored: Sequence[RestoreStep], failed: Sequence[RestoreStep], skipped: Sequence[RestoreStep]
) -> RestoreResult:
    return RestoreResult(
        restored=tuple(map(_row, restored)),
        failed=tuple(map(_row, failed)),
        skipped=tuple(map(_row, skipped)),
        changed=bool(restored) and not ctx.request.dry_run,
        dry_run=ctx.request.dry_run,
    )


def _row(step: RestoreStep) -> RestoreRow:
    again_in = None if step.again_in is None else round(step.again_in, 3)
    why, commands = split(step.why)
    return RestoreRow(step.model, step.port, why, commands, again_in)
