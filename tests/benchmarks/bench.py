"""`inv bench`: every target against its yardstick in one run, and how each cost grows."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlxops.control import render
from mlxops.core.errors import MlxopsError, UsageError
from tests.benchmarks import files, hosts, place, serving
from tests.benchmarks.contest import BenchFailed, Contest, Cost
from tests.benchmarks.stats import Growth, Row, Verdict, growth_table, rows_table
from tests.lab.homelab import LabUnavailable, TimedOut
from tests.lab.hub import HubFailed

CONTESTS: tuple[Contest, ...] = (*hosts.CONTESTS, *serving.CONTESTS, *files.CONTESTS)
COSTS: tuple[Cost, ...] = (*hosts.COSTS, *files.COSTS, *serving.COSTS)
BUSY = 0.5
"""A load of the machine above which its numbers are those of something else as well."""


@dataclass(frozen=True)
class Report:
    machine: dict[str, object]
    rows: tuple[Row, ...]
    growth: tuple[Growth, ...]

    @property
    def met(self) -> bool:
        verdicts = [*(row.verdict for row in self.rows), *(cost.verdict for cost in self.growth)]
        return Verdict.MISSED not in verdicts

    def text(self) -> str:
        tables = [rows_table(self.rows)] if self.rows else []
        tables += [growth_table(self.growth)] if self.growth else []
        about = [", ".join(f"{key} {value}" for key, value in self.machine.items()), *place.FAIR]
        return "\n\n".join([*tables, "\n".join(about)])

    def to_wire(self) -> dict[str, object]:
        return {
            "schema": render.SCHEMA,
            "command": "bench",
            "ok": True,
            "met": self.met,
            "machine": self.machine,
            "fair": list(place.FAIR),
            "rows": [each.to_wire() for each in self.rows],
            "growth": [each.to_wire() for each in self.growth],
        }


def names() -> list[str]:
    return [*(contest.name for contest in CONTESTS), *(cost.name for cost in COSTS)]


def chosen(only: str | None) -> list[str]:
    """The rows that `--only` names, separated by commas; all without it. Raises `UsageError`."""
    wanted = names() if only is None else [word.strip() for word in only.split(",") if word.strip()]
    unknown = [word for word in wanted if word not in names()]
    if unknown or not wanted:
        what = f"there is no row {', '.join(unknown)}" if unknown else "--only names no row"
        why = "nothing of that name is measured"
        raise UsageError("unknown_row", what, why=why, hint=f"rows: {', '.join(names())}")
    return wanted


def run(only: str | None, *, as_json: bool) -> None:
    """Measure, and print. Raises `MlxopsError`, `cache.BuildFailed`."""
    wanted = chosen(only)
    console = render.Console(many=False)
    machine = place.machine()
    if place.load() > BUSY:
        console.note(f"warning: the machine is busy (load {machine['load']}): its numbers will be of that as well")
    with tempfile.TemporaryDirectory(prefix="mlxops-bench-") as name:
        report = _measure(Path(name), wanted, machine, console)
    render.say(json.dumps(report.to_wire(), indent=2) if as_json else report.text())


def _measure(folder: Path, wanted: Sequence[str], machine: dict[str, object], console: render.Console) -> Report:
    rows: list[Row] = []
    growth: list[Growth] = []
    for contest in CONTESTS:
        if contest.name in wanted:
            console.note(f"{contest.name}: {contest.what}")
            with _scene(folder, contest.name) as own:
                rows.append(contest.hold(own))
    for cost in COSTS:
        if cost.name in wanted:
            console.note(f"{cost.name}: how what is done for each {cost.unit} grows")
            with _scene(folder, cost.name) as own:
                growth += cost.measure(own)
    return Report(machine, tuple(rows), tuple(growth))


@contextmanager
def _scene(folder: Path, name: str) -> Iterator[Path]:
    """A folder for one row, gone after it. What the lab misses or cannot do is told as one error."""
    try:
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=folder) as own:
            yield Path(own)
    except (
        *(BenchFailed, LabUnavailable, HubFailed, TimedOut),
        *(pytest.skip.Exception, pytest.fail.Exception),
    ) as error:
        what = f"the row {name} could not be measured"
        raise MlxopsError("bench_failed", what, why=str(error)[:800], hint=f"inv bench --only {name}") from error
