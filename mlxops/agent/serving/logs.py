"""The servers' logs: one file a port, both streams, appended to. Kept small, and read.

A server is started with its log opened for appending, so a file can be cut under it: what it writes next goes to the
new end. `<port>.log` is the present server's (or the last one's), `<port>.log.1` to `.3` those before.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from mlxops.agent.state.durable_files import list_matching
from mlxops.agent.state.locks import folder_lock
from mlxops.common.files import open_file
from mlxops.core.errors import Busy
from mlxops.core.text import clean

KEPT = 3
"""Logs of earlier starts."""
CAP = 64 * 1024 * 1024
"""Bytes; a log that is larger is cut when something is changed on the host."""
KEPT_BYTES = 4 * 1024 * 1024
"""What is kept of the end of a log that is cut."""
LONGEST_LINE = 64 * 1024
BLOCK = 256 * 1024
"""Bytes that are read at once where the last lines are looked for."""
CHECKED = 64
"""Bytes before a mark that its checksum is of."""
POLL_SECONDS = 0.1
_MARK = re.compile(r"[0-9a-f]{1,16}-[0-9a-f]{1,16}-[0-9a-f]{1,8}")


def rotate(log: Path) -> None:
    """Make place for a new log; or, where the others do not come to an end with theirs, leave it as it is: the new one
    then begins behind it, which is no reason for a server not to start. Raises `OSError`."""
    with contextlib.suppress(Busy), _alone(log.parent):
        for number in range(KEPT, 0, -1):
            older = _numbered(log, number)
            newer = _numbered(log, number - 1)
            if newer.exists():
                newer.replace(older)


def _alone(folder: Path) -> AbstractContextManager[None]:
    """Logs get other names: not two at once, and not what is being cut. Raises `Busy` (logs_locked), `OSError`."""
    return folder_lock(folder, "logs")


def rotated(log: Path) -> Path:
    """What was `log` before it was rotated last."""
    return _numbered(log, 1)


def _numbered(log: Path, number: int) -> Path:
    return log.with_name(f"{log.name}.{number}") if number else log


def too_big(folder: Path) -> list[tuple[Path, int]]:
    """The logs that are over their cap, with their sizes. Raises `OSError`."""
    found = []
    for log in list_matching(folder, "", ".log"):
        # It gets another name when its port's next server starts, at any moment.
        with contextlib.suppress(FileNotFoundError):
            found.append((log, log.lstat().st_size))
    return [(log, size) for log, size in found if size > CAP]


def cut(log: Path, cap: int = CAP) -> bool:
    """Copy the end of a log of more than `cap` bytes away and empty it, while its server writes on. What the server
    writes in the instant between the two is lost, and only that. Returns whether it was still as long: somebody else
    may have been quicker, or another server's log have its name by now. Raises `Busy` (logs_locked), `OSError`."""
    with _alone(log.parent):
        if log.lstat().st_size <= cap:
            return False
        for number in range(KEPT, 1, -1):
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
    """How far somebody has read: a file by its inode, for it gets another name when the next server starts; a position
    in it; and a checksum of what is before that, for it may be cut, and an inode used again."""

    inode: int
    position: int
    before: int

    def __str__(self) -> str:
        return f"{self.inode:x}-{self.position:x}-{self.before:x}"


START = Mark(0, 0, 0)
"""The beginning of a log that is yet to come."""


def mark(text: str) -> Mark | None:
    """The mark of `str(mark)`; None if the text is none."""
    if not _MARK.fullmatch(text):
        return None
    return Mark(*(int(part, 16) for part in text.split("-")))


def last_lines(log: Path, count: int) -> Mark:
    """Where the last `count` whole lines of a log begin. Raises `FileNotFoundError`."""
    with open(open_file(log), "rb", buffering=0) as file:
        size = start = file.seek(0, 2)
        block, ends = b"", 0
        while start > 0 and ends <= count and size - start < CAP:
            step = min(BLOCK, start)
            start -= step
            block = os.pread(file.fileno(), step, start)
            ends += block.count(b"\n")
        if ends > count:
            # The end of the line before them is in the block that was read last.
            start += len(block) - len(block.split(b"\n", ends - count)[-1])
        return _mark(file, start)


