"""The table of `gateway`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlxops.core.replies import HostReply
from mlxops.core.tables import host_table, one_line


def _rows(result: Mapping[str, object] | None, key: str) -> list[Mapping[str, object]]:
    rows = (result or {}).get(key)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def show(answers: Sequence[HostReply[Mapping[str, object]]]) -> str:
    many = len(answers) > 1
    rows: list[list[object]] = []
    for answer in answers:
        for row in _rows(answer.result, "aliases"):
            passage = row.get("through")
            through = (
                ("ok" if passage.get("ok") else str(passage.get("code"))) + f" ({passage.get('seconds')} s)"
                if isinstance(passage, dict)
                else ""
            )
            named = (row.get(key) for key in ("port", "sends", "state", "owner", "model", "context_length"))
            names = row.get("names")
            alias = ", ".join(map(str, names)) if isinstance(names, list) and names else row.get("alias")
            rows.append([answer.host, alias, *named, through, row.get("verdict")])
    columns = ["HOST", "ALIAS", "PORT", "SENDS", "STATE", "OWNER", "MODEL", "CONTEXT", "THROUGH", "VERDICT"]
    found = [row for answer in answers for row in _rows(answer.result, "findings")]
    findings = [
        f"{row.get('severity')}: {one_line(row.get('message'))}; {one_line(row.get('hint'))}"
        for row in sorted(found, key=lambda row: row.get("severity") != "fault")
    ]
    return "\n".join([host_table(columns, rows, many=many), *findings])
