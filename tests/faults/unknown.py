"""Real causes of the state `unknown`: `python -m tests.faults.unknown CAUSE`.

It is its own process, because it uses up its own descriptors, or must not see the processes of others.

Each cause hides a healthy server. `status` must call its port unknown, every command must leave the server, its record
and the registry as they are. When the cause is gone, the server must be ready again.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import psutil  # noqa: F401 - now: nothing can be imported where no descriptor is left

from mlxops.agent.host.system import LinuxSystem, PsutilSystem, System
from mlxops.core.ports import PortView
from mlxops.core.settings import PortRange
from tests.faults import batch
from tests.faults.arena import Arena, Ended, entry

LINUX = LinuxSystem()
COMMANDS: tuple[tuple[str, Mapping[str, object]], ...] = (
    ("reconcile", {}),
    ("unload", {"force": True}),
    ("unload-all", {}),
    ("restore", {}),
    ("load", {"model": "org/alpha", "force": True}),
    ("load", {"model": "org/beta", "force": True}),
    ("remove", {"model": "org/gamma"}),
)
"""All commands that stop, clear, start or delete. If they take a port, they get the unknown one."""


def main(cause: str) -> None:
    if cause == "a listener in another pid namespace":
        _in_another_namespace()
        return
    with batch.own_arena() as arena:
        assert arena.run("init").exit == 0
        CAUSES[cause](arena)


def _in_another_namespace() -> None:
    """The port's listener is outside this pid namespace. It has the same user, but its process is not visible."""
    with batch.own_arena() as arena:
        assert arena.run("init").exit == 0
        port = int(sys.argv[2])
        _move(arena, port)
        why = "its process cannot be seen"
        _stays_unknown(arena, port, why, lambda name, args: arena.run(name, **args))
        # As on macOS, where listeners of others are not in any table: a connect finds it.
        _shows(arena, port, why, PsutilSystem())


def _move(arena: Arena, port: int) -> None:
    """Move the arena's ports to that of the listener outside."""
    arena.address = "127.0.0.1"
    arena.ports = range(port, port + 1)
    arena.settings = replace(arena.settings, bind=arena.address, ports=PortRange(port, port), slots={port: "slot-a"})


def _no_table(arena: Arena) -> None:
    """No descriptor is free for asking the kernel for the listeners.

    A worker that took this for no listeners would clear every assignment.
    """
    port = _loaded(arena)
    options = ("-e", "trace=socket", "-e", "inject=socket:error=EMFILE")
    _untouched(arena, port, lambda name, args: arena.struck(options, arena.folder / "strace", name, **args))
    with _descriptors(0):
        for system in (LINUX, PsutilSystem()):
            _shows(arena, port, "too many open files", system)


def _no_record(arena: Arena) -> None:
    """First the record's disk fails; then the record is not a regular file."""
    port = _loaded(arena)
    path = arena.state / "run" / f"{port}.json"
    options = _failing(str(path), "EIO")
    _untouched(arena, port, lambda name, args: arena.struck(options, arena.folder / "strace", name, **args))
    aside = path.with_name("aside")
    path.rename(aside)
    path.mkdir()
    _shows(arena, port, "is not a file")
    path.rmdir()
    aside.rename(path)
    _ready(arena, port)


def _no_probe(arena: Arena) -> None:
    """The probe of a mute server takes the only free descriptor, so the next server cannot be probed.

    That one is not wedged: a plain load would restart a wedged server.
    """
    mute, port = arena.ports[0], arena.ports[1]
    loaded = arena.run("load", model="org/alpha", port=str(port))
    assert loaded.exit == 0, loaded
    arena.start_by_hand("org/beta", mute, "--fake-act", "mute")
    seen: dict[object, object] = {}
    with _descriptors(1):
        for _ in range(20):  # which of the two probes comes first is the threads' matter
            view = _view(arena, port, LINUX)
            seen[view.state] = view.detail
            if "unknown" in seen:
                break
    assert seen.keys() <= {"unknown", "ready"} and "could not be asked" in str(seen["unknown"]), seen
    _ready(arena, port)


CAUSES: Mapping[str, Callable[[Arena], None]] = {
    "no table of listeners": _no_table,
    "no run record": _no_record,
    "no probe": _no_probe,
}


def _loaded(arena: Arena) -> int:
    port = arena.ports[0]
    loaded = arena.run("load", model="org/alpha", port=str(port))
    assert loaded.exit == 0, loaded
    return port


def _failing(path: str, error: str) -> Sequence[str]:
    """Return strace's options that let an open of `path` fail."""
    return ("-P", path, "-e", "trace=openat", "-e", f"inject=openat:error={error}")


def _untouched(arena: Arena, port: int, run: Callable[[str, Mapping[str, object]], Ended]) -> None:
    before = (arena.servers(), arena.registry(), (arena.state / "run" / f"{port}.json").read_bytes())
    for name, args in COMMANDS:
        ended = run(name, {**args, "port": str(port)} if name in {"load", "unload"} else args)
        assert ended.exit == EXITS.get(name, 0), (name, ended)
        assert ended.exit == 0 or (ended.error is not None and ended.error.code in REFUSALS), (name, ended)
        after = (arena.servers(), arena.registry(), (arena.state / "run" / f"{port}.json").read_bytes())
        assert after == before, (name, ended)
    _ready(arena, port)


EXITS = {"load": 3, "unload": 3, "remove": 3, "restore": 4}
REFUSALS = {"unknown_port", "not_seen", "restore_incomplete"}


def _stays_unknown(arena: Arena, port: int, why: str, run: Callable[[str, Mapping[str, object]], Ended]) -> None:
    arena.write_registry({"org/alpha": _assigned(arena, port), "org/gamma": _assigned(arena, None)})
    before = arena.registry()
    _shows(arena, port, why)
    for name, args in COMMANDS:
        ended = run(name, {**args, "port": str(port)} if name in {"load", "unload"} else args)
        assert ended.exit == EXITS.get(name, 0), (name, ended)
        assert ended.exit == 0 or (ended.error is not None and ended.error.code in REFUSALS), (name, ended)
        assert arena.registry() == before and not arena.servers(), (name, ended)


def _assigned(arena: Arena, port: int | None) -> dict[str, object]:
    name = "org/alpha" if port else "org/gamma"
    return entry(name, arena.snapshots[name], port)


def _view(arena: Arena, port: int, system: System) -> PortView:
    context = replace(arena.context("status"), system=system)
    return context.observe(context.registry()).ports[port]


def _shows(arena: Arena, port: int, why: str, system: System = LINUX) -> None:
    view = _view(arena, port, system)
    assert (view.state, view.owner) == ("unknown", None), view
    assert why in view.detail.lower(), view


def _ready(arena: Arena, port: int) -> None:
    view = _view(arena, port, LINUX)
    assert (view.state, view.owner) == ("ready", "mlxops"), view


@contextmanager
def _descriptors(left: int) -> Iterator[None]:
    """Let this process open only so many more files at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 8, hard))
    try:
        try:
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            for _ in range(left):
                os.close(taken.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.write("nothing was done\n")
