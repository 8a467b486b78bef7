"""Two operations, one of which acts at a fixed moment of the other."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.faults import interleaved
from tests.lab.homelab import CHECKOUT

pytestmark = pytest.mark.lab


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets the arena collect orphans")
@pytest.mark.parametrize("case", interleaved.CASES)
def test_interleaved_operations(case: str) -> None:
    argv = [sys.executable, "-m", "tests.faults.interleaved", case]
    done = subprocess.run(argv, cwd=CHECKOUT, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout == "as it should be\n", done.stderr
