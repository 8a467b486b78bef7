"""`restore`: start what the registry assigns and nothing serves; after a reboot, and when servers crash."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from mlxops.agent import boot
from mlxops.agent.operations.context import RESTORE, Context, TakenOut
from mlxops.agent.operations.load import load
from mlxops.core.errors import Interrupted, MlxopsError, NotStarted, Refused
from mlxops.core.registry import Registry
from mlxops.core.restore import RestorePlan, Step, attempts_of, is_wanted, last_cleared, plan_restore

UNLOADED = "it was unloaded meanwhile"


class _NotWanted(Refused):
    """Somebody has unloaded it since the plan was made."""


def restore(ctx: Context) -> dict[str, object]:
    """Each on its own, in the order of the ports: what does not start, or does not fit beside those before it, keeps
    nobody else from starting. Raises `NotStarted` (restore_incomplete) in the end if there was such a one."""
    with ctx.alone(RESTORE):
        plan = _plan(ctx)
        for step in plan.skipped:
            _tell_left(ctx, step)
        if ctx.request.dry_run:
            return _result(ctx, plan.starts, (), plan.skipped)
        return _carry_out(ctx, plan)


def _carry_out(ctx: Context, plan: RestorePlan) -> dict[str, object]:
    restored: list[Step] = []
    failed: list[Step] = []
    left = list(plan.skipped)
    for step in plan.starts:
        ctx.cancellation.check()
        try:
            if _start(ctx, step):
                restored.append(step)
        except (TakenOut, _NotWanted):
            left.append(replace(step, why=UNLOADED))
            _tell_left(ctx, left[-1])
        except Interrupted:
            raise
        except MlxopsError as error:
            ctx.note(f"{step.model} on {step.port}: {error.message}: {error.why}", "warning")
            failed.append(replace(step, why=f"{error.code}: {error.message}"))
    result = _result(ctx, restored, failed, left)
    if failed:
        raise NotStarted(
            "restore_incomplete",
            f"{len(failed)} of {len(plan.starts)} did not start: {', '.join(f'{s.model} on {s.port}' for s in failed)}",
            why="; ".join(step.why for step in failed)[:600],
            hint=f"what serves now: mlxctl status; then for each: mlxctl load {failed[0].model} {failed[0].port}",
            details=result,
        )
    return result


def _tell_left(ctx: Context, step: Step) -> None:
    ctx.note(f"{step.model} on {step.port} is left: {step.why}", "warning")


def _plan(ctx: Context) -> RestorePlan:
    registry = ctx.usable_registry()
    history = ctx.history()
    job = ctx.where.settings.boot
    return plan_restore(
        registry,
        ctx.observe(registry),
        boot_port=job.port if job and boot.job_is_there(job, ctx.environ) else None,
        cleared=last_cleared(history) if ctx.request.flag("cleared") else (),
        attempts=attempts_of(history, ctx.system.boot_id(), time.monotonic()),
    )


def _start(ctx: Context, step: Step) -> bool:
    """Remembered before it begins: a start that takes the whole host down counts as well. Raises what `load` raises,
    `TakenOut` and `_NotWanted`."""

    def remember(registry: Registry) -> None:
        if not is_wanted(registry, step, cleared=ctx.request.flag("cleared")):
            raise _NotWanted("not_wanted", f"{step.model} is not assigned to port {step.port} any more")
        ctx.remember(
            command="restore",
            model=step.model,
            port=step.port,
            boot_id=ctx.system.boot_id(),
            monotonic=round(time.monotonic(), 3),
        )

    asked = replace(ctx.request, command="load", args={"model": step.model, "port": str(step.port), "restore": True})
    with ctx.cancellation.part(step.port):
        return load(replace(ctx, request=asked), remember)["changed"] is True


def _result(
    ctx: Context, restored: Sequence[Step], failed: Sequence[Step], skipped: Sequence[Step]
) -> dict[str, object]:
    return {
        "restored": [step.to_wire() for step in restored],
        "failed": [step.to_wire() for step in failed],
        "skipped": [step.to_wire() for step in skipped],
        "changed": bool(restored) and not ctx.request.dry_run,
        "dry_run": ctx.request.dry_run,
    }
