"""What the keeper of a host costs while nothing happens: processor time, and memory."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.benchmarks.contest import BenchFailed, Contest, Timed
from tests.benchmarks.scene import homelab, host_environment
from tests.benchmarks.stats import Limit
from tests.lab.quick import MODELS, QuickHost

SECONDS = 60.0
SHARE = 0.001
MAX_RESIDENT = 30_000_000
MINUTE = "a minute"


@contextmanager
def _keeper(folder: Path) -> Iterator[Mapping[str, Timed]]:
    with homelab(folder) as lab:
        host = QuickHost(lab)
        host.mlxctl("init").ok()
        for model, port in zip(MODELS, host.ports, strict=False):
            host.mlxctl("load", model, str(port)).ok()
        argv = [sys.executable, "-P", "-m", "mlxops.agent", "--keeper", str(host.studio.state)]
        with subprocess.Popen(argv, env=host_environment(host.studio), stdout=subprocess.DEVNULL) as keeper:
            try:
                time.sleep(5)  # its first pass
                yield {MINUTE: lambda: SECONDS, "keeper": lambda: _idle(psutil.Process(keeper.pid))}
            finally:
                keeper.kill()
                host.studio.sweep()


def _idle(keeper: psutil.Process) -> float:
    """Return the processor seconds of the keeper in a minute. Raises `BenchFailed` if it takes too much memory."""
    before = keeper.cpu_times()
    time.sleep(SECONDS)
    after = keeper.cpu_times()
    if (resident := keeper.memory_info().rss) > MAX_RESIDENT:
        raise BenchFailed(f"the keeper holds {resident / 1e6:.1f} MB, and at most {MAX_RESIDENT / 1e6:.0f} are allowed")
    return max(1e-9, after.user + after.system - before.user - before.system)


CONTESTS = (
    Contest(
        "keeper",
        f"processor time of an idle keeper of three servers, with at most {MAX_RESIDENT / 1e6:.0f} MB of memory",
        "keeper",
        MINUTE,
        Limit({MINUTE: SHARE}),
        3,
        _keeper,
    ),
)
