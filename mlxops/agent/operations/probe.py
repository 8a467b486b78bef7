"""`probe`: send the requests of each check to the ready ports, and keep the verdicts."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mlxops.agent.context import Context
from mlxops.agent.engines import ENGINES
from mlxops.agent.operations.clients import clients, identity
from mlxops.agent.operations.server_names import names_of
from mlxops.agent.operations.verdicts import VerdictRecord, keep, last_verdicts
from mlxops.agent.state.store import utc_now
from mlxops.common.chat import LIMITS, TimeLimits
from mlxops.common.conformance import run_checks
from mlxops.common.http import ChatServer
from mlxops.common.parallel import within
from mlxops.core import conformance, names
from mlxops.core.commands.probe import CheckedPort, Probe, ProbeResult, VerdictRow
from mlxops.core.conformance import Check, Mark, Verdict
from mlxops.core.errors import MlxopsError
from mlxops.core.frozen import dataclass
from mlxops.core.ports import Owner, PortView, State
from mlxops.core.protocol import Phase
from mlxops.core.registry import Model, Registry

LATE_SECONDS = LIMITS.total + LIMITS.answer + 10
"""When the checks of a port have ended at the latest: the last one may begin just before its limit."""


def run(ctx: Context, request: Probe) -> ProbeResult:
    registry, world = ctx.registry_and_world()
    only = names.port(request.port, ctx.paths.settings.ports) if request.port else None
    views = [
        view
        for port, view in sorted(world.ports.items())
        if port in ctx.paths.settings.ports and (port == only if only else _is_meant(view, last=request.last))
    ]
    rows = [_row(ctx, registry, view) for view in views]
    if request.last:
        return ProbeResult(tuple(_last(ctx, row, view) for row, view in zip(rows, views, strict=True)))
    found = _check_all(ctx, [row for row in rows if row.not_asked is None])
    return ProbeResult(
        tuple(
            _checked(ctx, row, view, found[row.port]) if row.port in found else row
            for row, view in zip(rows, views, strict=True)
        )
    )


def _is_meant(view: PortView, *, last: bool) -> bool:
    """Return whether a port is shown that is not named. The last verdicts of a server that died are shown, too."""
    return view.state is State.READY or (last and view.state is State.FAILED)


def _row(ctx: Context, registry: Registry, view: PortView) -> CheckedPort:
    """Return the row of a port before its checks."""
    served = names_of(view)
    reason = served.not_asked or ("" if served.known else "its name is not known")
    if view.state is not State.READY:
        reason = f"the port is {view.state}"
    engine = ENGINES.get(view.engine or "")
    return CheckedPort(
        port=view.port,
        alias=view.alias,
        model=view.model,
        name=served.known[0] if served.known else None,
        engine=view.engine,
        engine_version=view.engine_version,
        promised=promised(registry.models.get(view.model or "")),
        pid=view.pid,
        since=view.since or _start_of_dead(view),
        clients=_clients(ctx, view),
        json_schema=engine is not None and engine.json_schema,
        not_asked=reason or None,
    )


def _start_of_dead(view: PortView) -> str | None:
    """Return when a server started that died by itself; None for any other."""
    died = view.owner is None and view.state is State.FAILED and view.run is not None and view.run.stopped_by is None
    return view.run.started_at if died and view.run else None


def promised(entry: Model | None) -> tuple[str, ...]:
    """Return what an entry promises, else what its family can do."""
    if entry is None or entry.checks is not None or entry.cache_path is None:
        return (entry.checks or ()) if entry is not None else ()
    from mlxops.agent.hub.snapshot import shape

    return tuple(conformance.FAMILIES.get(shape(Path(entry.cache_path)).model_type or "", ()))


@dataclass(frozen=True)
class _Found:
    """The verdicts of one server, without what is promised."""

    verdicts: tuple[Verdict, ...]
    seconds: float


def _check_all(ctx: Context, rows: Sequence[CheckedPort]) -> dict[int, _Found]:
    """Check all servers in parallel, and send heartbeats. Return what was found by port."""
    if not rows:
        return {}

    def check(row: CheckedPort) -> _Found:
        began = time.monotonic()
        verdicts = check_server(ctx, row.port, str(row.name), json_schema=row.json_schema)
        return _Found(verdicts, round(time.monotonic() - began, 1))

    ctx.emit(Phase("checks", ", ".join(f"{row.name} on {row.port}" for row in rows)))
    outcomes = within(LATE_SECONDS, {str(row.port): partial(check, row) for row in rows}, ctx.beat)
    return {int(port): _found(outcome) for port, outcome in outcomes.items()}


def _found(outcome: _Found | Exception) -> _Found:
    if isinstance(outcome, TimeoutError):
        return _Found(tuple(Verdict(check, Mark.SKIP, str(outcome)) for check in Check), LATE_SECONDS)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _checked(ctx: Context, row: CheckedPort, view: PortView, found: _Found) -> CheckedPort:
    """Return the row with its verdicts, and keep them if the server is ours."""
    if _replaced(ctx, view):
        return replace(row, not_asked="the server was stopped or replaced during the checks")
    verdicts = tuple(map(VerdictRow.of, conformance.with_promises(found.verdicts, row.promised)))
    run = view.run if view.owner is Owner.MLXOPS else None
    if run is None:
        return replace(row, checked_at=utc_now(), seconds=found.seconds, verdicts=verdicts)
    record = keep(ctx, run, str(row.name), found.verdicts, row.promised, found.seconds)
    return replace(_with_record(row, record), verdicts=verdicts)


def check_server(
    ctx: Context,
    port: int,
    name: str,
    wanted: Collection[Check] = tuple(Check),
    *,
    json_schema: bool,
    limits: TimeLimits = LIMITS,
) -> tuple[Verdict, ...]:
    """Make the checks of a server on this host."""
    server = ChatServer("http", ctx.paths.connect_host, port, name)

    def connections() -> int:
        return _clients(ctx, ctx.observe_port(port))

    return run_checks(server, wanted, json_schema=json_schema, connections=connections, limits=limits)


def _clients(ctx: Context, view: PortView) -> int:
    try:
        return clients(ctx, view)
    except MlxopsError:
        return 0  # the host does not show connections


def _replaced(ctx: Context, view: PortView) -> bool:
    """Return whether a server was stopped, or another one is in its place. One that died has failed its checks."""
    if view.owner is not Owner.MLXOPS or view.run is None:
        now = ctx.observe_port(view.port)
        return now.pid is not None and identity(now) != identity(view)
    try:
        run = ctx.store.run(view.port)
    except (OSError, ValueError):
        return True
    return run is None or run.stopped_by is not None or (run.pid, run.start) != (view.run.pid, view.run.start)


def _last(ctx: Context, row: CheckedPort, view: PortView) -> CheckedPort:
    record = last_verdicts(ctx.store, view.run) if view.run is not None else None
    if record is None:
        return replace(row, not_asked=row.not_asked or "it was not checked since it started")
    return _with_record(row, record)


def _with_record(row: CheckedPort, record: VerdictRecord) -> CheckedPort:
    return replace(
        row,
        name=record.name,
        checked_at=record.at,
        seconds=record.seconds,
        verdicts=record.verdicts,
        lost=record.lost,
    )
