"""`cancel`: end an operation. `ops --cancel` asks for it."""

from __future__ import annotations

from collections.abc import Sequence

from mlxops.core.command import Request
from mlxops.core.frozen import dataclass
from mlxops.core.replies import HostReply
from mlxops.core.tables import each_host, one_line


@dataclass(frozen=True)
class CancelResult:
    operation: str
    """The id of the operation."""
    cancelled: bool
    """False: it was done before it could be cancelled."""
    changed: bool
    """Always true."""
    outcome: str = ""
    """What became of the server that the operation had replaced, for people."""


@dataclass(frozen=True)
class Cancel(Request[CancelResult], nested=True):
    operation: str = ""


def show(replies: Sequence[HostReply[CancelResult]]) -> str:
    return each_host(replies, _line)


def _line(result: CancelResult) -> str:
    cancelled = f"was cancelled; {result.outcome or 'nothing half done is left'}"
    return one_line(f"operation {result.operation} {cancelled if result.cancelled else _LATE}")


_LATE = "was done before it could be cancelled"
