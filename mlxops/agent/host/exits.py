"""Wait for the end of processes that are not children of this one: a pidfd on Linux, kqueue on macOS.

Sources: pidfd_open(2), poll(2); kqueue(2), EVFILT_PROC with NOTE_EXIT. Both tell that a process has ended, and not how.
kqueue was not available: the tests check that mypy accepts it for macOS.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import sys
from typing import Protocol


class Exits(Protocol):
    """The processes that are waited for."""

    def watch(self, pid: int) -> bool:
        """Wait for this process, too. Return False if there is none with this pid. Raises `OSError`."""

    def forget(self, pid: int) -> None:
        """Do not wait for it any longer."""

    def wait(self, seconds: float) -> frozenset[int]:
        """Wait until a watched process ends, or until the time is up. Return those that have ended, and forget them."""


if sys.platform == "darwin":

    class KqueueExits:
        def __init__(self) -> None:
            self._queue = select.kqueue()
            self._watched: set[int] = set()

        def watch(self, pid: int) -> bool:
            try:
                self._change(pid, select.KQ_EV_ADD | select.KQ_EV_ONESHOT)
            except (ProcessLookupError, OverflowError):
                return False
            self._watched.add(pid)
            return True

        def forget(self, pid: int) -> None:
            if pid in self._watched:
                self._watched.discard(pid)
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                    self._change(pid, select.KQ_EV_DELETE)

        def wait(self, seconds: float) -> frozenset[int]:
            events = self._queue.control(None, len(self._watched) + 1, seconds)
            ended = frozenset(event.ident for event in events) & self._watched
            self._watched -= ended
            return ended

        def _change(self, pid: int, flags: int) -> None:
            event = select.kevent(pid, select.KQ_FILTER_PROC, flags, select.KQ_NOTE_EXIT)
            self._queue.control([event], 0)

    def process_exits() -> Exits:
        return KqueueExits()

else:
    _A_THREAD = (errno.EINVAL, errno.ENOENT)
    """The number is a thread's now, of any process. Linux 6.9 and later return ENOENT."""

    class PidfdExits:
        def __init__(self) -> None:
            self._poll = select.poll()
            self._descriptors: dict[int, int] = {}

        def watch(self, pid: int) -> bool:
            self.forget(pid)
            try:
                descriptor = os.pidfd_open(pid)
            except (ProcessLookupError, OverflowError):
                return False
            except OSError as error:
                if error.errno in _A_THREAD:
                    return False
                raise
            self._descriptors[pid] = descriptor
            self._poll.register(descriptor, select.POLLIN)
            return True

        def forget(self, pid: int) -> None:
            descriptor = self._descriptors.pop(pid, None)
            if descriptor is not None:
                self._poll.unregister(descriptor)
                os.close(descriptor)

        def wait(self, seconds: float) -> frozenset[int]:
            ready = {descriptor for descriptor, _ in self._poll.poll(seconds * 1000)}
            ended = frozenset(pid for pid, descriptor in self._descriptors.items() if descriptor in ready)
            for pid in ended:
                self.forget(pid)
            return ended

    def process_exits() -> Exits:
        return PidfdExits()
