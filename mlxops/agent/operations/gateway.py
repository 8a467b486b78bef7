"""`gateway`: report each port, so that the control node can compare it with the gateway's entries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlxops.agent.context import Context
from mlxops.agent.operations.server_names import name_fields, names_of, paths_of
from mlxops.core.commands.gateway import Gateway, ServedPort, ServedPorts
from mlxops.core.planner import recent_models, swap_seconds
from mlxops.core.ports import PortView
from mlxops.core.registry import Model, Registry
from mlxops.core.replies import ErrorRow


def run(ctx: Context, request: Gateway) -> ServedPorts:
    registry, world = ctx.registry_and_world()
    views = [view for port, view in sorted(world.ports.items()) if port in ctx.paths.settings.ports]
    error = ctx.warn_if_unusable(registry)
    history = ctx.history()
    swaps, recent = swap_seconds(history), recent_models(history)
    return ServedPorts(
        ports=tuple(_served_port(view, registry, swaps.get(view.port), recent.get(view.port, ())) for view in views),
        registry_error=ErrorRow.of(error) if error else None,
    )


def _served_port(view: PortView, registry: Registry, swap: float | None, recent: Sequence[str]) -> ServedPort:
    entry = registry.models.get(view.model or "")
    names = name_fields(names_of(view))
    return ServedPort(
        port=view.port,
        alias=view.alias,
        state=view.state.value,
        owner=view.owner.value if view.owner else None,
        model=view.model,
        answers_to=names.answers_to,
        also_answers_to=names.also_answers_to,
        answers_to_any=names.answers_to_any,
        drops_for_others=names.drops_for_others,
        not_asked=names.not_asked,
        paths=tuple(paths_of(view)),
        context_length=_context_length(entry) if entry and view.owner else None,
        assigned=bool(registry.on_port(view.port)),
        detail=view.detail,
        swap_seconds=swap,
        smallest_context=_smallest_context(view, registry, recent),
    )


def _smallest_context(view: PortView, registry: Registry, recent: Sequence[str]) -> int | None:
    assigned = [model.name for model in registry.on_port(view.port)]
    entries = [registry.models.get(name) for name in {view.model, *assigned, *recent} if name]
    contexts = [context for entry in entries if entry and (context := _context_length(entry))]
    return min(contexts, default=None)


def _context_length(entry: Model) -> int | None:
    """Return the entry's own limit, else that of the model's files."""
    if entry.context_length is not None or entry.cache_path is None:
        return entry.context_length
    from mlxops.agent.hub.snapshot import shape

    return shape(Path(entry.cache_path)).context_length
