"""The counts over a host's history."""

from __future__ import annotations

import pytest

from mlxops.core.totals import HistoryTotals

LOAD = {"command": "load", "port": 8100, "model": "jerry", "downtime_seconds": None}
ROW = {"prompt": "long", "cache": "cold", "streams": 1, "metric": "decode", "low": 1, "high": 3, "rounds": 5}
MEASURE = {"command": "measure", "port": 8100, "model": "jerry", "revision": "abc", "at": "2026-11-26T23:24:26Z"}


def counted(*lines: dict[str, object]) -> HistoryTotals:
    totals = HistoryTotals()
    for line in lines:
        totals.add(line)
    return totals


def test_loads_swaps_and_downtime_are_counted_by_port() -> None:
    undone = {"command": "swap_undone", "port": 8100, "downtime_seconds": 4}
    swaps = [LOAD | {"downtime_seconds": 2.5}, LOAD | {"downtime_seconds": 1}, undone]
    totals = counted(LOAD, *swaps, LOAD | {"port": 8101})
    found = totals.of(8100)
    assert (found.loads, found.swaps, found.downtime_seconds) == (3, 2, 7.5)
    assert totals.of(8101).loads == 1 and totals.of(8102).loads == 0


def test_restart_has_the_cause_of_the_death_before() -> None:
    died, restore = {"command": "died", "port": 8100, "cause": "memory"}, {"command": "restore", "port": 8100}
    found = counted(restore, died, restore, died | {"cause": "of later versions"}, restore, restore).of(8100)
    assert found.deaths == {"memory": 1, "unknown": 1}
    assert found.restarts == {"memory": 1, "unknown": 3}


def test_last_run_of_measure_is_kept() -> None:
    totals = counted(MEASURE | {"rows": [ROW | {"median": 2}]}, MEASURE | {"rows": [ROW | {"median": 2.5}]})
    (figure,) = totals.measured[8100].figures
    assert (figure.metric, figure.median, totals.measured[8100].revision) == ("decode", 2.5, "abc")


@pytest.mark.parametrize(
    "line",
    [
        {},
        {"command": "pull", "repo_id": "org/model"},
        LOAD | {"port": "8100"},
        LOAD | {"port": True},
        LOAD | {"port": 10**9},
        MEASURE | {"rows": "none"},
        MEASURE | {"rows": [], "model": 7},
    ],
)
def test_line_about_no_server_counts_nothing(line: dict[str, object]) -> None:
    totals = counted(line)
    assert totals.of(8100) == HistoryTotals().of(8100) and not totals.measured
