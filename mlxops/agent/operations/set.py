"""`set`: check and write a model's fields in the registry. A running server keeps its settings until its restart."""

from __future__ import annotations

from mlxops.agent.context import Context
from mlxops.agent.engines import ENGINES, engine_named
from mlxops.agent.operations.drift import settings_drift
from mlxops.agent.operations.model_files import cached
from mlxops.agent.operations.preflight import option_rows, prepare
from mlxops.core import model_options, names, planner
from mlxops.core.commands.set import Set, SetResult
from mlxops.core.errors import Interrupted, MlxopsError, Refused
from mlxops.core.model_options import Fields
from mlxops.core.planner import ModelRef
from mlxops.core.refusals import unknown_model
from mlxops.core.registry import Model, Registry


def run(ctx: Context, request: Set) -> SetResult:
    """Raises `Refused` if the model could not be served with the new fields."""
    fields = model_options.parse(request.set)
    registry = ctx.usable_registry()
    target = planner.resolve(registry, names.model_name(request.model or ""), None, None)
    if target.entry is None:
        raise unknown_model(target.name, registry)
    name = target.entry.name
    after = _apply_fields(registry, name, fields)
    changed = after.raw != registry.raw
    if changed:
        _check_engine(ctx, planner.resolve(after, name, None, None), after.models[name], fields)
    if changed and not request.dry_run:
        after = ctx.store.registry.update(lambda current: _apply_fields(current, name, fields))
        ctx.remember(command="set", model=name, written=dict(fields.written), removed=list(fields.removed))
    entry = after.models[name]
    running = _outdated_server(ctx, after, name) if changed else None
    if running is not None:
        ctx.note(f"{name} serves port {running} with its old settings until: `mlxctl load {name} {running} --force`")
    return SetResult(
        model=name,
        changed=changed and not request.dry_run,
        dry_run=request.dry_run,
        revision=entry.revision,
        options=option_rows(ctx, entry),
        restart_needed_on=running,
    )


def _apply_fields(registry: Registry, name: str, fields: Fields) -> Registry:
    if name not in registry.models:
        raise unknown_model(name, registry)
    if fields.written:
        registry = registry.set_fields(name, fields.written)
    removed = [key for key in fields.removed if key in registry.entry(name)]
    return registry.without_fields(name, removed) if removed else registry


def _check_engine(ctx: Context, target: ModelRef, entry: Model, fields: Fields) -> None:
    """Check the new fields as a load would. Without the engine or the model's files, only warn. Raises `Refused`."""
    engine_named(entry.engine or ctx.paths.settings.engine)
    if not fields.written:
        return
    port = ctx.paths.settings.ports.first  # any port will do
    try:
        files = cached(ctx, target)
        if files is not None:
            prepare(ctx, ModelRef(entry.name, entry.repo_id or "", files.revision, entry), port, files)
            return
        why = "its files are not in the cache"
    except Interrupted:
        raise
    except Refused as refused:
        if refused.code != "engine_not_found":
            raise
        why = refused.message
    except MlxopsError as error:
        why = error.message
    ctx.note(f"not checked against an engine ({', '.join(ENGINES)}): {why}", "warning")


def _outdated_server(ctx: Context, registry: Registry, name: str) -> int | None:
    """Return the port where the model runs with other settings than a load would use now."""
    for view in ctx.observe(registry).ports.values():
        if view.run is not None and view.run.model == name and any(settings_drift(ctx, registry, view)):
            return view.port
    return None
