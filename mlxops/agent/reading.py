"""Files that anybody may have put, or replaced, where we look: opened without waiting and read with a limit.

A named pipe in the place of a file blocks whoever opens it, and a device like /dev/zero has no end.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
import sys
from pathlib import Path
from typing import TypeGuard


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
    """Whether there is a folder. Raises `OSError` where that cannot be told: above it is a folder that may not be
    entered, or a file system that does not answer. (`Path.is_dir` raises or says no, depending on Python's version.)"""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        raise


def leads_nowhere(path: str | Path) -> bool:
    """Whether a path is a link to what is not there. Raises `OSError` where that cannot be told, as `is_folder`."""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
        return os.path.islink(path)
    return False


_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})


_HOST_FAULTS = frozenset(
    {errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH}
    | {errno.ETIMEDOUT, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOLCK, errno.ENXIO, errno.ENODEV, errno.EDEADLK}
)


def is_hosts_fault(error: BaseException) -> TypeGuard[OSError]:
    """Whether an error says that the host's disks or permissions do not allow something, wherever that was."""
    return isinstance(error, OSError) and error.errno in _HOST_FAULTS and isinstance(error.filename, str | bytes)


def said(error: OSError) -> str:
    """What the system said no to, with the path if it names one."""
    words = error.strerror or str(error)
    path = error.filename2 or error.filename
    return f"{os.fsdecode(path)}: {words}" if isinstance(path, str | bytes) else words


def remedy(error: OSError) -> str | None:
    """What helps, for those errors of which that can be told."""
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
            return "mount its network disk anew on the host, then try again"
        case errno.EROFS:
            return "its disk is mounted read-only: mount it writable, or put it elsewhere in hosts.yaml"
        case errno.ENOSPC | errno.EDQUOT:
            return "free space on its disk, then try again"
    return None
