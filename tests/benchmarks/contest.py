"""How things are held against each other: by turns, in one run, the first turn to warm up."""

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
"""Does one thing once, and returns the seconds that count of it."""
K = TypeVar("K")
COMMAND_SECONDS = 600.0


class BenchFailed(RuntimeError):
    """Something that was to be timed did not do what it should: its time means nothing."""


@dataclass(frozen=True)
class Contest:
    """`open` sets the scene in a folder, gives what takes part by name, and clears up."""

    name: str
    what: str
    ours: str
    yardstick: str
    limit: Limit | None
    turns: int
    open: Callable[[Path], AbstractContextManager[Mapping[str, Timed]]]

    def hold(self, folder: Path) -> Row:
        """Raises `BenchFailed`, `cache.BuildFailed`."""
        with self.open(folder) as things:
            taken = by_turns(things, self.turns)
        series = tuple(Series(name, seconds) for name, seconds in taken.items())
        return Row(self.name, self.what, self.ours, self.yardstick, self.limit, series)


@dataclass(frozen=True)
class Cost:
    """`open` gives what is timed for each amount of the work, by name; all of them stand side by side."""

    name: str
    unit: str
    turns: int
    open: Callable[[Path], AbstractContextManager[Mapping[str, Mapping[int, Timed]]]]

    def measure(self, folder: Path) -> list[Growth]:
        """Raises `BenchFailed`, `cache.BuildFailed`."""
        with self.open(folder) as costs:
            flat = {(what, amount): timed for what, each in costs.items() for amount, timed in each.items()}
            taken = by_turns(flat, self.turns)
        return [
            Growth(self.name, what, self.unit, tuple((n, Series(what, taken[what, n])) for n in sorted(costs[what])))
            for what in costs
        ]


def by_turns(things: Mapping[K, Timed], turns: int) -> dict[K, tuple[float, ...]]:
    """Each thing once a turn, another one first each time, so that what disturbs them disturbs all alike. A turn
    more than is kept comes before: it fills caches."""
    taken: dict[K, list[float]] = {key: [] for key in things}
    for turn in range(turns + 1):
        for key in _rotated(list(things), turn):
            seconds = things[key]()
            if turn > 0:
                taken[key].append(seconds)
    return {key: tuple(seconds) for key, seconds in taken.items()}


def _rotated(keys: Sequence[K], by: int) -> list[K]:
    by %= len(keys)
    return [*keys[by:], *keys[:by]]


@dataclass(frozen=True)
class Program:
    """A command as somebody would type it, timed from its start to its end."""

    argv: Sequence[str]
    cwd: Path
    env: Mapping[str, str]
    status: int = 0
    """The exit status that it has to have."""

    def __call__(self) -> float:
        return self.run()[0]

    def run(self) -> tuple[float, Completed]:
        began = time.perf_counter()
        done = run(self.argv, self.cwd, self.env, timeout=COMMAND_SECONDS)
        took = time.perf_counter() - began
        if done.exit != self.status:
            raise BenchFailed(f"{' '.join(self.argv)} ended with {done.exit}: {(done.stderr or done.stdout)[-600:]}")
        return took, done
