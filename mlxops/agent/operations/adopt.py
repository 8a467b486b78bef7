"""Prove a server that was running before the load: adopt it, or accept the boot job's."""

from __future__ import annotations

from dataclasses import replace

from mlxops.agent.context import Context
from mlxops.agent.operations.preflight import Prepared, commit
from mlxops.agent.operations.server_names import names_of
from mlxops.agent.state.store import utc_now
from mlxops.common.http import NoCompletion
from mlxops.core import refusals
from mlxops.core.budget import limits_at_end
from mlxops.core.commands.load import Load
from mlxops.core.errors import MlxopsError, Refused
from mlxops.core.names import shown
from mlxops.core.planner import LoadPlan
from mlxops.core.ports import Owner, PortView
from mlxops.core.records import Run, run_of


def adopt(ctx: Context, request: Load, plan: LoadPlan, prepared: Prepared) -> None:
    """Adopt a live server that matches the request: prove it, record it, assign the port. Raises `Refused`."""
    from mlxops.agent.serving.launch import COMPLETION_SECONDS, prove

    view = plan.adopts
    assert view is not None
    run = view.run if view.owner is Owner.MLXOPS and view.run else _adopted_run(ctx, view, plan, prepared)
    try:
        prove(ctx.paths, plan.alias, run, ctx.system, request.timeout or COMPLETION_SECONDS)
    except (OSError, NoCompletion) as error:
        raise Refused(
            "not_adopted",
            f"the server on port {plan.port} does not answer as {plan.alias}",
            why=str(error)[:300],
            hint=f"replace it: `mlxctl load {plan.target.name} {plan.port} --force`",
        ) from None
    with ctx.cancellation.shield():  # a cancellation in between would leave a record without an assignment
        ctx.store.save_run(replace(run, proven_at=utc_now()))
        try:
            ctx.store.registry.update(lambda current: commit(current, plan, prepared.files))
        except MlxopsError:
            # The server keeps serving. Restore its previous record.
            if view.run:
                ctx.store.save_run(view.run)
            else:
                ctx.store.forget_run(plan.port)
            raise
    ctx.remember(
        command="load",
        adopted=True,
        model=plan.target.name,
        port=plan.port,
        repo_id=plan.target.repo_id,
        revision=prepared.files.revision,
        pid=run.pid,
    )


def prove_boot_job(ctx: Context, request: Load, plan: LoadPlan, view: PortView) -> None:
    """Check that the boot job's server answers under the alias. Raises `Refused` (boot_port)."""
    from mlxops.agent.serving.launch import COMPLETION_SECONDS, prove

    if view.server is None:
        raise refusals.boot_port(view, "its server is gone")
    names = names_of(view)
    if names.not_asked:
        raise refusals.boot_port(view, f"its server is not asked: {names.not_asked}")
    if names.sure and not names.any and plan.alias not in names.known:
        why = f"its server answers to {' and '.join(map(shown, names.known))}, not to {plan.alias}"
        refused = refusals.boot_port(view, why[:300])
        refused.set_hint(f"have the boot job start it under the name {plan.alias}; or, {refused.marked_hint}")
        raise refused
    run = run_of(view.server, plan.port, ctx.system.boot_id())
    try:
        prove(ctx.paths, plan.alias, run, ctx.system, request.timeout or COMPLETION_SECONDS)
    except (OSError, NoCompletion) as error:
        why = f"its server does not answer as {plan.alias}: {error}"
        raise refusals.boot_port(view, why[:300]) from None


def _adopted_run(ctx: Context, view: PortView, plan: LoadPlan, prepared: Prepared) -> Run:
    server = view.server
    if server is None:
        raise Refused(
            "not_adopted", f"the server on port {plan.port} is gone", why="it ended a moment ago", hint="try again"
        )
    return replace(
        run_of(server, plan.port, ctx.system.boot_id()),
        model=plan.target.name,
        alias=plan.alias,
        repo_id=plan.target.repo_id,
        revision=prepared.files.revision,
        operation=ctx.operation,
        log_path=str(ctx.store.log_path(plan.port)),
        started_at=utc_now(),
        budget=limits_at_end(server.argv, prepared.wanted.limits),
    )
