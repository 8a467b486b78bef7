"""What a real mlx-openai-server does that serves: its limits, its memory, its speed.

One server for all tests, because its start takes 15 s of a processor.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.test_held_memory import LIBRARIES, held, kernel_bytes
from tests.agent.test_limits import drift, record
from tests.agent.test_openai_server import office
from tests.lab import cache, leaks, models
from tests.lab.homelab import Homelab, LabUnavailable
from tests.lab.sshd import missing
from tests.steps import REPO, Ask
from tests.test_measure import measured

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def served(tiny_models: Path, watch: leaks.Watch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """A studio whose first port has the server."""
    if not cache.has_openai_server():
        pytest.skip(f"mlx-openai-server runs on Python 3.11 and 3.12, not on {cache.PYTHON}")
    folder = tmp_path_factory.mktemp("openai")
    try:
        lab = Homelab(folder / "lab")
    except LabUnavailable as error:
        missing(str(error))
    with watch.spare(folder), lab:
        studio = office(lab, cache.openai_server_venv() / "bin" / "mlx-openai-server")
        studio.install(REPO, models.QWEN)
        studio.mlxctl("init").ok()
        studio.mlxctl("set", "--model", REPO, "--set", "args=--decode-concurrency 3").ok()
        loaded = studio.mlxctl("load", REPO, str(studio.ports[0]), timeout=300).ok()
        assert "limits: 3 requests at once, 6.8 MB of contexts (those that are kept are files)" in loaded.stderr
        yield Ask(lab, "ssh")
        studio.mlxctl("unload", str(studio.ports[0])).ok()


def test_server_gets_limits_beside_those_of_its_entry(served: Ask) -> None:
    studio, port = served.studio, served.port
    run = record(studio, port)
    # 3 contexts, and 10 that it keeps by default: those are files, and no memory.
    assert run["budget"] == ["--prompt-concurrency", "3", "--max-bytes", str(13 * 524288)]
    assert run["argv"][-6:] == ["--decode-concurrency", "3", *run["budget"]]
    with urllib.request.urlopen(f"http://{studio.address}:{port}/v1/queue/stats", timeout=30) as answer:
        stats = json.load(answer)["queue_stats"]["batch_stats"]
    studio.completion(port, "jerry-xl")
    assert (stats["completion_batch_size"], stats["prefill_batch_size"]) == (3, 3)
    kept = list((studio.folder / "tmp").glob("mlx-openai-prompt-cache-*/*.pkl"))
    assert kept, "a kept context is a file"
    assert drift(studio) == []


@pytest.mark.skipif(sys.platform != "linux", reason="smaps_rollup is Linux's")
def test_memory_that_its_processes_share_is_counted_once(served: Ask) -> None:
    row, server, pids = held(served.studio, served.port)
    pss, rss = kernel_bytes(pids, "Pss"), kernel_bytes(pids, "Rss")
    assert len(pids) > 1
    assert server["resident_bytes"] == pytest.approx(pss, rel=0.05)
    # A server of another test shares its libraries with this one, and PSS is less by that share.
    assert pss - LIBRARIES < row["memory_bytes"] < rss


def test_server_is_measured(served: Ask) -> None:
    measured([served], streams=1)
