"""`unload-all`: stop every MLX server of a host."""

from __future__ import annotations

from collections.abc import Sequence

from mlxops.core.command import Group, Hosts, Stopping, switch
from mlxops.core.commands.load import PortResult
from mlxops.core.commands.unload import line
from mlxops.core.frozen import dataclass
from mlxops.core.replies import HostReply
from mlxops.core.tables import each_host


@dataclass(frozen=True)
class UnloadAllResult:
    ports: tuple[PortResult, ...]
    """One result for each server."""
    changed: bool
    """At least one server was stopped."""
    dry_run: bool


@dataclass(frozen=True)
class UnloadAll(
    Stopping[UnloadAllResult],
    group=Group.SERVE,
    example="mlxctl unload-all --dry-run",
    hosts=Hosts.SEVERAL,
    changes=True,
):
    """Stop every MLX server of the host; asks first."""

    yes: bool = switch("do not ask", sent=False)


def show(replies: Sequence[HostReply[UnloadAllResult]]) -> str:
    return each_host(replies, lines)


def lines(result: UnloadAllResult) -> str:
    return "\n".join(map(line, result.ports)) or "nothing to unload"