def _mark(file: FileIO, position: int) -> Mark:
    first = max(0, position - CHECKED)
    before = os.pread(file.fileno(), position - first, first)
    return Mark(os.fstat(file.fileno()).st_ino, position, zlib.crc32(before))


@dataclass(frozen=True)
class Read:
    """A line, made harmless, and where reading goes on after it."""

    text: str
    mark: Mark


class _Reader:
    """One log file, read on from a position."""

    def __init__(self, file: FileIO, position: int = 0) -> None:
        self.file = file
        self._go_to(position)

    def _go_to(self, position: int) -> None:
        self.file.seek(position)
        self._position = position
        """Behind the last line that was given out."""
        self._pending = b""

    def lines(self) -> Iterator[Read]:
        """The whole lines that are there by now; a very long one in pieces."""
        if os.fstat(self.file.fileno()).st_size < self.file.tell():
            self._go_to(0)  # cut: what is in it now is all new
        while data := self.file.read(LONGEST_LINE):
            *lines, self._pending = (self._pending + data).split(b"\n")
            for line in lines:
                yield self._given(line + b"\n")
            if len(self._pending) > LONGEST_LINE:
                yield from self.rest()

    def rest(self) -> Iterator[Read]:
        """What follows the last line's end."""
        pending, self._pending = self._pending, b""
        if pending:
            yield self._given(pending)

    def _given(self, line: bytes) -> Read:
        self._position += len(line)
        return Read(_shown(line), _mark(self.file, self._position))


def read(log: Path, start: Mark) -> Iterator[Read]:
    """What a log has from a mark to its end. Raises `FileNotFoundError`."""
    with open(open_file(log), "rb", buffering=0) as file:
        reader = _Reader(file, start.position)
        yield from reader.lines()
        yield from reader.rest()


def follow(log: Path, start: Mark, idle: Callable[[], None]) -> Iterator[Read]:
    """The lines that come after a mark, for ever: over rotations, over a cut, and from a file that is yet to come.

    `idle` is called while there is nothing to tell. Raises `LookupError` if what the mark is in is not there any more.
    """
    reader = _at(log, start)
    while True:
        if reader is None:
            reader = _reader(log)
        newer = _newer(log, reader.file) if reader else None
        told = False
        # Looked for before reading: then what the old server still wrote into the older file is not missed.
        for line in reader.lines() if reader else ():
            told = True
            yield line
        if reader is not None and newer is not None:
            yield from reader.rest()
            reader.file.close()
            reader = newer
        elif not told:
            idle()
            time.sleep(POLL_SECONDS)


def _at(log: Path, start: Mark) -> _Reader | None:
    """The file of a mark, whatever its name is by now."""
    if start == START:
        return None
    for number in range(KEPT + 1):
        reader = _reader(_numbered(log, number), start.position)
        if reader is not None and _mark(reader.file, start.position) == start:
            return reader
        if reader is not None:
            reader.file.close()
    raise LookupError(str(start))


def _newer(log: Path, file: FileIO) -> _Reader | None:
    """The log of the start that came next; None as long as there was none."""
    if _is_same(log, file):
        return None
    files = {number: found for number in range(KEPT + 1) if (found := _reader(_numbered(log, number))) is not None}
    at = next((number for number in files if _is_same(_numbered(log, number), file)), KEPT + 1)
    next_one = max((number for number in files if number < at), default=None)
    for number, each in files.items():
        if number != next_one:
            each.file.close()
    return None if next_one is None else files[next_one]


def _is_same(path: Path, file: FileIO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _reader(path: Path, position: int = 0) -> _Reader | None:
    try:
        return _Reader(open(open_file(path), "rb", buffering=0), position)
    except FileNotFoundError:
        return None


def _shown(line: bytes) -> str:
    return clean(line.decode("utf-8", "replace").rstrip("\r\n"))
