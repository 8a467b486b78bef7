"""A load as the gateway sees it: the names and tokens that it promises before, a probe through it afterwards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mlxops.control.client import HostTarget, reached_at
from mlxops.control.gateway.check import with_client_names
from mlxops.control.gateway.config import GatewayConfig, key_of, read
from mlxops.control.gateway.ports import configured_ports, same_host
from mlxops.control.gateway.probe import ProbeResult
from mlxops.control.gateway.result import Receipt
from mlxops.control.gateway.through import RunningGateway, read_running
from mlxops.control.hints import aimed
from mlxops.control.inventory import Gateway
from mlxops.control.output import Console
from mlxops.core import gateway as core
from mlxops.core import wire
from mlxops.core.commands.load import Loading, LoadResult
from mlxops.core.errors import MlxopsError, Refused
from mlxops.core.probe_names import server_of, slots_beside
from mlxops.core.replies import HostReply

RECEIPT_SECONDS = 30.0
"""How long a load waits for its receipt. The gateway sets a server that just failed aside for five seconds."""


def readable_config(gateway: Gateway | None, target: HostTarget, console: Console) -> GatewayConfig | None:
    """Return what the gateway's files say; None if they are not on this machine or cannot be read.

    A configuration that cannot be read is only a warning: it must not prevent a load.
    """
    if gateway is None or gateway.config is None or not os.path.isfile(Path(gateway.config).expanduser()):
        return None
    try:
        config = read(gateway)
    except Refused as error:
        console.note(f"warning: {error.message}: {error.why}; the gateway's names are not checked")
        return None
    try:
        return with_client_names(config, configured_ports(target))
    except MlxopsError:
        return config  # the load itself fails for the same reason, and reports it


def with_names(request: Loading, target: HostTarget, config: GatewayConfig | None) -> Loading:
    """Add to the request, by port, the names that the gateway sends and the tokens that it promises."""
    if config is None:
        return request
    try:
        address, ports = reached_at(target), target.settings.ports
    except MlxopsError:
        return request  # the request itself fails for the same reason, and reports it
    sent = core.names_sent(config.entries, address, same_host)
    promised = core.tokens_promised(config.entries, address, same_host)
    return replace(
        request,
        sent={str(port): names for port, names in sent.items() if port in ports},
        promised={str(port): tokens for port, tokens in promised.items() if port in ports},
    )


def with_receipt(
    reply: HostReply[LoadResult], gateway: Gateway, config: GatewayConfig | None, target: HostTarget, console: Console
) -> HostReply[LoadResult]:
    """Return a load's reply with the gateway's receipt.

    A probe that fails is a warning: the server answered on its port, so the fault is on the gateway's side.
    """
    if config and reply.error is not None and reply.error.code == "gateway_name":
        _add_edit_to_hint(reply.error, config, target)
    result = reply.result
    if result is None or result.state != "ready" or result.dry_run:
        return reply
    receipt = _probe(gateway, config, target, result, console)
    return replace(reply, result=replace(result, gateway=wire.encode(receipt)))


def _add_edit_to_hint(error: MlxopsError, config: GatewayConfig, target: HostTarget) -> None:
    """Make the hint name the file, the line and the value to write."""
    name, port = str(error.details.get("answers_to")), error.details.get("port")
    wrong = (entry for entry in config.entries if entry.address and entry.address[1] == port and entry.sends != name)
    entry = next((e for e in wrong if e.address and same_host(e.address[0], reached_at(target))), None)
    if entry is not None:
        error.set_hint(core.edit(entry, "model", entry.right_model(name), config.files))


def _probe(
    gateway: Gateway, config: GatewayConfig | None, target: HostTarget, result: LoadResult, console: Console
) -> Receipt:
    """Probe each of the gateway's names that leads to the port and that the server knows."""
    if gateway.url is None:
        return Receipt(False, "no url of the gateway is configured")
    key = key_of(gateway, config.environ if config is not None else {})
    running: RunningGateway | None = None
    results: tuple[ProbeResult, ...] = ()
    why = None
    if gateway.key_env and not key:
        why = f"{gateway.key_env} is set neither here nor in the gateway's env file"
    elif result.port is not None:
        port, slot, settings = result.port, str(result.alias), target.settings
        server = server_of(result, str(result.url), slot)
        others = slots_beside(port, reached_at(target), settings.slots, settings.ports)
        running = read_running(gateway, config, key, (server, *others))
        results = running.probe_all(RECEIPT_SECONDS)
        if not running.plan.names:
            why = aimed(f"{running.why_no_name(slot, port)}; see: `inv gateway`", target.flags)
        elif not results:
            why = "; ".join(f"{alias}: {reason}" for alias, reason in running.plan.skipped.items())
    if running is None or not running.plan.names:
        console.note(f"gateway: not asked: {why}")
        return Receipt(False, why)
    _report(running, results, target, console)
    return Receipt(bool(results), why, results, running.plan.skipped)


def _report(running: RunningGateway, results: Sequence[ProbeResult], target: HostTarget, console: Console) -> None:
    see, gateway = aimed("see: `inv gateway`", target.flags), running.gateway
    for alias, reason in running.plan.skipped.items():
        console.note(f"warning: {alias} is not asked for through {gateway.url}: {reason}; {see}")
    for result in results:
        if result.ok:
            console.note(f"gateway: {result.alias} answers through {gateway.url} ({result.seconds:.1f} s)")
        else:
            advice = aimed(running.advice(result), target.flags)
            console.note(f"warning: no answer for {result.alias} through {gateway.url}: {result.detail}; {advice}")
