"""`rollback`: load the model that a port served before, according to the history."""

from __future__ import annotations

from mlxops.agent.context import Context
from mlxops.agent.operations.load import hold, load
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
    now, before = _now_and_before(ctx, registry, port)
    if before is None:
        raise Refused(
            "nothing_to_roll_back_to",
            f"no earlier model of port {port} is known",
            why=f"the history ({ctx.store.state}/history.jsonl) has no other load on this port",
            hint=_load_hint(registry, port, now),
        )
    _refuse_elsewhere(ctx, registry, port, before)
    repo = _repo_argument(ctx, registry, before)
    ctx.note(f"port {port} served {before.model} before ({before.repo_id} at {before.revision[:12]})")

    load_request = Load(
        model=before.model,
        port=str(port),
        repo=repo,
        force=True,
        timeout=request.timeout,
        overcommit=request.overcommit,
        drain=request.drain,
        kill=request.kill,
        dry_run=request.dry_run,
        sent=request.sent,
        promised=request.promised,
    )
    with hold(ctx, load_request) as held:
        _refuse_elsewhere(ctx, held.registry, port, before)
        unchanged = _now_and_before(ctx, held.registry, port) == (now, before)
        if not unchanged or _repo_argument(ctx, held.registry, before) != repo:
            raise Busy(
                "changed_meanwhile",
                f"port {port} was changed a moment ago",
                why="a rollback would now bring back another model",
                hint=f"look first: `mlxctl status`; then, if you still want it: `mlxctl rollback {port}`",
            )
        return load(held)


def _load_hint(registry: Registry, port: int, now: Served | None) -> str:
    other = next((name for name in registry.models if now is None or name != now.model), None)
    if other is None:
        return "the registered models: `mlxctl list`"
    return f"load a model there, for example: `mlxctl load {other} {port}{' --force' if now else ''}`"


def _now_and_before(ctx: Context, registry: Registry, port: int) -> tuple[Served | None, Served | None]:
    """Return what the port serves, and what it served before."""
    view = ctx.observe(registry).ports[port]
    run = view.run if view.members else None
    now = Served(run.model, run.repo_id, run.revision) if run else None
    if now is None and view.state not in {State.IDLE, State.FAILED}:
        now = Served(view.model or "", view.repo_id or "", view.revision or "")
    return now, planner.served_before(ctx.history(), port, now)


def _refuse_elsewhere(ctx: Context, registry: Registry, port: int, before: Served) -> None:
    """Refuse to move the model from another port: a rollback changes only one. Raises `Refused` (model_elsewhere)."""
    for other, view in ctx.observe(registry).ports.items():
        if other != port and view.owner is not None and view.model == before.model:
            raise Refused(
                "model_elsewhere",
                f"{before.model}, which port {port} served before, is served on port {other} now",
                why="mlxops serves a model on one port only",
                hint=f"move it: `mlxctl load {before.model} {port} --force`; or first: `mlxctl unload {other}`",
            )


def _repo_argument(ctx: Context, registry: Registry, before: Served) -> str | None:
    """Return the repository to repoint the name to. None: the registered entry loads exactly what served before."""
    entry = registry.models.get(before.model)
    if entry is not None and entry.repo_id == before.repo_id:
        files = cached(ctx, ModelRef(entry.name, before.repo_id, entry.revision, entry))
        if files is not None and files.revision == before.revision:
            return None
    return f"{before.repo_id}@{before.revision}"
