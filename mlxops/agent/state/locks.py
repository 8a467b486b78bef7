"""flock(2) with a time limit: a process that hangs while it holds a lock must not block the others without end."""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlxops.core.errors import Busy

LOCK_SECONDS = 10.0
"""Limit of the wait for a lock that other processes hold for milliseconds."""
PROBE_SECONDS = 0.25
"""Limit of the wait for a lock that a worker holds for long. A process that only probes the lock holds it for
microseconds; this wait outlasts such a probe."""
ANSWER_SECONDS = 10.0
"""Limit of one flock(2) call. If the lock service of a network file system is down, the call never returns, although
files can be read."""

_NO_LOCKS = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.ENOSYS, errno.EBADF})
"""Linux NFS returns EBADF for a folder: its exclusive locks need a writable descriptor."""
_responsive_devices: set[int] = set()
"""Devices on which a flock(2) call of this process has returned."""


class NoLocks(OSError):
    """The file system has no flock(2), or its lock service does not respond."""


def try_flock(fd: int, *, shared: bool = False) -> bool:
    """Take the lock if it is free. Raises `OSError`; its subclass `NoLocks` if the file system has no locks."""
    try:
        _flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS | {errno.ETIMEDOUT}:
            raise
        why = "the lock service of this file system does not respond" if error.errno == errno.ETIMEDOUT else NO_LOCKS
        raise NoLocks(errno.ENOLCK, f"{why} (flock: {error.strerror})") from None
    return True


@contextmanager
def add_path(path: str | Path) -> Iterator[None]:
    """Add the path to a `NoLocks` that the block raises."""
    try:
        yield
    except NoLocks as error:
        error.filename = str(path)
        raise


NO_LOCKS = "this file system has no locks"


def _flock(fd: int, operation: int) -> None:
    device = os.fstat(fd).st_dev
    if device not in _responsive_devices:
        _flock_in_thread(fd, operation)
        _responsive_devices.add(device)
        return
    fcntl.flock(fd, operation)


def _flock_in_thread(fd: int, operation: int) -> None:
    """Lock in a thread: a call that waits for a lock service cannot be interrupted. Raises `OSError`."""
    # Use a second descriptor: if the call returns too late, closing it releases the lock, and `fd` may be another file.
    own = os.dup(fd)

    def lock() -> None:
        try:
            fcntl.flock(own, operation)
        finally:
            os.close(own)

    _call_within(ANSWER_SECONDS, lock)


def _call_within(seconds: float, call: Callable[[], None]) -> None:
    """Run `call` in a thread. Raises its exception, or `TimeoutError`."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            failed.append(error)

    thread = threading.Thread(target=run, name="flock", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(errno.ETIMEDOUT, f"no answer within {seconds:.0f} s")
    if failed:
        raise failed[0]


def flock_within(fd: int, seconds: float = PROBE_SECONDS, *, shared: bool = False) -> bool:
    """Take the lock within `seconds`. Raises what `try_flock` raises."""
    deadline = time.monotonic() + seconds
    while not try_flock(fd, shared=shared):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def take_or_close(fd: int, path: Path) -> bool:
    """Take the lock of an open file. Close the file if another process holds the lock, and on any error.

    Waits out processes that only probe the lock. Raises `OSError`.
    """
    try:
        with add_path(path):
            taken = flock_within(fd)
    except BaseException:
        os.close(fd)
        raise
    if not taken:
        os.close(fd)
    return taken


def is_locked(path: Path) -> bool:
    """Return whether the lock of a file is held. Raises `OSError`.

    A missing file is not locked. On a file system without locks the answer is unknown and counts as held.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not try_flock(fd)
    except NoLocks:
        return True
    finally:
        os.close(fd)


@contextmanager
def folder_lock(folder: Path, name: str) -> Iterator[None]:
    """Hold a folder's lock for milliseconds. Raises `Busy` (registry_locked, settings_locked, operations_locked,
    logs_locked) and `OSError`; its subclass `NoLocks` if the file system has no locks."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with add_path(folder):
            free = flock_within(fd, LOCK_SECONDS)
        if not free:
            raise Busy(
                f"{name}_locked",
                f"another program holds the lock of the {name}",
                why=f"it has been held for {LOCK_SECONDS:.0f} s; a transaction takes milliseconds",
                hint=f"find it on the host: lsof {shlex.quote(str(folder))}",
            )
        yield
    finally:
        os.close(fd)
