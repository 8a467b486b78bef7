"""What a real mlx-lm holds, as `status` and `list --memory` show it, against what the kernel says."""

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


def held(studio: Studio, port: int) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """Return a served port in `status`, its server in `list --memory`, and its processes."""
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
    studio, port = homelab.studio, homelab.studio.ports[0]
    studio.install(NAME, models.QWEN)
    studio.mlxctl("init").ok()
    studio.mlxctl("load", NAME, str(port), timeout=300).ok()
    row, server, pids = held(studio, port)
    assert server["limit"]["contexts"] == 32 and server["limit"]["cache_bytes"] > 0
    pss = kernel_bytes(pids, "Pss")
    assert row["memory_bytes"] == pytest.approx(pss, abs=LIBRARIES)
    assert server["resident_bytes"] == pytest.approx(pss, abs=LIBRARIES)
