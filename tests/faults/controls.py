"""Positive controls: simpler implementations, under the same faults and checks. Each must fail."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def run() -> Iterator[tuple[str, bool]]:
    """Return (implementation, whether a check failed), each from its own process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.controls"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        yield f"could not run: {done.stderr.strip()[-200:]}", False
    for line in done.stdout.splitlines():
        name, _, verdict = line.rpartition("\t")
        yield name, verdict == "caught"


def _all() -> Iterator[tuple[str, bool]]:
    from tests.faults import batch, power, reuse

    with batch.own_arena() as arena:
        for writer in power.NAIVE:
            lost = [wrong for number in range(3) for wrong in power.trial(arena, number, 0, writer)[2]]
            yield f"a registry writer that writes {writer.__name__.replace('_', ' ')}", bool(lost)
        if not reuse.available():
            for number, way in ((0, "by pid"), (1, "by port")):
                _, wrong = reuse.trial(arena, number, 0, way)
                yield f"a stopper that kills {way}", "the stranger was killed" in wrong


def _main() -> None:
    for name, caught in _all():
        sys.stdout.write(f"{name}\t{'caught' if caught else 'missed'}\n")


if __name__ == "__main__":
    _main()
