"""Files that anybody may have put, or replaced, where we look: opened without waiting and read with a limit.

A named pipe in the place of a file blocks whoever opens it, and a device like /dev/zero has no end.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


class Unfit(OSError):
    """What is there is no file, or none of the kind that is looked for: nobody can have it open as one either."""


_NO_FILE = frozenset({errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV})
"""A folder, a loop of links; a socket, a pipe that nobody reads, a device that is not there."""


def open_file(path: str | Path, flags: int = os.O_RDONLY, mode: int = 0o600) -> int:
    """A descriptor of a regular file, which no child inherits. Raises `OSError`; of it `Unfit` if it is none."""
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, mode)
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        raise _no_file(path) from None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise _no_file(path)


def _no_file(path: str | Path) -> Unfit:
    return Unfit(errno.EINVAL, "is not a file", str(path))


def read(path: str | Path, limit: int) -> bytes:
    """The bytes of a regular file. Raises `OSError`; of it `Unfit` if it is none, or longer than `limit`."""
    descriptor = open_file(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise Unfit(errno.EFBIG, f"is of {size} bytes, more than any real one", str(path))
        return os.read(descriptor, size)
    finally:
        os.close(descriptor)


def read_end(path: str | Path, size: int) -> bytes:
    """The last `size` bytes of a regular file, or all of them. Raises `OSError`; of it `Unfit` if it is none."""
    descriptor = open_file(path)
    try:
        length = os.fstat(descriptor).st_size
        return os.pread(descriptor, size, max(0, length - size))
    finally:
        os.close(descriptor)
