"""flock(2), taken with a limit: whoever is stopped, or hangs, with a lock must not make all others wait for ever."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlxops.core.errors import Busy

LOCK_SECONDS = 10.0
"""How long one waits for what others hold for milliseconds, so this is never a queue."""
LOOK_SECONDS = 0.25
"""The same for a lock that is held for long or, by those who look whether it is held, for microseconds: it tells the
two apart."""


def try_flock(fd: int, *, shared: bool = False) -> bool:
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def flock_within(fd: int, seconds: float = LOOK_SECONDS, *, shared: bool = False) -> bool:
    deadline = time.monotonic() + seconds
    while not try_flock(fd, shared=shared):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def is_locked(path: Path) -> bool:
    """Whether anybody holds the lock of a file; nobody does of one that is not there. Raises `OSError`."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not try_flock(fd)
    finally:
        os.close(fd)


@contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder's lock, for milliseconds. Raises `Busy` (registry_locked, settings_locked, operations_locked,
    logs_locked) and `OSError`."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not flock_within(fd, LOCK_SECONDS):
            raise Busy(
                f"{what}_locked",
                f"another program holds the lock of the {what}",
                why=f"it has been held for {LOCK_SECONDS:.0f} s; a transaction takes milliseconds",
                hint=f"find it on the host: lsof +D {folder}",
            )
        yield
    finally:
        os.close(fd)
