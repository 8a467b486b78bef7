"""`probe`: send the requests of each check to the ready ports, and keep the verdicts."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mlxops.agent.context import Context
from mlxops.agent.engines import ENGINES
from mlxops.agent.engines.base import Engine
from mlxops.agent.operations.server_names import names_of
from mlxops.agent.operations.verdicts import kept, last_verdicts
from mlxops.agent.state.store import utc_now
from mlxops.common.conformance import LIMITS, run_checks
from mlxops.common.http import ChatServer
from mlxops.common.parallel import within
from mlxops.core import conformance, names
from mlxops.core.commands.load import Load
from mlxops.core.commands.probe import CHECK_FAILED, CheckedPort, Probe, ProbeResult, VerdictRow
from mlxops.core.conformance import Check, Mark, Verdict
from mlxops.core.errors import MlxopsError, NotStarted, Refused
from mlxops.core.frozen import dataclass
from mlxops.core.ports import Owner, PortView, State
from mlxops.core.protocol import Phase
from mlxops.core.records import Run
from mlxops.core.registry import Model, Registry

LATE_SECONDS = LIMITS.total + LIMITS.answer + 10
"""When the checks of a port have ended at the latest: the last one may begin just before its limit."""


def run(ctx: Context, request: Probe) -> ProbeResult:
    registry, world = ctx.registry_and_world()
    only = names.port(request.port, ctx.paths.settings.ports) if request.port else None
    views = [
        view
        for port, view in sorted(world.ports.items())
        if port in ctx.paths.settings.ports and (port == only if only else view.state is State.READY)
    ]
    rows = [_row(ctx, registry, view) for view in views]
    if request.last:
        return ProbeResult(tuple(_with_record(ctx, row, view) for row, view in zip(rows, views, strict=True)))
    found = _check_all(ctx, [row for row in rows if row.not_asked is None])
    return ProbeResult(
        tuple(
            _checked(ctx, row, view, found[row.port]) if row.port in found else row
            for row, view in zip(rows, views, strict=True)
        )
    )


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
        json_schema=engine is not None and engine.json_schema,
        not_asked=reason or None,
    )


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
    run = view.run if view.owner is Owner.MLXOPS else None
    if run is not None and not _still_serves(ctx, run):
        return replace(row, not_asked="the server was stopped or replaced during the checks")
    verdicts = conformance.with_promises(found.verdicts, row.promised)
    row = replace(row, checked_at=utc_now(), seconds=found.seconds, verdicts=tuple(map(VerdictRow.of, verdicts)))
    return row if run is None else kept(ctx, row, run, found.verdicts)


def check_server(
    ctx: Context, port: int, name: str, wanted: Collection[Check] = tuple(Check), *, json_schema: bool
) -> tuple[Verdict, ...]:
    """Make the checks of a server on this host."""

    def is_busy() -> bool:
        try:
            return bool(ctx.system.connected({port}))
        except MlxopsError:
            return False

    server = ChatServer("http", ctx.paths.connect_host, port, name)
    return run_checks(server, wanted, json_schema=json_schema, is_busy=is_busy)


def refuse_impossible(request: Load, engine: Engine) -> None:
    """Raises `Refused` (not_checkable) if a load requires what the engine does not have; nothing is stopped yet."""
    if Check.JSON in request.require and not engine.json_schema:
        raise Refused(
            "not_checkable",
            f"{engine.name} does not follow a JSON schema, so --require {Check.JSON} cannot pass",
            why="it ignores `response_format`",
            hint=f"leave {Check.JSON} out of --require, or serve the model with another engine",
        )


def check_required(ctx: Context, request: Load, port: int, name: str, engine: Engine | None) -> None:
    """Make the checks that a load requires. Raises `NotStarted` (check_failed) if one does not pass."""
    wanted = [Check(each) for each in request.require]
    if not wanted:
        return
    ctx.emit(Phase("checks", f"{', '.join(wanted)}, as {name}"))
    verdicts = check_server(ctx, port, name, wanted, json_schema=engine is not None and engine.json_schema)
    failed = [each for each in verdicts if each.mark is not Mark.PASS]
    if failed:
        raise NotStarted(
            CHECK_FAILED,
            f"{request.model} answers on port {port}, and does not pass: {', '.join(each.check for each in failed)}",
            why="; ".join(f"{each.check}: {each.detail}" for each in failed),
            hint=f"see its log: `mlxctl logs --port {port}`; or load it without --require, then: `mlxctl probe {port}`",
            details={"port": port, "checks": conformance.marks(verdicts)},
        )


def check_serving(ctx: Context, request: Load, view: PortView) -> None:
    """Make the checks that a load requires of a server that was there before, and stays as it is.

    Raises `NotStarted` (check_failed) and `Refused` (not_checkable).
    """
    served = names_of(view)
    if request.require and (served.not_asked or not served.known):
        raise Refused(
            "not_checkable",
            f"the server on port {view.port} cannot be checked",
            why=served.not_asked or "its name is not known",
            hint="load it without --require; or replace it, with --force",
        )
    if request.require:
        check_required(ctx, request, view.port, served.known[0], ENGINES.get(view.engine or ""))


def _still_serves(ctx: Context, run: Run) -> bool:
    try:
        now = ctx.store.run(run.port)
    except (OSError, ValueError):
        return False
    return now is not None and now.stopped_by is None and (now.pid, now.start) == (run.pid, run.start)


def _with_record(ctx: Context, row: CheckedPort, view: PortView) -> CheckedPort:
    record = last_verdicts(ctx.store, view.run) if view.run is not None else None
    if record is None:
        return replace(row, not_asked=row.not_asked or "it was not checked since it started")
    return replace(
        row,
        name=record.name,
        checked_at=record.at,
        seconds=record.seconds,
        verdicts=record.verdicts,
        lost=record.lost,
    )
