"""Files that anybody may have put where mlxops looks: opened without waiting, read with a limit.

A named pipe in the place of a file blocks the process that opens it; a device such as /dev/zero has no end.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TypeGuard


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


def is_folder(path: str | Path) -> bool:
    """Whether the path is a folder. Raises `OSError` if that cannot be seen: a folder above it may not be entered, or
    its file system does not answer. (`Path.is_dir` raises or returns False, depending on Python's version.)"""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        raise


_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})


def dangles(path: str | Path) -> bool:
    """Whether a path is a link whose target is not there, such as one to a disk that is not mounted.

    False if that cannot be seen, because a folder on the way may not be entered.
    """
    if not os.path.islink(path):
        return False
    try:
        os.stat(path)
    except OSError as error:
        return error.errno in _ABSENT
    return False


def dangling_link(path: Path) -> Path | None:
    """Return the dangling link that a path is, or that leads to it; None if there is none."""
    return next((each for each in (path, *path.parents) if dangles(each)), None)


_HOST_FAULTS = frozenset(
    {errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH}
    | {errno.ETIMEDOUT, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOLCK, errno.ENXIO, errno.ENODEV, errno.EDEADLK}
)


def is_hosts_fault(error: BaseException) -> TypeGuard[OSError]:
    """Whether an error about a file comes from the host's disks or permissions, not from a bug in mlxops."""
    return isinstance(error, OSError) and error.errno in _HOST_FAULTS and isinstance(error.filename, str | bytes)


def said(error: OSError) -> str:
    """Return the system's reason, after the path if the error has one."""
    words = error.strerror or str(error)
    path = error.filename2 or error.filename
    return f"{os.fsdecode(path)}: {words}" if isinstance(path, str | bytes) else words


def remedy(error: OSError) -> str | None:
    """Return what helps against an error; None if that is not known."""
    path = error.filename2 or error.filename
    name = shlex.quote(os.fsdecode(path)) if isinstance(path, str | bytes) else ""
    look = f"look at it: ls -lde {name}" if sys.platform == "darwin" else f"look at it: namei -l {name}"
    match error.errno:
        case errno.EPERM if name and sys.platform == "darwin":
            return (
                "on a Mac, allow full disk access for remote users (System Settings > Sharing > Remote Login),"
                " or for the terminal (Privacy & Security > Full Disk Access); a locked file: chflags nouchg " + name
            )
        case errno.EPERM if name:
            return f"{look}; perhaps it is immutable: lsattr -d {name}"
        case errno.EACCES if name:
            return f"give this account access to it; {look}"
        case errno.ESTALE:
            return "remount its network disk on the host, then try again"
        case errno.EROFS:
            return "its disk is mounted read-only: mount it writable, or put it elsewhere in hosts.yaml"
        case errno.ENOSPC | errno.EDQUOT:
            return "free space on its disk, then try again"
    return None


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
