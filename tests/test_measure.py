"""`measure` with the real engines, over SSH and on the host itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.agent.test_openai_server import office
from tests.lab.homelab import Homelab
from tests.steps import REPO, WAYS, Ask, install


def check(lab: Homelab, streams: int) -> None:
    """Measure a server both ways. The second run is compared with the first."""
    asks = [Ask(lab, way) for way in WAYS]
    studio, port = lab.studio, lab.studio.ports[0]
    install(studio)
    asks[0]("init").ok()
    asks[0]("load", "--model", REPO, "--port", port, timeout=300).ok()
    words = ("measure", "--port", port, "--rounds", 1, "--streams", streams)
    first, second = (ask.document(*words)["ports"][0] for ask in asks)
    for row in (first, second):
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
    assert first["compared_with"] is None and second["compared_with"]
    assert {each["verdict"] for each in second["figures"] if each["before"]} == {"unsure"}, "one round is too few"
    assert studio.completion(port, "jerry-xl")["model"] == "jerry-xl"
    asks[0]("unload", "--port", port).ok()


def test_mlx_lm_is_measured(homelab: Homelab) -> None:
    check(homelab, streams=2)


@pytest.mark.timeout(600)
def test_mlx_openai_server_is_measured(homelab: Homelab, openai_server: Path) -> None:
    office(homelab, openai_server)
    check(homelab, streams=1)
