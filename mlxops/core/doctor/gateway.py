"""Check whether LiteLLM's health checks reach the servers. Pure. `core.hold` checks its retries."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from mlxops.core.doctor.findings import Finding, FindingCode


def health_check_findings(entries: Collection[str], config: str) -> Iterator[Finding]:
    """`entries`: the aliases whose servers LiteLLM's background health checks ask."""
    if entries:
        message = f"background_health_checks send requests to the servers of {', '.join(sorted(set(entries)))}"
        yield Finding.of(FindingCode.GATEWAY_HEALTH_CHECKS, message, config=config)
