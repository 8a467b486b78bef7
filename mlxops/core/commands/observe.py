"""`observe`: all that `serve` exports of a host, in one answer. mlxops itself asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from mlxops.core.command import Request
from mlxops.core.commands.list import MemoryRow
from mlxops.core.commands.probe import VerdictRow
from mlxops.core.commands.status import StatusResult
from mlxops.core.frozen import dataclass
from mlxops.core.measuring import Figure


@dataclass(frozen=True)
class PortTotals:
    """What a host's history counts for one port, since the history began."""

    loads: int = 0
    unloads: int = 0
    swaps: int = 0
    """Loads that left the port without a server for a time."""
    downtime_seconds: float = 0.0
    """The sum of these times."""
    deaths: Mapping[str, int] = field(default_factory=dict)
    """Servers that ended by themselves, by cause."""
    restarts: Mapping[str, int] = field(default_factory=dict)
    """Starts by `restore` or the keeper, by the cause of the death before."""


@dataclass(frozen=True)
class ObservedPort:
    """One port, beside its row of the status. Times are seconds since 1970."""

    port: int
    started_at: float | None = None
    checked_at: float | None = None
    """When the server was last probed."""
    verdicts: tuple[VerdictRow, ...] = ()
    measured_at: float | None = None
    """When the model that is served now was last measured on this port."""
    figures: tuple[Figure, ...] = ()
    totals: PortTotals | None = None
    """None if the history cannot be read."""


@dataclass(frozen=True)
class EndedOperation:
    operation: str
    """Its id."""
    outcome: str
    """done, failed, cancelled, followed or interrupted."""


@dataclass(frozen=True)
class ObserveResult:
    status: StatusResult
    memory: MemoryRow
    ports: tuple[ObservedPort, ...]
    running: int
    """Operations that run now."""
    ended: tuple[EndedOperation, ...]
    """The operations that are recorded and have ended."""


@dataclass(frozen=True)
class Observe(Request[ObserveResult], repeatable=True):
    """Return what `serve` exports of a host."""
