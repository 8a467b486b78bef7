"""`ops`: running and recent operations."""

from __future__ import annotations

from collections.abc import Sequence

from mlxops.core.command import Group, Hosts, Request, option, seconds
from mlxops.core.frozen import dataclass
from mlxops.core.protocol import Progress
from mlxops.core.replies import HostReply
from mlxops.core.tables import table
from mlxops.core.text import duration
from mlxops.core.wire import omitted


@dataclass(frozen=True)
class OperationRow:
    operation: str
    """Its id."""
    command: str | None
    model: str | None
    repo: str | None
    port: int | str | None
    """As it was asked for: a number, `auto`, or what was typed."""
    asker: str | None
    """User and host that asked for it, and in parentheses what `MLXOPS_BY` said there."""
    since: str
    """When it began, in UTC."""
    phase: str | None
    """The phase that it is in, or was in at its end."""
    detail: str
    """How far it is, or how it ended, for people."""
    error: str | None
    """The code of its error."""
    state: str
    """running, done, failed, cancelled, followed or interrupted."""
    progress: Progress | None = omitted(None)
    """Only while it counts bytes."""
    seconds: float | None = None
    """How long it took, or has taken until now."""


@dataclass(frozen=True)
class OpsResult:
    operations: tuple[OperationRow, ...]
    """The newest first."""


@dataclass(frozen=True)
class Ops(
    Request[OpsResult],
    group=Group.LOOK,
    example="mlxctl ops --follow 7f3a",
    hosts=Hosts.SEVERAL,
    repeatable=True,
):
    """Show running and recent operations; follow or cancel one."""

    follow: str | None = option("operation to follow to its end: its id, or the end of it", sent=False)
    timeout: float | None = option(
        "with --follow: seconds until it stops following (exit status 9); the operation goes on",
        parse=seconds("--timeout", zero=True),
        sent=False,
    )
    cancel: str | None = option(
        "operation to cancel: its id, or the end of it; its unfinished part is undone", sent=False
    )


def show(replies: Sequence[HostReply[OpsResult]]) -> str:
    rows: list[list[object]] = []
    for reply in replies:
        if reply.error is not None and reply.result is None:
            rows.append([reply.host, "", "", "", "", "", "", "", reply.error.code, reply.error.message])
        for row in reply.result.operations if reply.result else ():
            took = "-" if row.seconds is None else duration(row.seconds)
            about = [reply.host, row.operation, row.command, row.model or row.repo, row.port]
            rows.append([*about, row.since, took, row.asker, row.state, row.detail])
    columns = ["HOST", "OPERATION", "COMMAND", "MODEL", "PORT", "BEGAN", "TOOK", "ASKED BY", "STATE", "DETAIL"]
    return table(columns, rows)
