"""`measure` with the real mlx-lm, over SSH and on the host itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.lab.homelab import Homelab
from tests.steps import REPO, WAYS, Ask, install


def measured(asks: Sequence[Ask], streams: int) -> list[Any]:
    """Measure the first port in each of these ways. Return its rows, whose figures are checked."""
    studio, port = asks[0].studio, asks[0].port
    words = ("measure", "--port", port, "--rounds", 1, "--streams", streams)
    rows = [ask.document(*words)["ports"][0] for ask in asks]
    for row in rows:
        assert row["missing"] == [] and row["not_measured"] is None and not row["shared"]
        for figure in row["figures"]:
            assert figure["rounds"] == 1
            assert figure["completion_tokens"] <= (64 if figure["cache"] == "cold" else 2)
            if figure["cache"] == "warm":
                assert figure["cached_tokens"] == figure["prompt_tokens"] - 1
            else:
                assert figure["cached_tokens"] < figure["prompt_tokens"] / 2
        metrics = [each["metric"] for each in row["figures"]]
        # A random model may say characters of many tokens, which shows no rate.
        assert (metrics.count("first_token"), metrics.count("prefill")) == (4 * streams, streams)
    assert rows[0]["compared_with"] is None
    assert studio.completion(port, "jerry-xl")["model"] == "jerry-xl"
    return rows


def test_mlx_lm_is_measured_and_compared_with_the_run_before(homelab: Homelab) -> None:
    asks = [Ask(homelab, way) for way in WAYS]
    install(homelab.studio)
    asks[0]("init").ok()
    asks[0]("load", "--model", REPO, "--port", asks[0].port, timeout=300).ok()
    _, second = measured(asks, streams=2)
    assert second["compared_with"]
    assert {each["verdict"] for each in second["figures"] if each["before"]} == {"unsure"}, "one round is too few"
    asks[0]("unload", "--port", asks[0].port).ok()
