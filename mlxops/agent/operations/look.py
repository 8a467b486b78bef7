"""`status` and `list`: what is there. They change nothing."""

from __future__ import annotations

from mlxops.agent.operations.context import Context
from mlxops.agent.operations.drift import further_drift
from mlxops.agent.operations.files import Files, registered
from mlxops.core.registry import Model, refusal


def status(ctx: Context) -> dict[str, object]:
    registry = ctx.registry()
    world = ctx.observe(registry)
    rows = [view.to_wire() for port, view in sorted(world.ports.items()) if port in ctx.where.settings.ports]
    drift = [each.to_wire() for each in (*world.drift, *further_drift(ctx, registry, world))]
    if registry.unwritable:
        error = refusal(registry.unwritable)
        drift.insert(0, {"code": error.code, "port": None, "model": None, "message": error.why, "hint": error.hint})
    return {"ports": rows, "drift": drift, "registry": str(ctx.where.registry)}


def list_models(ctx: Context) -> dict[str, object]:
    registry = ctx.registry()
    if registry.unwritable:
        ctx.note(f"the registry {ctx.where.registry}: {registry.unwritable}", "warning")
    rows = [_list_row(ctx, model) for model in registry.models.values()]
    return {"models": rows, "registry": str(ctx.where.registry), "unusable": registry.unwritable}


def _list_row(ctx: Context, model: Model) -> dict[str, object]:
    from mlxops.agent.cache import Snapshot, find

    problems = list(model.problems)
    files = registered(model)
    if files is None and model.repo_id is not None:
        found = find(ctx.where.hub, model.repo_id, model.revision)
        if found is None:
            problems.append("its files are not in the cache; load downloads them")
        elif isinstance(found, Snapshot):
            files = Files(found.revision, found.path, found.size_bytes)
            problems.append(f"cache_path is dead; its files are at {found.path}")
        else:
            problems.append(f"its files: {found.why}")
    return {
        "name": model.name,
        "repo_id": model.repo_id,
        "model_id": model.model_id,
        "revision": files.revision if files else model.revision,
        "cache_path": model.cache_path,
        "format": model.format,
        "port": model.port,
        "engine": model.engine or ctx.where.settings.engine,
        "size_bytes": files.size_bytes if files else None,
        "problems": problems,
    }
