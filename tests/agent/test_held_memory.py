"""What real engines hold, as `status` and `list --memory` show it, against what the kernel says."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.lab import models
from tests.lab.homelab import Homelab, Studio

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="smaps_rollup is Linux's")

NAME = "tiny-org/tiny-qwen3"
LIBRARIES = 60_000_000
"""What a server shares with programs that are not part of it: PSS is less by their share."""


def kernel_bytes(pids: list[int], field: str) -> int:
    """Return the sum of `field` in /proc/PID/smaps_rollup."""
    lines = [line.split() for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return sum(int(words[1]) * 1024 for words in lines if words[0] == f"{field}:")


def loaded(studio: Studio, port: int) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """Load a model. Return its port in `status`, its server in `list --memory`, and its processes."""
    studio.install(NAME, models.QWEN)
    studio.mlxctl("init").ok()
    studio.mlxctl("load", NAME, str(port), timeout=300).ok()
    studio.completion(port, "jerry-xl")
    row = studio.mlxctl("status", "--json").ok().json["hosts"][0]["ports"][0]
    memory = studio.mlxctl("list", "--memory", "--json").ok().json["hosts"][0]["memory"]
    (server,) = [each for each in memory["servers"] if each["port"] == port]
    assert memory["held_bytes"] >= server["resident_bytes"] and memory["host"]["in_use_bytes"] > 0
    if limit := server["limit"]:
        contexts = limit["contexts"] * (limit["context_bytes"] + limit["state_bytes"])
        parts = limit["weight_bytes"] + contexts + limit["cache_bytes"] + limit["server_bytes"]
        assert parts == limit["total_bytes"] == server["limit_bytes"]
    pids = [process.pid for process in studio.processes() if os.getpgid(process.pid) == row["pgid"]]
    assert row["pid"] in pids
    return row, server, pids


@pytest.mark.timeout(600)
def test_memory_of_mlx_lm_is_what_the_kernel_says(homelab: Homelab, engine: Path) -> None:
    row, server, pids = loaded(homelab.studio, homelab.studio.ports[0])
    assert server["limit"]["contexts"] == 32 and server["limit"]["cache_bytes"] > 0
    pss = kernel_bytes(pids, "Pss")
    assert row["memory_bytes"] == pytest.approx(pss, abs=LIBRARIES)
    assert server["resident_bytes"] == pytest.approx(pss, abs=LIBRARIES)


@pytest.mark.timeout(600)
def test_memory_of_mlx_openai_server_counts_what_its_processes_share_once(
    homelab: Homelab, openai_server: Path
) -> None:
    launch = {**homelab.studio.settings["launch"], "mlx-openai-server": [str(openai_server), "launch"]}  # type: ignore[dict-item]
    homelab.configure(engine="mlx-openai-server", launch=launch)
    row, server, pids = loaded(homelab.studio, homelab.studio.ports[0])
    pss, rss = kernel_bytes(pids, "Pss"), kernel_bytes(pids, "Rss")
    assert len(pids) > 1
    assert server["resident_bytes"] == pytest.approx(pss, rel=0.05)
    assert row["memory_bytes"] == pytest.approx(pss, abs=LIBRARIES) and row["memory_bytes"] < rss
