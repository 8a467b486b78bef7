"""A server starts with default signals and its user's limits, even from a shell that changed them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlxops.agent.host.programs import environment
from mlxops.agent.host.system import this_system
from mlxops.agent.serving.processes import spawn
from tests.lab.homelab import Completed, Homelab, Studio, run, script
from tests.lab.world import wait_until
from tests.steps import listener, nothing_runs, register, with_fake

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what a process has inherited is read from /proc")

ROUGH = """
import os, resource, signal, sys
for name in "INT", "HUP", "QUIT", "USR1", "USR2", "CHLD":
    signal.signal(getattr(signal, f"SIG{name}"), signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1])
for name, soft in ("NOFILE", 128), ("FSIZE", 10**8), ("CORE", 0):
    kind = getattr(resource, f"RLIMIT_{name}")
    resource.setrlimit(kind, (soft, resource.getrlimit(kind)[1]))
os.execv(sys.argv[1], sys.argv[1:])
"""


def roughly(studio: Studio, *words: str) -> Completed:
    """Run `mlxctl --local` from a shell that ignores and blocks signals and has low limits."""
    argv = [sys.executable, "-c", ROUGH, script("mlxctl"), *words, "--local"]
    return run(argv, studio.home, studio.environment)


def signals(pid: int, which: str) -> set[int]:
    """Return the signals of a mask in proc(5): SigIgn (ignored) or SigBlk (blocked)."""
    rows = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    # Without the signals reserved by glibc (nptl(7)): posix_spawn lets its child ignore one of them.
    return {number for number in range(1, 65) if number not in {32, 33} and int(rows[which], 16) >> (number - 1) & 1}


def limits(pid: int) -> dict[str, tuple[str, str]]:
    """Map each limit's name to its soft and hard value."""
    rows = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    return {row[:26].strip(): (row[26:47].strip(), row[47:68].strip()) for row in rows}


def test_server_does_not_inherit_signals_and_limits_of_the_shell(homelab: Homelab) -> None:
    studio = with_fake(homelab).studio
    register(studio, "mine")
    roughly(studio, "load", "mine", str(studio.ports[0])).ok()
    pid = listener(studio, studio.ports[0])
    assert pid is not None
    assert signals(pid, "SigBlk") == set()
    assert signals(pid, "SigIgn") <= {13, 25}, "Python ignores SIGPIPE and SIGXFSZ itself"
    own = limits(pid)
    for name in ("Max open files", "Max file size"):
        soft, hard = own[name]
        assert soft == hard, name
    assert own["Max core file size"][0] == "0", "a crash must not write the model to the disk"
    stopped = roughly(studio, "unload", str(studio.ports[0]), "--json").ok()
    assert stopped.json["hosts"][0]["result"]["seconds"] < 10, "it ended when it was asked"
    nothing_runs(studio)


def test_load_from_a_rough_shell_can_be_cancelled(homelab: Homelab) -> None:
    studio = with_fake(homelab).studio
    register(studio, "mine", "deaf")
    argv = [sys.executable, "-c", ROUGH, script("mlxctl"), "load", "mine", str(studio.ports[0]), "--local"]
    with subprocess.Popen(argv, cwd=studio.home, env=studio.environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            next(line for line in process.stderr if line.startswith("proof: "))
            operation = json.loads(studio.mlxctl("ops", "--json").ok().stdout)["hosts"][0]["operations"][0]["operation"]
            studio.mlxctl("ops", "--cancel", operation, timeout=20).ok()
            assert process.wait(20) == 130
        finally:
            process.kill()
    nothing_runs(studio)


def test_engine_without_python_ignores_no_signals(tmp_path: Path) -> None:
    system = this_system()
    env = environment(os.environ, {}, "run")
    gated = spawn(system, ["/bin/sleep", "60"], env, tmp_path / "log")
    try:
        gated.open(tmp_path)
        wait_until(lambda: (seen := system.process(gated.pid)) and "gate.py" not in " ".join(seen.argv), 30, "sleep")
        # This process may ignore a signal, for example under nohup. Those that Python ignores are not passed on.
        assert signals(gated.pid, "SigIgn") == signals(os.getpid(), "SigIgn") - {13, 25}
    finally:
        gated.child.kill()
        gated.abandon()
