"""The record of one operation: its request, its events, and whether its worker lives. Kept on the host, so that
an operation outlives the connection that asked for it, and anybody can follow it.

    ops/<id>/request.json   as it was asked
    ops/<id>/events.jsonl   one event a line, appended by the worker
    ops/<id>/lock           held by the worker for as long as it lives
    ops/<id>/cancel         made by who wants it to end, taken away by the worker that has heard it
    ops/<id>/without-<port> made by who wants it to leave that port alone; of a restore
    ops/<id>/stderr         what the worker's libraries print
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mlxops.agent.state.durable_files import flush
from mlxops.agent.state.locks import alone, naming, take_or_close, try_flock
from mlxops.agent.state.store import state_unreadable
from mlxops.common import files
from mlxops.common.files import Unfit
from mlxops.core.errors import Bug, MlxopsError, Refused
from mlxops.core.protocol import (
    MAX_LINE,
    PROTOCOL,
    Done,
    Event,
    Failed,
    Phase,
    Progress,
    Request,
    decode_event,
    decode_request,
    encode_event,
)

MAX_REQUEST = 8 * 1024 * 1024
"""Bytes, encoded: the longest that an agent accepts has an eighth of it."""
KEPT = 200
"""Operations whose records are kept."""
POLL_SECONDS = 0.015
PATIENT_POLL_SECONDS = 0.1
"""After a few seconds without news: a download of an hour is not worth a core's attention."""
PATIENT_AFTER_SECONDS = 3.0
ACTIVITY_BYTES = 65536
"""How much of a record's end tells where the operation is: some hundred events."""
_ENDS = tuple(f'{{"mlxops":{PROTOCOL},"event":"{event}"'.encode() for event in ("done", "failed"))
_seen_ended: set[Path] = set()
_ID = re.compile(r"[0-9]{8}T[0-9]{6}-[0-9a-f]{6,8}")


@dataclass(frozen=True)
class OperationState:
    """Where an operation is: its latest phase, the bytes of it, and how it ended."""

    phase: Phase | None = None
    progress: Progress | None = None
    final: Done | Failed | None = None

    def __str__(self) -> str:
        if self.progress is not None:
            return f"{self.progress.name} {self.progress}"
        return f"{self.phase.name}: {self.phase.message}" if self.phase else ""


