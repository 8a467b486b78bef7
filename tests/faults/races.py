"""Eight processes at once on three ports and three models: loads, unloads, rollbacks, init, reconcile, restore, edits.

Before them, there is no server, one of ours, or one that was started by hand. A load of its model adopts the latter.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from mlxops.common.build import build_id
from tests.faults import children, oracle, strikes
from tests.faults.arena import Arena
from tests.lab.envelopes import envelope
from tests.lab.quick import MODELS

PROCESSES = 8
ALLOWED = {0, 3, 75, 130}
"""Done, refused, busy, cancelled by an unload. No other exit status is allowed in a race."""


def trial(arena: Arena, number: int, seed: int) -> tuple[str, list[str]]:
    rng = random.Random(f"{seed} race {number}")
    arena.sweep()
    arena.run("init")
    match rng.randrange(4):
        case 0 | 1:
            arena.run("load", model=rng.choice(MODELS), port=str(rng.choice(list(arena.ports))))
        case 2:
            arena.start_by_hand(rng.choice(MODELS), rng.choice(list(arena.ports)))
    requests = [_random_request(arena, rng) for _ in range(PROCESSES)]
    workers, agents, editors = [], [], []
    for index, (command, args) in enumerate(requests):
        if command == "edit":
            editors.append(_editor(arena, index, rng.random()))
        elif index < 2:
            agents.append((command, _agent(arena, index, command, args)))
        else:
            workers.append((command, *arena.begin(command, args, stopped=True)))
    for _, _, pid in workers:
        _go(pid)
    ended = [(command, arena.ended(journal, pid)) for command, journal, pid in workers]
    wrong = [problem for _, each in ended for problem in oracle.no_bug(each)]
    wrong += [f"an unexpected answer: {each}" for command, each in ended if each.exit not in _allowed(command)]
    for command, pid in agents:
        status = children.wait(pid, 90)
        wrong += [] if status in _allowed(command) else [f"the agent of {command} ended with {status}"]
    for pid in editors:
        children.wait(pid, 30)
    wrong += oracle.registry_sound(arena) + oracle.locks_free(arena) + oracle.nothing_hidden(arena)
    wrong += _one_server_a_model(arena)
    name = ", ".join(" ".join([command, *map(str, args.values())]) for command, args in requests)
    return name, wrong + strikes.emptied(arena)


def _allowed(command: str) -> set[int]:
    """Return the allowed exit statuses. Another operation may take a port of a `restore`, which then fails (4)."""
    return ALLOWED | ({4} if command == "restore" else set())


def _random_request(arena: Arena, rng: random.Random) -> tuple[str, Mapping[str, object]]:
    port, model = str(rng.choice(list(arena.ports))), rng.choice(MODELS)
    match rng.randrange(15):
        case 0 | 1 | 2 | 3:
            return "load", {"model": model, "port": port, "force": rng.random() < 0.5}
        case 4:
            return "load", {"model": model, "port": "auto", "force": rng.random() < 0.5}
        case 5:
            return "load", {"model": "short", "port": port, "repo": model, "force": rng.random() < 0.5}
        case 6 | 7:
            return "unload", {"port": port}
        case 8:
            return "unload", {"model": model}
        case 9:
            return "rollback", {"port": port}
        case 10:
            return "init", {}
        case 11:
            return "reconcile", {}
        case 12:
            return "unload-all", {}
        case 13:
            return "restore", {}
    return "edit", {}


def _go(pid: int) -> None:
    """Wait until a fork has stopped, and continue it."""
    children.until_stopped(pid)
    os.kill(pid, signal.SIGCONT)


def _agent(arena: Arena, index: int, command: str, args: Mapping[str, object]) -> int:
    """Do the same through a real agent with its own worker."""
    folder = arena.folder / f"agent{index}"
    request = envelope(command, args, arena.settings, build_id())
    folder.with_suffix(".in").write_bytes(request.encode())
    argv = ["/bin/sh", "-c", 'exec "$0" -P -m mlxops.agent < "$1"', sys.executable, str(folder.with_suffix(".in"))]
    return children.spawn(argv, folder.with_suffix(".out"))


def _editor(arena: Arena, index: int, pause: float) -> int:
    """Edit the registry as a person does: read it, pause, save by a rename, without a lock."""

    def body() -> int:
        for turn in range(3):
            document = json.loads(arena.registry_path.read_bytes())
            time.sleep(pause * 0.02)
            for entry in document["models"].values():
                entry["note"] = f"{index}.{turn}"
            beside = Path(f"{arena.registry_path}.edit{index}")
            beside.write_text(json.dumps(document, indent=2))
            os.replace(beside, arena.registry_path)
        return 0

    return children.fork(body, arena.folder / f"editor{index}")


def _one_server_a_model(arena: Arena) -> list[str]:
    models = [row["model"] for row in oracle.rows_by_port(arena).values() if row["owner"] == "mlxops"]
    return [f"a model is served twice: {models}"] if len(models) != len(set(models)) else []
