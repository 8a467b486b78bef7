"""`inv bench`: measure every limit against its yardstick in one run, and how each cost grows."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlxops.control import output
from mlxops.core.errors import MlxopsError, UsageError
from tests.benchmarks import cpu, files, hosts, keeper, scene, serving
from tests.benchmarks.contest import BenchFailed, Contest, Cost
from tests.benchmarks.stats import Growth, Row, Verdict, growth_table, rows_table
from tests.lab.homelab import LabUnavailable, TimedOut
from tests.lab.hub import HubFailed

CONTESTS: tuple[Contest, ...] = (*hosts.CONTESTS, *cpu.CONTESTS, *serving.CONTESTS, *files.CONTESTS, *keeper.CONTESTS)
COSTS: tuple[Cost, ...] = (*hosts.COSTS, *files.COSTS, *serving.COSTS)
BUSY_LOAD = 0.5
"""The load average above which other programs distort the numbers."""


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
        about = [", ".join(f"{key} {value}" for key, value in self.machine.items()), *scene.FAIR]
        return "\n\n".join([*tables, "\n".join(about)])

    def to_wire(self) -> dict[str, object]:
        return {
            "schema": output.SCHEMA,
            "command": "bench",
            "ok": True,
            "met": self.met,
            "machine": self.machine,
            "fair": list(scene.FAIR),
            "rows": [each.to_wire() for each in self.rows],
            "growth": [each.to_wire() for each in self.growth],
        }


def names() -> list[str]:
    return [*(contest.name for contest in CONTESTS), *(cost.name for cost in COSTS)]


def rows_to_measure(only: str | None) -> list[str]:
    """Return the rows that `--only` names, separated by commas; all rows without it. Raises `UsageError`."""
    rows = names() if only is None else [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in rows if name not in names()]
    if unknown or not rows:
        what = f"there is no row {', '.join(unknown)}" if unknown else "--only names no row"
        why = "every row has one of the names below"
        raise UsageError("unknown_row", what, why=why, hint=f"rows: {', '.join(names())}")
    return rows


def run(only: str | None, *, as_json: bool) -> None:
    """Measure and print the report. Raises `MlxopsError`, `cache.BuildFailed`."""
    wanted = rows_to_measure(only)
    console = output.Console(many=False)
    machine = scene.machine()
    if scene.load() > BUSY_LOAD:
        console.note(f"warning: the machine is busy (load {machine['load']}), which distorts the numbers")
    with tempfile.TemporaryDirectory(prefix="mlxops-bench-") as name:
        report = _measure(Path(name), wanted, machine, console)
    output.say(json.dumps(report.to_wire(), indent=2) if as_json else report.text())


def _measure(folder: Path, wanted: Sequence[str], machine: dict[str, object], console: output.Console) -> Report:
    rows: list[Row] = []
    growth: list[Growth] = []
    for contest in CONTESTS:
        if contest.name in wanted:
            console.note(f"{contest.name}: {contest.what}")
            with _row_folder(folder, contest.name) as own:
                rows.append(contest.measure(own))
    for cost in COSTS:
        if cost.name in wanted:
            console.note(f"{cost.name}: how the cost of one more {cost.unit} grows")
            with _row_folder(folder, cost.name) as own:
                growth += cost.measure(own)
    return Report(machine, tuple(rows), tuple(growth))


@contextmanager
def _row_folder(folder: Path, name: str) -> Iterator[Path]:
    """Yield a folder that is deleted after the row. Raises one error for all that the lab lacks or cannot do."""
    try:
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=folder) as own:
            yield Path(own)
    except (
        *(BenchFailed, LabUnavailable, HubFailed, TimedOut),
        *(pytest.skip.Exception, pytest.fail.Exception),
    ) as error:
        what = f"the row {name} could not be measured"
        raise MlxopsError("bench_failed", what, why=str(error)[:800], hint=f"inv bench --only {name}") from error
