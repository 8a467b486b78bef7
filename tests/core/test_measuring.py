"""The figures of a measure, from recorded times; their comparison; and what the history may have."""

from __future__ import annotations

import json
from itertools import count
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxops.core.measuring import (
    METHOD,
    Answer,
    Cache,
    Case,
    Metric,
    NotMeasurable,
    Prompt,
    Spread,
    Tally,
    Verdict,
    figures,
    last_comparable,
    median,
    prompt_text,
    read_answer,
    steps,
    verdict,
)
from tests.properties import PROPERTY, json_values

USAGE = {"prompt_tokens": 38, "completion_tokens": 6, "prompt_tokens_details": {"cached_tokens": 30}}
COLD, LONG = Case(Prompt.SHORT, Cache.COLD, 1), Case(Prompt.LONG, Cache.COLD, 1)


def event(**chunk: object) -> bytes:
    return f"data: {json.dumps(chunk)}\n".encode()


def delta(**parts: object) -> bytes:
    return event(choices=[{"index": 0, "delta": parts}])


MLX_LM = [
    (0.1, b": keepalive 37/38\n"),
    (0.5, delta(role="assistant", content="The")),
    (0.5, b"\n"),
    (0.9, delta(role="assistant", content=" end")),
    (1.0, event(choices=[{"finish_reason": "length", "delta": {"role": "assistant"}}])),
    (1.1, event(choices=[], usage=USAGE)),
    (1.1, b"data: [DONE]\n"),
]
MLX_OPENAI_SERVER = [
    (0.1, delta(role="assistant")),
    (0.5, delta(role="assistant", content="The")),
    (0.9, delta(role="assistant", content=" end")),
    (1.2, event(choices=[{"delta": {}, "finish_reason": "stop"}], usage=USAGE)),
    (1.2, b"data: [DONE]\n"),
]


@pytest.mark.parametrize("lines", [MLX_LM, MLX_OPENAI_SERVER])
def test_answer_is_timed_from_its_text_and_counted_by_its_usage(lines: list[tuple[float, bytes]]) -> None:
    assert read_answer(lines) == Answer(0.5, 0.9, prompt_tokens=38, completion_tokens=6, pieces=2, cached_tokens=30)


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content", "tool_calls"])
def test_reasoning_and_tool_calls_are_text(key: str) -> None:
    assert read_answer([(0.2, delta(**{key: ["x"]})), (0.3, event(usage=USAGE))]).first == 0.2


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([], "no text"),
        ([delta(role="assistant", content=""), event(usage=USAGE)], "no text"),
        ([delta(content="x")], "does not count"),
        ([delta(content="x"), event(usage={"prompt_tokens": True, "completion_tokens": 1})], "does not count"),
        ([delta(content="x"), event(usage={"prompt_tokens": 1, "completion_tokens": 10**400})], "does not count"),
        ([delta(content="x"), event(error={"message": "out of memory"})], "out of memory"),
        ([b"data: " + b"[" * 100_000, b"data: \xff", b"data: 1"], "no text"),
    ],
)
def test_stream_that_shows_no_speed_is_not_measurable(lines: list[bytes], why: str) -> None:
    with pytest.raises(NotMeasurable, match=why):
        read_answer((0.1, line) for line in lines)


@pytest.mark.parametrize(
    ("case", "answers", "expected"),
    [
        (COLD, [Answer(0.5, 2.5, 38, 21, 6)], {Metric.FIRST_TOKEN: 0.5, Metric.DECODE: 10}),
        (COLD, [Answer(0.5, 0.5, 38, 1, 1)], {Metric.FIRST_TOKEN: 0.5}),
        (COLD, [Answer(0.5, 2.5, 38, 21, 5)], {Metric.FIRST_TOKEN: 0.5}),
        (COLD._replace(cache=Cache.WARM), [Answer(0.1, 0.2, 38, 2, 2, 37)], {Metric.FIRST_TOKEN: 0.1}),
        (LONG, [Answer(2, 4, 1000, 21, 21, 200)], {Metric.FIRST_TOKEN: 2, Metric.PREFILL: 400, Metric.DECODE: 10}),
        (LONG, [Answer(2, 4, 1000, 21, 21)], {Metric.FIRST_TOKEN: 2, Metric.PREFILL: 500, Metric.DECODE: 10}),
        # All streams together: 1800 tokens in 3 s; 40 tokens from second 1 to 6.
        (
            LONG._replace(streams=2),
            [Answer(1, 5, 1000, 21, 21, 100), Answer(3, 6, 1000, 21, 21, 100)],
            {Metric.FIRST_TOKEN: 2, Metric.PREFILL: 600, Metric.DECODE: 8},
        ),
    ],
)
def test_figures_follow_from_times_and_counts(case: Case, answers: list[Answer], expected: dict[Metric, float]) -> None:
    assert figures(case, answers) == expected


def test_rounds_without_an_answer_are_counted() -> None:
    tally, two = Tally(), COLD._replace(streams=2)
    tally.add(two, [Answer(0.5, 2.5, 38, 21, 6)] * 2)
    tally.fail(two, "timed out")
    tally.fail(two, "it closed the connection")
    tally.fail(LONG, "it answered 400")
    assert tally.missing == (
        "cold short prompt, 2 streams, 2 of 3 rounds: it closed the connection",
        "cold long prompt, 1 stream: it answered 400",
    )


