"""`unload`: stop the server on a port, or of a model, and clear its assignment."""

from __future__ import annotations

import time
from dataclasses import replace

from mlxops.agent.context import DRAIN_SECONDS, RESTORE, Context, busy
from mlxops.agent.operations.stop import look_for_memory, report_registry_behind, shown_stop, stop, stop_portless
from mlxops.agent.serving.ending import longest_seconds
from mlxops.agent.serving.stranded import return_seconds
from mlxops.agent.state.operation_log import OperationLog, find_operation
from mlxops.core import names, planner
from mlxops.core.command import Draining
from mlxops.core.commands.load import PlanRow, PortResult
from mlxops.core.commands.unload import Unload
from mlxops.core.errors import UsageError
from mlxops.core.planner import UnloadPlan
from mlxops.core.records import Operation

CANCEL_SECONDS = 60.0
"""Time for a cancelled load to end, besides the time to stop its server and to start the old one again."""


def run(ctx: Context, request: Unload) -> PortResult:
    began = time.monotonic()
    ctx.usable_registry()
    model = _requested_model(request)
    cancelled: Operation | None = None
    while True:
        port = _current_port(ctx, request, model)
        if port is None:
            return unload_result(ctx, with_cancelled(UnloadPlan(0, model=model), cancelled), began)
        if not ctx.request.dry_run:
            entry = ctx.registry().named(model) if model else None
            cancelled = make_way(ctx, port, entry.name if entry else model) or cancelled
        with ctx.hold_port(port):
            # The model may have moved before the lock was taken. Then do not stop the model that is there now.
            if _current_port(ctx, request, model) == port:
                plan = unload_port(ctx, port, force=request.force)
                return unload_result(ctx, with_cancelled(plan, cancelled), began)


def with_cancelled(plan: UnloadPlan, load: Operation | None) -> UnloadPlan:
    """Return the plan with a load that was cancelled for it. If nothing else was unloaded, the load's model was."""
    if load is None or plan.changed:
        return plan
    note = f"the load of {load.model} on port {load.port} was cancelled"
    return replace(plan, port=plan.port or load.port or 0, model=load.model, cancelled=True, notes=(*plan.notes, note))


def _requested_model(request: Unload) -> str | None:
    """Return the model to unload from its current port; None: unload the given port."""
    port, model = request.port, request.model
    if (port is None) == (model is None):
        why = "neither is given" if port is None else "both are given"
        example = "what serves where: `mlxctl status`" if port is None else f"`mlxctl unload {port}`"
        raise UsageError("port_or_model", "unload takes a port or a model", why=why, hint=example)
    return None if model is None else names.model_name(model)


def _current_port(ctx: Context, request: Unload, model: str | None) -> int | None:
    if model is None:
        return names.port(request.port or "", ctx.paths.settings.ports)
    registry = ctx.registry()
    return planner.port_of(registry, ctx.observe(registry), model)


def unload_port(ctx: Context, port: int, *, force: bool) -> UnloadPlan:
    """Unload one port. The caller holds its lock.

    The assignment is cleared before the portless servers are stopped: they may take long, or not end at all.
    """
    registry = ctx.registry()
    plan = planner.plan_unload(registry, ctx.observe(registry), port, force=force)
    if ctx.request.dry_run:
        return plan
    if plan.stop is not None:
        stop(ctx, plan.stop)
    if plan.stop is not None or not plan.portless:  # else another process still holds the port
        _clear(ctx, plan)
    for server in plan.portless:
        stop_portless(ctx, server, port)
    return plan


def _clear(ctx: Context, plan: UnloadPlan) -> None:
    """Clear what the host records of a port that is free now."""
    port = plan.port
    look_for_memory(ctx, port)
    ctx.store.forget_run(port)
    with report_registry_behind(plan.stop):
        ctx.store.registry.update(lambda current: current.clear(model.name for model in current.on_port(port)))
    if plan.changed:
        ctx.remember(command="unload", model=plan.model, port=port)


