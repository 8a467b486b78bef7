"""The servers' logs: one file per port with both output streams. Rotate, truncate, read and follow them.

A server's log is opened for appending, so it can be truncated while the server runs: the next write goes to the new
end. `<port>.log` belongs to the current or the last server, `<port>.log.1` to `.3` to the ones before.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from io import FileIO
from pathlib import Path

from mlxops.agent.state.durable_files import list_matching
from mlxops.agent.state.locks import folder_lock
from mlxops.common.files import open_file
from mlxops.core.errors import Busy
from mlxops.core.frozen import dataclass
from mlxops.core.text import clean

KEPT_LOGS = 3
"""How many earlier logs are kept."""
CAP = 64 * 1024 * 1024
"""The size in bytes above which a change on the host truncates a log."""
KEPT_BYTES = 4 * 1024 * 1024
"""How much of the end of a truncated log is kept."""
MAX_LINE_BYTES = 64 * 1024
BLOCK_BYTES = 256 * 1024
"""How much is read at once to find the last lines."""
CHECKSUM_BYTES = 64
"""How many bytes before a mark its checksum covers."""
FOLLOW_POLL_SECONDS = 0.1
_MARK = re.compile(r"[0-9a-f]{1,16}-[0-9a-f]{1,16}-[0-9a-f]{1,8}")


def make_current(new: Path, log: Path) -> None:
    """Rotate the logs, and rename `new` to `log`. Raises `OSError`."""
    rotate(log)
    if log.exists():  # the lock was not released in time; a server that starts is worth more than the log before
        log.replace(previous_log(log))
    new.rename(log)


def rotate(log: Path) -> None:
    """Rename the logs to make room for a new one. Raises `OSError`. If the lock is not released in time, do nothing."""
    with contextlib.suppress(Busy), _logs_lock(log.parent):
        for number in range(KEPT_LOGS, 0, -1):
            older = _numbered(log, number)
            newer = _numbered(log, number - 1)
            if newer.exists():
                newer.replace(older)


def _logs_lock(folder: Path) -> AbstractContextManager[None]:
    """Hold while logs are renamed or truncated. Raises `Busy` (logs_locked), `OSError`."""
    return folder_lock(folder, "logs")


def previous_log(log: Path) -> Path:
    """Return the path of the log before `log`."""
    return _numbered(log, 1)


def _numbered(log: Path, number: int) -> Path:
    return log.with_name(f"{log.name}.{number}") if number else log


def too_big(folder: Path) -> list[tuple[Path, int]]:
    """Return the logs that are larger than `CAP`, with their sizes. Raises `OSError`."""
    sizes = []
    for log in list_matching(folder, "", ".log"):
        # The start of a server may rename it at any moment.
        with contextlib.suppress(FileNotFoundError):
            sizes.append((log, log.lstat().st_size))
    return [(log, size) for log, size in sizes if size > CAP]


def cut(log: Path, cap: int = CAP) -> bool:
    """Copy the end of a log of more than `cap` bytes to `.log.1` and empty the log, while its server runs.

    Only output of the instant between the two is lost. Return False if the log is not that long: another
    process has truncated it, or renamed it for the next server. Raises `Busy` (logs_locked), `OSError`.
    """
    import shutil

    with _logs_lock(log.parent):
        if log.lstat().st_size <= cap:
            return False
        for number in range(KEPT_LOGS, 1, -1):
            if _numbered(log, number - 1).exists():
                _numbered(log, number - 1).replace(_numbered(log, number))
        with open(log, "rb") as source, open(_numbered(log, 1), "wb") as copy:
            os.chmod(copy.fileno(), 0o600)
            source.seek(max(0, source.seek(0, 2) - KEPT_BYTES))
            shutil.copyfileobj(source, copy)
        os.truncate(log, 0)
    return True


@dataclass(frozen=True)
class Mark:
    """A reading position. It stays valid when the log is renamed, and becomes invalid when it is truncated."""

    inode: int
    """Identifies the file after a rename."""
    position: int
    before: int
    """A checksum of the bytes before the position: the log may be truncated, and an inode may be reused."""

    def __str__(self) -> str:
        return f"{self.inode:x}-{self.position:x}-{self.before:x}"


START = Mark(0, 0, 0)
"""The beginning of a log that may not exist yet."""


def parse_mark(text: str) -> Mark | None:
    """Return the mark that `str(mark)` wrote; None if the text is not a mark."""
    if not _MARK.fullmatch(text):
        return None
    return Mark(*(int(part, 16) for part in text.split("-")))


def last_lines(log: Path, count: int) -> Mark:
    """Return the mark at which the last `count` complete lines of a log begin. Raises `FileNotFoundError`."""
    with open(open_file(log), "rb", buffering=0) as file:
        size = start = file.seek(0, 2)
        block, ends = b"", 0
        while start > 0 and ends <= count and size - start < CAP:
            step = min(BLOCK_BYTES, start)
            start -= step
            block = os.pread(file.fileno(), step, start)
            ends += block.count(b"\n")
        if ends > count:
            # The newline before these lines is in the block that was read last.
            start += len(block) - len(block.split(b"\n", ends - count)[-1])
        return _mark_at(file, start)


def _mark_at(file: FileIO, position: int) -> Mark:
    first = max(0, position - CHECKSUM_BYTES)
    before = os.pread(file.fileno(), position - first, first)
    return Mark(os.fstat(file.fileno()).st_ino, position, zlib.crc32(before))


@dataclass(frozen=True)
class Line:
    """A line without control characters, and the mark after it."""

    text: str
    mark: Mark


class _Reader:
    """Reads one log file from a position on."""

    def __init__(self, file: FileIO, position: int = 0) -> None:
        self.file = file
        self._seek(position)

    def _seek(self, position: int) -> None:
        self.file.seek(position)
        self._position = position
        """After the last returned line."""
        self._pending = b""

    def lines(self) -> Iterator[Line]:
        """Yield the complete lines up to the end of the file; a very long line in pieces."""
        if os.fstat(self.file.fileno()).st_size < self._position + len(self._pending):
            self._seek(0)  # truncated: everything in it is new
        while data := self.file.read(MAX_LINE_BYTES):
            *lines, self._pending = (self._pending + data).split(b"\n")
            for line in lines:
                yield self._line(line + b"\n")
            if len(self._pending) > MAX_LINE_BYTES:
                yield from self.rest()

    def rest(self) -> Iterator[Line]:
        """Yield the incomplete last line."""
        pending, self._pending = self._pending, b""
        if pending:
            yield self._line(pending)

    def _line(self, line: bytes) -> Line:
        self._position += len(line)
        return Line(_clean_text(line), _mark_at(self.file, self._position))


def read(log: Path, start: Mark) -> Iterator[Line]:
    """Yield the lines from a mark to the end of the log. Raises `FileNotFoundError`."""
    with open(open_file(log), "rb", buffering=0) as file:
        reader = _Reader(file, start.position)
        yield from reader.lines()
        yield from reader.rest()


def follow(log: Path, start: Mark, idle: Callable[[], None]) -> Iterator[Line]:
    """Yield the lines after a mark without end, across rotations and truncation. The log may not exist yet.

    `idle` is called while there is no new line. Raises `LookupError` if the mark's file or its content is gone.
    """
    reader = _reader_at(log, start)
    while True:
        if reader is None:
            reader = _open_reader(log)
        newer = _next_log(log, reader.file) if reader else None
        has_new_line = False
        # `newer` was found before this reading, so the last lines of the old server are not missed.
        for line in reader.lines() if reader else ():
            has_new_line = True
            yield line
        if reader is not None and newer is not None:
            yield from reader.rest()
            reader.file.close()
            reader = newer
        elif not has_new_line:
            idle()
            time.sleep(FOLLOW_POLL_SECONDS)


def _reader_at(log: Path, start: Mark) -> _Reader | None:
    """Find the file of a mark, which may have been renamed. Return None for `START`."""
    if start == START:
        return None
    for number in range(KEPT_LOGS + 1):
        reader = _open_reader(_numbered(log, number), start.position)
        if reader is not None and _mark_at(reader.file, start.position) == start:
            return reader
        if reader is not None:
            reader.file.close()
    raise LookupError(str(start))


def _next_log(log: Path, file: FileIO) -> _Reader | None:
    """Return the log of the next start after `file`; None if there is none yet."""
    if _is_same(log, file):
        return None
    readers = {
        number: reader
        for number in range(KEPT_LOGS + 1)
        if (reader := _open_reader(_numbered(log, number))) is not None
    }
    current = next((number for number in readers if _is_same(_numbered(log, number), file)), KEPT_LOGS + 1)
    following = max((number for number in readers if number < current), default=None)
    for number, reader in readers.items():
        if number != following:
            reader.file.close()
    return None if following is None else readers[following]


def _is_same(path: Path, file: FileIO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _open_reader(path: Path, position: int = 0) -> _Reader | None:
    try:
        return _Reader(open(open_file(path), "rb", buffering=0), position)
    except FileNotFoundError:
        return None


def _clean_text(line: bytes) -> str:
    return clean(line.decode("utf-8", "replace").rstrip("\r\n"))
