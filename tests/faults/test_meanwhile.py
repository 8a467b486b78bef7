"""Two operations, one of which comes at a certain moment of the other."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.faults import meanwhile
from tests.lab.homelab import CHECKOUT

pytestmark = pytest.mark.lab


@pytest.mark.skipif(sys.platform != "linux", reason="the arena collects orphans by what Linux alone has")
@pytest.mark.parametrize("case", meanwhile.CASES)
def test_an_operation_in_the_middle_of_another(case: str) -> None:
    argv = [sys.executable, "-m", "tests.faults.meanwhile", case]
    done = subprocess.run(argv, cwd=CHECKOUT, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout == "as it should be\n", done.stderr
