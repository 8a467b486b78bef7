"""Choose the limits of a new server from the memory that is left, and name what may exhaust the host's memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlxops.agent.context import Context
from mlxops.agent.engines.inspection import optional_help
from mlxops.agent.host.memory import HostMemory
from mlxops.agent.serving.memory import estimate_of
from mlxops.core import budget, dangers
from mlxops.core.budget import LimitOptions, Limits
from mlxops.core.memory import Estimate, Use
from mlxops.core.planner import LoadPlan
from mlxops.core.registry import Model, Registry
from mlxops.core.settings import Settings
from mlxops.core.text import amount

if TYPE_CHECKING:
    from mlxops.agent.operations.preflight import Prepared
    from mlxops.core.doctor.findings import Finding


def installed_options(ctx: Context, prepared: Prepared) -> LimitOptions:
    """Return the options that a load may add: those that the installed engine has and the entry does not set itself.

    The engine prints its help text, which takes seconds the first time. Do this before memory is locked.
    """
    engine, keep = prepared.engine, not ctx.request.dry_run
    text = optional_help(engine, prepared.command, ctx.engine_environ, ctx.store, keep=keep)
    return prepared.limit_options.only(set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text or "")))


def give(
    ctx: Context,
    registry: Registry,
    plan: LoadPlan,
    prepared: Prepared,
    options: LimitOptions,
    need: Estimate,
    staying: Sequence[Use],
    size: int,
) -> tuple[Prepared, list[str]]:
    """Return the server with its limits, and warnings. Say what it may take.

    `options`: those of `installed_options`. `need`: its estimate. `staying`: the other servers. `size`: the budget.
    """
    later = awaited(ctx.paths.settings, registry, plan, staying)
    spare = size - sum(use.possible for use in staying) - later - need.total
    prepared = replace(prepared, budget=_choose(options, prepared, need, spare))
    most = budget.limited(need, _limits(prepared), cached=_keeps_caches(prepared))
    prepared = replace(prepared, estimate=most)
    ctx.note(_describe(prepared, most))
    return prepared, _warnings(ctx, plan, prepared, most, staying, size)


def _choose(options: LimitOptions, prepared: Prepared, need: Estimate, spare: int) -> tuple[str, ...]:
    own = prepared.engine.read_limits(prepared.wanted.argv)
    if not options.requests and own.requests is None:  # such a version answers one request at a time
        own = replace(own, requests=1, prompts=1)
    return options.words(budget.choose(need, spare, own, cached=_keeps_caches(prepared)))


def awaited(settings: Settings, registry: Registry, plan: LoadPlan, staying: Sequence[Use]) -> int:
    """Return the bytes that the assigned models need that do not serve. After a reboot, the first must leave room."""
    taken = {plan.port, *(use.port for use in staying)}
    models = [each for each in registry.models.values() if each.port not in taken and each.name != plan.target.name]
    return sum(_needs(settings, model) for model in models if model.port is not None)


def _needs(settings: Settings, model: Model) -> int:
    from mlxops.agent.operations.preflight import expected_context, expected_type

    if model.cache_path is None:
        return 0
    context, kind = expected_context(settings, model), expected_type(settings, model)
    expected = estimate_of(Path(model.cache_path), context, kind)
    return expected.total if expected else 0


def _describe(prepared: Prepared, most: Estimate) -> str:
    """Return a sentence that says what the server may take, and what its engine cannot limit."""
    limits, name = _limits(prepared), prepared.engine.name
    counted = f": {most.context_tokens} tokens are counted" if most.context_tokens else ""
    length = f"{name} does not limit the length of a context{counted}"
    if limits == Limits():
        return f"no limits of its memory are set: the installed {name} is not known to have any; {length}"
    kept = f", {amount(limits.cache_bytes)} of contexts" if limits.cache_bytes else ""
    files = " (those that are kept are files)" if kept and not _keeps_caches(prepared) else ""
    requests = f"{limits.contexts} request{'s'[: limits.contexts != 1]} at once"
    return f"limits: {requests}{kept}{files}; it may take up to {amount(most.total)}; {length}"


def _warnings(
    ctx: Context, plan: LoadPlan, prepared: Prepared, most: Estimate, staying: Sequence[Use], size: int
) -> list[str]:
    """Return what may exhaust the memory or wedge the GPU of the host. `size`: its budget."""
    growing = prepared.engine.is_unbounded(prepared.argv, prepared.command.version)
    new = Use(plan.port, plan.target.name, "mlxops", None, most.total, None, unbounded=growing)
    found = [
        *host_dangers(ctx),
        dangers.unbounded_servers([*staying, new]) if growing else None,
        dangers.limits_over_budget([*staying, new], size),
    ]
    return [f"{danger.message}; {danger.hint}" for danger in found if danger]


def host_dangers(ctx: Context) -> list[Finding]:
    """Judge what servers get from the host: their environment, and the GPU's wired limit."""
    ours = dangers.FAST_SYNCH in ctx.paths.settings.env
    where = "env in hosts.yaml" if ours else "the environment of mlxops on the host"
    found = dangers.metal_fast_synch(ctx.engine_environ, where), raised_wired_limit(ctx.system.host_memory())
    return [danger for danger in found if danger]


def raised_wired_limit(memory: HostMemory) -> Finding | None:
    """Judge the GPU's wired limit of a Mac, if an administrator set it."""
    if not memory.gpu_limit_set:
        return None
    from mlxops.agent.host.darwin import default_gpu_limit

    return dangers.wired_limit(memory.gpu_limit, default_gpu_limit(memory.total), memory.total)


def _limits(prepared: Prepared) -> Limits:
    return prepared.engine.read_limits(prepared.argv)


def _keeps_caches(prepared: Prepared) -> bool:
    return prepared.engine.keeps_caches_in_memory(prepared.command.version)
