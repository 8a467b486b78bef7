"""`logs`: a server's log."""

from __future__ import annotations

from collections.abc import Sequence

from mlxops.core.command import Group, Request, option, switch, whole
from mlxops.core.frozen import dataclass
from mlxops.core.replies import HostReply
from mlxops.core.wire import omitted


@dataclass(frozen=True)
class LogsResult:
    port: int
    path: str
    """The log on the host."""
    lines: tuple[str, ...] | None = omitted(None)
    """With `--json` and without `--follow`: the lines. The agent sends them as events before."""


@dataclass(frozen=True)
class Logs(Request[LogsResult], group=Group.LOOK, example="mlxctl logs 8100 --follow"):
    """Show a server's log."""

    port: str | None = option("port of the server", position=0, needed="logs --port 8100")
    lines: int = option("number of last lines to show (100)", default=100, parse=whole("--lines", 0, 100_000))
    follow: bool = switch("keep running and show new lines")
    after: str | None = None
    """The mark of the last line that was received over an earlier connection."""


def show(replies: Sequence[HostReply[LogsResult]]) -> str:
    """The lines were printed as they came."""
    return ""
