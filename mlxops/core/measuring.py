"""The speed of a server, from the times of its streamed answers; and its comparison with an earlier run. Pure.

A round sends the same requests to the server again: short and long prompts, one stream and several. Each prompt is new
to every cache at first (cold), and is then sent once more (warm). The figures of a run are medians over its rounds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from mlxops.core.frozen import dataclass

METHOD = 1
"""Changes with the prompts and the formulas. Runs of different methods are not compared."""
COLD_TOKENS = 64
WARM_TOKENS = 2
"""Tokens to generate. A warm request only shows the time to the first one."""
TOKENS_PER_PIECE = 4
"""Servers send a piece of text for each token, or for a few."""
LONG_WORDS = 512
NOISE = 0.1
"""A smaller difference is never a warning."""
FEWEST_ROUNDS = 3
"""A run with fewer rounds shows too little of its spread to be compared."""
_WORDS = (
    "river stone window garden letter morning engine paper light street winter music table number water signal "
    "mountain story island market yellow answer machine forest doctor bridge silver evening village question corner "
    "kitchen travel summer picture station captain harbour little between nothing around under together because"
)


class NotMeasurable(ValueError):
    """The answer has no text or no token counts, or it is an error. The message completes "it ..."."""


class Prompt(StrEnum):
    SHORT = "short"
    LONG = "long"


class Cache(StrEnum):
    COLD = "cold"
    WARM = "warm"


class Metric(StrEnum):
    FIRST_TOKEN = "first_token"
    """Seconds from the request to the first text."""
    PREFILL = "prefill"
    """Prompt tokens per second, up to the first text."""
    DECODE = "decode"
    """Generated tokens per second, after the first text."""

    @property
    def unit(self) -> str:
        return "s" if self is Metric.FIRST_TOKEN else "tokens/s"

    def slowdown(self, now: float, before: float) -> float:
        """Return how much slower `now` is, as a share: 0.5 for one and a half times the time. Negative if faster."""
        return (now / before if self is Metric.FIRST_TOKEN else before / now) - 1


class Case(NamedTuple):
    """A kind of group of requests that are sent at once."""

    prompt: Prompt
    cache: Cache
    streams: int

    @property
    def tokens(self) -> int:
        return COLD_TOKENS if self.cache is Cache.COLD else WARM_TOKENS

    def __str__(self) -> str:
        return f"{self.cache} {self.prompt} prompt, {self.streams} stream{'s' if self.streams > 1 else ''}"


class Step(NamedTuple):
    """One group of requests."""

    round: int
    """From 1."""
    case: Case
    prompts: tuple[str, ...]


def steps(rounds: int, streams: int, seed: Callable[[], int]) -> Iterator[Step]:
    """Yield the groups of a run: each cold one, and then the same prompts again."""
    for number in range(1, rounds + 1):
        for count in sorted({1, streams}):
            for prompt in Prompt:
                prompts = tuple(prompt_text(prompt, seed()) for _ in range(count))
                for cache in Cache:
                    yield Step(number, Case(prompt, cache, count), prompts)


def prompt_text(prompt: Prompt, seed: int) -> str:
    """Return a prompt that begins with its seed, so that no cache has it."""
    task = "Write a long story about a lighthouse. Do not stop early."
    words = f"{' '.join(_words(seed))}. " if prompt is Prompt.LONG else ""
    return f"{seed:08x}: {words}{task}"


def _words(seed: int) -> Iterator[str]:
    words = _WORDS.split()
    for _ in range(LONG_WORDS):
        seed = (1103515245 * seed + 12345) % 2**31  # the example generator of ISO C
        yield words[(seed >> 16) % len(words)]


def median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


# -- one answer


@dataclass(frozen=True)
class Answer:
    """A streamed answer. Times are seconds since the requests of its group were sent."""

    first: float
    """When its first text came."""
    last: float
    """When its last text came."""
    prompt_tokens: int
    completion_tokens: int
    pieces: int
    """Events with text."""
    cached_tokens: int | None = None
    """Prompt tokens that the server had in its cache; None if it does not say."""

    @property
    def held_back(self) -> bool:
        """Whether so little text came that its times show no rate, such as a character of many tokens."""
        return self.pieces * TOKENS_PER_PIECE < self.completion_tokens


def read_answer(lines: Iterable[tuple[float, bytes]]) -> Answer:
    """Read a stream of server-sent events, each line with its time. Raises `NotMeasurable`."""
    times: list[float] = []
    usage: Mapping[str, object] = {}
    for seconds, line in lines:
        chunk = _chunk(line)
        if "error" in chunk:
            raise NotMeasurable(f"sent an error: {json.dumps(chunk['error'])[:200]}")
        if _has_text(chunk):
            times.append(seconds)
        if isinstance(counts := chunk.get("usage"), dict):
            usage = counts
    prompt, completion = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    if not times:
        raise NotMeasurable("generated no text")
    if not prompt or not completion:
        raise NotMeasurable("does not count the tokens of a streamed answer")
    details = usage.get("prompt_tokens_details")
    cached = _count(details, "cached_tokens") if isinstance(details, dict) else None
    return Answer(times[0], times[-1], prompt, completion, len(times), cached)


def _chunk(line: bytes) -> Mapping[str, object]:
    """Return the object of a `data:` line; an empty one for comments, `[DONE]` and everything else."""
    if not line.startswith(b"data:"):
        return {}
    try:
        found = json.loads(line.removeprefix(b"data:"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _has_text(chunk: Mapping[str, object]) -> bool:
    """Return whether a chunk has generated text of any kind. The role alone, which may come first, is none."""
    choices = chunk.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        delta = choice.get("delta") if isinstance(choice, dict) else None
        if isinstance(delta, dict) and any(value for key, value in delta.items() if key != "role"):
            return True
    return False


def _count(values: Mapping[str, object], key: str) -> int | None:
    value = values.get(key)
    return value if type(value) is int and 0 <= value < 2**31 else None


# -- figures of a group, and of a run


def figures(case: Case, answers: Sequence[Answer]) -> dict[Metric, float]:
    """Return what one group of requests, sent at once, shows. A figure that it cannot show is missing.

    A short prompt shows no prefill: the time to its first token is mostly not spent on it.
    """
    found = {Metric.FIRST_TOKEN: median(each.first for each in answers)}
    if case.cache is Cache.WARM:
        return found
    if case.prompt is Prompt.LONG:
        read = sum(each.prompt_tokens - (each.cached_tokens or 0) for each in answers)
        found[Metric.PREFILL] = read / max(each.first for each in answers)
    generated = sum(each.completion_tokens - 1 for each in answers)
    seconds = max(each.last for each in answers) - min(each.first for each in answers)
    if generated > 0 and seconds > 0 and not any(each.held_back for each in answers):
        found[Metric.DECODE] = generated / seconds
    return {metric: value for metric, value in found.items() if value > 0}


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds of a run."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        middle, low, high = (float(f"{value:.4g}") for value in (median(values), min(values), max(values)))
        return cls(middle, low, high, len(values))

    @property
    def relative(self) -> float:
        """The distance between the lowest and the highest value, as a share of the median."""
        return (self.high - self.low) / self.median


class Tally:
    """What a run has shown so far."""

    def __init__(self) -> None:
        self.values: dict[tuple[Case, Metric], list[float]] = {}
        self.answers: dict[Case, list[Answer]] = {}
        self._failed: dict[Case, list[str]] = {}

    def add(self, case: Case, answers: Sequence[Answer]) -> None:
        self.answers.setdefault(case, []).extend(answers)
        for metric, value in figures(case, answers).items():
            self.values.setdefault((case, metric), []).append(value)

    def fail(self, case: Case, why: str) -> None:
        self._failed.setdefault(case, []).append(why)

    @property
    def missing(self) -> tuple[str, ...]:
        """Each case without an answer, in some rounds or in all, with the last reason."""
        return tuple(f"{case}{self._rounds(case, len(whys))}: {whys[-1]}" for case, whys in self._failed.items())

    def _rounds(self, case: Case, failed: int) -> str:
        if case not in self.answers:
            return ""
        return f", {failed} of {failed + len(self.answers[case]) // case.streams} rounds"


class Verdict(StrEnum):
    """What a comparison shows."""

    SAME = "same"
    SLOWER = "slower"
    FASTER = "faster"
    UNSURE = "unsure"
    """Too few rounds, or other clients used the server."""


def verdict(metric: Metric, now: Spread, before: Spread) -> Verdict:
    """Compare two runs.

    A difference of the medians counts if it is larger than both runs' spreads together, and larger than `NOISE`.
    """
    if min(now.rounds, before.rounds) < FEWEST_ROUNDS:
        return Verdict.UNSURE
    noise = max(NOISE, now.relative + before.relative)
    if metric.slowdown(now.median, before.median) > noise:
        return Verdict.SLOWER
    return Verdict.FASTER if metric.slowdown(before.median, now.median) > noise else Verdict.SAME


# -- the history


Key = tuple[str, str, int, str]
"""Prompt, cache, streams and metric of a figure."""


@dataclass(frozen=True)
class Earlier:
    """An earlier run, from the history."""

    at: str
    engine_version: str | None
    spreads: Mapping[Key, Spread]


def last_comparable(history: Sequence[Mapping[str, object]], same: Mapping[str, object]) -> Earlier | None:
    """Return the latest run that has the values of `same`, without other clients. `history` is oldest first.

    Lines that a measure cannot have written are skipped.
    """
    for entry in reversed(history):
        if entry.get("command") != "measure" or entry.get("shared") is not False:
            continue
        if any(entry.get(key) != value for key, value in same.items()):
            continue
        spreads, version = _spreads(entry), entry.get("engine_version")
        if spreads:
            return Earlier(str(entry.get("at")), version if isinstance(version, str) else None, spreads)
    return None


@dataclass(frozen=True)
class Figure:
    """A recorded figure of a run: its median over the rounds."""

    prompt: str
    cache: str
    streams: int
    metric: str
    median: float


def figures_of(entry: Mapping[str, object]) -> tuple[Figure, ...]:
    """Return the figures of a history line of `measure`, without those that it cannot have written."""
    return tuple(Figure(*key, spread.median) for key, spread in _spreads(entry).items())


def _spreads(entry: Mapping[str, object]) -> dict[Key, Spread]:
    rows = entry.get("rows")
    return dict(filter(None, map(_spread, rows if isinstance(rows, list) else ())))


def _spread(row: object) -> tuple[Key, Spread] | None:
    """Return a figure of a recorded run; None for anything that a measure cannot have written."""
    if not isinstance(row, dict):
        return None
    prompt, cache, metric = (row.get(key) for key in ("prompt", "cache", "metric"))
    streams, rounds = row.get("streams"), row.get("rounds")
    middle, low, high = (_positive(row.get(key)) for key in ("median", "low", "high"))
    if not (isinstance(prompt, str) and isinstance(cache, str) and isinstance(metric, str)):
        return None
    if type(streams) is not int or type(rounds) is not int or not (middle and low and high):
        return None
    return (prompt, cache, streams, metric), Spread(middle, low, high, rounds)


def _positive(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and 0 < value < 1e12 else None
