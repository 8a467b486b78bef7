"""Exact pid reuse: a server ends, and another process gets its pid before the next command.

It runs in its own pid namespace (`unshare -Urpf`, Linux), in which /proc/sys/kernel/ns_last_pid sets the next pid. This
module is also the program that runs there.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tests.faults import children
from tests.faults.arena import Arena
from tests.lab.world import listening, wait_until

NAMESPACE = ("unshare", "-Urpf", "--mount-proc")
_LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
Stop = Callable[[Arena, int], None]


@cache
def available() -> str:
    """Return why exact reuse is not possible here; empty if it is."""
    try:
        command = [*NAMESPACE, "sh", "-c", "echo 5000 > /proc/sys/kernel/ns_last_pid"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except OSError as error:
        return f"unshare: {error.strerror}"
    return "" if done.returncode == 0 else f"no pid namespace: {done.stderr.strip()[:100]}"


def trial(arena: Arena, number: int, seed: int, naive: str = "") -> tuple[str, list[str]]:
    """`naive`: stop by pid or by port, as the controls do, instead of with mlxops."""
    command = [*NAMESPACE, sys.executable, "-m", "tests.faults.reuse", str(number), str(seed), naive]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    if done.returncode != 0:
        return "pid reuse", [f"the namespace ended with {done.returncode}: {done.stderr.strip()[-800:]}"]
    row = json.loads(done.stdout.splitlines()[-1])
    return str(row["name"]), [str(each) for each in row["wrong"]]


# In the namespace


def _main(number: int, seed: int, naive: str) -> None:
    rng = random.Random(f"{seed} reuse {number}")
    with tempfile.TemporaryDirectory(prefix="mlxops-reuse-", dir="/dev/shm") as folder:
        arena = Arena(Path(folder) / "host")
        try:
            name, wrong = _reuse(arena, rng, number, naive)
        finally:
            arena.sweep()
    sys.stdout.write(json.dumps({"name": name, "wrong": wrong}) + "\n")


def _reuse(arena: Arena, rng: random.Random, number: int, naive: str) -> tuple[str, list[str]]:
    kind, command = KINDS[number % len(KINDS)], COMMANDS[number // len(KINDS) % len(COMMANDS)]
    arena.run("init")
    port = arena.ports[0]
    loaded = arena.run("load", model="org/alpha", port=str(port))
    assert loaded.exit == 0, loaded
    run = arena.store.run(port)
    assert run is not None
    os.killpg(run.pgid, signal.SIGKILL)
    children.wait(run.pid, 20)
    stranger = _take_pid(run.pid, lambda: _become(kind, arena, port, run.argv), arena.folder / "stranger")
    if kind in {"listener", "twin"}:
        wait_until(lambda: listening(arena.address, port), 20, "the stranger's listener")
    name = f"{kind} with pid {stranger}, then {naive or command}"
    if naive == "by pid":
        os.kill(run.pid, signal.SIGTERM)
        ended = None
    elif naive == "by port":
        _kill_listeners(arena, port)
        ended = None
    elif command == "load":
        ended = arena.run("load", model="org/beta", port=str(port))
    elif command == "unload":
        ended = arena.run("unload", port=str(port))
    else:
        ended = arena.run(command)
    time.sleep(0.05)
    children.reap()
    wrong = [] if children.lives(stranger) else ["the stranger was killed"]
    if ended is not None and ended.exit not in {0, 3}:
        wrong.append(f"{command}: {ended}")
    row = next(row for row in _rows(arena) if row["port"] == port)
    if children.lives(stranger) and row["owner"] == "mlxops" and row["pid"] == stranger:
        wrong.append(f"the stranger is called ours: {row['state']}")
    if children.lives(stranger):
        os.kill(stranger, signal.SIGKILL)
    return name, wrong


KINDS = ("sleeper", "listener", "leader", "twin")
"""A process that does something else; one that listens on the port; one whose group has the recorded number; the same
program with the same arguments, not started by mlxops."""
COMMANDS = ("unload", "reconcile", "load")


def _become(kind: str, arena: Arena, port: int, argv: tuple[str, ...]) -> None:
    match kind:
        case "sleeper":
            os.execv("/bin/sleep", ["sleep", "300"])
        case "leader":
            os.execv("/bin/sh", ["sh", "-c", "sleep 300 & sleep 300"])
        case "listener":
            code = f"import socket,time; s=socket.create_server(('{arena.address}',{port})); time.sleep(300)"
            os.execv(sys.executable, [sys.executable, "-c", code])
        case _:
            os.chdir(arena.store.run_folder(port))
            os.execv(argv[0], list(argv))


def _take_pid(pid: int, body: Callable[[], None], output: Path) -> int:
    """Start a process with exactly this pid. Nothing else forks in the namespace, so one try mostly suffices."""

    def run() -> int:
        body()
        return 0

    for _ in range(50):
        _LAST_PID.write_text(str(pid - 1))
        got = children.fork(run, output)
        if got == pid:
            return got
        os.kill(got, signal.SIGKILL)
        children.wait(got, 10)
    raise RuntimeError(f"pid {pid} could not be had")


def _rows(arena: Arena) -> list[dict[str, object]]:
    rows = arena.look()["ports"]
    assert isinstance(rows, list)
    return rows


def _kill_listeners(arena: Arena, port: int) -> None:
    """Kill every process that listens on the port, as a simple script would."""
    from mlxops.agent.host.system import this_system

    for listener in this_system().process_table({port}).on(arena.address, port):
        for pid in listener.pids:
            os.kill(pid, signal.SIGTERM)


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "")
