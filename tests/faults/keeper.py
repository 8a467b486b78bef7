"""Servers and keepers that are killed, beside loads and unloads of the same ports.

In the end each assigned model is served once, within seconds, and what an operator unloaded is not.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults import children, oracle, strikes
from tests.faults.arena import Arena, Ended
from tests.lab.quick import MODELS
from tests.lab.world import wait_until

HEALED_SECONDS = 40.0
"""A second where nothing else runs; a pass that meets an operation looks again after ten."""
ALLOWED = {0, 3, 4, 75, 130}
"""Done, refused, not started, busy, cancelled."""


def trial(arena: Arena, number: int, seed: int) -> tuple[str, list[str]]:
    rng = random.Random(f"{seed} keeper {number}")
    arena.sweep()
    arena.store.create_folders()
    arena.store.save_agreed_settings(arena.settings)
    arena.run("init")
    for port, model in zip(arena.ports, MODELS[:2], strict=False):
        arena.run("load", model=model, port=str(port))
    scene = SCENES[number % len(SCENES)]
    with _keeper(arena) as pid:
        try:
            wrong = scene(arena, rng, pid)
            wrong += _healed(arena)
        except (TimeoutError, AssertionError) as error:
            wrong = [f"{type(error).__name__}: {error}; {_log(arena)}"]
    _wait_for_passes(arena)
    wrong += oracle.registry_sound(arena) + oracle.locks_free(arena) + oracle.nothing_hidden(arena)
    return scene.__name__.strip("_"), wrong + strikes.emptied(arena)


Scene = Callable[[Arena, random.Random, int], list[str]]


def _kill(arena: Arena, port: int) -> None:
    run = arena.store.run(port)
    if run is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(run.pid, signal.SIGKILL)


def _servers(arena: Arena, rng: random.Random, keeper: int) -> list[str]:
    for port in rng.sample(list(arena.ports[:2]), rng.choice([1, 2])):
        _kill(arena, port)
    return []


def _server_and_keeper(arena: Arena, rng: random.Random, keeper: int) -> list[str]:
    """Kill the keeper before, after, or while it has the server restarted. The system starts another one."""
    moment = rng.choice([0.0, 0.05, 0.3, 0.6, 1.0])
    if not moment:
        os.kill(keeper, signal.SIGKILL)
    _kill(arena, arena.ports[0])
    time.sleep(moment)
    if moment:
        os.kill(keeper, signal.SIGKILL)
    with _keeper(arena):
        return _healed(arena)


def _two_keepers(arena: Arena, rng: random.Random, keeper: int) -> list[str]:
    with _keeper(arena, acts=False):
        _kill(arena, arena.ports[rng.randrange(2)])
        return _healed(arena)


def _unload(arena: Arena, rng: random.Random, keeper: int) -> list[str]:
    _kill(arena, arena.ports[0])
    time.sleep(rng.random() * 1.5)
    ended = arena.run("unload", port=str(arena.ports[0]))
    wrong = _answer(ended)
    if ended.exit == 0:
        time.sleep(2.0)
        rows = oracle.rows_by_port(arena)
        wrong += [] if rows[arena.ports[0]]["state"] == "idle" else [f"the unload was undone: {rows[arena.ports[0]]}"]
    return wrong


def _load(arena: Arena, rng: random.Random, keeper: int) -> list[str]:
    _kill(arena, arena.ports[0])
    time.sleep(rng.random() * 1.5)
    return _answer(arena.run("load", model=MODELS[2], port=str(arena.ports[0]), force=True))


def _restore(arena: Arena, rng: random.Random, keeper: int) -> list[str]:
    for port in arena.ports[:2]:
        _kill(arena, port)
    time.sleep(rng.random())
    return _answer(arena.run("restore"))


def _swap(arena: Arena, rng: random.Random, keeper: int) -> list[str]:
    """Kill what is on a port while another model replaces its server."""
    strike = threading.Timer(rng.random() * 1.5, _kill, (arena, arena.ports[0]))
    strike.start()
    ended = arena.run("load", model=MODELS[2], port=str(arena.ports[0]), force=True)
    strike.join()
    return _answer(ended)


def _paused(arena: Arena, rng: random.Random, keeper: int) -> list[str]:
    """Let both servers end, and one of them be unloaded, while the keeper stands still."""
    os.kill(keeper, signal.SIGSTOP)
    for port in arena.ports[:2]:
        _kill(arena, port)
    ended = arena.run("unload", port=str(arena.ports[0]))
    os.kill(keeper, signal.SIGCONT)
    wrong = _answer(ended) + _healed(arena)
    row = oracle.rows_by_port(arena)[arena.ports[0]]
    return wrong + ([] if row["state"] == "idle" or ended.exit else [f"the unload was undone: {row}"])


SCENES: tuple[Scene, ...] = (*(_servers, _server_and_keeper, _two_keepers, _unload, _load, _restore, _swap, _paused),)


def _answer(ended: Ended) -> list[str]:
    wrong = oracle.no_bug(ended)
    return wrong + ([] if ended.exit in ALLOWED else [f"an unexpected answer: {ended}"])


@contextmanager
def _keeper(arena: Arena, *, acts: bool = True) -> Iterator[int]:
    """Run a keeper until the end of the block, if it is not killed before."""
    os.environ.update(arena.environ)
    output = arena.folder / "keeper.log"
    before = output.stat().st_size if output.exists() else 0
    words = " runs" if acts else "another keeper runs"
    pid = children.spawn([sys.executable, "-P", "-m", "mlxops.agent", "--keeper", str(arena.state)], output)
    try:
        wait_until(lambda: words in _text(output)[before:], 20, "the keeper")
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            children.wait(pid, 10)


def _healed(arena: Arena) -> list[str]:
    """Wait until every assigned model is served."""

    def served() -> bool:
        children.reap()
        rows = oracle.rows_by_port(arena)
        assigned = {port for model in arena.store.registry.read().models.values() if (port := model.port) is not None}
        return all(rows[port]["state"] == "ready" for port in assigned)

    try:
        wait_until(served, HEALED_SECONDS, "the servers")
    except TimeoutError:
        return [f"not healed: {oracle.rows_by_port(arena)}; {_log(arena)}"]
    return []


def _wait_for_passes(arena: Arena) -> None:
    """Wait until no pass and no worker of this host runs: they outlive the keeper."""
    state = os.fsencode(arena.state)

    def running() -> list[str]:
        children.reap()
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{name}/cmdline").read_bytes()
                if b"mlxops.agent" in words and state in words:
                    found.append(name)
        return found

    wait_until(lambda: not running(), 60, "the end of the passes")


def _text(path: Path) -> str:
    return path.read_text(errors="replace")


def _log(arena: Arena) -> str:
    return _text(arena.folder / "keeper.log")[-1500:]
