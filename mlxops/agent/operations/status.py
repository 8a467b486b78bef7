"""`status`, `list` and `gateway`: what is there. They change nothing."""

from __future__ import annotations

from pathlib import Path

from mlxops.agent.context import Context
from mlxops.agent.operations.drift import conflicted_copies, further_drift, rebooted
from mlxops.agent.operations.ops import downloads
from mlxops.agent.state.operation_log import stand_of
from mlxops.core.drift import Drift, DriftCode
from mlxops.core.errors import MlxopsError, Refused
from mlxops.core.ports import PortView
from mlxops.core.records import Operation
from mlxops.core.registry import Model, Registry


def status(ctx: Context) -> dict[str, object]:
    registry, world = ctx.look()
    rows = [view.to_wire() for port, view in sorted(world.ports.items()) if port in ctx.paths.settings.ports]
    found = [*rebooted(ctx, registry, world), *world.drift, *further_drift(ctx, registry, world)]
    if ctx.request.flag("probe"):
        from mlxops.agent.operations.probe import failed, probe

        probes = probe(ctx, world)
        rows = [row | {"probe": probes.get(row["port"])} for row in rows]
        found += failed(world, probes)
    if registry.unwritable:
        error = ctx.store.registry.refusal(registry)
        code = DriftCode.REGISTRY_MISSING if registry.missing else DriftCode.REGISTRY_UNUSABLE
        found.insert(0, Drift(code, None, None, f"{error.message}: {error.why}", error.hint))
    drift = [each.to_wire() for each in (*found, *conflicted_copies(ctx))]
    running = [_running(ctx, each) for each in downloads(ctx)]
    return {"operations": running, "ports": rows, "drift": drift, "registry": str(ctx.paths.registry)}


def _running(ctx: Context, operation: Operation) -> dict[str, object]:
    stand = stand_of(ctx.store.state / "ops", operation.id)
    progress = stand.progress.to_wire() if stand.progress else None
    return {"operation": operation.id, "command": operation.command, "detail": str(stand), "progress": progress}


def answering(ctx: Context) -> dict[str, object]:
    """`gateway`: what a gateway's entries have to agree with, port by port."""
    registry, world = ctx.look()
    rows = [
        _answering_row(view, registry) for port, view in sorted(world.ports.items()) if port in ctx.paths.settings.ports
    ]
    error = _tell_unusable(ctx, registry)
    return {"ports": rows, "registry_error": error.to_wire() if error else None}


def _answering_row(view: PortView, registry: Registry) -> dict[str, object]:
    from mlxops.agent.operations.server_names import names_of, paths_of, to_wire

    entry = registry.models.get(view.model or "")
    return {
        "port": view.port,
        "alias": view.alias,
        "state": view.state.value,
        "owner": view.owner.value if view.owner else None,
        "model": view.model,
        **to_wire(names_of(view)),
        "paths": paths_of(view),
        "context_length": _context_length(entry) if entry and view.owner else None,
        "assigned": bool(registry.on_port(view.port)),
        "detail": view.detail,
    }


def _context_length(entry: Model) -> int | None:
    """What the entry limits it to, else what the model's files say."""
    if entry.context_length is not None or entry.cache_path is None:
        return entry.context_length
    from mlxops.agent.hub.snapshot import shape

    return shape(Path(entry.cache_path)).context_length


def list_models(ctx: Context) -> dict[str, object]:
    registry = ctx.registry()
    error = _tell_unusable(ctx, registry)
    for each in conflicted_copies(ctx):
        ctx.note(f"{each.message}: {each.hint}", "warning")
    rows = [_list_row(ctx, model) for model in registry.models.values()]
    result: dict[str, object] = {"models": rows, "registry": str(ctx.paths.registry), "unusable": registry.unwritable}
    result["registry_error"] = error.to_wire() if error else None
    return result | ({"memory": _memory(ctx, registry)} if ctx.request.flag("memory") else {})


def _tell_unusable(ctx: Context, registry: Registry) -> MlxopsError | None:
    """Note and return the error with which every change is refused while the registry is unusable; None if it is
    usable."""
    if not registry.unwritable:
        return None
    error = ctx.store.registry.refusal(registry)
    ctx.note(f"{error.message}: {error.why}; {error.hint}", "warning")
    return error


def _memory(ctx: Context, registry: Registry) -> dict[str, object]:
    """The budget, what takes of it now, and what is left."""
    from mlxops.agent.serving.memory import budget, in_use

    limit = budget(ctx.paths)
    uses = in_use(ctx.observe(registry), ctx.system, ctx.reserved())
    used = sum(use.counted for use in uses)
    return {
        "budget_bytes": limit.size,
        "budget_source": limit.source,
        "used_bytes": used,
        "left_bytes": limit.size - used,
        "servers": [use.to_wire() for use in uses],
    }


def _list_row(ctx: Context, model: Model) -> dict[str, object]:
    from mlxops.agent.hub.cache import Skipped, Snapshot, find
    from mlxops.agent.hub.snapshot import shape
    from mlxops.agent.operations.model_files import ModelFiles, registered
    from mlxops.agent.operations.preflight import shown_options

    problems = list(model.problems)
    files = registered(model)
    if files is None and model.repo_id is not None:
        try:
            found = find(ctx.paths.hub, model.repo_id, model.revision)
        except Refused as closed:
            found = Skipped(model.repo_id, ctx.paths.hub, f"{closed.message}: {closed.why}", incomplete=True)
        if found is None:
            problems.append("its files are not in the cache; load downloads them")
        elif isinstance(found, Snapshot):
            files = ModelFiles(found.revision, found.path, found.size_bytes)
            problems.append(f"cache_path is dead; its files are at {found.path}")
        else:
            problems.append(f"its files: {found.why}")
    path = files.path if files else None
    shaped = shape(path) if path else None
    return {
        "name": model.name,
        "repo_id": model.repo_id,
        "model_id": model.model_id,
        "revision": files.revision if files else model.revision,
        "cache_path": model.cache_path,
        "format": model.format,
        "port": model.port,
        "engine": model.engine or ctx.paths.settings.engine,
        "size_bytes": files.size_bytes if files else None,
        "context_length": model.context_length or (shaped.context_length if shaped else None),
        "flags": shown_options(ctx, model, path),
        **({"memory": _expected(path, model)} if ctx.request.flag("memory") else {}),
        "problems": problems,
    }


def _expected(path: Path | None, model: Model) -> dict[str, object] | None:
    from mlxops.agent.operations.preflight import served_as
    from mlxops.agent.serving.memory import estimate_of

    expected = estimate_of(path, model.context_length, served_as(model)) if path else None
    return expected.to_wire() if expected else None
