"""`list`: the registered models, and the memory that they need."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mlxops.agent.context import Context
from mlxops.agent.host.memory import HostMemory
from mlxops.agent.operations.drift import conflicted_copies
from mlxops.core.commands.list import EstimateRow, HostRow, List, ListResult, MemoryRow, ModelRow, OptionRow, UseRow
from mlxops.core.errors import Refused
from mlxops.core.model_options import Origin
from mlxops.core.ports import World
from mlxops.core.registry import Model
from mlxops.core.replies import ErrorRow

if TYPE_CHECKING:
    from mlxops.core.memory import Estimate


def run(ctx: Context, request: List) -> ListResult:
    registry = ctx.registry()
    error = ctx.warn_if_unusable(registry)
    for drift in conflicted_copies(ctx):
        ctx.note(f"{drift.message}: {drift.hint}", "warning")
    return ListResult(
        models=tuple(_model_row(ctx, model, memory=request.memory) for model in registry.models.values()),
        registry=str(ctx.paths.registry),
        unusable=registry.unwritable,
        registry_error=ErrorRow.of(error) if error else None,
        memory=memory_row(ctx, ctx.observe(registry)) if request.memory else None,
    )


def memory_row(ctx: Context, world: World) -> MemoryRow:
    """Return the budget of the host and what its servers take of it."""
    from mlxops.agent.serving.memory import budget, in_use
    from mlxops.core.memory import STRANDED

    host = ctx.system.host_memory()
    limit = budget(ctx.paths, host)
    uses = in_use(world, ctx.system, ctx.reserved())
    used = sum(use.counted for use in uses)
    sums = {kind: sum(use.counted for use in uses if use.owner == kind) for kind in ("loading", STRANDED)}
    return MemoryRow(
        budget_bytes=limit.size,
        budget_source=limit.source,
        used_bytes=used,
        left_bytes=limit.size - used,
        servers=tuple(
            UseRow(
                port=use.port,
                model=use.model,
                owner=use.owner,
                pid=use.pid,
                estimated_bytes=use.estimated_bytes,
                resident_bytes=use.resident_bytes,
                counted_bytes=use.counted,
                limit_bytes=use.limit_bytes,
                limit=estimate_row(use.limit) if use.limit else None,
            )
            for use in uses
        ),
        held_bytes=sum(use.resident_bytes or 0 for use in uses if use.owner not in sums),
        reserved_bytes=sums["loading"],
        stranded_bytes=sums[STRANDED],
        host=_host_row(host),
    )


def _host_row(host: HostMemory) -> HostRow:
    return HostRow(
        total_bytes=host.total,
        in_use_bytes=host.in_use,
        wired_bytes=host.wired,
        unexplained_bytes=host.unexplained_wired,
        gpu_limit_bytes=host.gpu_limit,
        gpu_limit_default_bytes=host.gpu_limit_default,
        gpu_limit_set=host.gpu_limit_set,
        pressure=host.pressure,
        stalled_percent=host.stalled_percent,
        swap_total_bytes=host.swap_total,
        swap_used_bytes=host.swap_used,
    )


def _model_row(ctx: Context, model: Model, *, memory: bool) -> ModelRow:
    from mlxops.agent.hub.cache import Skipped, Snapshot, find
    from mlxops.agent.hub.snapshot import shape
    from mlxops.agent.operations.model_files import ModelFiles, registered
    from mlxops.agent.operations.preflight import option_rows

    problems = list(model.problems)
    files = registered(model)
    if files is None and model.repo_id is not None:
        try:
            copy = find(ctx.paths.hub, model.repo_id, model.revision)
        except Refused as refused:
            copy = Skipped(model.repo_id, ctx.paths.hub, f"{refused.message}: {refused.why}", incomplete=True)
        if copy is None:
            problems.append("its files are not in the cache; load downloads them")
        elif isinstance(copy, Snapshot):
            files = ModelFiles(copy.revision, copy.path, copy.size_bytes)
            problems.append(f"cache_path is dead; its files are at {copy.path}")
        else:
            problems.append(f"its files: {copy.why}")
    path = files.path if files else None
    facts = shape(path) if path else None
    return ModelRow(
        name=model.name,
        repo_id=model.repo_id,
        model_id=model.model_id,
        revision=files.revision if files else model.revision,
        cache_path=model.cache_path,
        format=model.format,
        port=model.port,
        engine=model.engine or ctx.paths.settings.engine,
        size_bytes=files.size_bytes if files else None,
        context_length=model.context_length or (facts.context_length if facts else None),
        flags=(*option_rows(ctx, model, path), *_budget_rows(ctx, model)),
        problems=tuple(problems),
        memory=_estimate(ctx, path, model) if memory and path else None,
    )


def _budget_rows(ctx: Context, model: Model) -> Iterator[OptionRow]:
    """Yield the limits that the model's server got at its load."""
    run = None
    with contextlib.suppress(OSError, ValueError):
        run = ctx.store.run(model.port) if model.port is not None else None
    if run is None or run.model != model.name or run.boot_id != ctx.system.boot_id():
        return
    for option, word in zip(run.budget[::2], run.budget[1::2], strict=False):
        value = int(word) if word.isdecimal() and len(word) < 19 else word
        yield OptionRow(option.removeprefix("--").replace("-", "_"), value, Origin.BUDGET.value)


def _estimate(ctx: Context, path: Path, model: Model) -> EstimateRow | None:
    from mlxops.agent.operations.preflight import expected_context, expected_type
    from mlxops.agent.serving.memory import estimate_of

    settings = ctx.paths.settings
    estimate = estimate_of(path, expected_context(settings, model), expected_type(settings, model))
    return estimate_row(estimate) if estimate else None


def estimate_row(estimate: Estimate) -> EstimateRow:
    """Return the parts of an estimate."""
    from mlxops.core.memory import ENGINE_BYTES

    return EstimateRow(
        weight_bytes=estimate.weight_bytes,
        context_bytes=estimate.context_bytes,
        context_tokens=estimate.context_tokens,
        state_bytes=estimate.state_bytes,
        upper_estimate=not estimate.certain,
        total_bytes=estimate.total,
        contexts=estimate.contexts,
        cache_bytes=estimate.cache_bytes,
        server_bytes=ENGINE_BYTES,
    )
