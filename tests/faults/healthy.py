"""Scenes that no command may harm: other programs, foreign servers, a registry whose disk is gone.

A trial prepares one scene, runs one command, and checks the scene's conditions.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlxops.core.errors import MlxopsError
from mlxops.core.settings import BootJob
from tests.faults import children, oracle
from tests.faults.arena import UP_SECONDS, Arena, Ended
from tests.lab.quick import MODELS

LABEL = "org.example.boot"
ALLOWED = {0, 3, 4, 75}
"""Exit statuses: done, refused, not everything could be started, busy."""


@dataclass
class Scene:
    """The situation on the arena's first port."""

    alive: dict[str, int] = field(default_factory=dict)
    """The pids of processes that every command must leave alone, by a readable name."""
    spared: dict[str, int] = field(default_factory=dict)
    """Processes that only commands that stop servers may end."""
    neighbours: dict[str, int] = field(default_factory=dict)
    """Processes that only `unload-all` may end."""
    ports: dict[int, tuple[str, str]] = field(default_factory=dict)
    """The state and owner that `status` must show for a port before the command."""
    checks: list[Callable[[], list[str]]] = field(default_factory=list)
    strace: Sequence[str] = ()
    """Faults for the command, as options of strace."""
    writes: bool = True
    """Whether a command may change the registry."""


@dataclass(frozen=True)
class Command:
    name: str
    args: Callable[[Arena], Mapping[str, object]] = lambda arena: {}
    stops: bool = False
    """The command stops a server of mlxops, or one that was started by hand."""
    reads: bool = False


def _port(arena: Arena) -> str:
    return str(arena.ports[0])


COMMANDS = (
    Command("status", reads=True),
    Command("status", lambda arena: {"probe": True}, reads=True),
    Command("list", lambda arena: {"memory": True}, reads=True),
    Command("init"),
    Command("reconcile"),
    Command("restore"),
    Command("load", lambda arena: {"model": "org/alpha", "port": _port(arena)}),
    Command("load", lambda arena: {"model": "org/beta", "port": _port(arena)}),
    Command("load", lambda arena: {"model": "org/beta", "port": _port(arena), "force": True}, stops=True),
    Command("unload", lambda arena: {"port": _port(arena), "force": True}, stops=True),
    Command("unload-all", stops=True),
)


