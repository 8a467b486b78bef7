"""`probe --through`: the checks of each name that leads to a ready port, through the running gateway."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from urllib.parse import urlsplit

from mlxops.common.conformance import LIMITS, ChatServer, run_checks
from mlxops.common.parallel import within
from mlxops.control.gateway.config import GatewayConfig
from mlxops.control.gateway.ports import same_host
from mlxops.control.gateway.probe import LITELLM_FIELDS
from mlxops.control.gateway.result import AliasRow, GatewayResult
from mlxops.control.gateway.through import RunningGateway, read_running, required_key
from mlxops.control.inventory import Gateway
from mlxops.core import conformance
from mlxops.core.commands.probe import CheckedPort, ProbeResult, VerdictRow
from mlxops.core.conformance import Verdict
from mlxops.core.frozen import dataclass
from mlxops.core.ports import State
from mlxops.core.probe_names import WILDCARD, ProbePlan, plan_probes, server_of
from mlxops.core.replies import HostReply


@dataclass(frozen=True)
class _Route:
    """The running gateway, and the names that may be asked through it."""

    gateway: RunningGateway
    plan: ProbePlan
    key: str | None

    def names(self, row: AliasRow) -> list[str]:
        """Return the names that lead to a row's port."""
        return [name for name, urls in self.plan.names.items() if row.url in urls and WILDCARD not in name]

    def why_not(self, name: str) -> str | None:
        """Return why a name is not asked for; None if it is."""
        if len(self.plan.names[name]) > 1 or self.plan.others.get(name):
            return "the gateway sends it to several servers, so it is not known which one would answer"
        return self.plan.skipped.get(name)


def check_through(
    gateway: Gateway,
    config: GatewayConfig,
    aliases: Sequence[HostReply[GatewayResult]],
    ports: Sequence[HostReply[ProbeResult]],
) -> tuple[HostReply[ProbeResult], ...]:
    """Check each name that leads to a ready port. `aliases`: the result of `gateway`; `ports`: what to check.

    A name is left out if a request by it could make a server drop its model. Raises what `required_key` raises.
    """
    key = required_key(gateway, config)
    rows = [row for reply in aliases if reply.result for row in reply.result.aliases]
    servers = [server_of(row, row.url, row.slot, idle=row.owner is None) for row in rows]
    running = read_running(gateway, config, key, servers)
    route = _Route(running, plan_probes(running.entries, running.servers, same_host), key)
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


def _rows(route: _Route, ports: ProbeResult | None, aliases: GatewayResult | None) -> list[CheckedPort]:
    """Return a row for each name that leads to one of these ports."""
    by_port = {row.port: row for row in aliases.aliases} if aliases else {}
    rows: list[CheckedPort] = []
    for port in ports.ports if ports else ():
        blank = replace(port, verdicts=(), lost=(), checked_at=None, through=route.gateway.gateway.url)
        alias = by_port.get(port.port)
        if alias is None or alias.state is not State.READY:
            rows.append(replace(blank, not_asked=f"the port is {alias.state if alias else 'not known'}"))
        elif names := route.names(alias):
            rows += [replace(blank, name=name, not_asked=route.why_not(name)) for name in names]
        else:
            rows.append(replace(blank, not_asked=route.gateway.why_no_name(port.alias or "it", port.port)))
    return rows


def _checked(route: _Route, row: CheckedPort) -> CheckedPort:
    parts = urlsplit(route.gateway.gateway.url or "")
    server = ChatServer(
        parts.scheme,
        parts.hostname or "",
        parts.port,
        str(row.name),
        base=parts.path.rstrip("/").removesuffix("/v1"),
        headers={"Authorization": f"Bearer {route.key}"} if route.key else None,
        fields=LITELLM_FIELDS,
    )
    began = time.monotonic()
    verdicts = conformance.with_promises(run_checks(server, json_schema=row.json_schema), row.promised)
    return replace(
        row,
        verdicts=tuple(map(VerdictRow.of, without_key(verdicts, route.key))),
        seconds=round(time.monotonic() - began, 1),
        checked_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def without_key(verdicts: Sequence[Verdict], key: str | None) -> tuple[Verdict, ...]:
    """Remove the key from the details: LiteLLM repeats one that it does not accept."""
    if not key:
        return tuple(verdicts)
    return tuple(replace(each, detail=each.detail.replace(key, "[key]")) for each in verdicts)
