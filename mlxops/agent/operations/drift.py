"""What `status` tells beyond the ports themselves: servers that run with other settings than they would get now,
entries that a hand edit spoiled, operations that were cut short, and what killed writers left."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from mlxops.agent.context import Context
from mlxops.agent.engines.installation import cached_lookups
from mlxops.agent.serving import logs
from mlxops.agent.state import recovery
from mlxops.agent.state.store import format_utc
from mlxops.core.drift import Drift, DriftCode
from mlxops.core.errors import MlxopsError
from mlxops.core.ports import Owner, PortView, State, World
from mlxops.core.registry import Registry
from mlxops.core.text import amount


def further_drift(ctx: Context, registry: Registry, world: World) -> Iterator[Drift]:
    with cached_lookups():
        settings = [drift for view in world.ports.values() for drift in settings_drift(ctx, registry, view)]
    yield from settings
    for view in world.ports.values():
        if view.unserved and view.run is not None and not registry.on_port(view.port):
            message = f"{view.port}: a run record of {view.run.model} describes nothing that lives"
            yield Drift.of(DriftCode.LEFTOVER, view.port, view.run.model, message)
    for model in registry.models.values():
        for problem in model.problems:
            if "also claimed" not in problem:  # told as port_claimed_twice
                message = f"the registry entry {model.name}: {problem}"
                yield Drift.of(DriftCode.ENTRY_PROBLEM, model.port, model.name, message, registry=ctx.paths.registry)
    yield from recovery.drift(ctx.store, ctx.paths.settings.ports)
    yield from _too_big(ctx)
    for path in ctx.store.leftovers():
        yield Drift.of(DriftCode.LEFTOVER, None, None, f"{path} was left by a writer that was killed")


def rebooted(ctx: Context, registry: Registry, world: World) -> Iterator[Drift]:
    """Servers of before the host's last boot that are assigned and not back."""
    gone = [view.port for view in world.ports.values() if view.rebooted and view.unserved]
    down = [port for port in gone if registry.on_port(port)]
    if down:
        message = f"rebooted {format_utc(ctx.system.booted_at())}; {len(down)} assignment{'s'[: len(down) != 1]} down"
        yield Drift.of(DriftCode.REBOOTED, None, None, message)


def conflicted_copies(ctx: Context) -> Iterator[Drift]:
    """Yield the copies that a sync service left beside the registry when two machines had written it."""
    for copy in ctx.store.registry.conflicted_copies():
        message = f"{copy} is a conflicted copy: another machine wrote the registry too"
        yield Drift.of(DriftCode.REGISTRY_CONFLICT, None, None, message, registry=ctx.paths.registry)


def _too_big(ctx: Context) -> Iterator[Drift]:
    for log, size in logs.too_big(ctx.store.state / "logs"):
        port = int(log.stem) if log.stem.isdecimal() else None
        yield Drift.of(DriftCode.LOG_TOO_BIG, port, None, f"{log} has {amount(size)}")


def settings_drift(ctx: Context, registry: Registry, view: PortView) -> Iterator[Drift]:
    """A server of ours whose argv is not what a load of its model would give it now."""
    run = view.run
    if run is None or view.owner is not Owner.MLXOPS or view.state not in {State.READY, State.WEDGED}:
        return
    entry = registry.models.get(run.model)
    if entry is None:
        return
    if entry.repo_id not in (None, run.repo_id):
        message = f"{view.port} serves {run.repo_id}, and the registry says {entry.repo_id}"
        yield Drift.of(DriftCode.SETTINGS_CHANGED, view.port, run.model, message)
        return
    wanted = entry.revision or Path(entry.cache_path or run.revision).name
    if not run.revision.startswith(wanted):
        message = f"{view.port} serves {run.repo_id} at {run.revision[:12]}, and the registry says {wanted[:12]}"
        yield Drift.of(DriftCode.SETTINGS_CHANGED, view.port, run.model, message)
        return
    try:
        expected = _expected(ctx, registry, view)
    except MlxopsError as error:
        message = f"{view.port}: {run.model} could not be started as it is configured now: {error.message}"
        yield Drift(DriftCode.SETTINGS_CHANGED, view.port, run.model, message, error.hint)
        return
    found = run.argv
    if run.adopted and expected is not None:
        # However it was launched by hand; what counts are the options.
        found, expected = found[-len(expected) + 1 :], expected[1:]
    if expected is not None and found != expected:
        message = (
            f"{view.port}: {run.model} runs with other settings than it would get now: {_difference(found, expected)}"
        )
        yield Drift.of(DriftCode.SETTINGS_CHANGED, view.port, run.model, message)


def _expected(ctx: Context, registry: Registry, view: PortView) -> tuple[str, ...] | None:
    """The argv that the model would be started with now; None if that cannot be told without running the engine.

    Raises `Refused`.
    """
    from mlxops.agent.engines.inspection import HelpNotKnown
    from mlxops.agent.operations.model_files import ModelFiles
    from mlxops.agent.operations.preflight import prepare
    from mlxops.core.planner import ModelRef

    run = view.run
    assert run is not None
    entry = registry.models[run.model]
    target = ModelRef(entry.name, run.repo_id, run.revision, entry)
    try:
        return prepare(
            ctx, target, view.port, ModelFiles(run.revision, Path(entry.cache_path or "/"), 0), ask=False
        ).wanted.argv
    except HelpNotKnown:
        return None


def _difference(found: tuple[str, ...], expected: tuple[str, ...]) -> str:
    """Words that only one of them has; where there are none, the order differs."""
    only = [
        f"{verb} {shlex.join(words)}"
        for verb, words in (
            ("has", [word for word in found if word not in expected]),
            ("lacks", [word for word in expected if word not in found]),
        )
        if words
    ]
    return "; ".join(only)[:400] or "the same words in another order"
