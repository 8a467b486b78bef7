"""How long the keeper takes to bring a server back, with the real mlx-lm: `python -m tests.benchmarks.healing`.

Linux, and for the lack of memory root and version 1 of control groups. The hang takes some minutes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from mlxops.core.settings import SlotOptions
from tests.faults.arena import Arena
from tests.faults.batch import own_arena
from tests.lab.quick import MODELS
from tests.lab.world import wait_until

GROUP = Path("/sys/fs/cgroup/memory") / f"mlxops-healing-{os.getpid()}"
LIMIT = 1_000_000
LOOK_SECONDS = 35.0


def killed(arena: Arena, pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def out_of_memory(arena: Arena, pid: int) -> None:
    """Move the server into a group that may take no more memory, and ask it for something."""
    (GROUP / "cgroup.procs").write_text(str(pid))
    (GROUP / "memory.limit_in_bytes").write_text(str(LIMIT))
    time.sleep(LOOK_SECONDS)  # until the keeper has seen the group
    body = b'{"messages": [{"role": "user", "content": "' + b"word " * 2000 + b'"}], "max_tokens": 8}'
    url = f"http://{arena.address}:{arena.ports[0]}/v1/chat/completions"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with suppress(OSError):
        urllib.request.urlopen(request, timeout=20).read()
    wait_until(lambda: not Path(f"/proc/{pid}/cmdline").exists() or not _words(pid), 20, "its end")


def hung(arena: Arena, pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


CASES: dict[str, Callable[[Arena, int], None]] = {
    "kill -9": killed,
    "out of memory (cgroup)": out_of_memory,
    "a hang (SIGSTOP), keep: restart": hung,
}


def _words(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def healed(case: str, arena: Arena) -> tuple[float, float, str]:
    """Return the seconds until another server is started, and until it is proven, and what the history says."""
    port = arena.ports[0]
    before = arena.store.run(port)
    assert before is not None
    CASES[case](arena, before.pid)
    began = time.monotonic()

    def another(*, proven: bool) -> bool:
        run = arena.store.run(port)
        return run is not None and run.pid != before.pid and (run.proven_at is not None or not proven)

    wait_until(lambda: another(proven=False), 900, "another process")
    started = time.monotonic() - began
    wait_until(lambda: another(proven=True), 120, "another server")
    took = time.monotonic() - began
    lines = [line for line in arena.store.history() if line.get("command") in {"died", "wedged"}]
    return started, took, " ".join(f"{line['command']} {line.get('cause', '')}".strip() for line in lines)


def main(cases: list[str]) -> None:
    for case in cases or CASES:
        with own_arena(real=True) as arena:
            slot = {arena.ports[0]: SlotOptions(keep="restart")}
            arena.settings = replace(arena.settings, slot_options=slot)
            arena.store.create_folders()
            arena.store.save_agreed_settings(arena.settings)
            arena.run("init")
            arena.run("load", model=MODELS[0], port=str(arena.ports[0]))
            arena.run("load", model=MODELS[1], port=str(arena.ports[1]))
            argv = [sys.executable, "-P", "-m", "mlxops.agent", "--keeper", str(arena.state)]
            environ = {**os.environ, **arena.environ}
            with subprocess.Popen(argv, env=environ, stdout=subprocess.DEVNULL) as keeper:
                if "memory" in case:
                    GROUP.mkdir()
                try:
                    time.sleep(3)
                    started, took, said = healed(case, arena)
                finally:
                    keeper.kill()
                    arena.sweep()
                    if GROUP.exists():
                        GROUP.rmdir()
        print(f"{case} | {started:.1f} s | {took:.1f} s | {said}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
