"""What measured seconds say: medians, ranges, ratios, verdicts, and how a cost grows. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from mlxops.core.tables import table

SLACK = 1.5
"""How far above a straight line a cost may end before it counts as growing faster than the work: on a machine with
few cores the last point is the one that suffers from everything else that runs there."""


class Verdict(Enum):
    MET = "met"
    MISSED = "missed"
    NONE = "-"
    """There is no target: it is shown for comparison."""


@dataclass(frozen=True)
class Series:
    """What one thing took, in seconds: a value for each turn."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        return min(self.seconds)

    @property
    def high(self) -> float:
        return max(self.seconds)

    def __str__(self) -> str:
        """`305 ms (298-340)`, in one unit that suits the median."""
        factor, unit, digits = _unit(self.median)
        low, middle, high = (f"{value * factor:.{digits}f}" for value in (self.low, self.median, self.high))
        return f"{middle} {unit} ({low}-{high})"

    def to_wire(self) -> dict[str, object]:
        return {
            "name": self.name,
            "median": _rounded(self.median),
            "low": _rounded(self.low),
            "high": _rounded(self.high),
            "seconds": [_rounded(value) for value in self.seconds],
        }


@dataclass(frozen=True)
class Limit:
    """The most that something may take: so many times the medians of others, together, and so many seconds."""

    times: Mapping[str, float]
    plus: float = 0.0

    def seconds(self, medians: Mapping[str, float]) -> float:
        return sum(factor * medians[name] for name, factor in self.times.items()) + self.plus

    def __str__(self) -> str:
        parts = [name if factor == 1 else f"{factor:g} x {name}" for name, factor in self.times.items()]
        return " + ".join([*parts, *([f"{self.plus:g} s"] if self.plus else [])])


@dataclass(frozen=True)
class Row:
    """One contest. `series` are all that took part; the limit is about `ours`, the ratio against `yardstick`."""

    name: str
    what: str
    ours: str
    yardstick: str
    limit: Limit | None
    series: tuple[Series, ...]

    def of(self, name: str) -> Series:
        return next(each for each in self.series if each.name == name)

    def ratio(self, name: str) -> float:
        return self.of(name).median / self.of(self.yardstick).median

    @property
    def limit_seconds(self) -> float | None:
        return self.limit.seconds({each.name: each.median for each in self.series}) if self.limit else None

    @property
    def verdict(self) -> Verdict:
        most = self.limit_seconds
        if most is None:
            return Verdict.NONE
        return Verdict.MET if self.of(self.ours).median <= most else Verdict.MISSED

    @property
    def beside(self) -> tuple[Series, ...]:
        """What took part and is neither ours nor the yardstick."""
        return tuple(each for each in self.series if each.name not in (self.ours, self.yardstick))

    def to_wire(self) -> dict[str, object]:
        most = self.limit_seconds
        return {
            "row": self.name,
            "what": self.what,
            "ours": self.ours,
            "yardstick": self.yardstick,
            "ratio": round(self.ratio(self.ours), 3),
            "limit": str(self.limit) if self.limit else None,
            "limit_seconds": None if most is None else _rounded(most),
            "verdict": self.verdict.value,
            "series": [each.to_wire() for each in self.series],
        }


@dataclass(frozen=True)
class Growth:
    """How one cost grows with the work: `points` are (amount of work, what it took), the least work first."""

    name: str
    what: str
    unit: str
    points: tuple[tuple[int, Series], ...]

    @property
    def per_unit(self) -> float:
        """Seconds for each further unit, from the first point to the last."""
        (first, least), (last, most) = self.points[0], self.points[-1]
        return (most.median - least.median) / (last - first)

    @property
    def verdict(self) -> Verdict:
        """Whether the last point lies where the first two may lead, as far as their ranges tell, or not far above."""
        (one, first), (two, second), (last, most) = self.points[0], self.points[1], self.points[-1]
        slope = max(0.0, (second.high - first.low) / (two - one))
        straight = first.median + slope * (last - one)
        return Verdict.MET if most.median <= SLACK * straight else Verdict.MISSED

    def to_wire(self) -> dict[str, object]:
        return {
            "cost": self.name,
            "what": self.what,
            "unit": self.unit,
            "points": [{"amount": amount, **series.to_wire()} for amount, series in self.points],
            "seconds_per_unit": _rounded(self.per_unit),
            "verdict": self.verdict.value,
        }


def rows_table(rows: Sequence[Row]) -> str:
    """A line for each contest, and one for whatever else took part in it."""
    lines: list[list[object]] = []
    for row in rows:
        yardstick = f"{row.yardstick} {row.of(row.yardstick)}"
        most = None if row.limit is None else f"{row.limit} = {_short(row.limit_seconds or 0.0)}"
        verdict = row.verdict.value
        for what, each in ((row.what, row.of(row.ours)), *((each.name, each) for each in row.beside)):
            lines.append([row.name, what, each, yardstick, f"{row.ratio(each.name):.2f}", most, verdict])
            most, verdict = None, Verdict.NONE.value
    return table(["ROW", "WHAT", "TOOK", "YARDSTICK", "RATIO", "AT MOST", "VERDICT"], lines)


def growth_table(costs: Sequence[Growth]) -> str:
    lines = [
        [
            each.name,
            each.what,
            ", ".join(f"{amount}: {_short(series.median)}" for amount, series in each.points),
            f"{_short(each.per_unit)} per {each.unit}",
            "no faster than the work" if each.verdict is Verdict.MET else "faster than the work",
        ]
        for each in costs
    ]
    return table(["COST", "WHAT", "MEDIANS", "EACH", "GROWS"], lines)


def _short(seconds: float) -> str:
    factor, unit, digits = _unit(seconds)
    return f"{seconds * factor:.{digits}f} {unit}"


def _unit(seconds: float) -> tuple[float, str, int]:
    """(what to multiply with, the unit's name, digits after the point)"""
    size = abs(seconds)
    if size >= 1:
        return 1.0, "s", 2
    return (1e3, "ms", 0) if size >= 0.01 else (1e3, "ms", 2)


def _rounded(seconds: float) -> float:
    return round(seconds, 6)
