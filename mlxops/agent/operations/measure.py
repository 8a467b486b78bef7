"""`measure`: ask ready ports for streamed answers, and compute their speed from the times.

It takes no lock and changes nothing but the history. A swap is not held up: it ends the run, which is then void.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from mlxops.agent.context import Context
from mlxops.agent.engines.argv import program_of
from mlxops.agent.operations.clients import clients, identity
from mlxops.agent.operations.server_names import names_of
from mlxops.common.http import ChatServer
from mlxops.common.speed import NO_ANSWER, TimeUp, ask_at_once, fresh_seed, reason
from mlxops.core import names, wire
from mlxops.core.commands.measure import Measure, MeasuredPort, MeasureResult, figure_rows
from mlxops.core.errors import Busy, MlxopsError, Refused
from mlxops.core.measuring import METHOD, WARM_TOKENS, Prompt, Tally, last_comparable, prompt_text, steps
from mlxops.core.ports import Owner, PortView, State, World
from mlxops.core.protocol import Phase

QUIET_SECONDS = 6.0
"""How long to wait for the connections of other clients. uvicorn keeps an idle one for 5 s."""
POLL_SECONDS = 0.1


def run(ctx: Context, request: Measure) -> MeasureResult:
    _, world = ctx.registry_and_world()
    views = _chosen(ctx, request, world)
    rows, errors = [], []
    for view in views:
        try:
            rows.append(_measure(ctx, request, view))
        except MlxopsError as error:
            errors.append(error)
            rows.append(_not_measured(view, error))
    if len(errors) == len(views):
        raise errors[0]
    return MeasureResult(tuple(rows))


def _chosen(ctx: Context, request: Measure, world: World) -> list[PortView]:
    """Return the ports to measure. Raises `UsageError` (bad_port), and `Refused` (not_ready) if none is ready."""
    settings = ctx.paths.settings
    ports = settings.ports if request.port is None else [names.port(request.port, settings.ports)]
    views = [world.ports[port] for port in ports]
    ready = [view for view in views if view.state is State.READY]
    if ready:
        return ready
    which = "no port is ready" if request.port is None else f"port {request.port} is {views[0].state}, not ready"
    raise Refused("not_ready", which, why="only a server that answers can be measured", hint="look: `mlxctl status`")


def _not_measured(view: PortView, error: MlxopsError) -> MeasuredPort:
    return replace(_described(view), not_measured=f"{error.message}: {error.why}")


def _described(view: PortView) -> MeasuredPort:
    """Return the row of a port, without figures."""
    return MeasuredPort(
        port=view.port,
        alias=view.alias,
        model=view.model,
        repo_id=view.repo_id,
        revision=view.revision,
        engine=view.engine,
        engine_version=view.engine_version,
        settings=_settings_hash(view),
        seconds=0.0,
        shared=False,
        figures=(),
        compared_with=None,
        engine_version_before=None,
        missing=(),
        not_measured=None,
    )


def _settings_hash(view: PortView) -> str:
    """Hash the server's options, without the program: another version may lie elsewhere."""
    ours = view.run if view.owner is Owner.MLXOPS else None
    argv = ours.settings if ours else view.server.argv if view.server else ()
    program = program_of(argv)
    return hashlib.sha256("\0".join(program.arguments if program else argv).encode()).hexdigest()[:12]


def _measure(ctx: Context, request: Measure, view: PortView) -> MeasuredPort:
    """Raises `Refused` (cannot_be_asked, no_answer), and `Busy` (open_requests, changed_meanwhile)."""
    began = time.monotonic()
    used = _wait_until_quiet(ctx, request, view)
    tally, joined = _rounds(ctx, request, view, began + request.seconds)
    row = replace(
        _described(view),
        seconds=round(time.monotonic() - began, 3),
        shared=used or joined,
        missing=tally.missing,
    )
    same: Mapping[str, object] = {
        **{key: getattr(row, key) for key in ("port", "model", "repo_id", "revision", "engine", "settings")},
        "method": METHOD,
    }
    before = last_comparable(ctx.findings("measure"), same)
    row = replace(
        row,
        figures=figure_rows(tally, before.spreads if before else {}, unsure=row.shared),
        compared_with=before.at if before else None,
        engine_version_before=before.engine_version if before else None,
    )
    keys = ("prompt", "cache", "streams", "metric", "median", "low", "high", "rounds")
    recorded = [{key: wire.encode(getattr(each, key)) for key in keys} for each in row.figures]
    ctx.remember(
        command="measure", **same, alias=row.alias, engine_version=row.engine_version, shared=row.shared, rows=recorded
    )
    return row


