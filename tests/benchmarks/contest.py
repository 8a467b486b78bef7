"""How programs are compared: by turns, in one run. The first turn warms up and does not count."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.benchmarks.stats import Growth, Limit, Row, Series
from tests.lab.homelab import Completed, run

Timed = Callable[[], float]
"""Does the work once and returns its seconds."""
K = TypeVar("K")
COMMAND_TIMEOUT = 600.0


class BenchFailed(RuntimeError):
    """A timed program did not do its work, so its time means nothing."""


@dataclass(frozen=True)
class Contest:
    """One row of the report. `open` sets up the contestants in a folder, yields them by name, and cleans up."""

    name: str
    what: str
    ours: str
    yardstick: str
    limit: Limit | None
    turns: int
    open: Callable[[Path], AbstractContextManager[Mapping[str, Timed]]]

    def measure(self, folder: Path) -> Row:
        """Raises `BenchFailed`, `cache.BuildFailed`."""
        with self.open(folder) as contestants:
            seconds = by_turns(contestants, self.turns)
        series = tuple(Series(name, values) for name, values in seconds.items())
        return Row(self.name, self.what, self.ours, self.yardstick, self.limit, series)


@dataclass(frozen=True)
class Cost:
    """`open` yields, by name, what is timed for each amount of work. All amounts exist side by side."""

    name: str
    unit: str
    turns: int
    open: Callable[[Path], AbstractContextManager[Mapping[str, Mapping[int, Timed]]]]

    def measure(self, folder: Path) -> list[Growth]:
        """Raises `BenchFailed`, `cache.BuildFailed`."""
        with self.open(folder) as costs:
            flat = {(name, amount): timed for name, amounts in costs.items() for amount, timed in amounts.items()}
            seconds = by_turns(flat, self.turns)
        return [
            Growth(self.name, name, self.unit, tuple((n, Series(name, seconds[name, n])) for n in sorted(costs[name])))
            for name in costs
        ]


def by_turns(contestants: Mapping[K, Timed], turns: int) -> dict[K, tuple[float, ...]]:
    """Run every contestant once a turn, each turn starting with another one, and return the seconds of each.

    A disturbance then hits all of them alike. One more turn runs before those that count, to fill caches.
    """
    seconds: dict[K, list[float]] = {key: [] for key in contestants}
    for turn in range(turns + 1):
        for key in _rotated(list(contestants), turn):
            value = contestants[key]()
            if turn > 0:
                seconds[key].append(value)
    return {key: tuple(values) for key, values in seconds.items()}


def _rotated(keys: Sequence[K], by: int) -> list[K]:
    by %= len(keys)
    return [*keys[by:], *keys[:by]]


@dataclass(frozen=True)
class Program:
    """A command line, timed from its start to its end."""

    argv: Sequence[str]
    cwd: Path
    env: Mapping[str, str]
    status: int = 0
    """The exit status that it must have."""
    stdin: str | None = None

    def __call__(self) -> float:
        return self.run()[0]

    def run(self) -> tuple[float, Completed]:
        """Return its seconds and what it wrote. Raises `BenchFailed`."""
        began = time.perf_counter()
        done = run(self.argv, self.cwd, self.env, self.stdin, timeout=COMMAND_TIMEOUT)
        took = time.perf_counter() - began
        if done.exit != self.status:
            raise BenchFailed(f"{' '.join(self.argv)} ended with {done.exit}: {(done.stderr or done.stdout)[-600:]}")
        return took, done
