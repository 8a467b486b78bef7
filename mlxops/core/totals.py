"""Counts over a host's history, line by line: loads, swaps, downtime, deaths, restarts, and the last speeds. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from mlxops.core import planner
from mlxops.core.commands.observe import PortTotals
from mlxops.core.frozen import dataclass
from mlxops.core.measuring import Figure, figures_of

CAUSES = ("memory", "unknown")
"""Why a server ended. What a later version writes beside these counts as unknown."""


@dataclass(frozen=True)
class Measured:
    """The last run of `measure` on a port."""

    at: str
    model: str
    revision: str | None
    figures: tuple[Figure, ...]


class HistoryTotals:
    """The counts of each port. `add` each line, oldest first."""

    def __init__(self) -> None:
        self.measured: dict[int, Measured] = {}
        self._counts: Counter[tuple[int, str]] = Counter()
        self._downtime: dict[int, float] = {}
        self._deaths: Counter[tuple[int, str]] = Counter()
        self._restarts: Counter[tuple[int, str]] = Counter()
        self._last_cause: dict[int, str] = {}

    def add(self, line: Mapping[str, object]) -> None:
        """Count a line. Ignore one without a port: it is about no server."""
        port = line.get("port")
        if type(port) is not int or not 0 < port < 65536:
            return
        match line.get("command"):
            case "load":
                self._counts[port, "loads"] += 1
                if self._add_downtime(port, line.get("downtime_seconds")):
                    self._counts[port, "swaps"] += 1
            case planner.SWAP_UNDONE:
                self._add_downtime(port, line.get("downtime_seconds"))
            case "unload":
                self._counts[port, "unloads"] += 1
            case "died":
                cause = self._last_cause[port] = _cause(line.get("cause"))
                self._deaths[port, cause] += 1
            case "restore":
                self._restarts[port, self._last_cause.pop(port, "unknown")] += 1
            case "measure":
                self._add_measured(port, line)

    def of(self, port: int) -> PortTotals:
        return PortTotals(
            loads=self._counts[port, "loads"],
            unloads=self._counts[port, "unloads"],
            swaps=self._counts[port, "swaps"],
            downtime_seconds=round(self._downtime.get(port, 0.0), 3),
            deaths={cause: self._deaths[port, cause] for cause in CAUSES},
            restarts={cause: self._restarts[port, cause] for cause in CAUSES},
        )

    def _add_downtime(self, port: int, downtime: object) -> bool:
        """Return whether there was any."""
        if not isinstance(downtime, int | float) or not 0 <= downtime < planner.LONGEST_SWAP:
            return False
        self._downtime[port] = self._downtime.get(port, 0.0) + downtime
        return True

    def _add_measured(self, port: int, line: Mapping[str, object]) -> None:
        at, model, revision = (line.get(key) for key in ("at", "model", "revision"))
        figures = figures_of(line)
        if isinstance(at, str) and isinstance(model, str) and figures:
            self.measured[port] = Measured(at, model, revision if isinstance(revision, str) else None, figures)


def _cause(value: object) -> str:
    return value if isinstance(value, str) and value in CAUSES else "unknown"
