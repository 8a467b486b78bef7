"""`probe --through`: the checks of each name that leads to a ready port, through the running gateway."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from mlxops.common.chat import LIMITS
from mlxops.common.conformance import run_checks
from mlxops.common.parallel import within
from mlxops.control.gateway.result import GatewayResult
from mlxops.control.gateway.route import Route
from mlxops.core import conformance
from mlxops.core.commands.probe import CheckedPort, ProbeResult, VerdictRow
from mlxops.core.ports import State
from mlxops.core.redaction import without_key
from mlxops.core.replies import HostReply


def check_through(
    route: Route,
    aliases: Sequence[HostReply[GatewayResult]],
    ports: Sequence[HostReply[ProbeResult]],
) -> tuple[HostReply[ProbeResult], ...]:
    """Check each name that leads to a ready port. `aliases`: the result of `gateway`; `ports`: what to check.

    A name is left out if a request by it could make a server drop its model.
    """
    planned = {
        reply.host: _rows(route, reply.result, asked.result) for reply, asked in zip(ports, aliases, strict=True)
    }
    to_ask = {_id(host, row): row for host, rows in planned.items() for row in rows if row.not_asked is None}
    outcomes = within(2 * LIMITS.total, {each: partial(_checked, route, row) for each, row in to_ask.items()})

    def checked(host: str, row: CheckedPort) -> CheckedPort:
        outcome = outcomes.get(_id(host, row), row)
        if isinstance(outcome, TimeoutError):
            return replace(row, not_asked=str(outcome))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return tuple(
        replace(reply, result=ProbeResult(tuple(checked(reply.host, row) for row in planned[reply.host])))
        if reply.result is not None
        else reply
        for reply in ports
    )


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


def _checked(route: Route, row: CheckedPort) -> CheckedPort:
    began = time.monotonic()
    verdicts = conformance.with_promises(
        run_checks(route.server(str(row.name)), json_schema=row.json_schema), row.promised
    )
    return replace(
        row,
        verdicts=tuple(
            VerdictRow.of(replace(each, detail=without_key(each.detail, route.gateway.key))) for each in verdicts
        ),
        seconds=round(time.monotonic() - began, 1),
        checked_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