def trial(arena: Arena, number: int, seed: int) -> tuple[str, list[str]]:
    rng = random.Random(f"{seed} healthy {number}")
    kind = SCENES[number % len(SCENES)]
    command = COMMANDS[number // len(SCENES) % len(COMMANDS)]
    arena.sweep()
    settings = arena.settings
    try:
        with ExitStack() as stack:
            scene = kind(arena, rng, stack)
            args = command.args(arena)
            name = f"{kind.__name__.strip('_')}: {command.name} {args or ''}".strip()
            return name, _tried(arena, scene, command, args)
    finally:
        arena.settings = settings


def _tried(arena: Arena, scene: Scene, command: Command, args: Mapping[str, object]) -> list[str]:
    wrong = _shown(arena, scene)
    before = arena.registry()
    if command.reads:
        try:
            arena.look(command.name, **args)
        except MlxopsError:
            pass  # an error in the words of mlxops is an answer
    else:
        if scene.strace:
            ended = arena.struck(scene.strace, arena.folder / "strace", command.name, **args)
        else:
            ended = arena.run(command.name, **args)
        wrong += oracle.no_bug(ended)
        wrong += [] if ended.exit in ALLOWED else [f"an unexpected answer: {ended}"]
        wrong += _truth(command.name, ended)
    children.reap()
    protected = scene.alive | ({} if command.stops else scene.spared)
    protected |= {} if command.name == "unload-all" else scene.neighbours
    wrong += [f"{who} ({pid}) was ended" for who, pid in protected.items() if not children.lives(pid)]
    if not scene.writes and arena.registry() != before:
        wrong.append("the registry was written")
    return wrong + [each for check in scene.checks for each in check()]


def _shown(arena: Arena, scene: Scene) -> list[str]:
    if not scene.ports:
        return []
    rows = oracle.rows_by_port(arena)
    found = {port: (str(rows[port]["state"]), str(rows[port]["owner"])) for port in scene.ports}
    return [] if found == scene.ports else [f"status shows {found}, right is {scene.ports}"]


def _truth(command: str, ended: Ended) -> list[str]:
    """A load that ends with 0 has a ready server."""
    result = ended.result or {}
    if command == "load" and ended.exit == 0 and result.get("state") != "ready":
        return [f"a load ended with 0 and is {result.get('state')}"]
    return []


# Parts of a scene


@contextmanager
def _running(arena: Arena, argv: Sequence[str], **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program in its own session. At the end, stop the whole session."""
    with open(arena.folder / "scene.log", "ab") as log:
        process = subprocess.Popen(  # type: ignore[call-overload]
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, **options
        )
    try:
        yield process
    finally:
        _end_session(process.pid)
        children.wait(process.pid, 10)


def _end_session(session: int) -> None:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(ProcessLookupError):
            if os.getsid(int(name)) == session:
                found.append(int(name))
    children.end(found)


def _listener(arena: Arena, port: int) -> int:
    return arena.listener(port, arena.folder / "scene.log")


def _words(arena: Arena, port: int) -> list[str]:
    """Return a server's command line without the path that marks the arena's own servers."""
    return ["mlx_lm.server", *arena.by_path("org/alpha", port)[1:]]


@contextmanager
def _carrier(arena: Arena, argv: Sequence[str], code: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Python program with exactly this argv: the interpreter uses argv[1] as its script."""
    folder = arena.folder / "carriers"
    folder.mkdir(exist_ok=True)
    (folder / argv[1]).write_text(code, encoding="utf-8")
    # Under another name the interpreter does not find its own library.
    environment = {**os.environ, "PYTHONHOME": sys.base_prefix}
    with _running(arena, argv, executable=sys.executable, cwd=folder, env=environment) as process:
        yield process


# Scenes


def _carried_words(arena: Arena, rng: random.Random, stack: ExitStack) -> Scene:
    """A program with a server's command line among its arguments: ssh, docker exec, watch, tmux."""
    head, script = rng.choice([("ssh", "studio2"), ("docker", "exec"), ("watch", "pgrep"), ("tmux", "new-session")])
    argv = [head, script, *_words(arena, arena.ports[0])]
    process = stack.enter_context(_carrier(arena, argv, "import time\ntime.sleep(300)\n"))
    return Scene(alive={head: process.pid}, ports={arena.ports[0]: ("idle", "None")})


def _terminal(arena: Arena, rng: random.Random, stack: ExitStack) -> Scene:
    """A terminal multiplexer with the server in its own session, and with a second window."""
    code = (
        "import subprocess, sys, time\n"
        "at = sys.argv.index('mlx') + 1\n"
        "subprocess.Popen(sys.argv[at:], start_new_session=True)\n"
        "other = subprocess.Popen(['/bin/sleep', '300'], start_new_session=True)\n"
        "open('window', 'w').write(str(other.pid))\n"
        "time.sleep(300)\n"
    )
    written = arena.folder / "carriers" / "window"
    written.unlink(missing_ok=True)
    argv = ["tmux", "new-session", "-d", "-s", "mlx", *arena.by_path("org/alpha", arena.ports[0])]
    process = stack.enter_context(_carrier(arena, argv, code))
    server = _listener(arena, arena.ports[0])
    stack.callback(_kill, server)
    window = _number_in(written)
    stack.callback(_kill, window)
    return Scene(
        alive={"tmux": process.pid, "the other window": window},
        spared={"the server": server},
        ports={arena.ports[0]: ("ready", "hand")},
    )


def _neighbours(arena: Arena, rng: random.Random, stack: ExitStack) -> Scene:
    """One script that starts several servers: one process group."""
    first, second = arena.ports[0], arena.ports[1]
    lines = [" ".join([*arena.by_path(model, port), "&"]) for model, port in zip(MODELS, (first, second), strict=False)]
    script = arena.folder / "start-all.sh"
    script.write_text("\n".join(["#!/bin/sh", *lines, "wait", ""]), encoding="utf-8")
    process = stack.enter_context(_running(arena, ["/bin/sh", str(script)]))
    one, two = _listener(arena, first), _listener(arena, second)
    return Scene(
        spared={"the server": one, "the script": process.pid},
        neighbours={"the neighbour": two},
        ports={first: ("ready", "hand"), second: ("ready", "hand")},
    )


def _parent(arena: Arena, rng: random.Random, stack: ExitStack) -> Scene:
    """A program with work of its own, such as a notebook, that started the server as its child in its group."""
    code = "import subprocess, sys, time\nsubprocess.Popen(sys.argv[1:])\ntime.sleep(300)\n"
    argv = [sys.executable, "-c", code, *arena.by_path("org/alpha", arena.ports[0])]
    process = stack.enter_context(_running(arena, argv))
    server = _listener(arena, arena.ports[0])
    return Scene(
        alive={"the parent": process.pid}, spared={"the server": server}, ports={arena.ports[0]: ("ready", "hand")}
    )


def _piped(arena: Arena, rng: random.Random, stack: ExitStack) -> Scene:
    """A server whose output goes through a pipe. The reader is in its group, but is not part of the server."""
    line = " ".join([*arena.by_path("org/alpha", arena.ports[0]), "|", "cat", ">", "/dev/null"])
    stack.enter_context(_running(arena, ["/bin/sh", "-c", f"{line}; true"]))
    return Scene(spared={"the server": _listener(arena, arena.ports[0])}, ports={arena.ports[0]: ("ready", "hand")})


def _prefix(arena: Arena, rng: random.Random, stack: ExitStack) -> Scene:
    """A launch command that replaces itself with the engine (`exec`)."""
    folder = arena.folder / "prefixes"
    folder.mkdir(exist_ok=True)
    appends = folder / "appends.sh"
    appends.write_text('#!/bin/sh\nexec "$@" --fake-act ok\n', encoding="utf-8")
    poetry = folder / "poetry"
    poetry.write_text('#!/bin/sh\nshift\nexec "$@"\n', encoding="utf-8")
    for path in (appends, poetry):
        path.chmod(0o755)
    prefix = rng.choice(
        [
            ("/usr/bin/nice", "-n", "10"),
            ("/usr/bin/env", "A=B"),
            ("/usr/bin/env", "-i", "PATH=/usr/bin:/bin"),
            (str(appends),),
            (str(poetry), "run"),
        ]
    )
    arena.settings = replace(arena.settings, launch={"mlx-lm": (*prefix, str(arena.program))})
    port = arena.ports[0]
    arena.run("init")
    loaded = arena.run("load", model="org/alpha", port=str(port))
    wrong = [] if loaded.exit == 0 else [f"the load through {prefix} failed: {loaded}"]
    scene = Scene(ports={port: ("ready", "mlxops")})
    scene.checks.append(lambda: wrong)
    if not wrong:
        scene.spared = {"the server": _listener(arena, port)}
    return scene


def _booted(arena: Arena, rng: random.Random, stack: ExitStack) -> Scene:
    """A boot job of launchd whose script ends in `exec`: only launchd's mark identifies the job."""
    script = arena.folder / "start.sh"
    script.write_text("#!/bin/sh\nexec " + " ".join(arena.by_path("org/alpha", arena.ports[0])) + "\n")
    script.chmod(0o755)
    arena.settings = replace(arena.settings, boot=(BootJob(arena.ports[0], str(script), LABEL),))
    process = stack.enter_context(_running(arena, [str(script)], env={**os.environ, "XPC_SERVICE_NAME": LABEL}))
    _listener(arena, arena.ports[0])
    return Scene(alive={"the boot job's server": process.pid}, ports={arena.ports[0]: ("ready", "boot")})


def _strict(arena: Arena, rng: random.Random, stack: ExitStack) -> Scene:
    """A hand-started server that drops its model on a request with an unknown name."""
    asked = arena.folder / "asked"
    asked.unlink(missing_ok=True)
    if rng.random() < 0.5:
        arena.settings = replace(arena.settings, boot=(BootJob(arena.ports[0], str(arena.folder / "start.sh"), LABEL),))
    environment = {**os.environ, "XPC_SERVICE_NAME": LABEL}
    argv = arena.by_path("org/alpha", arena.ports[0], "--fake-names", str(asked))
    process = stack.enter_context(_running(arena, argv, env=environment))
    _listener(arena, arena.ports[0])

    def under_its_own_name() -> list[str]:
        names = set(asked.read_text().splitlines()) if asked.exists() else set()
        unknown = names - {str(arena.snapshots["org/alpha"]), "default_model"}
        return [f"the server was asked for {sorted(unknown)}, and drops its model for that"] if unknown else []

    return Scene(spared={"the server": process.pid}, checks=[under_its_own_name])


def _away(arena: Arena, rng: random.Random, stack: ExitStack) -> Scene:
    """A registry behind a link to a disk that is unmounted, while its assigned model still serves."""
    disk, away = arena.folder / "disks" / "External", arena.folder / "taken"
    (disk / "mlx").mkdir(parents=True, exist_ok=True)
    real = disk / "mlx" / "registry.json"
    real.write_text('{"version": 1, "models": {}}', encoding="utf-8")
    arena.registry_path.symlink_to(real)

    def back() -> None:
        shutil.rmtree(disk, ignore_errors=True)
        shutil.rmtree(away, ignore_errors=True)
        arena.registry_path.unlink(missing_ok=True)

    stack.callback(back)
    arena.run("init")
    loaded = arena.run("load", model="org/alpha", port=_port(arena))
    assert loaded.exit == 0, loaded
    server = _listener(arena, arena.ports[0])
    kept = real.read_bytes()
    disk.rename(away)

    def untouched() -> list[str]:
        wrong = [f"created where the disk should be: {path}" for path in (disk, real) if os.path.lexists(path)]
        return wrong + ([] if (away / "mlx" / "registry.json").read_bytes() == kept else ["the registry was written"])

    return Scene(spared={"the server": server}, checks=[untouched], writes=False)


def _lockless(arena: Arena, rng: random.Random, stack: ExitStack) -> Scene:
    """A registry on a file system without locks, such as some SMB and NFS mounts."""
    arena.run("init")
    loaded = arena.run("load", model="org/alpha", port=_port(arena))
    assert loaded.exit == 0, loaded
    code = rng.choice(("EOPNOTSUPP", "ENOLCK"))
    return Scene(
        alive={"the server": _listener(arena, arena.ports[0])},
        strace=("-P", str(arena.hub), "-e", "trace=flock", "-e", f"inject=flock:error={code}"),
        writes=False,
    )


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _number_in(path: Path) -> int:
    deadline = time.monotonic() + UP_SECONDS
    while True:
        try:
            return int(path.read_text())
        except (OSError, ValueError):
            assert time.monotonic() < deadline, f"{path} did not come"
            time.sleep(0.005)


SCENES: tuple[Callable[[Arena, random.Random, ExitStack], Scene], ...] = (
    _carried_words,
    _terminal,
    _neighbours,
    _parent,
    _piped,
    _prefix,
    _booted,
    _strict,
    _away,
    _lockless,
)
