"""The servers' logs: one file a port, both streams, appended to. Kept small, and read.

A server is started with its log opened for appending, so a file can be cut under it: what it writes next goes to the
new end. `<port>.log` is the present server's (or the last one's), `<port>.log.1` to `.3` those before.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mlxops.agent.store import named

KEPT = 3
"""Logs of earlier starts."""
CAP = 64 * 1024 * 1024
"""Bytes; a log that is larger is cut when something is changed on the host."""
KEPT_BYTES = 4 * 1024 * 1024
"""What is kept of the end of a log that is cut."""
LONGEST_LINE = 64 * 1024
POLL_SECONDS = 0.1
_TERMINAL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[@-_]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean(text: str) -> str:
    """Text from outside without control characters and terminal escapes."""
    return _TERMINAL.sub("", text)


def rotate(log: Path) -> None:
    """Make place for a new log. Raises `OSError`."""
    for number in range(KEPT, 0, -1):
        older = _numbered(log, number)
        newer = _numbered(log, number - 1)
        if newer.exists():
            newer.replace(older)


def rotated(log: Path) -> Path:
    """What was `log` before it was rotated last."""
    return _numbered(log, 1)


def _numbered(log: Path, number: int) -> Path:
    return log.with_name(f"{log.name}.{number}") if number else log


def too_big(folder: Path) -> list[tuple[Path, int]]:
    """The logs that are over their cap, with their sizes."""
    sizes = [(log, log.stat().st_size) for log in named(folder, "", ".log")]
    return [(log, size) for log, size in sizes if size > CAP]


def cut(log: Path) -> None:
    """Copy the end of a log away and empty it, while its server writes on. What the server writes in the instant
    between the two is lost, and only that. Raises `OSError`."""
    for number in range(KEPT, 1, -1):
        if _numbered(log, number - 1).exists():
            _numbered(log, number - 1).replace(_numbered(log, number))
    with open(log, "rb") as source, open(_numbered(log, 1), "wb") as copy:
        os.chmod(copy.fileno(), 0o600)
        source.seek(max(0, source.seek(0, 2) - KEPT_BYTES))
        shutil.copyfileobj(source, copy)
    os.truncate(log, 0)


@dataclass(frozen=True)
class End:
    """The end of a log: its last whole lines, what follows the last line's end, and where that begins."""

    lines: list[str]
    rest: str
    position: int


def end_of(log: Path, count: int) -> End:
    """With at most `count` lines, made harmless. Raises `FileNotFoundError`."""
    with open(log, "rb") as file:
        size = start = file.seek(0, 2)
        data = b""
        while start > 0 and data.count(b"\n") <= count and size - start < CAP:
            step = min(256 * 1024, start)
            start -= step
            file.seek(start)
            data = file.read(step) + data
    whole, newline, rest = data.rpartition(b"\n")
    lines = whole.split(b"\n")[-count:] if newline and count else []
    return End([_shown(line) for line in lines], _shown(rest), size - len(rest))


def follow(log: Path, position: int, rest: Callable[[], None]) -> Iterator[str]:
    """The lines that come after `position`, for ever: over rotation, over a cut, and from a file that is yet to come.

    `rest` is called while there is nothing to tell.
    """
    file = None
    pending = b""
    while True:
        if file is None:
            file = _open(log, position)
        data = file.read(LONGEST_LINE) if file else b""
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            yield _shown(line)
        if len(pending) > LONGEST_LINE:
            yield _shown(pending)
            pending = b""
        if data:
            continue
        if file is not None and not _is_same(log, file.fileno()):
            # Rotated: what is written to the old one from now on has nobody to read it.
            file.close()
            file, position = None, 0
        elif file is not None and os.fstat(file.fileno()).st_size < file.tell():
            file.seek(0)
        else:
            rest()
            time.sleep(POLL_SECONDS)


def _open(log: Path, position: int) -> BinaryIO | None:
    try:
        file = open(log, "rb")  # noqa: SIM115  # as long as it is followed
    except FileNotFoundError:
        return None
    file.seek(position)
    return file


def _is_same(log: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(log), os.fstat(fd))
    except FileNotFoundError:
        return False


def _shown(line: bytes) -> str:
    return clean(line[:LONGEST_LINE].decode("utf-8", "replace").rstrip("\r"))
