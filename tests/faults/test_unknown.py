"""What could not be determined is `unknown`, and nothing acts upon it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys

import pytest

from tests.faults import reuse, unknown
from tests.lab.homelab import CHECKOUT
from tests.lab.sshd import missing

pytestmark = pytest.mark.lab


def left_alone(*argv: str) -> None:
    command = [*argv[:-1], sys.executable, "-m", "tests.faults.unknown", *argv[-1].split("\t")]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout == "nothing was done\n", done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="strace and /proc are Linux's")
@pytest.mark.parametrize("cause", unknown.CAUSES)
def test_a_server_that_cannot_be_seen_for_reasons_of_our_own_is_left_alone(cause: str) -> None:
    if shutil.which("strace") is None:
        missing("strace (Debian and Ubuntu: apt-get install strace)")
    left_alone(cause)


def test_a_listener_whose_process_cannot_be_seen_is_left_alone() -> None:
    if why := reuse.available():
        pytest.skip(f"no process can be hidden here: {why}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        left_alone(*reuse.NAMESPACE, f"a listener of nobody\t{server.getsockname()[1]}")
