"""`restore`: start what the registry assigns and nothing serves; after a reboot, and when servers crash."""

from __future__ import annotations

import time
from dataclasses import replace

from mlxops.agent import boot
from mlxops.agent.operations.context import Context
from mlxops.agent.operations.load import load
from mlxops.core.errors import Interrupted, MlxopsError, NotStarted
from mlxops.core.restore import RestorePlan, Step, attempts_of, last_cleared, plan_restore


def restore(ctx: Context) -> dict[str, object]:
    """Each on its own, in the order of the ports: what does not start, or does not fit beside those before it, keeps
    nobody else from starting. Raises `NotStarted` (restore_incomplete) in the end if there was such a one."""
    plan = _plan(ctx)
    for step in plan.skipped:
        ctx.note(f"{step.model} on {step.port} is left: {step.why}", "warning")
    if ctx.request.dry_run:
        return _result(ctx, plan, plan.starts, [])
    restored: list[Step] = []
    failed: list[Step] = []
    for step in plan.starts:
        ctx.cancellation.check()
        try:
            if _start(ctx, step):
                restored.append(step)
        except Interrupted:
            raise
        except MlxopsError as error:
            ctx.note(f"{step.model} on {step.port}: {error.message}: {error.why}", "warning")
            failed.append(Step(step.model, step.port, f"{error.code}: {error.message}"))
    result = _result(ctx, plan, restored, failed)
    if failed:
        raise NotStarted(
            "restore_incomplete",
            f"{len(failed)} of {len(plan.starts)} did not start: {', '.join(f'{s.model} on {s.port}' for s in failed)}",
            why="; ".join(step.why for step in failed)[:600],
            hint=f"what serves now: mlxctl status; then for each: mlxctl load {failed[0].model} {failed[0].port}",
            details=result,
        )
    return result


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
    """Remembered before it begins: a start that takes the whole host down counts as well."""
    ctx.remember(
        command="restore",
        model=step.model,
        port=step.port,
        boot_id=ctx.system.boot_id(),
        monotonic=round(time.monotonic(), 3),
    )
    asked = replace(ctx.request, command="load", args={"model": step.model, "port": str(step.port), "restore": True})
    return load(replace(ctx, request=asked))["changed"] is True


def _result(
    ctx: Context, plan: RestorePlan, restored: list[Step] | tuple[Step, ...], failed: list[Step]
) -> dict[str, object]:
    return {
        "restored": [step.to_wire() for step in restored],
        "failed": [step.to_wire() for step in failed],
        "skipped": [step.to_wire() for step in plan.skipped],
        "changed": bool(restored) and not ctx.request.dry_run,
        "dry_run": ctx.request.dry_run,
    }
