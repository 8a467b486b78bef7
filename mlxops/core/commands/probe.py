"""`probe`: does each served model answer as clients expect."""

from __future__ import annotations

from collections.abc import Sequence

from mlxops.core.command import Group, Hosts, Request, option, switch
from mlxops.core.conformance import Mark, Verdict
from mlxops.core.frozen import dataclass
from mlxops.core.replies import HostReply
from mlxops.core.tables import host_table, one_line


@dataclass(frozen=True)
class VerdictRow:
    """One check. Another version may have other checks."""

    check: str
    verdict: str
    """pass, warn (the model chose otherwise), fail, or skip."""
    detail: str = ""
    """Why it did not pass, for people."""

    @classmethod
    def of(cls, verdict: Verdict) -> VerdictRow:
        return cls(verdict.check.value, verdict.mark.value, verdict.detail)


@dataclass(frozen=True)
class CheckedPort:
    """The verdicts of one port, or of one name of the gateway that leads to it."""

    port: int
    alias: str | None
    """The slot's alias."""
    model: str | None
    name: str | None = None
    """The model name that the requests had."""
    engine: str | None = None
    engine_version: str | None = None
    checked_at: str | None = None
    """When, in UTC; None if it was not checked."""
    seconds: float = 0.0
    """How long the checks took."""
    verdicts: tuple[VerdictRow, ...] = ()
    lost: tuple[str, ...] = ()
    """Checks that got worse for the same repository, revision and engine."""
    promised: tuple[str, ...] = ()
    """What the model's entry or its family promises: missing, it is a failure."""
    json_schema: bool = False
    """The engine follows a JSON schema."""
    through: str | None = None
    """The URL of the gateway, if the requests went through it."""
    not_asked: str | None = None
    """Why it was not checked."""
    pid: int | None = None
    """The process of the server."""
    since: str | None = None
    """When the server started, in UTC."""
    clients: int = 0
    """Connections to the server when the row was made, such as those of open requests."""


@dataclass(frozen=True)
class ProbeResult:
    ports: tuple[CheckedPort, ...]


@dataclass(frozen=True)
class Probe(
    Request[ProbeResult],
    group=Group.LOOK,
    example="mlxctl probe 8100",
    hosts=Hosts.ALL,
):
    """Check whether each served model answers as clients expect."""

    port: str | None = option("only this port; left out: all that are ready", position=0)
    last: bool = switch("show the last verdicts; ask no server")
    through: bool = switch("ask through the running gateway, by each name that leads there", sent=False)


CHECK_FAILED = "check_failed"
"""The code of the error for a check that failed."""


def failures(result: ProbeResult) -> list[tuple[int, str]]:
    """Return (port, check) of each check that failed."""
    return [(port.port, row.check) for port in result.ports for row in port.verdicts if row.verdict == Mark.FAIL]


def show(replies: Sequence[HostReply[ProbeResult]]) -> str:
    ports = [(reply.host, port) for reply in replies if reply.result for port in reply.result.ports]
    rows: list[list[object]] = []
    for host, port in ports:
        place = [host, port.port, port.name or port.alias, port.model]
        if port.not_asked:
            rows.append([*place, "", "", f"not asked: {port.not_asked}"])
        rows += [[*place, row.check, row.verdict, row.detail] for row in port.verdicts]
    columns = ["HOST", "PORT", "NAME", "MODEL", "CHECK", "VERDICT", "DETAIL"]
    many = len(replies) > 1
    if not rows:
        return "no server is ready" if any(reply.result for reply in replies) else ""
    return "\n".join([host_table(columns, rows, many=many), *(_summary(host, port, many=many) for host, port in ports)])


def _summary(host: str, port: CheckedPort, *, many: bool) -> str:
    """Return one line: how many checks passed, when, and how."""
    marks = [row.verdict for row in port.verdicts]
    counts = ", ".join(f"{marks.count(mark)} {mark}" for mark in ("pass", "warn", "fail", "skip") if mark in marks)
    engine = f"{port.engine} {port.engine_version or ''}".strip() if port.engine else "its server"
    through = f" through {port.through}" if port.through else ""
    lost = f"; worse than before: {', '.join(port.lost)}" if port.lost else ""
    place = f"{host}: {port.port}" if many else f"{port.port}"
    when = f" at {port.checked_at}, in {port.seconds:.1f} s" if port.checked_at else ""
    return one_line(f"{place}: {engine}{through}: {counts or 'not checked'}{when}{lost}")
