"""`reconcile`: clear assignments that no server serves, and stop servers without an assignment."""

from __future__ import annotations

from collections.abc import Mapping

from mlxops.agent.context import Context
from mlxops.agent.operations.stop import look_for_memory, name_left, report_registry_behind, stop
from mlxops.agent.serving.ending import STILL_ENDING
from mlxops.agent.state.recovery import settle_all
from mlxops.agent.state.store import state_unwritable
from mlxops.core import planner, wire
from mlxops.core.commands.reconcile import ClearedRow, Reconcile, ReconcileResult, StoppedRow
from mlxops.core.errors import Busy, Interrupted, MlxopsError
from mlxops.core.refusals import merge_refusals


def run(ctx: Context, request: Reconcile) -> ReconcileResult:
    registry = ctx.usable_registry()
    plan = planner.plan_reconcile(registry, ctx.observe(registry))
    ports = sorted({*(plan.clear or {}).values(), *plan.forget, *(view.port for view in plan.stops)})
    interrupted = settle_all(ctx.store, ctx.paths.settings.ports, by=ctx.operation, dry_run=ctx.request.dry_run)
    stopped, cleared, kept = list[StoppedRow](), list[ClearedRow](), list(plan.kept)
    errors: list[MlxopsError] = []
    with name_left(ctx, errors):
        for port in ports:
            try:
                with ctx.hold_port(port):
                    now_stopped, now_cleared = _reconcile_port(ctx, port)
            except Interrupted:
                raise
            except MlxopsError as error:
                kept.append(f"{port}: {error.message}")
                if not isinstance(error, Busy) or error.code == STILL_ENDING:
                    errors.append(error)
                continue
            stopped += now_stopped
            cleared += now_cleared
    if stopped and not ctx.request.dry_run:
        ctx.remember(command="reconcile", stopped=wire.encode(stopped))
    leftovers = ctx.store.leftovers() if ctx.request.dry_run else ctx.store.remove_leftovers()
    result = ReconcileResult(
        cleared=tuple(cleared),
        stopped=tuple(stopped),
        interrupted=tuple(interrupted),
        leftovers=tuple(map(str, leftovers)),
        kept=tuple(kept),
        changed=bool(stopped or cleared or interrupted or leftovers) and not request.dry_run,
        dry_run=request.dry_run,
    )
    if errors:
        merged = merge_refusals(errors)
        merged.details |= wire.encode(result)
        raise merged
    return result


def _reconcile_port(ctx: Context, port: int) -> tuple[list[StoppedRow], list[ClearedRow]]:
    """Observe the port again under its lock, because a load may have started since, and reconcile it."""
    registry = ctx.registry()
    world = ctx.observe(registry, only=[port])
    plan = planner.plan_reconcile(registry, world)
    clear = {name: at for name, at in (plan.clear or {}).items() if at == port}
    if not ctx.request.dry_run:
        if clear:
            _remember_cleared(ctx, clear)
        for view in plan.stops:
            stop(ctx, view)
        if clear:
            with report_registry_behind(next(iter(plan.stops), None)):
                ctx.store.registry.update(
                    lambda current: current.clear(m.name for m in current.on_port(port) if m.name in clear)
                )
        if plan.forget:
            look_for_memory(ctx, port)
            ctx.store.forget_run(port)
        for name in [name for name, at in (plan.again or {}).items() if at == port]:
            ctx.note(f"to serve {name} on port {port} again: `mlxctl load {name} {port}`")
    stopped = [StoppedRow(view.port, view.model, view.pid, view.detail) for view in plan.stops]
    return stopped, _cleared_rows(clear)


def _remember_cleared(ctx: Context, clear: Mapping[str, int]) -> None:
    """Write to the history what will be cleared, first.

    `restore --cleared` must find it even if this operation is killed. Raises `Refused` if it cannot be written.
    """
    try:
        ctx.store.append_history(
            operation=ctx.operation, by=str(ctx.asker), command="reconcile", cleared=wire.encode(_cleared_rows(clear))
        )
    except OSError as error:
        raise state_unwritable(ctx.store.state, error) from None


def _cleared_rows(clear: Mapping[str, int]) -> list[ClearedRow]:
    return [ClearedRow(name, port) for name, port in clear.items()]
