"""Servers that people start under various names, and every command that may send them a request.

No request may use a name that the server does not know: a real mlx-lm would then drop its model.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

from tests.faults import children
from tests.faults.arena import Arena, entry
from tests.lab.quick import MODELS

SNAPSHOT = "{snapshot}"
STARTED = {
    # The words after the program, and the names that it then has.
    "by its path": (["--model", SNAPSHOT], {SNAPSHOT}),
    "by its path with a slash": ([f"--model={SNAPSHOT}/"], {f"{SNAPSHOT}/"}),
    "by a relative path": (["--model", "./link"], {"./link"}),
    "by a link in its folder": (["--model", "link"], {"link"}),
    "under the slot's alias": (["--model", "slot-a"], {"slot-a"}),
    "by its repository": (["--model", MODELS[0]], {MODELS[0]}),
    "by an option cut short": (["--mod", SNAPSHOT], {SNAPSHOT}),
    "twice": (["--model", "other", "--model", SNAPSHOT], {SNAPSHOT}),
    "with an adapter": (["--model", SNAPSHOT, "--adapter-path", "tuned"], set()),
    "without a model": ([], set()),
}
COMMANDS = ("status", "gateway", "load", "load", "load --force on another port", "unload", "restore", "reconcile")


def trial(arena: Arena, number: int, seed: int) -> tuple[str, list[str]]:
    rng = random.Random(f"{seed} names {number}")
    arena.sweep()
    how = list(STARTED)[number % len(STARTED)]
    words, known = STARTED[how]
    snapshot, port, asked = arena.snapshots[MODELS[0]], arena.ports[0], arena.folder / "asked"
    allowed = {name.replace(SNAPSHOT, str(snapshot)) for name in known} | {"default_model"}
    asked.unlink(missing_ok=True)
    assigned = port if rng.random() < 0.5 else None
    arena.write_registry({MODELS[0]: entry(MODELS[0], snapshot, assigned)})
    _start(arena, [word.replace(SNAPSHOT, str(snapshot)) for word in words], asked)
    done = [rng.choice(COMMANDS) for _ in range(3)]
    before = arena.servers().keys()
    for each in ("status", *done):
        _run(arena, each, port)
    names = set(asked.read_text().splitlines()) if asked.exists() else set()
    wrong = [f"it was asked for {name!r}" for name in sorted(names - allowed)]
    if not before <= arena.servers().keys():
        wrong.append("it was stopped")
    return f"started {how}; status, {', '.join(done)}", wrong


def _run(arena: Arena, command: str, port: int) -> None:
    match command:
        case "status":
            arena.look("status", probe=True)
        case "gateway":
            arena.look("gateway")
        case "load":
            arena.run("load", model=MODELS[0], port=str(port))
        case "load --force on another port":
            arena.run("load", model=MODELS[0], port=str(arena.ports[1]), force=True)
        case "unload":
            arena.run("unload", port=str(port))
        case _:
            arena.run(command)


def _start(arena: Arena, words: list[str], asked: Path) -> None:
    folder = arena.folder / "hand"
    folder.mkdir(exist_ok=True)
    for name in ("link", "slot-a"):
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(arena.snapshots[MODELS[0]])
    where = ["--host", arena.address, "--port", str(arena.ports[0]), "--fake-names", str(asked)]
    argv = [str(arena.program), *words, *where]

    def serve() -> int:
        os.chdir(folder)
        os.execv(argv[0], argv)

    children.fork(serve, folder / "log")
    arena.listener(arena.ports[0], folder / "log")
