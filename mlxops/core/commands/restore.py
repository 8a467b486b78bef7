"""`restore`: start what is assigned and nothing serves."""

from __future__ import annotations

from collections.abc import Sequence

from mlxops.core.command import Group, Hosts, Stopping, switch
from mlxops.core.frozen import dataclass
from mlxops.core.hints import Commands
from mlxops.core.replies import HostReply
from mlxops.core.tables import each_host, one_line
from mlxops.core.wire import omitted


@dataclass(frozen=True)
class RestoreRow:
    model: str
    port: int
    why: str = omitted("")
    """Why it failed or was skipped."""
    commands: Commands = omitted(())
    """The commands that `why` names."""
    again_in_seconds: float | None = omitted(None)
    """When a later restore tries it again."""
    argv: tuple[str, ...] | None = omitted(())
    """In a dry run: what would be run; None if its files would be downloaded first."""


@dataclass(frozen=True)
class RestoreResult:
    restored: tuple[RestoreRow, ...]
    """Started; in a dry run, would be started."""
    failed: tuple[RestoreRow, ...]
    skipped: tuple[RestoreRow, ...]
    """Not tried, for example soon after a failure."""
    changed: bool
    dry_run: bool


@dataclass(frozen=True)
class Restore(
    Stopping[RestoreResult],
    group=Group.SERVE,
    example="mlxctl restore",
    hosts=Hosts.SEVERAL,
    changes=True,
    cancellable=True,
):
    """Start assigned models that no server serves."""

    cleared: bool = switch("also what the latest reconcile has cleared")
    ports: tuple[int, ...] = ()
    """Only these ports; empty: all. The keeper asks for them. Such a restore may run beside another one."""
    wedged: str = ""
    """Pid and start of a server on the first of `ports`. It completes nothing, and is stopped before."""


def show(replies: Sequence[HostReply[RestoreResult]]) -> str:
    return each_host(replies, line)


def line(result: RestoreResult) -> str:
    verb = "would start" if result.dry_run else "started"
    left = f"; left: {_named(result.skipped)}" if result.skipped else ""
    return one_line(f"{verb} {_named(result.restored) or 'nothing'}{left}")


def _named(rows: Sequence[RestoreRow]) -> str:
    return ", ".join(f"{row.model} on {row.port}" for row in rows)
