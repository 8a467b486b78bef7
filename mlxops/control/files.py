"""Files that anybody may have put where we look: opened without waiting, and read with a limit.

A named pipe in the place of a file blocks whoever opens it, and a file that grows has no end.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import IO


def opened(path: Path) -> IO[bytes]:
    """A regular file, or /dev/null, to be read. Raises `OSError`, also for anything else."""
    if os.path.realpath(path) == os.devnull:
        return open(os.devnull, "rb")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return open(descriptor, "rb")


def last_bytes(stream: IO[bytes], count: int) -> bytes:
    """Of a file that another process writes, and may write without an end."""
    stream.seek(max(0, stream.seek(0, os.SEEK_END) - count))
    return stream.read(count)