def test_round_repeats_each_cold_prompt_and_the_next_has_new_ones() -> None:
    seeds = count()
    found = list(steps(2, 4, lambda: next(seeds)))
    assert [(each.round, str(each.case)) for each in found[:8]] == [
        (1, f"{cache} {prompt} prompt, {streams}")
        for streams in ("1 stream", "4 streams")
        for prompt in ("short", "long")
        for cache in ("cold", "warm")
    ]
    assert [each.round for each in found[8:]] == [2] * 8
    assert all(cold.prompts == warm.prompts for cold, warm in zip(found[::2], found[1::2], strict=True))
    assert len({prompt for each in found for prompt in each.prompts}) == 2 * 2 * (1 + 4)
    assert len(list(steps(1, 1, lambda: 1))) == 4, "one stream is measured once"


@pytest.mark.parametrize("prompt", Prompt)
def test_prompt_depends_on_its_seed_alone_and_begins_with_it(prompt: Prompt) -> None:
    first, second = prompt_text(prompt, 1), prompt_text(prompt, 2)
    assert first == prompt_text(prompt, 1) and first.startswith("00000001: ") and second.startswith("00000002: ")
    assert len(first.split()) > (512 if prompt is Prompt.LONG else 5)


@pytest.mark.parametrize(("values", "middle"), [([3], 3), ([3, 1], 2), ([9, 1, 2], 2), ([4, 1, 2, 9], 3)])
def test_median_is_the_middle(values: list[float], middle: float) -> None:
    assert median(values) == middle


def spread(median: float, width: float = 0.0, rounds: int = 5) -> Spread:
    return Spread(median, median * (1 - width / 2), median * (1 + width / 2), rounds)


@pytest.mark.parametrize(
    ("metric", "now", "before", "expected"),
    [
        (Metric.FIRST_TOKEN, spread(1.09), spread(1.0), Verdict.SAME),
        (Metric.FIRST_TOKEN, spread(1.11), spread(1.0), Verdict.SLOWER),
        (Metric.FIRST_TOKEN, spread(1.0), spread(1.11), Verdict.FASTER),
        (Metric.DECODE, spread(100), spread(109), Verdict.SAME),
        (Metric.DECODE, spread(100), spread(111), Verdict.SLOWER),
        (Metric.DECODE, spread(111), spread(100), Verdict.FASTER),
        (Metric.DECODE, spread(100, 0.2), spread(140, 0.25), Verdict.SAME),
        (Metric.DECODE, spread(100, 0.2), spread(150, 0.25), Verdict.SLOWER),
        (Metric.DECODE, spread(100, rounds=2), spread(200), Verdict.UNSURE),
        (Metric.DECODE, spread(100), spread(200, rounds=2), Verdict.UNSURE),
    ],
)
def test_difference_counts_if_it_is_larger_than_the_noise(
    metric: Metric, now: Spread, before: Spread, expected: Verdict
) -> None:
    assert verdict(metric, now, before) is expected


def test_noise_alone_is_hardly_ever_a_warning() -> None:
    random = Random(1)

    def run(speed: float) -> Spread:
        return Spread.of([speed * random.gauss(1, 0.1) for _ in range(5)])

    same = [verdict(Metric.DECODE, run(100), run(100)) for _ in range(2000)]
    halved = [verdict(Metric.DECODE, run(50), run(100)) for _ in range(2000)]
    assert same.count(Verdict.SLOWER) <= 10 and halved.count(Verdict.SLOWER) > 1900


ROW: dict[str, object] = {"prompt": "short", "cache": "cold", "streams": 1, "metric": "decode", "rounds": 5}
RUN: dict[str, object] = {
    "at": "2026-01-02T03:04:05Z",
    "command": "measure",
    "port": 8100,
    "method": METHOD,
    "engine_version": "1.0",
    "shared": False,
    "rows": [{**ROW, "median": 10.0, "low": 9, "high": 11.0}],
}


def test_latest_run_with_the_same_values_is_compared() -> None:
    history: list[dict[str, object]] = [
        RUN | {"at": "before"},
        RUN,
        RUN | {"port": 8101},
        RUN | {"shared": True},
        {"command": "load"},
    ]
    found = last_comparable(history, {"port": 8100, "method": METHOD})
    assert found is not None and (found.at, found.engine_version) == (RUN["at"], "1.0")
    assert found.spreads == {("short", "cold", 1, "decode"): Spread(10.0, 9.0, 11.0, 5)}


@pytest.mark.parametrize(
    "change",
    [
        {"rows": []},
        {"rows": None},
        {"rows": [1, {}]},
        {"rows": [{**ROW, "median": "1", "low": 1, "high": 1}]},
        {"rows": [{**ROW, "median": 0, "low": 1, "high": 1}]},
        {"rows": [{**ROW, "median": 10**400, "low": 1, "high": 1}]},
        {"rows": [{**ROW, "median": float("nan"), "low": 1, "high": 1}]},
        {"rows": [{**ROW, "median": 1, "low": 1, "high": 1, "streams": "1"}]},
        {"shared": None},
    ],
)
def test_line_that_no_measure_has_written_is_skipped(change: dict[str, object]) -> None:
    assert last_comparable([RUN | change], {"port": 8100}) is None


@PROPERTY
@given(st.dictionaries(st.sampled_from([*RUN, *ROW]), json_values, max_size=4))
def test_no_line_of_the_history_breaks_a_measure(change: dict[str, object]) -> None:
    last_comparable([RUN | change, RUN | {"rows": [ROW | change]}], {"port": 8100})
