"""Settings of property tests: the same everywhere, without files, and repeatable in CI.

Use: `@given(...)` above `@PROPERTY`.
"""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

# Beside the throwaway home, which goes away with the run: what it computes once is no part of the checkout.
set_hypothesis_home_dir(Path(os.environ["HOME"]).parent / "hypothesis")

PROPERTY = settings(
    max_examples=100,
    deadline=None,
    database=None,
    derandomize=os.environ.get("CI") == "true",
    suppress_health_check=[HealthCheck.too_slow],
)

hostile_texts = st.lists(
    st.sampled_from("\x1b\x9b\x07\x7f\x85\r\n\t\0\u200e\u061c\u202e\u2066\u2028\ud800") | st.characters(), max_size=15
).map("".join)
"""Also what steers a terminal, and what Python can hold and UTF-8 cannot: a file name that is no text, for instance."""

json_scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12)
)
json_values = st.recursive(
    json_scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
