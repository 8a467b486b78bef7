"""`inv bench` itself, with its cheapest row. No test asserts a speed."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import pytest

from tests.benchmarks import bench
from tests.lab.homelab import CHECKOUT, Completed, run

pytestmark = pytest.mark.lab


def inv_bench(*arguments: str) -> Completed:
    return run([str(Path(sysconfig.get_path("scripts")) / "inv"), "bench", *arguments], CHECKOUT, dict(os.environ))


def test_row_is_measured_and_leaves_no_files() -> None:
    done = inv_bench("--only", "registry", "--json").ok()
    (row,) = done.json["rows"]
    assert (row["row"], row["ours"], row["yardstick"]) == ("registry", "transaction", "bare write")
    contest = next(each for each in bench.CONTESTS if each.name == "registry")
    for series in row["series"]:
        assert len(series["seconds"]) == contest.turns and 0 < series["low"] <= series["median"] <= series["high"]
    assert row["verdict"] in ("met", "missed") and done.json["growth"] == []
    assert not list(Path(os.environ["TMPDIR"]).glob("mlxops-bench-*"))


def test_table_names_the_machine() -> None:
    lines = inv_bench("--only", "registry").ok().stdout.splitlines()
    assert lines[0].split() == ["ROW", "WHAT", "TOOK", "YARDSTICK", "RATIO", "AT", "MOST", "VERDICT"]
    assert lines[1].startswith("registry  one registry transaction  ")
    assert any(line.startswith("system ") and "processors" in line for line in lines)


@pytest.mark.parametrize("only", ["registry,no-such-row", " , "])
def test_unknown_row_is_usage_and_lists_the_known_ones(only: str) -> None:
    done = inv_bench("--only", only, "--json")
    error = done.json["error"]
    assert (done.exit, error["code"]) == (2, "unknown_row")
    assert "registry" in error["hint"].split(", ") and "registry" not in error["message"]
