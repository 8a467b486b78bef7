"""Find drift that a port's state does not show.

Examples: servers whose settings have changed, invalid registry entries, interrupted operations, leftover files.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlxops.agent.context import Context
from mlxops.agent.engines.installation import cached_lookups
from mlxops.agent.serving import logs
from mlxops.agent.state import recovery
from mlxops.agent.state.store import format_utc
from mlxops.common.files import describe_error
from mlxops.core.dangers import FAST_SYNCH, FAST_SYNCH_WHY, is_set
from mlxops.core.drift import Drift, DriftCode
from mlxops.core.errors import MlxopsError
from mlxops.core.ports import Owner, PortView, State, World
from mlxops.core.registry import Registry
from mlxops.core.text import amount


def further_drift(ctx: Context, registry: Registry, world: World) -> Iterator[Drift]:
    """Yield all drift of this module, apart from `rebooted` and `conflicted_copies`."""
    with cached_lookups():
        settings = [drift for view in world.ports.values() for drift in settings_drift(ctx, registry, view)]
    yield from settings
    for view in world.ports.values():
        yield from _dangerous_setting(ctx, view)
    for view in world.ports.values():
        if view.unserved and view.run is not None and not registry.on_port(view.port):
            message = f"{view.port}: a run record of {view.run.model} describes no live process"
            yield Drift.of(DriftCode.LEFTOVER, view.port, view.run.model, message)
    for model in registry.models.values():
        for problem in model.problems:
            if "also claimed" not in problem:  # reported as port_claimed_twice
                message = f"the registry entry {model.name}: {problem}"
                yield Drift.of(DriftCode.ENTRY_PROBLEM, model.port, model.name, message, registry=ctx.paths.registry)
    yield from recovery.drift(ctx.store, ctx.paths.settings.ports)
    yield from _big_logs(ctx)
    yield from _stranded(ctx, world)
    for path in ctx.store.leftovers():
        yield Drift.of(DriftCode.LEFTOVER, None, None, f"{path} was left by a writer that was killed")


def _dangerous_setting(ctx: Context, view: PortView) -> Iterator[Drift]:
    """Report a server of ours, or one that was started by hand or at boot, whose environment is dangerous."""
    if view.pid is None or view.owner not in {Owner.MLXOPS, Owner.HAND, Owner.BOOT}:
        return
    if not is_set(ctx.system.environment(view.pid, FAST_SYNCH)):
        return
    code = DriftCode.DANGEROUS_SETTING
    message = f"{view.port}: {FAST_SYNCH} is set in its environment: {FAST_SYNCH_WHY}"
    if view.owner is Owner.MLXOPS:
        yield Drift.of(code, view.port, view.model, message)
    else:
        yield Drift(code, view.port, view.model, message, "take it out of what starts the server, and restart it there")


def rebooted(ctx: Context, registry: Registry, world: World) -> Iterator[Drift]:
    """Report assigned servers that ran before the host's last boot and do not run now."""
    unserved = [view.port for view in world.ports.values() if view.rebooted and view.unserved]
    down = [port for port in unserved if registry.on_port(port)]
    if down:
        message = f"rebooted {format_utc(ctx.system.booted_at())}; {len(down)} assignment{'s'[: len(down) != 1]} down"
        yield Drift.of(DriftCode.REBOOTED, None, None, message)


def conflicted_copies(ctx: Context) -> Iterator[Drift]:
    """Report the copies that a sync service left beside the registry because two machines had written it."""
    for copy in ctx.store.registry.conflicted_copies():
        message = f"{copy} is a conflicted copy: another machine wrote the registry too"
        yield Drift.of(DriftCode.REGISTRY_CONFLICT, None, None, message, registry=ctx.paths.registry)


def silent_servers(ctx: Context, views: Sequence[PortView]) -> Iterator[Drift]:
    """Report our servers from which the keeper got no completion."""
    for view in views:
        if view.run is not None and view.owner is Owner.MLXOPS and (silence := ctx.store.silence(view.run)):
            stays = f"; it is not restarted: {silence.stays}" if silence.stays else ""
            message = f"{view.port}: {view.model} completes nothing since {silence.since}{stays}"
            yield Drift.of(DriftCode.NO_COMPLETION, view.port, view.model, message)


def _big_logs(ctx: Context) -> Iterator[Drift]:
    for log, size in logs.too_big(ctx.store.state / "logs"):
        port = int(log.stem) if log.stem.isdecimal() else None
        yield Drift.of(DriftCode.LOG_TOO_BIG, port, None, f"{log} has {amount(size)}")


def _stranded(ctx: Context, world: World) -> Iterator[Drift]:
    """Report memory that stopped servers did not return, or that its record cannot be read."""
    if record := world.stranded:
        message = (
            f"{amount(record.size)} of memory did not return; {record.model} on {record.port} was stopped last, at "
            f"{record.stopped_at}"
        )
        yield Drift.of(DriftCode.MEMORY_STRANDED, None, None, message)
        return
    try:
        ctx.store.stranded("")
    except (OSError, ValueError) as error:
        path = ctx.store.stranded_path
        why = describe_error(error) if isinstance(error, OSError) else str(error)[:200]
        yield Drift.of(DriftCode.STATE_UNREADABLE, None, None, f"{path} cannot be read: {why}")


def settings_drift(ctx: Context, registry: Registry, view: PortView) -> Iterator[Drift]:
    """Report a server of ours if a load of its model would start it with another argv now."""
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
    revision = entry.revision or Path(entry.cache_path or run.revision).name
    if not run.revision.startswith(revision):
        message = f"{view.port} serves {run.repo_id} at {run.revision[:12]}, and the registry says {revision[:12]}"
        yield Drift.of(DriftCode.SETTINGS_CHANGED, view.port, run.model, message)
        return
    try:
        expected = _expected_argv(ctx, registry, view)
    except MlxopsError as error:
        message = f"{view.port}: {run.model} could not be started as it is configured now: {error.message}"
        yield Drift(DriftCode.SETTINGS_CHANGED, view.port, run.model, message, error.marked_hint)
        return
    actual = run.settings
    if run.adopted and expected is not None:
        # It may have been launched in another way by hand. Compare only the options.
        actual, expected = actual[-len(expected) + 1 :], expected[1:]
    if expected is not None and actual != expected:
        message = (
            f"{view.port}: {run.model} runs with other settings than it would get now: {_difference(actual, expected)}"
        )
        yield Drift.of(DriftCode.SETTINGS_CHANGED, view.port, run.model, message)


def _expected_argv(ctx: Context, registry: Registry, view: PortView) -> tuple[str, ...] | None:
    """Return the argv with which a load would start the model now; None if only the engine itself could say that.

    Raises `Refused` if it could not be started.
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


def _difference(actual: tuple[str, ...], expected: tuple[str, ...]) -> str:
    """Return the arguments that only one of them has. If there are none, the order differs."""
    parts = [
        f"{verb} {shlex.join(arguments)}"
        for verb, arguments in (
            ("has", _only_in(actual, expected)),
            ("lacks", _only_in(expected, actual)),
        )
        if arguments
    ]
    return "; ".join(parts)[:400] or "the same arguments in another order"


def _only_in(argv: Sequence[str], other: Sequence[str]) -> list[str]:
    """Return the arguments that the other command lacks, without the secrets in them."""
    from mlxops.core.redaction import redact_argv

    return [shown for word, shown in zip(argv, redact_argv(argv), strict=True) if word not in other]
