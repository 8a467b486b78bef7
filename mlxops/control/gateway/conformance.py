"""`probe --through`: the checks of each name that leads to a ready port, through the running gateway."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from mlxops.common.chat import LIMITS, TimeLimits
from mlxops.common.conformance import run_checks
from mlxops.common.parallel import within
from mlxops.control.gateway.result import GatewayResult
from mlxops.control.gateway.route import Route
from mlxops.core import conformance
from mlxops.core.commands.probe import CheckedPort, ProbeResult, VerdictRow
from mlxops.core.ports import State
from mlxops.core.redaction import without_key
from mlxops.core.replies import HostReply

Looks = Sequence[HostReply[ProbeResult]]
"""What the hosts say about their servers, as `probe --last`."""


def check_through(
    route: Route,
    aliases: Sequence[HostReply[GatewayResult]],
    ports: Looks,
    look: Callable[[], Looks],
    limits: TimeLimits = LIMITS,
) -> tuple[HostReply[ProbeResult], ...]:
    """Check each name that leads to a ready port. `aliases`: the result of `gateway`; `ports`: what to check.

    A name is left out if a request by it could make a server drop its model. `look` asks the hosts again: where a
    server seems busy, and at the end, because a server that was replaced has no verdicts.
    """
    planned = {
        reply.host: _rows(route, reply.result, asked.result) for reply, asked in zip(ports, aliases, strict=True)
    }
    to_ask = {_id(host, row): (host, row) for host, rows in planned.items() for row in rows if row.not_asked is None}
    one_look = threading.Lock()

    def checked(host: str, row: CheckedPort) -> CheckedPort:
        def connections() -> int:
            with one_look:
                now = _server(look(), host, row.port)
            # The gateway may still hold the connection of the request that was given up.
            return max(row.clients, now.clients - 1 if now else 0)

        return _checked(route, row, connections, limits)

    seconds = limits.total + limits.answer + 10
    outcomes = within(seconds, {each: partial(checked, *asked) for each, asked in to_ask.items()})
    after = look() if to_ask else ()

    def outcome(host: str, row: CheckedPort) -> CheckedPort:
        found = outcomes.get(_id(host, row), row)
        if isinstance(found, TimeoutError):
            return replace(row, not_asked=str(found))
        if isinstance(found, Exception):
            raise found
        return found if found.not_asked else _if_unchanged(found, _server(after, host, row.port))

    return tuple(
        replace(reply, result=ProbeResult(tuple(outcome(reply.host, row) for row in planned[reply.host])))
        if reply.result is not None
        else reply
        for reply in ports
    )


def _server(looks: Looks, host: str, port: int) -> CheckedPort | None:
    rows = [row for reply in looks if reply.host == host and reply.result for row in reply.result.ports]
    return next((row for row in rows if row.port == port), None)


def _if_unchanged(row: CheckedPort, now: CheckedPort | None) -> CheckedPort:
    """Return the row, without verdicts if they may be those of two servers. One that died has failed its checks."""
    if now is not None and now.since == row.since and now.pid in (row.pid, None):
        return row
    why = "the server was stopped, restarted or replaced during the checks"
    return replace(row, verdicts=(), checked_at=None, seconds=0.0, not_asked=why)


def _id(host: str, row: CheckedPort) -> str:
    return f"{host} {row.port} {row.name}"


def _rows(route: Route, ports: ProbeResult | None, aliases: GatewayResult | None) -> list[CheckedPort]:
    """Return a row for each name that leads to one of these ports."""
    by_port = {row.port: row for row in aliases.aliases} if aliases else {}
    rows: list[CheckedPort] = []
    for port in ports.ports if ports else ():
        blank = replace(port, verdicts=(), lost=(), checked_at=None, through=route.url)
        alias = by_port.get(port.port)
        if alias is None or alias.state is not State.READY:
            rows.append(replace(blank, not_asked=f"the port is {alias.state if alias else 'not known'}"))
        elif names := route.names(alias):
            rows += [replace(blank, name=name, not_asked=route.why_not(name)) for name in names]
        else:
            rows.append(replace(blank, not_asked=route.gateway.why_no_name(port.alias or "it", port.port)))
    return rows


def _checked(route: Route, row: CheckedPort, connections: Callable[[], int], limits: TimeLimits) -> CheckedPort:
    began = time.monotonic()
    server = route.server(str(row.name))
    found = run_checks(server, json_schema=row.json_schema, connections=connections, limits=limits)
    verdicts = conformance.with_promises(found, row.promised)
    return replace(
        row,
        verdicts=tuple(
            VerdictRow.of(replace(each, detail=without_key(each.detail, route.gateway.key))) for each in verdicts
        ),
        seconds=round(time.monotonic() - began, 1),
        checked_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
