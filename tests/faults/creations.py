"""Faults at the creation of a file: the Nth `open` with O_CREAT of a process.

strace could only count every openat(2), and most of those read /proc, as often as there are processes. The interpreter
raises an audit event before each open, with its flags (PEP 578, event `open`). A process that is killed or fails in the
hook has not reached the kernel.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
import sys
from collections.abc import Callable

Fault = Callable[[], None]


def counted(into: mmap.mmap) -> Fault:
    """Count this process's creations in shared memory. That needs no system call, so no fault can hit it."""

    def count(number: int) -> None:
        into[:8] = number.to_bytes(8, "little")

    return lambda: _at_each(count)


def count_of(shared: mmap.mmap) -> int:
    return int.from_bytes(shared[:8], "little")


def struck(number: int, error: str) -> Fault:
    """Kill the process at the creation with this number; if `error` is not empty, let the creation fail with it."""

    def strike(at: int) -> None:
        if at != number:
            return
        if not error:
            os.kill(os.getpid(), signal.SIGKILL)
        code = getattr(errno, error)
        raise OSError(code, os.strerror(code))

    return lambda: _at_each(strike)


def _at_each(act: Callable[[int], None]) -> None:
    seen = 0

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal seen
        if event == "open" and isinstance(flags := args[2], int) and flags & os.O_CREAT:
            seen += 1
            act(seen)

    sys.addaudithook(hook)
