"""Open files without blocking, read them with a limit, and explain errors.

Other programs may put anything at a path that mlxops reads. Opening a named pipe blocks until a process writes to it; a
device such as /dev/zero has no end.
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
    """The path is not a regular file, or the file is too long to be one of ours. So no process of ours uses it."""


_NOT_FILES = frozenset({errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV})
"""A folder, a loop of links; a socket or a pipe without a reader; a missing device."""


def open_file(path: str | Path, flags: int = os.O_RDONLY, mode: int = 0o600) -> int:
    """Return a descriptor of a regular file. Child processes do not inherit it.

    Raises `OSError`, and its subclass `Unfit` if the path is not a regular file.
    """
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, mode)
    except OSError as error:
        if error.errno not in _NOT_FILES:
            raise
        raise _not_a_file(path) from None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise _not_a_file(path)


def _not_a_file(path: str | Path) -> Unfit:
    return Unfit(errno.EINVAL, "is not a file", str(path))


def read(path: str | Path, limit: int) -> bytes:
    """Return the content of a regular file. Raises `OSError`, and `Unfit` if it is longer than `limit` bytes."""
    descriptor = open_file(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise Unfit(errno.EFBIG, f"has {size} bytes, more than any real one", str(path))
        return os.read(descriptor, size)
    finally:
        os.close(descriptor)


def read_start(path: str | Path, size: int) -> bytes:
    """Return the first `size` bytes of a regular file, or all of them. /dev/null is an empty file. Raises `OSError`.

    Files of /proc, whose size is unknown, are read as well.
    """
    try:
        descriptor = open_file(path)
    except Unfit:
        if os.path.realpath(path) == os.devnull:
            return b""
        raise
    with open(descriptor, "rb") as stream:
        return stream.read(size)


def read_end(path: str | Path, size: int) -> bytes:
    """Return the last `size` bytes of a regular file, or all of them. Raises `OSError`."""
    descriptor = open_file(path)
    try:
        length = os.fstat(descriptor).st_size
        return os.pread(descriptor, size, max(0, length - size))
    finally:
        os.close(descriptor)


def write_privately(path: Path, data: bytes) -> None:
    """Write a file that only its user may read. Its old content stays if the write fails. Raises `OSError`.

    What cannot be replaced is written to: a link, a device such as /dev/stdout, a file in a closed folder.
    """
    import tempfile

    is_new = not os.path.lexists(path)
    if path.is_symlink() or not (is_new or path.is_file()) or not os.access(path.parent, os.W_OK):
        path.write_bytes(data)
        return
    fd, new = tempfile.mkstemp(prefix=".mlxops-", dir=path.parent)
    try:
        with open(fd, "wb") as file:
            file.write(data)
        os.replace(new, path)
    except BaseException:
        os.unlink(new)
        raise


def is_folder(path: str | Path) -> bool:
    """Return whether the path is a folder. Raises `OSError` if the system does not say: a folder above it is closed to
    this account, or its file system does not respond. (`Path.is_dir` raises or returns False: it depends on Python's
    version.)"""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        raise


_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})


def dangles(path: str | Path) -> bool:
    """Return whether a path is a link whose target is missing, such as a link to an unmounted disk.

    False if the target cannot be checked because a folder on the way is closed to this account.
    """
    if not os.path.islink(path):
        return False
    try:
        os.stat(path)
    except OSError as error:
        return error.errno in _ABSENT
    return False


def dangling_link(path: Path) -> Path | None:
    """Return the path itself, or the parent folder of it, that is a dangling link; None if there is none."""
    return next((each for each in (path, *path.parents) if dangles(each)), None)


_HOST_FAULTS = frozenset(
    {errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH}
    | {errno.ETIMEDOUT, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOLCK, errno.ENXIO, errno.ENODEV, errno.EDEADLK}
)


def is_hosts_fault(error: BaseException) -> TypeGuard[OSError]:
    """Return whether an error about a file comes from the host's disks or permissions, and not from a bug in mlxops."""
    return isinstance(error, OSError) and error.errno in _HOST_FAULTS and isinstance(error.filename, str | bytes)


def describe_error(error: OSError) -> str:
    """Return `PATH: REASON`, or the reason alone if the error has no path."""
    reason = error.strerror or str(error)
    path = error.filename2 or error.filename
    return f"{os.fsdecode(path)}: {reason}" if isinstance(path, str | bytes) else reason


def remedy(error: OSError) -> str | None:
    """Return what to do about an error; None if there is no advice."""
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
