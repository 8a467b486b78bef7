"""`status`: the state of each port, and drift."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mlxops.agent.context import Context
from mlxops.agent.operations.drift import conflicted_copies, further_drift, rebooted, silent_servers
from mlxops.agent.paths import settings_differ
from mlxops.agent.state.durable_files import list_matching
from mlxops.agent.state.locks import NoLocks
from mlxops.agent.state.operation_log import operation_state
from mlxops.common.files import Unfit
from mlxops.core.commands.status import DriftRow, PortRow, ProbeRow, RunningRow, Status, StatusResult
from mlxops.core.drift import Drift, DriftCode
from mlxops.core.hints import split
from mlxops.core.ports import Owner, PortView, World
from mlxops.core.records import Operation
from mlxops.core.registry import Registry

if TYPE_CHECKING:
    from mlxops.agent.operations.verdicts import VerdictRecord


def run(ctx: Context, request: Status) -> StatusResult:
    return look(ctx, request, *ctx.registry_and_world())


def look(ctx: Context, request: Status, registry: Registry, world: World) -> StatusResult:
    """Return the status of ports that were observed already."""
    views = [view for port, view in sorted(world.ports.items()) if port in ctx.paths.settings.ports]
    drift = [*rebooted(ctx, registry, world), *world.drift, *further_drift(ctx, registry, world)]
    probes: dict[int, ProbeRow] = {}
    if request.probe:
        from mlxops.agent.operations.completions import failed_probes, probe

        probes = probe(ctx, world)
        drift += failed_probes(world, probes)
    if registry.unwritable:
        error = ctx.store.registry.refusal(registry)
        code = DriftCode.REGISTRY_MISSING if registry.missing else DriftCode.REGISTRY_UNUSABLE
        drift.insert(0, Drift(code, None, None, f"{error.message}: {error.why}", error.marked_hint))
    checked = _last_verdicts(ctx, views)
    if checked:
        from mlxops.agent.operations.verdicts import lost_checks

        drift += lost_checks(views, checked)
    if ctx.paths.differences:
        error = settings_differ(ctx.paths.differences)
        drift.insert(0, Drift.of(DriftCode.SETTINGS_DIFFER, None, None, f"{error.message}: {error.why}"))
    drift += conflicted_copies(ctx)
    drift += silent_servers(ctx, views)
    return StatusResult(
        operations=tuple(_running_row(ctx, download) for download in downloads(ctx)),
        ports=tuple(_port_row(view, probes.get(view.port), checked.get(view.port)) for view in views),
        drift=tuple(map(_drift_row, drift)),
        registry=str(ctx.paths.registry),
        keeper=ctx.store.running_keeper(),
    )


def downloads(ctx: Context) -> list[Operation]:
    """Return the operations that download now."""
    holders = []
    for path in list_matching(ctx.store.state / "locks", "repo-"):
        # Skip what is not a file, and file systems without locks: no operation can hold a lock there.
        with contextlib.suppress(Unfit, NoLocks):
            holders.append(ctx.store.holder(path.name))
    return [operation for operation in holders if operation is not None]


def _running_row(ctx: Context, operation: Operation) -> RunningRow:
    state = operation_state(ctx.store.state / "ops", operation.id)
    return RunningRow(operation.id, operation.command, str(state), state.progress)


def _drift_row(drift: Drift) -> DriftRow:
    hint, commands = split(drift.hint)
    return DriftRow(drift.code.value, drift.port, drift.model, drift.message, hint, commands)


def _last_verdicts(ctx: Context, views: Sequence[PortView]) -> Mapping[int, VerdictRecord]:
    """Return what the last `probe` of each live server found, by port."""
    runs = [view.run for view in views if view.run is not None and view.owner is Owner.MLXOPS]
    if not any(ctx.store.verdicts(run.port) for run in runs):
        return {}
    from mlxops.agent.operations.verdicts import last_verdicts

    return {run.port: record for run in runs if (record := last_verdicts(ctx.store, run))}


def _port_row(view: PortView, probe: ProbeRow | None, checked: VerdictRecord | None) -> PortRow:
    return PortRow(
        port=view.port,
        alias=view.alias,
        state=view.state.value,
        owner=view.owner.value if view.owner else None,
        model=view.model,
        repo_id=view.repo_id,
        revision=view.revision,
        pid=view.pid,
        pgid=view.pgid,
        engine=view.engine,
        engine_version=view.engine_version,
        since=view.since,
        proven_at=view.proven_at,
        memory_bytes=view.memory_bytes,
        detail=view.detail,
        progress=view.progress,
        log_path=view.run.log_path if view.run else None,
        operation=view.operation.id if view.operation else None,
        portless=tuple(server.pid for server in view.portless),
        probe=probe,
        checks=checked.worst if checked else None,
    )
