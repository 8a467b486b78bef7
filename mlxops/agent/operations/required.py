"""`load --require`: the checks that a server must pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from mlxops.agent.context import Context
from mlxops.agent.engines import ENGINES
from mlxops.agent.engines.base import Engine
from mlxops.agent.operations.probe import check_server, promised
from mlxops.agent.operations.server_names import names_of
from mlxops.agent.operations.verdicts import keep
from mlxops.common.chat import TimeLimits
from mlxops.core import conformance
from mlxops.core.commands.load import Load
from mlxops.core.commands.probe import CHECK_FAILED
from mlxops.core.conformance import Check, Mark, Verdict
from mlxops.core.errors import NotStarted, Refused
from mlxops.core.ports import Owner, PortView
from mlxops.core.protocol import Phase
from mlxops.core.records import Run

LIMITS = TimeLimits(busy=10.0)
BUSY_SECONDS = 120.0
"""How long checks are tried again while the server is busy with the requests of clients."""
PAUSE_SECONDS = 1.0


def refuse_impossible(request: Load, engine: Engine, version: str | None) -> None:
    """Raises `Refused` (not_checkable) if a load requires what the engine does not have; nothing is stopped yet."""
    if Check.JSON in request.require and not engine.json_schema:
        raise _not_checkable(Check.JSON, f"{engine.name} does not follow a JSON schema", "it ignores `response_format`")
    if Check.LENGTH in request.require and not engine.says_length(version):
        why = "it gives each answer without a tool call the finish reason `stop`"
        raise _not_checkable(Check.LENGTH, f"{engine.name} {version} does not say that an answer is cut", why)


def _not_checkable(check: Check, what: str, why: str) -> Refused:
    return Refused(
        "not_checkable",
        f"{what}, so --require {check} cannot pass",
        why=why,
        hint=f"leave {check} out of --require, or serve the model with another engine",
    )


def check_started(ctx: Context, request: Load, run: Run, engine: Engine) -> None:
    """Make the checks that a load requires of its new server. Raises `NotStarted` (check_failed) if one fails."""
    if request.require:
        _check(ctx, request, run.port, run.alias, engine, run)


def check_serving(ctx: Context, request: Load, view: PortView) -> None:
    """Make the checks that a load requires of a server that was there before, and stays as it is.

    Raises `NotStarted` (check_failed) and `Refused` (not_checkable).
    """
    if not request.require:
        return
    served, engine = names_of(view), ENGINES.get(view.engine or "")
    if served.not_asked or not served.known:
        raise Refused(
            "not_checkable",
            f"the server on port {view.port} cannot be checked",
            why=served.not_asked or "its name is not known",
            hint="load it without --require; or replace it, with --force",
        )
    if engine is not None:
        refuse_impossible(request, engine, view.engine_version)
    _check(ctx, request, view.port, served.known[0], engine, view.run if view.owner is Owner.MLXOPS else None)


def _check(ctx: Context, request: Load, port: int, name: str, engine: Engine | None, run: Run | None) -> None:
    """Make the required checks, and keep the verdicts if the server is ours. Raises `NotStarted` (check_failed).

    A server that stays busy with the requests of clients passes, with a warning: it has proven that it answers, and to
    undo its load would cut off those clients.
    """
    wanted = [Check(each) for each in request.require]
    ctx.emit(Phase("checks", f"{', '.join(wanted)}, as {name}"))
    began = time.monotonic()

    def make(checks: Collection[Check]) -> Sequence[Verdict]:
        json_schema = engine is not None and engine.json_schema
        return check_server(ctx, port, name, checks, json_schema=json_schema, limits=LIMITS)

    verdicts = patient(make, wanted, ctx.note)
    if run is not None:
        entry = ctx.registry().models.get(run.model)
        keep(ctx, run, name, verdicts, promised(entry), round(time.monotonic() - began, 1))
    failed = [each for each in verdicts if each.mark is not Mark.PASS and not each.busy]
    if failed:
        raise NotStarted(
            CHECK_FAILED,
            f"{request.model} answers on port {port}, and does not pass: {', '.join(each.check for each in failed)}",
            why="; ".join(f"{each.check}: {each.detail}" for each in failed),
            hint=f"see its log: `mlxctl logs --port {port}`; or load it without --require, then: `mlxctl probe {port}`",
            details={"port": port, "checks": conformance.marks(verdicts)},
        )
    if busy := [each for each in verdicts if each.busy]:
        ctx.note(
            f"not checked: {', '.join(each.check for each in busy)}: {busy[0].detail}; {request.model} serves on; "
            f"check it when it is less busy: `mlxctl probe {port}`",
            "warning",
        )


def patient(
    make: Callable[[Collection[Check]], Sequence[Verdict]], wanted: Sequence[Check], say: Callable[[str], None]
) -> tuple[Verdict, ...]:
    """Make these checks. While the server is busy, make what is missing again, for `BUSY_SECONDS`."""
    found = {each.check: each for each in make(wanted)}
    deadline = time.monotonic() + BUSY_SECONDS
    said = False
    while busy := [check for check in wanted if found[check].busy]:
        failed = any(each.mark is not Mark.PASS and not each.busy for each in found.values())
        if failed or time.monotonic() > deadline:
            break
        if not said:
            say(f"{found[busy[0]].detail}; the checks are tried again for {BUSY_SECONDS:.0f} s")
            said = True
        time.sleep(PAUSE_SECONDS)
        found |= {each.check: each for each in make(busy)}
    return tuple(found[check] for check in Check if check in found)
