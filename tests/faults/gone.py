"""Registries that disappear, or that cannot be locked, while a server runs."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path

from mlxops.agent.state import locks
from tests.faults import oracle
from tests.faults.arena import Arena, entry
from tests.lab.quick import MODELS

Undo = Callable[[], object]


def trial(arena: Arena, number: int, seed: int) -> tuple[str, list[str]]:
    """While the disk is gone, no command changes, stops or starts anything, and none reports an empty registry. After
    its return, everything is as before."""
    rng = random.Random(f"{seed} gone {number}")
    arena.sweep()
    arena.write_registry({name: entry(name, arena.snapshots[name]) for name in MODELS})
    loaded = arena.run("load", model="org/alpha", port=str(arena.ports[0]))
    if loaded.exit != 0:
        return "load", [f"load failed: {loaded}"]
    kind = KINDS[number % len(KINDS)]
    before, servers = arena.registry(), arena.servers()
    undo = kind(arena, rng)
    wrong: list[str] = []
    try:
        for command, args in _commands(arena, rng):
            at = _entries(arena.hub)
            ended = arena.run(command, _without_locks(arena) if kind is _unlockable else lambda: None, **args)
            wrong += oracle.no_bug(ended)
            wrong += [f"{command} went on: {ended}"] if ended.exit != 3 else []
            wrong += [f"{command} wrote beside it"] if _entries(arena.hub) != at else []
            wrong += [f"{command} touched the server"] if arena.servers() != servers else []
        if kind is not _unlockable:
            wrong += [] if arena.look("list")["unusable"] else ["list took it for empty"]
            wrong += [] if "registry_missing" in oracle.drift_codes(arena) else ["status does not miss it"]
    finally:
        undo()
    wrong += [] if arena.registry() == before else ["it is not what it was"]
    wrong += [f"drift: {code}" for code in oracle.drift_codes(arena)]
    ended = arena.run("unload", port=str(arena.ports[0]))
    wrong += [f"it cannot be unloaded: {ended}"] if ended.exit != 0 else []
    return kind.__name__.strip("_"), wrong + oracle.locks_free(arena) + oracle.nothing_hidden(arena)


def _commands(arena: Arena, rng: random.Random) -> list[tuple[str, Mapping[str, object]]]:
    port, other = map(str, arena.ports[:2])
    every: list[tuple[str, Mapping[str, object]]] = [
        ("init", {}),
        ("load", {"model": "org/beta", "port": port, "force": True}),
        ("load", {"model": "org/beta", "port": other}),
        ("unload", {"port": port}),
        ("reconcile", {}),
        ("restore", {}),
    ]
    rng.shuffle(every)
    return every


def _entries(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def _moved(arena: Arena, to: Path) -> Undo:
    arena.registry_path.rename(to)
    return lambda: to.replace(arena.registry_path)


def _deleted(arena: Arena, rng: random.Random) -> Undo:
    return _moved(arena, arena.folder / "kept.json")


def _renamed(arena: Arena, rng: random.Random) -> Undo:
    names = (".registry.json.icloud", "registry 2.json", "registry (conflicted copy).json", "registry.json.bak")
    return _moved(arena, arena.hub / rng.choice(names))


def _dangling(arena: Arena, rng: random.Random) -> Undo:
    undo = _moved(arena, arena.folder / "kept.json")
    arena.registry_path.symlink_to(arena.folder / rng.choice(["disk/mlx/registry.json", "disk.json"]))
    return undo


def _unlockable(arena: Arena, rng: random.Random) -> Undo:
    return lambda: None


def _without_locks(arena: Arena) -> Callable[[], None]:
    """In the worker, let flock(2) on the registry's folder fail as on SMB and NFS."""

    def fault() -> None:
        real = fcntl.flock

        def flock(fd: int, operation: int) -> None:
            if os.path.samestat(os.fstat(fd), os.stat(arena.hub)):
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
            real(fd, operation)

        fcntl.flock = flock  # type: ignore[assignment]  # ours asks with descriptors only
        locks._responsive_devices.clear()

    return fault


KINDS: tuple[Callable[[Arena, random.Random], Undo], ...] = (_deleted, _renamed, _dangling, _unlockable)
