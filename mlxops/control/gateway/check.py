"""`gateway`: compare the entries in the gateway's files with the ports of the hosts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from mlxops.control.client import HostTarget
from mlxops.control.gateway.config import GatewayConfig
from mlxops.control.gateway.ports import configured_ports, observed_ports, same_host
from mlxops.control.gateway.result import AliasRow, GatewayResult
from mlxops.control.hints import aimed
from mlxops.core import gateway as core
from mlxops.core import hold
from mlxops.core.commands.gateway import ServedPorts
from mlxops.core.errors import MlxopsError, Refused
from mlxops.core.gateway import Entry, GatewayPort, Impact, Mismatch
from mlxops.core.litellm import LiteLLMConfig
from mlxops.core.probe_names import names_for
from mlxops.core.replies import HostReply

FAULTS_CODE = "gateway_faults"


def client_entries(config: LiteLLMConfig, ports: Sequence[GatewayPort]) -> tuple[Entry, ...]:
    """Return the entries under the names that clients use: patterns become the aliases of these ports."""
    names = [port.alias for port in ports if port.alias]
    return core.claims(config.concrete(names), ports, same_host)


def with_client_names(config: GatewayConfig, ports: Sequence[GatewayPort]) -> GatewayConfig:
    return replace(config, entries=client_entries(config.config, ports))


def check(
    config: GatewayConfig, targets: Sequence[HostTarget], replies: Sequence[HostReply[ServedPorts]]
) -> tuple[HostReply[GatewayResult], ...]:
    """Return the aliases and findings of each host. A host with a fault gets an error.

    A finding that is about no single host is reported with the first one.
    """
    ports: dict[str, tuple[GatewayPort, ...]] = {}
    for target, reply in zip(targets, replies, strict=True):
        try:
            ports[target.name] = observed_ports(configured_ports(target), reply.result)
        except MlxopsError:
            ports[target.name] = ()
    all_ports = [port for host_ports in ports.values() for port in host_ports]
    config = with_client_names(config, all_ports)
    compared = core.compare(config.entries, all_ports, config.files, same_host) if config.known else ()
    swaps = hold.findings(config.entries, all_ports, config.config.retry, config.files, same_host)
    registry_findings = [finding for reply in replies for finding in _registry_findings(reply)]
    flags = {target.name: target.flags for target in targets}
    findings = [
        replace(finding, hint=aimed(finding.hint, flags.get(finding.host or "", "")))
        for finding in (*config.findings, *compared, *swaps, *registry_findings)
    ]
    first = replies[0].host if replies else None
    return tuple(
        _host_result(config, reply, ports[reply.host], [f for f in findings if (f.host or first) == reply.host])
        for reply in replies
    )


def _registry_findings(reply: HostReply[ServedPorts]) -> Iterator[Mismatch]:
    """Report a registry that cannot be read: the assignments of its host's ports are unknown."""
    error = reply.result.registry_error if reply.result else None
    if error is not None:
        message = f"{error.message}: {error.why}"
        yield Mismatch(error.code, None, None, Impact.WARNING, message, error.hint, reply.host)


def _host_result(
    config: GatewayConfig,
    reply: HostReply[ServedPorts],
    ports: Sequence[GatewayPort],
    findings: Sequence[Mismatch],
) -> HostReply[GatewayResult]:
    rows = [
        _alias_row(config, port, findings) for port in ports if port.alias or port.serves or _entries_to(config, port)
    ]
    result = GatewayResult(tuple(rows), tuple(findings))
    return HostReply(reply.host, result, reply.error or faults_error(findings), reply.command, reply.flags)


def faults_error(findings: Sequence[Mismatch]) -> MlxopsError | None:
    """Return the error of a check with these findings; None if no finding is a fault."""
    count = sum(finding.severity is Impact.FAULT for finding in findings)
    if not count:
        return None
    return Refused(
        FAULTS_CODE,
        f"{count} {'fault' if count == 1 else 'faults'} between the gateway and its servers",
        why="a request for such an alias fails, or reaches another server",
        hint="each is listed, with what to do",
    )


def _entries_to(config: GatewayConfig, port: GatewayPort) -> list[Entry]:
    return [
        entry
        for entry in config.entries
        if entry.address and entry.address[1] == port.port and same_host(entry.address[0], port.address)
    ]


def _alias_row(config: GatewayConfig, port: GatewayPort, findings: Sequence[Mismatch]) -> AliasRow:
    entries = _entries_to(config, port)
    about = [f for f in findings if f.port == port.port or (f.alias and f.alias == port.alias)]
    faults = [finding.code for finding in about if finding.severity is Impact.FAULT]
    url = core.url(port.address, port.port)
    names = names_for(config.entries, url, port.alias, same_host)
    return AliasRow(
        alias=next(iter(names), None),
        names=tuple(names),
        slot=port.alias,
        port=port.port,
        url=url,
        sends=next((entry.sends for entry in entries), None),
        state=port.state,
        owner=port.owner,
        model=port.model,
        answers_to=port.answers_to,
        also_answers_to=port.also_answers_to,
        answers_to_any=port.answers_to_any,
        drops_for_others=port.drops_for_others,
        not_asked=port.not_asked or None,
        context_length=port.context_length,
        verdict=", ".join(dict.fromkeys(faults or [finding.code for finding in about])) or "ok",
    )
