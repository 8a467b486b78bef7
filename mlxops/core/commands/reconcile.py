"""`reconcile`: clear what nothing serves, stop what belongs to nothing."""

from __future__ import annotations

from collections.abc import Sequence

from mlxops.core.command import Group, Hosts, Stopping
from mlxops.core.frozen import dataclass
from mlxops.core.replies import HostReply
from mlxops.core.tables import each_host, joined


@dataclass(frozen=True)
class ClearedRow:
    model: str
    port: int
    """The port to which it was assigned."""


@dataclass(frozen=True)
class StoppedRow:
    port: int
    model: str | None
    pid: int | None
    why: str
    """Why it belongs to nothing."""


@dataclass(frozen=True)
class ReconcileResult:
    cleared: tuple[ClearedRow, ...]
    """Assignments that nothing serves."""
    stopped: tuple[StoppedRow, ...]
    """Servers and processes that belong to nothing."""
    interrupted: tuple[str, ...]
    """Interrupted operations whose end was written."""
    leftovers: tuple[str, ...]
    """Files of killed writers that were removed."""
    kept: tuple[str, ...]
    """What was left alone, and why."""
    changed: bool
    dry_run: bool


@dataclass(frozen=True)
class Reconcile(
    Stopping[ReconcileResult],
    group=Group.SERVE,
    example="mlxctl reconcile --dry-run",
    hosts=Hosts.SEVERAL,
    changes=True,
):
    """Clear assignments without a server; stop leftovers of a crash."""


def show(replies: Sequence[HostReply[ReconcileResult]]) -> str:
    return each_host(replies, _lines)


def _lines(result: ReconcileResult) -> str:
    would = "would be " if result.dry_run else ""
    lines = [f"{row.model}: assignment to {row.port} {would}cleared" for row in result.cleared]
    lines += [f"{row.port}: {row.model}, pid {row.pid}, {would}stopped: {row.why}" for row in result.stopped]
    lines += [f"{would}closed: {text}" for text in result.interrupted]
    lines += [f"{would}removed: {text}" for text in result.leftovers]
    lines += [f"left alone: {text}" for text in result.kept]
    return joined(lines) or "nothing to reconcile"
