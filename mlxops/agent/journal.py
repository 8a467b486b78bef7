"""The record of one operation: its request, its events, and whether its worker lives. Kept on the host, so that
an operation outlives the connection that asked for it, and anybody can follow it.

    ops/<id>/request.json   as it was asked
    ops/<id>/events.jsonl   one event a line, appended by the worker
    ops/<id>/lock           held by the worker for as long as it lives
    ops/<id>/cancel         made by who wants it to end
    ops/<id>/stderr         what the worker's libraries print
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlxops.core.errors import Bug, MlxopsError, Refused
from mlxops.core.protocol import Done, Event, Failed, Request, decode_event, decode_request, encode_event

KEPT = 200
"""Operations whose records are kept."""
POLL_SECONDS = 0.015
PATIENT_POLL_SECONDS = 0.1
"""After a few seconds without news: a download of an hour is not worth a core's attention."""
PATIENT_AFTER_SECONDS = 3.0
_ID = re.compile(r"[0-9]{8}T[0-9]{6}-[0-9a-f]{6}")


@dataclass(frozen=True)
class Journal:
    folder: Path

    @property
    def id(self) -> str:
        return self.folder.name

    def request(self) -> Request:
        return decode_request((self.folder / "request.json").read_bytes())

    # The worker's side

    def hold(self) -> int:
        """Take the lock that says that the worker lives. Raises `BlockingIOError` if another worker has it."""
        fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return fd

    def emitter(self) -> Callable[[Event], None]:
        fd = os.open(self.folder / "events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

        def emit(event: Event) -> None:
            # A full disk must not end an operation because its diary cannot be kept.
            with contextlib.suppress(OSError):
                os.write(fd, (encode_event(event) + "\n").encode())
                if isinstance(event, Done | Failed):
                    os.fsync(fd)

        return emit

    @property
    def cancelled(self) -> bool:
        return (self.folder / "cancel").exists()

    # Everybody else's

    def cancel(self) -> None:
        (self.folder / "cancel").touch(mode=0o600)

    def alive(self) -> bool:
        """Whether its worker holds the lock."""
        try:
            fd = os.open(self.folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def follow(self, starting: Callable[[], bool] = lambda: False) -> Iterator[Event | None]:
        """Its events from the first one to the last, as they come; None while there is nothing to tell.

        `starting` says that a worker that does not hold its lock yet is about to. A worker that ended without a
        last word is told as a `Failed`.
        """
        rest = b""
        position = 0
        news = time.monotonic()
        while True:
            # Asked before reading: what a worker wrote before it ended is then never missed.
            alive = starting() or self.alive()
            data = self._read_from(position)
            position += len(data)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                event = decode_event(line.decode(errors="replace"))
                if event is not None:
                    yield event
                if isinstance(event, Done | Failed):
                    return
            if not alive and not data:
                yield Failed(self._ended_silently())
                return
            news = time.monotonic() if data else news
            yield None
            patient = time.monotonic() - news > PATIENT_AFTER_SECONDS
            time.sleep(PATIENT_POLL_SECONDS if patient else POLL_SECONDS)

    def _read_from(self, position: int) -> bytes:
        try:
            with open(self.folder / "events.jsonl", "rb") as file:
                file.seek(position)
                return file.read()
        except FileNotFoundError:
            return b""

    def _ended_silently(self) -> MlxopsError:
        with contextlib.suppress(OSError):
            last = (self.folder / "stderr").read_text(errors="replace").strip()[-2000:]
            if last:
                return Bug("worker_failed", f"operation {self.id} ended without a result", why=last.splitlines()[-1])
        return Refused(
            "operation_interrupted",
            f"operation {self.id} was interrupted",
            why="its worker was killed, or the host went down",
            hint="see what it left: mlxctl status; then ask for the same thing again",
        )


def create(ops: Path, request: Request) -> Journal:
    """A new operation's record. Raises `OSError`."""
    _prune(ops)
    folder = ops / f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
    folder.mkdir(mode=0o700)
    fd = os.open(folder / "request.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(request.encode())
    return Journal(folder)


def named(ops: Path, operation: str) -> Journal | None:
    """The record of an operation by its id; None if there is none, or if that is no id."""
    folder = ops / operation
    return Journal(folder) if _ID.fullmatch(operation) and folder.is_dir() else None


def _prune(ops: Path) -> None:
    """The oldest records beyond the number that is kept go, unless their worker lives."""
    known = sorted(path for path in ops.iterdir() if _ID.fullmatch(path.name))
    for folder in known[: max(0, len(known) - KEPT + 1)]:
        if not Journal(folder).alive():
            shutil.rmtree(folder, ignore_errors=True)
