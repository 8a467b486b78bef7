"""Faults that need a control node, SSH and a host, with the quick fake engine."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.faults import hostile
from tests.lab import leaks
from tests.lab.homelab import Homelab
from tests.lab.quick import snapshot, with_fake
from tests.lab.wire import Wire
from tests.lab.wired import client, wired

MODEL = "org/alpha"
Trial = Callable[[int], tuple[str, int, list[str]]]


@contextmanager
def trials(kind: str, folder: Path, seed: int) -> Iterator[Trial]:
    leaks.become_subreaper()
    with Homelab(folder / "lab") as lab:
        _install(lab)
        if kind == "hostile over SSH":
            lab.mini.mlxctl("init").ok()
            yield lambda number: _hostile(lab, number, seed)
            return
        with wired(lab) as wire:
            lab.mini.mlxctl("init").ok()
            yield lambda number: _cut(lab, wire, number, seed)


def _install(lab: Homelab) -> None:
    """Install the fake engine and a model without weights on the Studio."""
    for name in (MODEL, "org/beta"):
        snapshot(lab.studio.hub, name)
    with_fake(lab, "studio", "--fake-late", "0.4")


def _hostile(lab: Homelab, number: int, seed: int) -> tuple[str, int, list[str]]:
    """Send hostile strings through SSH. Neither the Mini's shell nor the Studio's may create its canary."""
    rng = random.Random(f"{seed} ssh {number}")
    canary = lab.folder / "canary"
    line = hostile.words(rng, canary, lab.studio.ports, nul=False)
    line = [word.encode("utf-8", "replace").decode() for word in line]
    done = lab.mini.mlxctl(*line)
    wrong = hostile.judged(line, done.exit, done.stdout, done.stderr)
    if canary.exists():
        canary.unlink()
        wrong.append("executed")
    if line[0] == "load" and done.exit == 0:
        # A string may happen to be a good one: `--timeout 8100`.
        wrong += _one_server(lab, lab.studio.ports)
        lab.mini.mlxctl("unload-all", "--yes").ok()
    wrong += [f"left: {each}" for each in _settled(lab)]
    return f"mlxctl {line!r}", 1, wrong


def _settled(lab: Homelab) -> list[str]:
    """Return the processes that still run on the Studio a moment after a command that loaded nothing."""
    deadline = time.monotonic() + 10
    while (found := lab.studio.processes()) and time.monotonic() < deadline:
        leaks.reap_orphans()
        time.sleep(0.01)
    return [str(process) for process in found]


# Cuts


def _cut(lab: Homelab, wire: Wire, number: int, seed: int) -> tuple[str, int, list[str]]:
    """Cut the connection, session or client of a load. Then repeat the same command."""
    rng = random.Random(f"{seed} cut {number}")
    kind = CUTS[number % len(CUTS)]
    port = str(lab.studio.ports[0])
    words = ["load", MODEL, port]
    after = rng.uniform(0.0, 1.6)
    wire.passed, wire.cut_after = 0, rng.randrange(1, 9000) if kind == "bytes" else None
    with client(lab, *words, both=True) as process:
        timer = threading.Timer(after, lambda: _do(kind, lab, wire, process))
        timer.start()
        try:
            said, _ = process.communicate(timeout=120)
        finally:
            timer.join()
    wire.cut_after = None
    wrong = []
    # Killing the session kills all its processes, including the worker. The error then says so.
    cut_short = kind == "session killed" and process.returncode == 3 and "was interrupted" in said
    if kind not in {"client killed", "Ctrl-C"} and process.returncode not in {0, 5, 7} and not cut_short:
        wrong.append(f"exit {process.returncode}: {said[-300:]}")
    if "Traceback" in said:
        wrong.append(f"a traceback: {said[-600:]}")
    again = lab.mini.mlxctl(*words)
    if again.exit != 0:
        wrong.append(f"asked again: {again.stdout[-200:]} {again.stderr[-300:]}")
    wrong += _one_server(lab, lab.studio.ports[:1])
    gone = lab.mini.mlxctl("unload", port)
    wrong += [f"unload: {gone.stderr[-300:]}"] if gone.exit != 0 else []
    wrong += [f"left: {each}" for each in _settled(lab)]
    left = [path.name for path in lab.studio.hub.glob(".registry*")]
    wrong += [f"left: {left}"] if left else []
    return f"{kind} after {after:.2f} s", 1, wrong


CUTS = ("wire", "bytes", "connection killed", "session killed", "client killed", "Ctrl-C", "stall and cut")


def _do(kind: str, lab: Homelab, wire: Wire, process: subprocess.Popen[str]) -> None:
    match kind:
        case "wire":
            wire.cut()
        case "connection killed":
            lab.studio.sshd.kill_connections()
        case "session killed":
            lab.studio.sshd.kill_sessions()
        case "client killed":
            process.kill()
        case "Ctrl-C":
            process.send_signal(signal.SIGINT)
        case "stall and cut":
            wire.stalled = True
            time.sleep(0.3)
            wire.stalled = False
            wire.cut()


def _one_server(lab: Homelab, ports: Sequence[int]) -> list[str]:
    """Return what is wrong, unless the model is served once, on one of `ports`."""
    status = lab.mini.mlxctl("status", "--json")
    if status.exit != 0:
        return [f"status: {status.stderr[-300:]}"]
    rows = json.loads(status.stdout)["hosts"][0]["ports"]
    ready = [(row["port"], row["model"], row["owner"]) for row in rows if row["state"] != "idle"]
    servers = [each for each in lab.studio.processes() if "mlx_lm.server" in each.command]
    wrong = [] if ready in [[(port, MODEL, "mlxops")] for port in ports] else [f"the status shows {ready}"]
    return wrong if len(servers) == 1 else [*wrong, f"servers: {[str(each) for each in servers]}"]
