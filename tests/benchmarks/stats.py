"""Statistics of measured seconds: medians, ranges, ratios, verdicts, and how a cost grows. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from mlxops.core.tables import table

SLACK = 1.5
"""A cost may end this many times above a straight line before it counts as growing faster than the work. On a machine
with few cores, other programs disturb the last point most."""


class Verdict(Enum):
    MET = "met"
    MISSED = "missed"
    NONE = "-"
    """There is no limit: the row is a comparison only."""


@dataclass(frozen=True)
class Series:
    """The seconds of one contestant, one value for each turn."""

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
        """Return `305 ms (298-340)`: median, lowest and highest, in the unit that suits the median."""
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
    """The most that a contestant may take: the sum of others' medians, each times a factor, and `plus` seconds."""

    times: Mapping[str, float]
    plus: float = 0.0

    def seconds(self, medians: Mapping[str, float]) -> float:
        return sum(factor * medians[name] for name, factor in self.times.items()) + self.plus

    def __str__(self) -> str:
        parts = [name if factor == 1 else f"{factor:g} x {name}" for name, factor in self.times.items()]
        return " + ".join([*parts, *([f"{self.plus:g} s"] if self.plus else [])])


@dataclass(frozen=True)
class Ratio:
    """One contestant against another: the median of the turns' own ratios, and their quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def paired_ratio(ours: Series, other: Series) -> Ratio:
    """Compare turn by turn: what slows a whole turn down cancels out."""
    ratios = [one / two for one, two in zip(ours.seconds, other.seconds, strict=True)]
    if len(ratios) == 1:
        return Ratio(ratios[0], ratios[0], ratios[0])
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)


@dataclass(frozen=True)
class Row:
    """One contest. `series` has all contestants. The limit is for `ours`, the ratios are against `yardstick`."""

    name: str
    what: str
    ours: str
    yardstick: str
    limit: Limit | None
    series: tuple[Series, ...]

    def series_of(self, name: str) -> Series:
        return next(series for series in self.series if series.name == name)

    def ratio(self, name: str) -> Ratio:
        return paired_ratio(self.series_of(name), self.series_of(self.yardstick))

    @property
    def limit_ratio(self) -> Ratio | None:
        """Ours against the limit, turn by turn."""
        if self.limit is None:
            return None
        turns = range(len(self.series_of(self.ours).seconds))
        limits = (self.limit.seconds({each.name: each.seconds[turn] for each in self.series}) for turn in turns)
        return paired_ratio(self.series_of(self.ours), Series("limit", tuple(limits)))

    @property
    def limit_seconds(self) -> float | None:
        """The limit by the medians, for display."""
        return self.limit.seconds({each.name: each.median for each in self.series}) if self.limit else None

    @property
    def verdict(self) -> Verdict:
        ratio = self.limit_ratio
        if ratio is None:
            return Verdict.NONE
        return Verdict.MET if ratio.median <= 1 else Verdict.MISSED

    @property
    def others(self) -> tuple[Series, ...]:
        """The contestants that are neither ours nor the yardstick."""
        return tuple(each for each in self.series if each.name not in (self.ours, self.yardstick))

    def to_wire(self) -> dict[str, object]:
        limit, ratio, limit_ratio = self.limit_seconds, self.ratio(self.ours), self.limit_ratio
        return {
            "row": self.name,
            "what": self.what,
            "ours": self.ours,
            "yardstick": self.yardstick,
            "ratio": round(ratio.median, 3),
            "ratio_quartiles": [round(ratio.low, 3), round(ratio.high, 3)],
            "limit": str(self.limit) if self.limit else None,
            "limit_seconds": None if limit is None else _rounded(limit),
            "limit_ratio": None if limit_ratio is None else round(limit_ratio.median, 3),
            "verdict": self.verdict.value,
            "series": [each.to_wire() for each in self.series],
        }


@dataclass(frozen=True)
class Growth:
    """How one cost grows with the work. `points` are (amount of work, seconds), the least work first."""

    name: str
    what: str
    unit: str
    points: tuple[tuple[int, Series], ...]

    @property
    def per_unit(self) -> float:
        """Seconds for each further unit, from the first point to the last."""
        (first, low), (last, high) = self.points[0], self.points[-1]
        return (high.median - low.median) / (last - first)

    @property
    def verdict(self) -> Verdict:
        """Compare the last point with the steepest line that the ranges of the first two points allow."""
        (one, first), (two, second), (amount, last) = self.points[0], self.points[1], self.points[-1]
        slope = max(0.0, (second.high - first.low) / (two - one))
        straight = first.median + slope * (amount - one)
        return Verdict.MET if last.median <= SLACK * straight else Verdict.MISSED

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
    """Return a table with a line for each contest, and one more for each further contestant."""
    lines: list[list[object]] = []
    for row in rows:
        yardstick = f"{row.yardstick} {row.series_of(row.yardstick)}"
        limit = None if row.limit is None else f"{row.limit} = {_short(row.limit_seconds or 0.0)}"
        lines.append(
            [row.name, row.what, row.series_of(row.ours), yardstick, row.ratio(row.ours), limit, row.verdict.value]
        )
        lines += [
            [row.name, other.name, other, yardstick, row.ratio(other.name), None, Verdict.NONE.value]
            for other in row.others
        ]
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
    """Return (factor from seconds, the unit's name, digits after the point)."""
    size = abs(seconds)
    if size >= 1:
        return 1.0, "s", 2
    return (1e3, "ms", 0) if size >= 0.01 else (1e3, "ms", 2)


def _rounded(seconds: float) -> float:
    return round(seconds, 6)