def _known_name(view: PortView) -> str:
    """Return a name that the server knows, so that it neither loads nor drops a model."""
    served = names_of(view)
    if served.known and not served.not_asked:
        return served.known[0]
    raise Refused(
        "cannot_be_asked",
        f"the server on port {view.port} must not be asked",
        why=served.not_asked or "its name is not known",
        hint="if it was started by hand, `mlxctl list` names the models that can be loaded in its place",
    )


# -- other clients, and other servers


def _wait_until_quiet(ctx: Context, request: Measure, view: PortView) -> bool:
    """Wait until no client is connected. With `--force` do not wait. Return whether one is.

    Raises `Busy` (open_requests).
    """
    number = clients(ctx, view)
    if not number or request.force:
        return bool(number)
    ctx.note(f"port {view.port} is in use; waiting up to {QUIET_SECONDS:.0f} s for the end of open requests: {number}")
    deadline = time.monotonic() + QUIET_SECONDS
    while number := clients(ctx, view):
        if time.monotonic() > deadline:
            raise Busy(
                "open_requests",
                f"port {view.port} is in use; open requests: {number}",
                why="a measurement would slow them down, and they would spoil it",
                hint=f"try again later, or measure with them: `mlxctl measure {view.port} --force`",
            )
        time.sleep(POLL_SECONDS)
        ctx.beat()
    return False


def _check_same(ctx: Context, view: PortView) -> None:
    """Check that the server is still the one that is measured. Raises `Busy` (changed_meanwhile)."""
    now = ctx.observe_port(view.port)
    if now.state is State.READY and identity(now) == identity(view):
        return
    raise Busy(
        "changed_meanwhile",
        f"the server on port {view.port} changed while it was measured",
        why=f"it was swapped, restarted or stopped: the port is {now.state}; the run is void and is not recorded",
        hint=f"look: `mlxctl status`; then again: `mlxctl measure {view.port}`",
    )


# -- the rounds


def _rounds(ctx: Context, request: Measure, view: PortView, deadline: float) -> tuple[Tally, bool]:
    """Return what the rounds showed, and whether other clients used the server.

    Raises `Refused` (cannot_be_asked, no_answer), and `Busy` (changed_meanwhile).
    """
    server = ChatServer("http", ctx.paths.connect_host, view.port, _known_name(view))
    tally, shared, number, began = Tally(), False, 0, time.monotonic()
    try:
        with suppress(*NO_ANSWER):  # not measured: the first request may compile kernels
            ask_at_once(server, [prompt_text(Prompt.SHORT, fresh_seed())], WARM_TOKENS, deadline, ctx.beat)
        for step in steps(request.rounds, request.streams, fresh_seed):
            if step.round > number:
                number, began = step.round, _announce(ctx, request, view, step.round, began)
                _check_same(ctx, view)
            try:
                tally.add(step.case, ask_at_once(server, step.prompts, step.case.tokens, deadline, ctx.beat))
            except NO_ANSWER as error:
                _check_same(ctx, view)
                tally.fail(step.case, reason(error))
            shared = shared or bool(clients(ctx, view))
    except TimeUp:
        ctx.note(f"port {view.port}: the {request.seconds:g} s of --seconds are over")
    _check_same(ctx, view)
    if not tally.values:
        raise Refused(
            "no_answer",
            f"the server on port {view.port} gave no answer that can be measured",
            why=next(iter(tally.missing), f"none was complete within {request.seconds:g} s"),
            hint=f"ask it: `mlxctl status --probe`; or give it more time: `mlxctl measure {view.port} "
            f"--seconds {min(2 * request.seconds + 1, 86400):.0f}`",
        )
    return tally, shared


def _announce(ctx: Context, request: Measure, view: PortView, number: int, began: float) -> float:
    """Say which round begins, and how long the one before took, which began at `began`. Return the time."""
    now = time.monotonic()
    took = f" ({now - began:.0f} s each)" if number > 1 else ""
    ctx.emit(Phase("measure", f"port {view.port}, round {number} of {request.rounds}{took}"))
    return now
