"""flock(2), taken with a limit: whoever is stopped, or hangs, with a lock must not make all others wait for ever."""

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
"""How long one waits for what others hold for milliseconds, so this is never a queue."""
LOOK_SECONDS = 0.25
"""The same for a lock that is held for long or, by those who look whether it is held, for microseconds: it tells the
two apart."""
ANSWER_SECONDS = 10.0
"""How long the system may take to say whether a lock is free. A network file system whose lock service is down never
answers, although its files can be read."""

_NO_LOCKS = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.ENOSYS, errno.EBADF})
"""Linux's NFS answers EBADF for a folder: its exclusive locks need a descriptor that can be written."""
_answering: set[int] = set()
"""The devices whose locks this process has seen to answer."""


class NoLocks(OSError):
    """The file system has no flock(2), or its lock service does not answer."""


def try_flock(fd: int, *, shared: bool = False) -> bool:
    """Take the lock if it is free. Raises `OSError`; its subclass `NoLocks` if the file system has no locks."""
    try:
        _flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS | {errno.ETIMEDOUT}:
            raise
        why = "the locks of this file system do not answer" if error.errno == errno.ETIMEDOUT else NO_LOCKS
        raise NoLocks(errno.ENOLCK, f"{why} (flock: {error.strerror})") from None
    return True


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add the path to a `NoLocks`."""
    try:
        yield
    except NoLocks as error:
        error.filename = str(path)
        raise


NO_LOCKS = "this file system has no locks"


def _flock(fd: int, operation: int) -> None:
    device = os.fstat(fd).st_dev
    if device not in _answering:
        _first_flock(fd, operation)
        _answering.add(device)
        return
    fcntl.flock(fd, operation)


def _first_flock(fd: int, operation: int) -> None:
    """Lock in a thread, because a call that waits for a lock service cannot be interrupted. Raises `OSError`."""
    # A second descriptor: if the lock comes too late, closing it gives the lock back. `fd` may then be another file.
    own = os.dup(fd)

    def lock() -> None:
        try:
            fcntl.flock(own, operation)
        finally:
            os.close(own)

    _within(ANSWER_SECONDS, lock)


def _within(seconds: float, call: Callable[[], None]) -> None:
    """Call in a thread. Raises what `call` raises, and `TimeoutError`."""
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


def flock_within(fd: int, seconds: float = LOOK_SECONDS, *, shared: bool = False) -> bool:
    """Take the lock within `seconds`. Raises what `try_flock` raises."""
    deadline = time.monotonic() + seconds
    while not try_flock(fd, shared=shared):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def take_or_close(fd: int, path: Path) -> bool:
    """Take the lock of an open file, for long. Close the file if another process holds the lock, and on any error.

    Processes that only look whether it is held have it for microseconds. Raises `OSError`.
    """
    try:
        with naming(path):
            taken = flock_within(fd)
    except BaseException:
        os.close(fd)
        raise
    if not taken:
        os.close(fd)
    return taken


def is_locked(path: Path) -> bool:
    """Whether the lock of a file is held: False for a missing file, True where there are no locks. Raises `OSError`."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not try_flock(fd)
    except NoLocks:
        return True  # not known, so it counts as held
    finally:
        os.close(fd)


@contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder's lock, for milliseconds. Raises `Busy` (registry_locked, settings_locked, operations_locked,
    logs_locked) and `OSError`, of it `NoLocks`."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with naming(folder):
            free = flock_within(fd, LOCK_SECONDS)
        if not free:
            raise Busy(
                f"{what}_locked",
                f"another program holds the lock of the {what}",
                why=f"it has been held for {LOCK_SECONDS:.0f} s; a transaction takes milliseconds",
                hint=f"find it on the host: lsof {shlex.quote(str(folder))}",
            )
        yield
    finally:
        os.close(fd)
