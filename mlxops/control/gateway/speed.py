"""`measure --through`: the same requests through the running gateway, compared with the server itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

from mlxops.common.speed import NO_ANSWER, TimeUp, ask_at_once, fresh_seed, reason
from mlxops.control.gateway.result import AliasRow, GatewayResult
from mlxops.control.gateway.route import Route
from mlxops.core.commands.measure import Measure, MeasuredPort, MeasureResult, figure_rows
from mlxops.core.commands.status import StatusResult
from mlxops.core.measuring import WARM_TOKENS, Key, Prompt, Spread, Tally, prompt_text, steps
from mlxops.core.ports import State
from mlxops.core.replies import HostReply


def measured_through(
    way: Route,
    request: Measure,
    aliases: HostReply[GatewayResult],
    reply: HostReply[MeasureResult],
    say: Callable[[str], None],
) -> HostReply[MeasureResult]:
    """Measure each measured port of a host again, through the gateway. Add the rows to the reply."""
    by_port = {row.port: row for row in aliases.result.aliases} if aliases.result else {}
    rows: list[MeasuredPort] = []
    for port in reply.result.ports if reply.result else ():
        rows.append(port)
        if port.not_measured is None:
            rows.append(_through(way, request, by_port.get(port.port), port, say))
    return replace(reply, result=MeasureResult(tuple(rows))) if reply.result else reply


def _through(
    way: Route, request: Measure, alias: AliasRow | None, port: MeasuredPort, say: Callable[[str], None]
) -> MeasuredPort:
    row = replace(
        port,
        through=way.url,
        figures=(),
        missing=(),
        compared_with=None,
        engine_version_before=None,
    )
    if alias is None:
        return replace(row, not_measured="the port is not among those of the gateway's check")
    reasons = {name: way.why_not(name) for name in way.names(alias)}
    name = next((name for name, why in reasons.items() if why is None), None)
    if name is None:
        why = next(filter(None, reasons.values()), None) or way.gateway.why_no_name(port.alias or "it", port.port)
        return replace(row, not_measured=why)
    began = time.monotonic()
    tally = _rounds(way, name, request, say)
    return replace(
        row,
        seconds=round(time.monotonic() - began, 3),
        missing=tally.missing,
        not_measured=None if tally.values else next(iter(tally.missing), "no answer was complete in time"),
        figures=figure_rows(tally, _spreads(port), unsure=port.shared),
    )


def _rounds(way: Route, name: str, request: Measure, say: Callable[[str], None]) -> Tally:
    tally, number, deadline = Tally(), 0, time.monotonic() + request.seconds
    server = way.server(name)
    with suppress(TimeUp):
        with suppress(*NO_ANSWER):  # not measured: the gateway may connect to its server first
            ask_at_once(server, [prompt_text(Prompt.SHORT, fresh_seed())], WARM_TOKENS, deadline)
        for step in steps(request.rounds, request.streams, fresh_seed):
            if step.round > number:
                number = step.round
                say(f"measure: {name} through {way.url}, round {number} of {request.rounds}")
            try:
                tally.add(step.case, ask_at_once(server, step.prompts, step.case.tokens, deadline))
            except NO_ANSWER as error:
                tally.fail(step.case, reason(error, way.gateway.key))
    return tally


def _spreads(port: MeasuredPort) -> Mapping[Key, Spread]:
    """Return the figures of the server itself."""
    return {
        (row.prompt, row.cache, row.streams, row.metric): Spread(row.median, row.low, row.high, row.rounds)
        for row in port.figures
    }


def without_changed(
    reply: HostReply[MeasureResult], before: HostReply[StatusResult], after: HostReply[StatusResult]
) -> HostReply[MeasureResult]:
    """Remove the figures through the gateway of each port whose server changed between the two statuses."""
    if reply.result is None:
        return reply
    same = {*_servers(before)} & {*_servers(after)}
    unchanged = {port for port, *_ in same}
    why = "the server changed while it was measured"
    rows = [
        replace(row, figures=(), not_measured=why)
        if row.through and row.not_measured is None and row.port not in unchanged
        else row
        for row in reply.result.ports
    ]
    return replace(reply, result=MeasureResult(tuple(rows)))


def _servers(reply: HostReply[StatusResult]) -> list[tuple[int, int | None, str | None]]:
    """Return port, pid and start of each server."""
    rows = reply.result.ports if reply.result else ()
    return [(row.port, row.pid, row.since) for row in rows if row.state == State.READY]