def make_way(ctx: Context, port: int, model: str | None) -> Operation | None:
    """Cancel a load that runs on the port, and exclude the port from a running restore. Return the cancelled load.

    `model`: cancel only a load of this model. Wait until the operation has cleaned up and released the port's lock.
    Raises `Busy`.
    """
    restore = ctx.store.holder(RESTORE)
    if restore is not None and (journal := find_operation(ctx.store.state / "ops", restore.id)):
        journal.exclude_port(port)
        ctx.note(f"port {port} is excluded from {restore}")
    holder = ctx.store.holder(f"port-{port}")
    journal = find_operation(ctx.store.state / "ops", holder.id) if holder and holder.command == "load" else None
    if holder is None or journal is None or model not in {None, holder.model}:
        return None
    if model is None and holder.port != port:
        return None  # a load for another port, which moves its model away from this one
    restoring = _is_restore(journal)
    if restoring:
        journal.exclude_port(port)  # the restore may have begun after the first check
    else:
        ctx.note(f"cancelling {holder}")
        journal.cancel()
    deadline = time.monotonic() + cancel_seconds(ctx, port, holder.model, drain_of(journal))
    while ctx.store.holder(f"port-{port}") == holder:
        if time.monotonic() > deadline:
            raise busy(f"port-{port}", holder)
        time.sleep(0.02)
    return None if restoring else holder


def drain_of(journal: OperationLog) -> float:
    """Return the seconds that an operation gives to open requests before it cuts them off."""
    try:
        request = journal.request().request
    except (OSError, ValueError):
        return DRAIN_SECONDS
    drain = request.drain if isinstance(request, Draining) else None
    return DRAIN_SECONDS if drain is None else drain


def cancel_seconds(ctx: Context, port: int, model: str | None, drain: float = DRAIN_SECONDS) -> float:
    """Return how long a cancelled load of a model on a port may take to end. Its server may still grow to its estimate.

    A swap or a move stops the old servers, which cannot be interrupted, and starts them again. Each has `drain` seconds
    for its open requests.
    """
    from mlxops.agent.operations.model_files import registered
    from mlxops.agent.serving.launch import deadline_for

    load = ctx.reserved().get(port)
    models = ctx.registry().models.values()
    old = [each for each in models if each.port is not None and (each.port == port or each.name == model)]
    ports = {port, *(each.port for each in old if each.port in ctx.paths.settings.ports)}
    held = {at: ctx.observe_port(at).memory_bytes or 0 for at in ports if at is not None}
    held[port] = max(held[port], (load.reserves if load else None) or 0)
    stops = sum(drain + longest_seconds(size) + return_seconds(size) for size in held.values())
    files = [registered(each) for each in old]
    return CANCEL_SECONDS + stops + sum(deadline_for(each.size_bytes if each else 0) for each in files)


def _is_restore(journal: OperationLog) -> bool:
    try:
        return journal.request().request.name == RESTORE
    except (OSError, ValueError):
        return False


def unload_result(ctx: Context, plan: UnloadPlan, began: float) -> PortResult:
    port, dry_run = plan.port or None, ctx.request.dry_run
    return PortResult(
        model=plan.model,
        port=port,
        alias=ctx.paths.settings.slots.get(plan.port),
        url=ctx.paths.url(plan.port) if port else None,
        state=ctx.observe_port(port).state.value if port else "idle",
        changed=plan.changed and not dry_run,
        seconds=round(time.monotonic() - began, 3),
        log_path=plan.stop.run.log_path if plan.stop and plan.stop.run else None,
        notes=tuple(plan.notes),
        dry_run=dry_run,
        plan=_plan_row(plan) if dry_run else None,
    )


def _plan_row(plan: UnloadPlan) -> PlanRow:
    stops = [shown_stop(plan.stop, owner=True)] if plan.stop else []
    stops += [f"{each.model or 'a server'} for {plan.port}, pid {each.pid}, owner hand" for each in plan.portless]
    return PlanRow(stops=tuple(stops), clears=tuple(plan.clear))
