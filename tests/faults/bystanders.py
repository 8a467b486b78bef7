"""Servers that people start in various ways, beside processes that only resemble or contain one.

Commands that stop servers must leave such processes alone. All other commands must leave the servers alone, too.
"""

from __future__ import annotations

import os
import random
import shlex
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mlxops.agent.host.system import this_system
from mlxops.agent.serving import servers
from tests.faults import children
from tests.faults.arena import Arena
from tests.lab.quick import MODELS

SERVER, NEIGHBOUR = MODELS[0], MODELS[1]

BY_HAND = {
    # {server} on the port and {neighbour} on the next one are lines of shell; all in one process group.
    "two servers in a script": "{server} & {neighbour} & wait",
    "a script that becomes the neighbour": "{server} & exec {neighbour}",
    "a script that becomes the server": "{neighbour} & exec {server}",
    "a tee": "{neighbour} & {server} | tee log >/dev/null; wait",
    "a dashboard": "{neighbour} & exec {python} {carriers}/dashboard {server}",
    "an ssh client": "{neighbour} & exec -a ssh {python} studio2 {server}",
    "a tmux": "{neighbour} & exec -a tmux {python} {carriers}/studio2 new-session -d {server}",
}
STOPPING: Mapping[str, Mapping[str, object]] = {
    "unload": {"force": True},
    "load": {"force": True, "model": MODELS[2]},
}
PREFIXES = {
    "nice": ("/usr/bin/nice", "-n", "5"),
    "env": ("/usr/bin/env", "A=B"),
    "an empty environment": ("/usr/bin/env", "-i"),
    "a wrapper that stays": ("/bin/sh", "-c", '"$0" "$@"; :'),
    "a wrapper that adds options": ("/bin/sh", "-c", 'exec "$0" "$@" --log-level WARNING'),
}
HARMLESS = ("reconcile", "restore", "load", "status")


def trial(arena: Arena, number: int, seed: int) -> tuple[str, list[str]]:
    rng = random.Random(f"{seed} bystanders {number}")
    arena.sweep()
    arena.run("init")
    if number % 2:
        prefix = list(PREFIXES)[number // 2 % len(PREFIXES)]
        return _launched(arena, prefix, rng.choice(HARMLESS))
    how = list(BY_HAND)[number // 2 % len(BY_HAND)]
    return _by_hand(arena, how, rng.choice(list(STOPPING)))


def _launched(arena: Arena, prefix: str, command: str) -> tuple[str, list[str]]:
    """A server of ours is ready and stays, however it was launched."""
    usual, port = arena.settings, str(arena.ports[0])
    arena.settings = replace(usual, launch={"mlx-lm": (*PREFIXES[prefix], str(arena.program))})
    try:
        loaded = arena.run("load", model=SERVER, port=port)
        wrong = [] if loaded.exit == 0 else [f"load: {loaded}"]
        before = arena.servers().keys()
        if command == "status":
            arena.look()
        else:
            ended = arena.run(command, **({"model": SERVER, "port": port} if command == "load" else {}))
            wrong += [] if ended.exit == 0 and not (ended.result or {}).get("changed") else [f"{command}: {ended}"]
        if arena.servers().keys() != before:
            wrong.append("the server is another one now, or none")
        gone = arena.run("unload", port=port)
        if gone.exit or arena.servers():
            wrong.append(f"unload: {gone}; it left {arena.servers()}")
    finally:
        arena.settings = usual
    return f"launched through {prefix}, then {command}", wrong


@dataclass(frozen=True)
class Scene:
    """Return the group of the started process, and the port's server if there is one."""

    group: int
    server: int | None

    def living(self) -> set[int]:
        children.reap()
        return {process.pid for process in this_system().process_table(()).group(self.group)}


def _by_hand(arena: Arena, how: str, command: str) -> tuple[str, list[str]]:
    scene = _start(arena, how)
    try:
        # A tee ends by itself when nothing writes to it any more.
        before = scene.living() - _pids("tee")
        ended = arena.run(command, **STOPPING[command], port=str(arena.ports[0]))
        wrong = [] if ended.exit == 0 else [f"{command}: {ended}"]
        expected = before - {scene.server}
        if missing := expected - scene.living():
            wrong.append(f"processes that are none of the server's are gone: {missing}")
        if scene.server in scene.living():
            wrong.append("the server still runs")
        return f"{how}, then {command}", wrong
    finally:
        for pid in scene.living():
            os.kill(pid, signal.SIGKILL)


def _start(arena: Arena, how: str) -> Scene:
    carriers = arena.folder / "carriers"
    carriers.mkdir(exist_ok=True)
    (carriers / "studio2").write_text("import time; time.sleep(600)\n")
    (carriers / "dashboard").write_text(
        "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(600)\n"
    )
    words = arena.by_path(SERVER, arena.ports[0])
    script = BY_HAND[how].format(
        server=shlex.join(words),
        neighbour=shlex.join(arena.by_path(NEIGHBOUR, arena.ports[1])),
        python=sys.executable,
        carriers=carriers,
    )

    def serve() -> int:
        os.chdir(carriers)
        os.execv("/bin/bash", ["bash", "-c", script])

    group = children.fork(serve, carriers / "output")
    carried = how in {"an ssh client", "a tmux"}
    ports = arena.ports[1:2] if carried else arena.ports[:2]
    for port in ports:
        arena.listener(port, carriers / "output")
    found = {
        each.process.argv[-len(words) :]: each.process.pid
        for each in servers.find_servers(this_system().process_table(()))
    }
    return Scene(group, found.get(tuple(words)))


def _pids(program: str) -> set[int]:
    return {
        process.pid for process in this_system().process_table(()).processes.values() if process.argv[:1] == (program,)
    }
