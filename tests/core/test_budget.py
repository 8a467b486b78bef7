"""The limits of a server: chosen from the memory that is left, written to its command, read from it, and left out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxops.core.budget import LimitOptions, Limits, choose, limited, limits_at_end, without_limits
from mlxops.core.memory import ENGINE_BYTES, Estimate
from tests.properties import PROPERTY

GB = 10**9
NEED = Estimate(40 * GB, 4 * GB, 32768, state_bytes=GB)
"""A model with 40 GB of weights and 5 GB for each request."""
LM = LimitOptions("--decode-concurrency", "--prompt-concurrency", "--prompt-cache-bytes")
NONE = Limits()

CHOICES = {
    "nothing left": (0, NONE, True, Limits(1, 1, 5 * GB)),
    "less than nothing": (-100 * GB, NONE, True, Limits(1, 1, 5 * GB)),
    "less than a context": (4 * GB, NONE, True, Limits(1, 1, 7 * GB)),
    "a quarter to requests, a quarter to kept contexts": (84 * GB, NONE, True, Limits(5, 5, 47 * GB)),
    "no more than the engine's own numbers": (10_000 * GB, NONE, True, Limits(32, 8, 42 * 5 * GB)),
    "kept contexts are files": (84 * GB, NONE, False, Limits(5, 5, 75 * GB)),
    "files, nothing left": (0, NONE, False, Limits(1, 1, 55 * GB)),
    "the entry sets the requests": (84 * GB, Limits(requests=2), True, Limits(2, 2, 47 * GB)),
    "the entry sets more requests than fit": (0, Limits(requests=16), True, Limits(16, 8, 80 * GB)),
    "the entry sets the prompts": (0, Limits(prompts=3), True, Limits(3, 3, 15 * GB)),
    "fewer requests than prompts": (0, Limits(requests=1, prompts=3), True, Limits(1, 3, 15 * GB)),
    "the entry sets the bytes": (84 * GB, Limits(cache_bytes=7), True, Limits(5, 5, 7)),
}


@pytest.mark.parametrize("case", CHOICES)
def test_limits_are_chosen_from_what_is_left(case: str) -> None:
    spare, own, cached, chosen = CHOICES[case]
    assert choose(NEED, spare, own, cached=cached) == chosen


def test_model_without_a_context_has_no_limit_of_bytes() -> None:
    assert choose(Estimate(GB, 0, 32768), 84 * GB, NONE, cached=True) == Limits(32, 8, None)


@PROPERTY
@given(st.integers(-(10**13), 10**13), st.integers(0, 10**11), st.integers(0, 10**9), st.booleans())
def test_limits_never_exceed_what_is_left(spare: int, context: int, state: int, cached: bool) -> None:
    """And with nothing left, the estimate is the one of a single context: what fits without limits fits with them."""
    need = Estimate(GB, context, 32768, state)
    most = limited(need, choose(need, spare, NONE, cached=cached), cached=cached)
    assert need.total <= most.total <= need.total + max(0, spare) // 2


def test_estimate_is_weights_contexts_cache_and_server() -> None:
    most = limited(NEED, Limits(5, 5, 47 * GB), cached=True)
    assert most.total == 40 * GB + 5 * 5 * GB + 22 * GB + ENGINE_BYTES
    assert str(most) == (
        "40.0 GB weights, 4.0 GB for 32768 tokens of context, 1.0 GB for recurrent states, times 5 requests, "
        "22.0 GB for kept contexts"
    )
    assert limited(NEED, Limits(5, 5, 47 * GB), cached=False).total == 40 * GB + 5 * 5 * GB + ENGINE_BYTES
    assert limited(NEED, NONE, cached=True) == NEED


def test_only_options_that_the_engine_has_are_written() -> None:
    limits = Limits(5, 5, 47)
    words = ("--decode-concurrency", "5", "--prompt-concurrency", "5", "--prompt-cache-bytes", "47")
    assert LM.words(limits) == words
    assert LM.only({"--prompt-cache-bytes", "--max-tokens"}).words(limits) == words[-2:]
    assert LM.only(()).words(limits) == () == LM.words(NONE)
    assert LM.only(()).all == ()


@pytest.mark.parametrize(
    ("text", "size"),
    [("47", 47), ("10GB", 10 * GB), ("1.5G", 1_500_000_000), ("20 mb", 20_000_000), ("ten", None), ("", None)],
)
def test_sizes_are_read_as_the_engine_reads_them(text: str, size: int | None) -> None:
    assert LM.read({"--prompt-cache-bytes": text}) == Limits(cache_bytes=size)


def test_limits_at_the_end_of_a_command_are_left_out() -> None:
    argv = ("engine", "--model", "m", "--decode-concurrency", "3")
    limits = ("--prompt-concurrency", "3", "--prompt-cache-bytes", "47")
    options = LM.only({"--prompt-concurrency", "--prompt-cache-bytes"}).all
    assert limits_at_end((*argv, *limits), options) == limits
    assert without_limits((*argv, *limits), options) == argv == without_limits(argv, options)
    assert without_limits((*argv, "--prompt-concurrency", "x"), options) == (*argv, "--prompt-concurrency", "x")
    assert without_limits(limits, LM.all) == ()
