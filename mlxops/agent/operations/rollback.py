"""`rollback`: back to the model that a port served before. It is a load, of what the history says."""

from __future__ import annotations

from mlxops.agent.context import Context
from mlxops.agent.operations.load import load
from mlxops.agent.operations.model_files import cached
from mlxops.core import names, planner
from mlxops.core.commands.load import Load, LoadResult
from mlxops.core.commands.rollback import Rollback
from mlxops.core.errors import Busy, Refused
from mlxops.core.planner import ModelRef, Served
from mlxops.core.ports import State
from mlxops.core.registry import Registry


def run(ctx: Context, request: Rollback) -> LoadResult:
    port = names.port(request.port or "", ctx.paths.settings.ports)
    registry = ctx.usable_registry()
    now, before = _past(ctx, registry, port)
    if before is None:
        raise Refused(
            "nothing_to_roll_back_to",
            f"it is not known that port {port} ever served {'anything else' if now else 'anything'}",
            why=f"the history of this host has no other load on it ({ctx.store.state}/history.jsonl)",
            hint=_load_instead(registry, port, now),
        )
    _refuse_elsewhere(ctx, registry, port, before)
    repo = _repo(ctx, registry, before)
    ctx.note(f"port {port} served {before.model} before ({before.repo_id} at {before.revision[:12]})")

    def unchanged(registry: Registry) -> None:
        _refuse_elsewhere(ctx, registry, port, before)
        if _past(ctx, registry, port) != (now, before) or _repo(ctx, registry, before) != repo:
            raise Busy(
                "changed_meanwhile",
                f"what port {port} serves was changed a moment ago",
                why="what it served before is something else by now",
                hint=f"look first: `mlxctl status`; then, if it is still wanted: `mlxctl rollback {port}`",
            )

    wanted = Load(
        model=before.model,
        port=str(port),
        repo=repo,
        force=True,
        timeout=request.timeout,
        overcommit=request.overcommit,
        drain=request.drain,
        dry_run=request.dry_run,
        sent=request.sent,
        promised=request.promised,
    )
    return load(ctx.with_request(wanted), wanted, unchanged)


def _load_instead(registry: Registry, port: int, now: Served | None) -> str:
    other = next((name for name in registry.models if now is None or name != now.model), None)
    if other is None:
        return "the models that there are: `mlxctl list`"
    return f"load what you want there, for example: `mlxctl load {other} {port}{' --force' if now else ''}`"


def _past(ctx: Context, registry: Registry, port: int) -> tuple[Served | None, Served | None]:
    """What the port serves, and what it served before."""
    view = ctx.observe(registry).ports[port]
    run = view.run if view.members else None
    now = Served(run.model, run.repo_id, run.revision) if run else None
    if now is None and view.state not in {State.IDLE, State.FAILED}:
        now = Served(view.model or "", view.repo_id or "", view.revision or "")
    return now, planner.served_before(ctx.history(), port, now)


def _refuse_elsewhere(ctx: Context, registry: Registry, port: int, before: Served) -> None:
    """A rollback is of one port: another one is not emptied for it unasked."""
    for other, view in ctx.observe(registry).ports.items():
        if other != port and view.owner is not None and view.model == before.model:
            raise Refused(
                "model_elsewhere",
                f"{before.model}, which port {port} served before, is served on port {other} now",
                why="one model, one port",
                hint=f"move it: `mlxctl load {before.model} {port} --force`; or first: `mlxctl unload {other}`",
            )


def _repo(ctx: Context, registry: Registry, before: Served) -> str | None:
    """What the name has to be repointed to; None if a load of the name as it is registered brings just that."""
    entry = registry.models.get(before.model)
    if entry is not None and entry.repo_id == before.repo_id:
        files = cached(ctx, ModelRef(entry.name, before.repo_id, entry.revision, entry))
        if files is not None and files.revision == before.revision:
            return None
    return f"{before.repo_id}@{before.revision}"
