"""`set`: the per-model fields of the registry, checked. What a model serves with changes when it is started anew."""

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
    """Raises `Refused` for what could not be served with the new fields."""
    wanted = model_options.parse(request.set)
    registry = ctx.usable_registry()
    target = planner.resolve(registry, names.model_name(request.model or ""), None, None)
    if target.entry is None:
        raise unknown_model(target.name, registry)
    name = target.entry.name
    after = _apply(registry, name, wanted)
    changed = after.raw != registry.raw
    if changed:
        _check(ctx, planner.resolve(after, name, None, None), after.models[name], wanted)
    if changed and not request.dry_run:
        after = ctx.store.registry.update(lambda current: _apply(current, name, wanted))
        ctx.remember(command="set", model=name, written=dict(wanted.written), removed=list(wanted.removed))
    entry = after.models[name]
    running = _runs_otherwise_on(ctx, after, name) if changed else None
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


def _apply(registry: Registry, name: str, wanted: Fields) -> Registry:
    if name not in registry.models:
        raise unknown_model(name, registry)
    if wanted.written:
        registry = registry.set_fields(name, wanted.written)
    gone = [key for key in wanted.removed if key in registry.entry(name)]
    return registry.without_fields(name, gone) if gone else registry


def _check(ctx: Context, target: ModelRef, entry: Model, wanted: Fields) -> None:
    """As a load would: with the engine that is installed and the files that are here, as far as they are."""
    engine_named(entry.engine or ctx.paths.settings.engine)
    if not wanted.written:
        return
    try:
        files = cached(ctx, target)
        if files is not None:
            prepare(ctx, ModelRef(entry.name, entry.repo_id or "", files.revision, entry), _some_port(ctx), files)
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


def _some_port(ctx: Context) -> int:
    return ctx.paths.settings.ports.first


def _runs_otherwise_on(ctx: Context, registry: Registry, name: str) -> int | None:
    """The port where the model runs with other settings than it would get now."""
    for view in ctx.observe(registry).ports.values():
        if view.run is not None and view.run.model == name and any(settings_drift(ctx, registry, view)):
            return view.port
    return None