@dataclass(frozen=True)
class OperationLog:
    folder: Path

    @property
    def id(self) -> str:
        return self.folder.name

    def request(self) -> Request:
        """What was asked. Raises `OSError`; `ValueError` if the record does not say."""
        return decode_request(files.read(self.folder / "request.json", MAX_REQUEST))

    # The worker's side

    def hold(self) -> int:
        """The lock that says that the worker lives, as a descriptor for the worker to inherit: so there is no moment
        at which the operation exists and seems dead. Raises `OSError`; of it `BlockingIOError` if a worker lives."""
        path = self.folder / "lock"
        fd = files.open_file(path, os.O_RDWR | os.O_CREAT)
        if not take_or_close(fd, path):
            raise BlockingIOError(errno.EWOULDBLOCK, "its worker lives", str(self.folder))
        return fd

    def emitter(self) -> Callable[[Event], None]:
        fd = self._open()
        whole = True

        def emit(event: Event) -> None:
            nonlocal whole
            # A full disk must not end an operation because its diary cannot be kept. What got in half is closed by
            # a line's end, so that what follows can be read.
            line = ("" if whole else "\n") + encode_event(event) + "\n"
            whole = False
            with contextlib.suppress(OSError):
                whole = os.write(fd, line.encode()) == len(line)
                if isinstance(event, Done | Failed):
                    flush(fd)

        return emit

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        # A pipe that nobody reads does not make us wait: it is an error.
        return os.open(self.folder / "events.jsonl", flags | os.O_NONBLOCK, 0o600)

    def discard(self) -> None:
        """For an operation that nobody ever worked on: it did not begin, so it was not cut short either."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def append(self, event: Event) -> None:
        """Write an event, the end, for a worker that cannot do it any more; nothing if it can."""
        with contextlib.suppress(OSError), _closing(self.hold()), _closing(self._open()) as fd:
            os.write(fd, f"\n{encode_event(event)}\n".encode())

    @property
    def since(self) -> str:
        """When it was asked for: wall time, UTC. As the id says, which may be no time that there ever was."""
        day, at = self.id[:8], self.id[9:15]
        return f"{day[:4]}-{day[4:6]}-{day[6:]}T{at[:2]}:{at[2:4]}:{at[4:]}Z"

    @property
    def cancelled(self) -> bool:
        """Whether somebody wants it to end, and its worker has not heard that yet."""
        return (self.folder / "cancel").exists()

    def heed(self) -> None:
        """The wish to end was heard."""
        with contextlib.suppress(OSError):
            (self.folder / "cancel").unlink(missing_ok=True)

    @property
    def taken_out(self) -> frozenset[int]:
        """The ports that it is to leave alone."""
        named = (path.name.partition("-")[2] for path in self.folder.glob("without-*"))
        return frozenset(int(port) for port in named if port.isdecimal())

    # Everybody else's

    def cancel(self) -> None:
        (self.folder / "cancel").touch(mode=0o600)

    def take_out(self, port: int) -> None:
        (self.folder / f"without-{port}").touch(mode=0o600)

    def alive(self) -> bool:
        """Whether its worker holds the lock."""
        try:
            fd = files.open_file(self.folder / "lock")
        except (FileNotFoundError, Unfit):
            return False
        try:
            with naming(self.folder / "lock"):
                return not try_flock(fd, shared=True)
        finally:
            os.close(fd)

    @property
    def ended(self) -> bool:
        """Whether its record has an end. Quick, for looking at all of them: the last line's first bytes tell, and who
        has seen an end once does not look for it again."""
        if self.folder not in _seen_ended and self._end().rstrip().rpartition(b"\n")[2].startswith(_ENDS):
            _seen_ended.add(self.folder)
        return self.folder in _seen_ended

    def _end(self) -> bytes:
        """The end of its events: at least the whole last line, which may be a long result."""
        events = self.folder / "events.jsonl"
        try:
            data = files.read_end(events, ACTIVITY_BYTES)
            return data if b"\n" in data.rstrip() else files.read_end(events, 2 * MAX_LINE)
        except (FileNotFoundError, Unfit):
            return b""

    def stand(self) -> OperationState:
        """Where it is, from the end of its record."""
        stand = OperationState()
        for line in self._end().decode(errors="replace").splitlines():
            match decode_event(line):
                case Phase() as phase:
                    stand = OperationState(phase)
                case Progress() as progress:
                    stand = replace(stand, progress=progress)
                case Done() | Failed() as final:
                    stand = replace(stand, final=final)
        return stand

    def follow(self, heard: int = 0) -> Iterator[Event | None]:
        """Its events after the first `heard` to the last, as they come; None while there is nothing to tell.

        A worker that ended without a last word is told as a `Failed`.
        """
        rest = b""
        position = 0
        news = time.monotonic()
        while True:
            # Asked before reading: what a worker wrote before it ended is then never missed.
            alive = self.alive()
            data = self._read_from(position)
            position += len(data)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                event = decode_event(line.decode(errors="replace"))
                if event is None:
                    continue
                if isinstance(event, Done | Failed):
                    yield event
                    return
                if heard > 0:
                    heard -= 1
                else:
                    yield event
            if not alive and not data:
                yield Failed(self._ended_silently())
                return
            news = time.monotonic() if data else news
            yield None
            patient = time.monotonic() - news > PATIENT_AFTER_SECONDS
            time.sleep(PATIENT_POLL_SECONDS if patient else POLL_SECONDS)

    def _read_from(self, position: int) -> bytes:
        try:
            with open(files.open_file(self.folder / "events.jsonl"), "rb") as file:
                file.seek(position)
                return file.read()
        except (FileNotFoundError, Unfit):
            return b""

    def _ended_silently(self) -> MlxopsError:
        with contextlib.suppress(OSError):
            last = files.read_end(self.folder / "stderr", 2000).decode(errors="replace").strip()
            if last:
                return Bug(
                    "worker_failed",
                    f"operation {self.id} ended without a result",
                    why=last.splitlines()[-1],
                    hint=f"report it, with the file {self.folder / 'stderr'} of the host",
                )
        return Refused(
            "operation_interrupted",
            f"operation {self.id} was interrupted",
            why="its worker was killed, the host went down, or its disk takes no more",
            hint="see what it left: mlxctl status; then ask for the same thing again",
        )


def create(ops: Path, request: Request) -> tuple[OperationLog, int | None]:
    """A new operation's record, and its lock for the worker; or the record that the same ticket has already, and
    None. Raises `Busy` (operations_locked), `OSError`."""
    # Two requests with one ticket, from two connections, must not both find it new.
    with alone(ops, "operations"):
        ticket = request.ticket or os.urandom(4).hex()
        for folder in ops.glob(f"*-{ticket}"):
            return OperationLog(folder), None
        _prune(ops)
        folder = ops / f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{ticket}"
        folder.mkdir(mode=0o700)
        journal = OperationLog(folder)
        try:
            return journal, _begun(journal, request)
        except BaseException:
            journal.discard()
            raise


def _begun(journal: OperationLog, request: Request) -> int:
    """Everything that a worker needs in order to be heard: a disk that is full is then told by who still can."""
    lock = journal.hold()  # before all else: what can be read and seems dead is taken for cut short
    try:
        fd = os.open(journal.folder / "request.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(request.encode())
        os.close(journal._open())
    except BaseException:
        os.close(lock)
        raise
    return lock


def named(ops: Path, operation: str) -> OperationLog | None:
    """The record of an operation by its id; None if there is none, or if that is no id."""
    folder = ops / operation
    return OperationLog(folder) if _ID.fullmatch(operation) and folder.is_dir() else None


def stand_of(ops: Path, operation: str) -> OperationState:
    """Where an operation is by its id; an empty stand if that is not known."""
    journal = named(ops, operation)
    return journal.stand() if journal else OperationState()


def recent(ops: Path) -> list[OperationLog]:
    """The records that are kept, the newest first. Raises `Refused` (state_unreadable)."""
    try:
        names = _names(ops)
    except FileNotFoundError:
        return []
    except NotADirectoryError as error:
        raise state_unreadable(ops, error) from None
    alike = Counter(name[:15] for name in names)

    def began(name: str) -> tuple[str, int]:
        """The second is in the name; within one, the file that was written first tells."""
        return name[:15], _written(ops / name / "request.json") if alike[name[:15]] > 1 else 0

    return [OperationLog(ops / name) for name in sorted(names, key=began, reverse=True)]


def _names(ops: Path) -> list[str]:
    """The folders that are called like operations; not what else lies there. Raises `OSError`."""
    with os.scandir(ops) as entries:
        return [each.name for each in entries if _ID.fullmatch(each.name) and each.is_dir(follow_symlinks=False)]


def _written(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def _prune(ops: Path) -> None:
    """The oldest records beyond the number that is kept go, unless their worker lives."""
    known = [ops / name for name in sorted(_names(ops))]
    for folder in known[: max(0, len(known) - KEPT + 1)]:
        if not OperationLog(folder).alive():
            shutil.rmtree(folder, ignore_errors=True)
