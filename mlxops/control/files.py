"""Files that anybody may have put where we look: opened without waiting, and read with a limit.

A named pipe in the place of a file blocks whoever opens it, and a file that grows has no end.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
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


def ask_program(argv: Sequence[str], timeout: float, limit: int) -> tuple[int, bytes, bytes]:
    """Run a helper program. Return its exit status and the last `limit` bytes of standard output and standard error.

    Files take the output, not pipes: a process that the program leaves behind may hold a pipe open for ever. Raises
    `OSError`, `ValueError` and `subprocess.TimeoutExpired`.
    """
    import subprocess
    import tempfile

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, timeout=timeout, check=False)
        return done.returncode, last_bytes(out, limit), last_bytes(errors, limit)


def last_bytes(stream: IO[bytes], count: int) -> bytes:
    """Of a file that another process writes, and may write without an end."""
    stream.seek(max(0, stream.seek(0, os.SEEK_END) - count))
    return stream.read(count)
