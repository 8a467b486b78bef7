"""`status` and `list`: what is there. They change nothing."""

from __future__ import annotations

from mlxops.agent.journal import activity
from mlxops.agent.operations.context import Context
from mlxops.agent.operations.drift import further_drift, rebooted
from mlxops.agent.operations.files import Files, registered
from mlxops.agent.operations.ops import downloads
from mlxops.agent.operations.probe import failed, probe
from mlxops.core.registry import Model, refusal


def status(ctx: Context) -> dict[str, object]:
    registry = ctx.registry()
    world = ctx.observe(registry)
    rows = [view.to_wire() for port, view in sorted(world.ports.items()) if port in ctx.where.settings.ports]
    found = [*rebooted(ctx, registry, world), *world.drift, *further_drift(ctx, registry, world)]
    if ctx.request.flag("probe"):
        probes = probe(ctx, world)
        rows = [row | {"probe": probes.get(row["port"])} for row in rows]
        found += failed(world, probes)
    drift = [each.to_wire() for each in found]
    if registry.unwritable:
        error = refusal(registry.unwritable)
        drift.insert(0, {"code": error.code, "port": None, "model": None, "message": error.why, "hint": error.hint})
    running = [
        {"operation": each.id, "command": each.command, "detail": activity(ctx.store.state / "ops", each.id)}
        for each in downloads(ctx)
    ]
    return {"operations": running, "ports": rows, "drift": drift, "registry": str(ctx.where.registry)}


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
