"""The state `unknown`: no command acts on a port whose state could not be determined."""

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


@pytest.mark.skipif(sys.platform != "linux", reason="needs strace and /proc of Linux")
@pytest.mark.parametrize("cause", unknown.CAUSES)
def test_server_that_mlxops_cannot_observe_is_left_alone(cause: str) -> None:
    if shutil.which("strace") is None:
        missing("strace (Debian and Ubuntu: apt-get install strace)")
    left_alone(cause)


def test_listener_of_an_invisible_process_is_left_alone() -> None:
    if why := reuse.available():
        pytest.skip(f"no process can be hidden here: {why}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        left_alone(*reuse.NAMESPACE, f"a listener in another pid namespace\t{server.getsockname()[1]}")
