"""Looking at the machine: processes, listeners, and waiting for a condition with a deadline.

psutil where it can see everything without special rights, so that Linux and macOS are looked at in one way.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

from tests.lab.ports import can_bind as can_bind
from tests.lab.ports import free_port as free_port
from tests.lab.ports import free_ports as free_ports
from tests.lab.ports import listening as listening

T = TypeVar("T")
LINUX = sys.platform == "linux"


@dataclass(frozen=True)
class Process:
    """A process that was alive when it was observed. `started` distinguishes it from a later one with the same pid."""

    pid: int
    started: float
    command: str

    def __str__(self) -> str:
        return f"{self.pid} ({self.command})"


def wait_until(condition: Callable[[], T], timeout: float, what: str) -> T:
    """The first true value of `condition`. Raises `TimeoutError` that says what was waited for."""
    deadline = time.monotonic() + timeout
    pause = 0.002
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} s for {what}")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


def alive(process: Process) -> bool:
    """Whether it still runs; a zombie does not."""
    return _seen(process.pid) == process


def children(pid: int | None = None) -> list[int]:
    """Return the pids of a process's children (default: this process's), zombies included."""
    try:
        # psutil looks through all processes: milliseconds, and each test does this four times.
        # proc(5): a list is incomplete if a child ends while it is read. Two equal ones are not.
        previous, pids = None, _listed_children(pid or os.getpid())
        while pids != previous:
            previous, pids = pids, _listed_children(pid or os.getpid())
        return pids
    except FileNotFoundError:
        pass  # not Linux, a kernel without this file, or a process or thread that has just ended
    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.NoSuchProcess:
        return []


def _listed_children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text(encoding="ascii").split()]


def descendants(pid: int | None = None) -> set[Process]:
    """Return the living children of a process (default: this process), their children, and so on."""
    found: set[Process] = set()
    waiting = children(pid)
    while waiting:
        child = waiting.pop()
        if process := _seen(child):
            found.add(process)
            waiting += children(child)
    return found


def processes_below(folder: Path) -> set[Process]:
    """The living processes that belong to a folder: by their working directory, their arguments or their HOME.

    This process and what it descends from are never among them.
    """
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    belongs = _belonging(folder)
    return {seen for pid in psutil.pids() if pid not in spared and belongs(pid) and (seen := _seen(pid))}


def with_variable(name: str, value: str) -> list[int]:
    """Return the pids of the processes that have this variable in their environment."""
    return [pid for pid in psutil.pids() if _environment(pid).get(name) == value]


def below(folder: Path, processes: Iterable[Process]) -> set[Process]:
    """Those of the processes that belong to the folder, in the same sense."""
    belongs = _belonging(folder)
    return {process for process in processes if belongs(process.pid)}


def listeners(pids: Iterable[int]) -> set[tuple[str, int, int]]:
    """The TCP listeners of these processes: (address, port, pid)."""
    found: set[tuple[str, int, int]] = set()
    for pid in pids:
        try:
            for connection in psutil.Process(pid).net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add((connection.laddr.ip, connection.laddr.port, pid))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def end(processes: Iterable[Process]) -> None:
    """Kill them, each only if it is still the one that was seen, and wait until they are gone."""
    doomed = list(processes)
    for process in doomed:
        if alive(process):
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    wait_until(lambda: not any(map(alive, doomed)), 30, f"the end of {', '.join(map(str, doomed))}")


def _seen(pid: int) -> Process | None:
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            if process.status() == psutil.STATUS_ZOMBIE:
                return None
            return Process(pid, process.create_time(), " ".join(_arguments(process)) or process.name())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def _arguments(process: psutil.Process, patience: float = 0.05) -> list[str]:
    """Return the arguments. Empty for an ending process.

    Popen returns when the kernel closes the child's descriptors, a moment before it sets the arguments. So if there are
    none, look again for up to `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while not (arguments := process.cmdline()) and time.monotonic() < deadline:
        time.sleep(0.001)
    return arguments


def _belonging(folder: Path) -> Callable[[int], bool]:
    """Return a function that says whether a pid's process belongs to the folder."""
    top = os.path.realpath(folder)
    # Not that of a neighbour whose name begins in the same way.
    named = re.compile(re.escape(top) + r"(?![\w.-])")

    def inside(path: str | None) -> bool:
        return path is not None and (path == top or path.startswith(top + "/"))

    def belongs(pid: int) -> bool:
        try:
            arguments, cwd = _command(pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            return False
        if not arguments:  # the kernel's own, and zombies
            return False
        return bool(named.search(arguments)) or inside(cwd) or inside(_environment(pid).get("HOME"))

    return belongs


# Each test looks at all processes several times. psutil takes a millisecond for one of them, /proc a tenth of that.


def _command(pid: int) -> tuple[str, str]:
    """Return a process's arguments, separated by NUL, and its working directory. Raises OSError and psutil's errors."""
    if LINUX:
        return os.fsdecode(_proc(pid, "cmdline")), os.readlink(f"/proc/{pid}/cwd")
    process = psutil.Process(pid)
    return "\0".join(process.cmdline()), process.cwd()


def _environment(pid: int) -> dict[str, str]:
    """Return a process's environment; empty if it is gone or hidden."""
    try:
        if LINUX:
            lines = os.fsdecode(_proc(pid, "environ")).split("\0")
            return {name: value for name, _, value in (line.partition("=") for line in lines)}
        return psutil.Process(pid).environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
        return {}


def _proc(pid: int, name: str) -> bytes:
    with open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:
        return file.read()
