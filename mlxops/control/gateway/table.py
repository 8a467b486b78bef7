"""The table of `gateway`."""

from __future__ import annotations

from collections.abc import Sequence

from mlxops.control.gateway.result import AliasRow, GatewayResult, ProbedAliasRow
from mlxops.core.gateway import Impact
from mlxops.core.replies import HostReply
from mlxops.core.tables import host_table, one_line

COLUMNS = ["HOST", "ALIAS", "PORT", "SENDS", "STATE", "OWNER", "MODEL", "CONTEXT", "THROUGH", "VERDICT"]


def show(replies: Sequence[HostReply[GatewayResult]]) -> str:
    results = [(reply.host, reply.result) for reply in replies if reply.result is not None]
    rows = [_cells(host, row) for host, result in results for row in result.aliases]
    findings = [finding for _, result in results for finding in result.findings]
    lines = [
        f"{finding.severity}: {one_line(finding.message)}; {one_line(finding.hint)}"
        for finding in sorted(findings, key=lambda finding: finding.severity is not Impact.FAULT)
    ]
    return "\n".join(filter(None, [host_table(COLUMNS, rows, many=len(replies) > 1), *lines]))


def _cells(host: str, row: AliasRow) -> list[object]:
    alias = ", ".join(row.names) or row.alias
    return [
        *(host, alias, row.port, row.sends, row.state, row.owner, row.model, row.context_length),
        *(_through(row), row.verdict),
    ]


def _through(row: AliasRow) -> str:
    if not isinstance(row, ProbedAliasRow) or row.through is None:
        return ""
    return f"{'ok' if row.through.ok else row.through.code} ({row.through.seconds} s)"
