"""Check the gateway: its files, its entries, its health checks and its retries. Nothing of its secrets is shown."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from mlxops.common.http import NotHttp, send_request
from mlxops.control import client
from mlxops.control.client import HostTarget
from mlxops.control.gateway.check import check
from mlxops.control.gateway.config import GatewayConfig, key_of, read
from mlxops.control.inventory import Gateway
from mlxops.control.ssh.config import error_text
from mlxops.core.commands.gateway import Gateway as GatewayRequest
from mlxops.core.doctor.findings import Finding, FindingCode
from mlxops.core.doctor.gateway import health_check_findings
from mlxops.core.errors import Refused
from mlxops.core.gateway import Impact, Mismatch
from mlxops.core.hold import SWAP_LOSES

ANSWER_SECONDS = 5.0
ALIVE = "/health/liveliness"
"""LiteLLM's only health check that asks no server."""
_IDLE = "alias_without_server"
"""An alias behind which nothing is loaded. That is no fault."""


def findings(gateway: Gateway, targets: Sequence[HostTarget]) -> Iterator[Finding]:
    """A gateway with neither its files nor its URL here runs on another machine: that is no fault."""
    down = _not_running(gateway)
    absent = [name for name in (gateway.config, gateway.env) if name and not os.path.exists(os.path.expanduser(name))]
    if absent:
        message = f"there is no {', '.join(absent)} on this machine"
        message += f", and nothing answers at {gateway.url}" if down else ""
        yield Finding.of(FindingCode.GATEWAY_ABSENT, message)
        return
    yield from down
    try:
        config = read(gateway)
    except Refused as error:
        yield Finding.because(FindingCode.GATEWAY_UNUSABLE, error)
        return
    if gateway.key_env and not key_of(gateway, config.environ):
        message = f"{gateway.key_env}, which `key_env` in hosts.yaml names, has no value"
        yield Finding.of(FindingCode.GATEWAY_KEY_MISSING, message, name=gateway.key_env)
    yield from _entries(config, targets)


def _not_running(gateway: Gateway) -> list[Finding]:
    if gateway.url is None:
        return []
    parts = urlsplit(gateway.url)
    path = f"{parts.path.rstrip('/')}{ALIVE}"
    try:
        send_request(parts.scheme, parts.hostname or "", parts.port, "GET", path, timeout=ANSWER_SECONDS)
    except (OSError, NotHttp, ValueError) as error:
        return [Finding.of(FindingCode.GATEWAY_DOWN, f"{gateway.url} does not answer: {error_text(error)}")]
    return []


def _entries(config: GatewayConfig, targets: Sequence[HostTarget]) -> Iterator[Finding]:
    replies = client.ask_all(targets, GatewayRequest(), lambda host, event: None)
    results = [reply.result for reply in check(config, targets, replies) if reply.result is not None]
    yield from (_as_finding(each) for result in results for each in result.findings if each.code != _IDLE)
    aliases = {name for result in results for row in result.aliases if row.sends for name in row.names}
    name = config.files.config
    checked = [entry.alias for entry in config.entries if entry.health_checked and entry.alias in aliases]
    yield from health_check_findings(checked, name)


def _as_finding(finding: Mismatch) -> Finding:
    code = FindingCode.GATEWAY_FAULT if finding.severity is Impact.FAULT else FindingCode.GATEWAY_DOUBT
    if finding.code == SWAP_LOSES:
        return Finding(FindingCode.GATEWAY_RETRIES, FindingCode.GATEWAY_RETRIES.level, finding.message, finding.hint)
    return Finding(code, code.level, f"{finding.code}: {finding.message}", finding.hint, finding.port)
