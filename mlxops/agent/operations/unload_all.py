"""`unload-all`: stop every MLX server of the host."""

from __future__ import annotations

import time

from mlxops.agent.context import Context
from mlxops.agent.operations.stop import name_left
from mlxops.agent.operations.unload import make_way, unload_port, unload_result, with_cancelled
from mlxops.core import planner, refusals, wire
from mlxops.core.commands.load import PortResult
from mlxops.core.commands.unload_all import UnloadAll, UnloadAllResult
from mlxops.core.errors import Interrupted, MlxopsError
from mlxops.core.planner import UnloadPlan


def run(ctx: Context, request: UnloadAll) -> UnloadAllResult:
    """Unload each port separately: if one fails, continue with the others. Raises the merged errors at the end."""
    began = time.monotonic()
    registry = ctx.usable_registry()
    plans = planner.plan_unload_all(registry, ctx.observe(registry))
    done: list[PortResult] = []
    errors: list[MlxopsError] = []
    with name_left(ctx, errors):
        for plan in plans:
            try:
                done.append(_unload(ctx, plan, began))
            except Interrupted:
                raise
            except MlxopsError as error:
                ctx.note(f"{plan.port}: {error.message}", "warning")
                errors.append(error)
    result = UnloadAllResult(tuple(done), changed=any(row.changed for row in done), dry_run=request.dry_run)
    if errors:
        merged = refusals.merge_refusals(errors)
        merged.details |= wire.encode(result)
        raise merged
    return result


def _unload(ctx: Context, plan: UnloadPlan, began: float) -> PortResult:
    if not plan.changed:
        return unload_result(ctx, plan, began)
    cancelled = None if ctx.request.dry_run else make_way(ctx, plan.port, None)
    with ctx.hold_port(plan.port):
        ended = with_cancelled(unload_port(ctx, plan.port, force=True), cancelled)
        return unload_result(ctx, ended, began)
