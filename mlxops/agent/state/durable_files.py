"""Write files so that neither a reader nor a power loss sees half a change, and read them with a limit."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlxops.agent.state.locks import NoLocks
from mlxops.common import files
from mlxops.core import registry

MAX_FILE_BYTES = registry.MAX_BYTES
"""The longest file that is read as a whole. The registry is the largest of them."""


def write_durably(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a file's content atomically and durably: temporary file, flush, rename, flush of the folder.

    A reader sees the old or the new content. After the return, a power loss does not undo the write. Raises `OSError`.
    """
    temporary = temporary_path(path)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            # open(2) applies the umask to the mode. Some file systems (exFAT, SMB) keep no modes.
            with _unless_unsupported():
                os.fchmod(fd, mode)
            _write_all(fd, data)
            flush(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Some file systems cannot flush a folder (SMB, some FUSE ones).
        with _unless_unsupported():
            flush(folder)
    finally:
        os.close(folder)


@contextmanager
def _unless_unsupported() -> Iterator[None]:
    """Ignore errors of file systems that do not support the operation. Raises every other `OSError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


_UNSUPPORTED = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EBADF, errno.EPERM})


def temporary_path(path: Path) -> Path:
    """Return a new name beside `path` for the file that will replace it. The name contains the writer's pid."""
    return path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")


def writer_is_alive(temporary: Path) -> bool:
    """Return whether the process whose pid is in a temporary file's name is alive.

    If another process has got that pid, the answer is True; the file is then found when that process has ended.
    """
    pid = "".join(temporary.name.split(".")[-3:-2])
    if not pid.isdecimal() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # alive, and another user's
    return True


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


_F_FULLFSYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)
"""Only macOS has it. Its fsync(2) leaves the data in the drive's cache."""


def flush(fd: int) -> None:
    """Flush a file or a folder to the disk, so that its content outlives a power loss. Raises `OSError`."""
    try:
        if _F_FULLFSYNC is not None:
            fcntl.fcntl(fd, _F_FULLFSYNC)
            return
    except OSError as error:
        # Network file systems and those of other systems may not support F_FULLFSYNC.
        if error.errno not in {errno.ENOTSUP, errno.EINVAL, errno.ENOTTY}:
            raise
    os.fsync(fd)


def check_replaceable(path: Path) -> None:
    """Check that `write_durably` would succeed, without replacing the file. Raises `OSError`."""
    _check_rename(path)
    probe = temporary_path(path)
    try:
        # Unbuffered: flushing tests the disk only if the data has been written.
        with open(probe, "xb", buffering=0) as file:
            _write_all(file.fileno(), b" " * 4096)
            flush(file.fileno())
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _check_rename(path: Path) -> None:
    """Raise `OSError` if a rename could not replace the path.

    That is so if it is not a regular file, is immutable, or belongs to another user and lies in a sticky folder.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EISDIR, "it is not a file")
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        # A rename can replace a write-protected file, but not an immutable one (EPERM).
        if error.errno == errno.EPERM:
            raise
    folder = os.stat(path.parent)
    if folder.st_mode & stat.S_ISVTX and os.geteuid() not in {0, status.st_uid, folder.st_uid}:
        raise OSError(errno.EPERM, "it is another user's, in a folder in which only owners replace files", str(path))


def write_remedy(error: OSError, path: Path, relocate: str) -> str:
    """Return what to do about a failed write of `path`. `relocate`: how to move the file to another disk."""
    if isinstance(error, NoLocks):
        return relocate
    if error.errno == errno.EISDIR:
        file = shlex.quote(str(path))
        return f"move it away on the host: mv {file} {file}.away; then try again"
    known = files.remedy(with_path(error, path))
    return known or "free disk space or repair the permissions on the host, then try again"


def with_path(error: OSError, path: Path) -> OSError:
    """Return the same error about `path`. The name of a temporary file means nothing to the user."""
    return OSError(error.errno, error.strerror, str(path))


def read_if_exists(path: Path) -> bytes | None:
    """Return a file's content, None if there is no file. Raises `OSError`."""
    try:
        return files.read(path, MAX_FILE_BYTES)
    except FileNotFoundError:
        return None


def parse_object(data: bytes) -> dict[str, object]:
    """Return the JSON object in `data`. Raises `ValueError`."""
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def list_matching(folder: Path, prefix: str, suffix: str = "") -> list[Path]:
    """Return the paths in a folder whose names have this prefix and suffix, sorted; nothing if there is no folder.

    (`glob` compiles each pattern, which takes longer than reading the folder.)
    """
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return [folder / name for name in sorted(names) if name.startswith(prefix) and name.endswith(suffix)]
