"""What a test leaves behind: processes, listeners, threads, files. Looked at before and after each one."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil

from tests.lab.world import Process, below, children, descendants, listeners, processes_below

T = TypeVar("T")
_PR_SET_CHILD_SUBREAPER = 36
"""<linux/prctl.h>"""


@dataclass(frozen=True)
class World:
    """What there was at one moment."""

    processes: frozenset[Process]
    ports: frozenset[tuple[str, int]]
    threads: frozenset[threading.Thread]
    files: frozenset[Path]


@dataclass
class Watch:
    """Looks at what belongs to this process, and at the folders that tests must leave as they were.

    `lab`: the folder below which tests start programs. Where orphans cannot be collected (macOS), it is how they
    are found.
    """

    folders: tuple[Path, ...]
    lab: Path | None = None
    _spared: list[Path] = field(default_factory=list)

    def process_table(self) -> World:
        reap_orphans()
        processes = descendants()
        if self.lab is not None and not is_subreaper():
            processes |= processes_below(self.lab)
        for folder in self._spared:
            processes -= below(folder, processes)
        return World(
            frozenset(processes),
            # A child's listener is the child's matter: it is a leaked process, and named as that.
            frozenset((address, port) for address, port, _ in listeners([os.getpid()])),
            frozenset(threading.enumerate()),
            frozenset(self._files()),
        )

    def leaks(self, before: World, patience: float = 5.0) -> list[str]:
        """What is there and was not before, in words. Waits up to `patience` seconds for things to end."""
        deadline = time.monotonic() + patience
        pause = 0.005
        while True:
            found = describe(before, self.process_table())
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(pause)
            pause = min(pause * 2, 0.1)

    @contextmanager
    def spare(self, folder: Path) -> Iterator[None]:
        """Allow processes that belong to `folder` to outlive a test: for a lab that several tests share.

        The caller ends them.
        """
        self._spared.append(folder)
        try:
            yield
        finally:
            self._spared.remove(folder)

    def _files(self) -> Iterator[Path]:
        for folder in self.folders:
            yield from walk(folder)


def describe(before: World, after: World) -> list[str]:
    """The leaks, one sentence each."""
    return [
        *(f"a process: {process}" for process in _sorted(after.processes - before.processes)),
        *(f"a listener: {address}:{port}" for address, port in _sorted(after.ports - before.ports)),
        *(f"a thread: {thread.name}" for thread in _sorted(after.threads - before.threads) if thread.is_alive()),
        *(f"a file: {path}" for path in _sorted(after.files - before.files)),
    ]


def walk(folder: Path) -> Iterator[Path]:
    """Everything below a folder."""
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        yield Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from walk(Path(entry.path))


def become_subreaper() -> None:
    """Make orphaned descendants children of this process, where the system can do that. Then they are all found."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")


def is_subreaper() -> bool:
    return sys.platform == "linux"


def reap_orphans() -> None:
    """Collect the orphans that have ended. No other process waits for them.

    Children that this process started with `subprocess` are left alone: their objects wait for them, and would
    take a status that is gone for a success.
    """
    ended = {pid for pid in children() if _is_zombie(pid)}
    if not ended:
        return
    for pid in ended - {found.pid for found in gc.get_objects() if issubclass(type(found), subprocess.Popen)}:
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            continue


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _sorted(things: Iterable[T]) -> list[T]:
    return sorted(things, key=str)
