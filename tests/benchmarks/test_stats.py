"""Statistics and verdicts of made-up seconds; how turns are taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks import bench
from tests.benchmarks.contest import BenchFailed, Contest, Cost, Program, by_turns
from tests.benchmarks.stats import Growth, Limit, Ratio, Row, Series, Verdict, growth_table, rows_table


def row(ours: tuple[float, ...], yardstick: tuple[float, ...], limit: Limit | None, **beside: float) -> Row:
    others = tuple(Series(name, (value,)) for name, value in beside.items())
    return Row("row", "what it is", "ours", "ssh", limit, (Series("ssh", yardstick), Series("ours", ours), *others))


def growth(*medians: float, amounts: tuple[int, ...] = (1, 8, 32)) -> Growth:
    return Growth("c", "w", "host", tuple((n, Series("w", (m,))) for n, m in zip(amounts, medians, strict=True)))


class TestSeries:
    def test_one_slow_turn_does_not_move_the_median(self) -> None:
        assert Series("x", (0.3, 0.1, 9.0)).median == 0.3
        assert Series("x", (0.2, 0.1)).median == pytest.approx(0.15)

    @pytest.mark.parametrize(
        ("seconds", "shown"),
        [
            ((1.5, 1.25, 30.0), "1.50 s (1.25-30.00)"),
            ((0.305, 0.298, 0.34), "305 ms (298-340)"),
            ((0.0021, 0.0004, 0.0100), "2.10 ms (0.40-10.00)"),
        ],
    )
    def test_median_and_range_share_one_unit(self, seconds: tuple[float, ...], shown: str) -> None:
        assert str(Series("x", seconds)) == shown


class TestRow:
    @pytest.mark.parametrize(("ours", "verdict"), [(0.25, Verdict.MET), (0.2501, Verdict.MISSED)])
    def test_limit_itself_is_met(self, ours: float, verdict: Verdict) -> None:
        assert row((ours,), (0.1,), Limit({"ssh": 2.5})).verdict is verdict

    def test_worst_turn_does_not_decide(self) -> None:
        assert row((0.1, 0.1, 9.0), (0.1, 0.1, 0.1), Limit({"ssh": 1.0})).verdict is Verdict.MET

    def test_turn_is_compared_with_the_limit_of_the_same_turn(self) -> None:
        """The machine became slower all the time; each turn is a quarter above its limit."""
        measured = row((0.125, 0.25, 0.5), (0.1, 0.2, 0.4), Limit({"ssh": 1.0}))
        assert measured.limit_ratio == Ratio(1.25, 1.25, 1.25) and measured.verdict is Verdict.MISSED

    def test_limit_adds_medians_and_seconds(self) -> None:
        limit = Limit({"ssh": 1.0, "status": 1.5}, plus=1.0)
        assert row((1.0,), (4.0,), limit, status=0.4).limit_seconds == pytest.approx(5.6)
        assert str(limit) == "ssh + 1.5 x status + 1 s"

    def test_row_without_limit_has_no_verdict(self) -> None:
        assert row((9.0,), (1.0,), None).verdict is Verdict.NONE

    def test_ratio_is_the_median_of_the_turns_ratios(self) -> None:
        ratio = row((0.2, 0.3, 0.9), (0.1, 0.2, 0.1), None).ratio("ours")
        assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.75, 2.0, 5.5))
        assert str(ratio) == "2.00 (1.75-5.50)"

    def test_table_has_a_line_for_each_contestant_and_one_verdict(self) -> None:
        text = rows_table([row((0.3,), (0.1,), Limit({"ssh": 2.5}), peer=0.9)])
        assert [line.split("  ") and " ".join(line.split()) for line in text.splitlines()] == [
            "ROW WHAT TOOK YARDSTICK RATIO AT MOST VERDICT",
            "row what it is 300 ms (300-300) ssh 100 ms (100-100) 3.00 (3.00-3.00) 2.5 x ssh = 250 ms missed",
            "row peer 900 ms (900-900) ssh 100 ms (100-100) 9.00 (9.00-9.00) - -",
        ]


class TestGrowth:
    @pytest.mark.parametrize(
        ("medians", "verdict"),
        [
            ((0.3, 1.0, 3.4), Verdict.MET),
            ((0.3, 0.3, 0.3), Verdict.MET),
            ((0.3, 0.2, 0.4), Verdict.MET),  # noise in what does not grow
            ((0.3, 1.0, 9.0), Verdict.MISSED),
            ((0.3, 0.3, 0.5), Verdict.MISSED),
        ],
    )
    def test_cost_may_end_a_little_above_a_straight_line(self, medians: tuple[float, ...], verdict: Verdict) -> None:
        assert growth(*medians).verdict is verdict

    def test_noise_in_the_first_step_is_not_growth(self) -> None:
        points = ((10, (0.32, 0.31, 0.34)), (100, (0.33, 0.32, 0.38)), (1000, (0.6, 0.6, 0.6)))
        costs = tuple((amount, Series("w", seconds)) for amount, seconds in points)
        assert Growth("c", "w", "repository", costs).verdict is Verdict.MET
        squared = (*costs[:2], (1000, Series("w", (3.4, 3.4, 3.4))))
        assert Growth("c", "w", "repository", squared).verdict is Verdict.MISSED

    def test_unit_costs_its_share_of_the_difference(self) -> None:
        assert growth(0.3, 1.0, 3.4).per_unit == pytest.approx(0.1)

    def test_table_names_the_growth(self) -> None:
        text = growth_table([growth(0.3, 1.0, 9.0)])
        assert "1: 300 ms, 8: 1.00 s, 32: 9.00 s" in text and "281 ms per host" in text
        assert text.endswith("  faster than the work")


class TestTurns:
    def test_turns_rotate_and_the_first_does_not_count(self) -> None:
        calls: list[str] = []

        def timed(name: str) -> float:
            calls.append(name)
            return float(len(calls))

        taken = by_turns({"a": lambda: timed("a"), "b": lambda: timed("b"), "c": lambda: timed("c")}, 3)
        assert "".join(calls) == "abcbcacababc"
        assert taken == {"a": (6.0, 8.0, 10.0), "b": (4.0, 9.0, 11.0), "c": (5.0, 7.0, 12.0)}

    def test_wrong_exit_status_fails(self, tmp_path: Path) -> None:
        with pytest.raises(BenchFailed, match=r"sh -c echo no >&2; exit 3 ended with 3: no"):
            Program(["/bin/sh", "-c", "echo no >&2; exit 3"], tmp_path, {})()
        assert Program(["/bin/sh", "-c", "exit 3"], tmp_path, {}, status=3)() > 0


class TestReport:
    def test_report_is_one_json_document(self) -> None:
        report = bench.Report({"processors": 2}, (row((0.3,), (0.1,), Limit({"ssh": 2.5})),), (growth(0.3, 1.0, 3.4),))
        wire = json.loads(json.dumps(report.to_wire()))
        assert (wire["schema"], wire["command"], wire["met"]) == (1, "bench", False)
        (line,), (cost,) = wire["rows"], wire["growth"]
        assert (line["ratio"], line["limit_seconds"], line["verdict"]) == (3.0, 0.25, "missed")
        assert line["series"][1] == {"name": "ours", "median": 0.3, "low": 0.3, "high": 0.3, "seconds": [0.3]}
        assert [point["amount"] for point in cost["points"]] == [1, 8, 32]

    def test_row_names_are_unique(self) -> None:
        assert len(set(bench.names())) == len(bench.names()) == len(bench.CONTESTS) + len(bench.COSTS)
        assert all(isinstance(each, Contest) for each in bench.CONTESTS)
        assert all(isinstance(each, Cost) for each in bench.COSTS)
