"""The record of one operation: its request, its events, and whether its worker is alive.

It is kept on the host, so that an operation outlives the connection that requested it, and any client can follow it.

    ops/<id>/request.json   the request
    ops/<id>/events.jsonl   one event per line, appended by the worker
    ops/<id>/lock           held by the worker while it lives
    ops/<id>/cancel         created by a client to cancel the operation, removed by the worker when it reacts
    ops/<id>/without-<port> created by a client to exclude a port from a restore
    ops/<id>/stderr         output of the worker's libraries
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mlxops.agent.state.durable_files import flush
from mlxops.agent.state.locks import add_path, folder_lock, take_or_close, try_flock
from mlxops.agent.state.store import state_unreadable
from mlxops.common import files
from mlxops.common.files import Unfit
from mlxops.core.errors import Bug, MlxopsError, Refused
from mlxops.core.frozen import dataclass
from mlxops.core.protocol import (
    MAX_LINE,
    PROTOCOL,
    Done,
    Envelope,
    Event,
    Failed,
    Phase,
    Progress,
    decode_envelope,
    decode_event,
    encode_event,
)

MAX_REQUEST_BYTES = 8 * 1024 * 1024
"""Limit of an encoded request. An agent accepts an eighth of it."""
KEPT_OPERATIONS = 200
POLL_SECONDS = 0.015
SLOW_POLL_SECONDS = 0.1
"""The interval after `SLOW_AFTER_SECONDS` without an event: a long download needs no fast polling."""
SLOW_AFTER_SECONDS = 3.0
TAIL_BYTES = 65536
"""How much of the events' end is read for the operation's state: some hundred events."""
_FINAL_PREFIXES = tuple(f'{{"mlxops":{PROTOCOL},"event":"{event}"'.encode() for event in ("done", "failed"))
_known_ended: set[Path] = set()
"""Folders of operations that are known to have ended."""
_ID = re.compile(r"[0-9]{8}T[0-9]{6}-[0-9a-f]{6,8}")


@dataclass(frozen=True)
class OperationState:
    """The state of an operation: its latest phase, the progress in it, and its result."""

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

    def request(self) -> Envelope:
        """Return the request. Raises `OSError`, and `ValueError` if the record is damaged."""
        return decode_envelope(files.read(self.folder / "request.json", MAX_REQUEST_BYTES))

    # For the worker

    def hold(self) -> int:
        """Take the worker's lock and return its descriptor, which the worker inherits.

        So the operation never looks dead before its worker runs. Raises `OSError`; `BlockingIOError` if a worker is
        alive.
        """
        path = self.folder / "lock"
        fd = files.open_file(path, os.O_RDWR | os.O_CREAT)
        if not take_or_close(fd, path):
            raise BlockingIOError(errno.EWOULDBLOCK, "its worker is alive", str(self.folder))
        return fd

    def emitter(self) -> Callable[[Event], None]:
        """Return the function that appends an event."""
        fd = self._open_events()
        whole = True

        def emit(event: Event) -> None:
            nonlocal whole
            # Ignore a failed write: a full disk must not end an operation. After a partial write, start a new line, so
            # that the next event can be read.
            line = ("" if whole else "\n") + encode_event(event) + "\n"
            whole = False
            with contextlib.suppress(OSError):
                whole = os.write(fd, line.encode()) == len(line)
                if isinstance(event, Done | Failed):
                    flush(fd)

        return emit

    def _open_events(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        # Without O_NONBLOCK, opening a named pipe without a reader would block.
        return os.open(self.folder / "events.jsonl", flags | os.O_NONBLOCK, 0o600)

    def discard(self) -> None:
        """Remove the record of an operation whose worker did not start: it was not interrupted."""
        import shutil

        shutil.rmtree(self.folder, ignore_errors=True)

    def append(self, event: Event) -> None:
        """Write the final event for a worker that is dead. Do nothing if a worker is alive."""
        with contextlib.suppress(OSError), _closing(self.hold()), _closing(self._open_events()) as fd:
            os.write(fd, f"\n{encode_event(event)}\n".encode())

    def seconds(self, *, alive: bool) -> float | None:
        """Return how long it took, or has taken until now; None if that cannot be read."""
        try:
            began = (self.folder / "request.json").stat().st_mtime
            ended = time.time() if alive else (self.folder / "events.jsonl").stat().st_mtime
        except OSError:
            return None
        return round(max(0.0, ended - began), 3)

    @property
    def since(self) -> str:
        """The time of the request in UTC, taken from the id. It may not be a valid date."""
        day, at = self.id[:8], self.id[9:15]
        return f"{day[:4]}-{day[4:6]}-{day[6:]}T{at[:2]}:{at[2:4]}:{at[4:]}Z"

    @property
    def cancel_requested(self) -> bool:
        """Whether a client has cancelled it and its worker has not reacted yet."""
        return (self.folder / "cancel").exists()

    def clear_cancel(self) -> None:
        """Acknowledge `cancel`."""
        with contextlib.suppress(OSError):
            (self.folder / "cancel").unlink(missing_ok=True)

    @property
    def excluded_ports(self) -> frozenset[int]:
        """The ports that a restore leaves alone."""
        ports = (path.name.partition("-")[2] for path in self.folder.glob("without-*"))
        return frozenset(int(port) for port in ports if port.isdecimal())

    # For every other process

    def cancel(self) -> None:
        (self.folder / "cancel").touch(mode=0o600)

    def exclude_port(self, port: int) -> None:
        (self.folder / f"without-{port}").touch(mode=0o600)

    def alive(self) -> bool:
        """Return whether its worker holds the lock."""
        try:
            fd = files.open_file(self.folder / "lock")
        except (FileNotFoundError, Unfit):
            return False
        try:
            with add_path(self.folder / "lock"):
                return not try_flock(fd, shared=True)
        finally:
            os.close(fd)

    @property
    def ended(self) -> bool:
        """Whether its record has a final event.

        Fast, because it is asked for every operation: it compares the first bytes of the last line, and remembers the
        operations that have ended.
        """
        if self.folder not in _known_ended:
            last_line = self._read_tail().rstrip().rpartition(b"\n")[2]
            if last_line.startswith(_FINAL_PREFIXES):
                _known_ended.add(self.folder)
        return self.folder in _known_ended

    def _read_tail(self) -> bytes:
        """Return the end of its events, with at least the whole last line, which may be a long result."""
        events = self.folder / "events.jsonl"
        try:
            data = files.read_end(events, TAIL_BYTES)
            return data if b"\n" in data.rstrip() else files.read_end(events, 2 * MAX_LINE)
        except (FileNotFoundError, Unfit):
            return b""

    def state(self) -> OperationState:
        """Return the operation's state, read from its last events."""
        state = OperationState()
        for line in self._read_tail().decode(errors="replace").splitlines():
            match decode_event(line):
                case Phase() as phase:
                    state = OperationState(phase)
                case Progress() as progress:
                    state = replace(state, progress=progress)
                case Done() | Failed() as final:
                    state = replace(state, final=final)
        return state

    def follow(self, skip: int = 0) -> Iterator[Event | None]:
        """Yield its events after the first `skip`, up to the final one, as they are written. Yield None while waiting.

        If the worker ended without a final event, yield a `Failed`.
        """
        rest = b""
        position = 0
        last_data = time.monotonic()
        while True:
            # Check before reading, so that the last events of a worker that ends in between are not missed.
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
                if skip > 0:
                    skip -= 1
                else:
                    yield event
            if not alive and not data:
                yield Failed(self._missing_result_error())
                return
            last_data = time.monotonic() if data else last_data
            yield None
            slow = time.monotonic() - last_data > SLOW_AFTER_SECONDS
            time.sleep(SLOW_POLL_SECONDS if slow else POLL_SECONDS)

    def _read_from(self, position: int) -> bytes:
        try:
            with open(files.open_file(self.folder / "events.jsonl"), "rb") as file:
                file.seek(position)
                return file.read()
        except (FileNotFoundError, Unfit):
            return b""

    def _missing_result_error(self) -> MlxopsError:
        with contextlib.suppress(OSError):
            last = files.read_end(self.folder / "stderr", 2000).decode(errors="replace").strip()
            if last:
                return Bug(
                    "worker_failed",
                    f"operation {self.id} ended without a result",
                    why=last.splitlines()[-1],
                    hint=f"report this as a bug, with the file {self.folder / 'stderr'} of the host",
                )
        return Refused(
            "operation_interrupted",
            f"operation {self.id} was interrupted",
            why="its worker was killed, the host went down, or its disk is full",
            hint="see what it left: `mlxctl status`; then run the same command again",
        )


def create(ops: Path, request: Envelope) -> tuple[OperationLog, int | None]:
    """Create an operation's record. Return it and the lock for its worker. If the ticket already has a
    record, return that one and None. Raises `Busy` (operations_locked), `OSError`."""
    # Without the lock, two requests with one ticket, from two connections, could both create a record.
    with folder_lock(ops, "operations"):
        ticket = request.ticket or os.urandom(4).hex()
        for folder in ops.glob(f"*-{ticket}"):
            return OperationLog(folder), None
        _prune(ops)
        folder = ops / f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{ticket}"
        folder.mkdir(mode=0o700)
        log = OperationLog(folder)
        try:
            return log, _write_request(log, request)
        except BaseException:
            log.discard()
            raise


def _write_request(log: OperationLog, request: Envelope) -> int:
    """Create the files that a worker needs to report, so that a full disk fails here. Return the lock."""
    lock = log.hold()  # first: a record that can be read and whose lock is free counts as interrupted
    try:
        fd = os.open(log.folder / "request.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(request.encode())
        os.close(log._open_events())
    except BaseException:
        os.close(lock)
        raise
    return lock


def find_operation(ops: Path, operation: str) -> OperationLog | None:
    """Return the record of an operation by its id; None if there is none, or if the id is invalid."""
    folder = ops / operation
    return OperationLog(folder) if _ID.fullmatch(operation) and folder.is_dir() else None


def operation_state(ops: Path, operation: str) -> OperationState:
    """Return the state of an operation by its id; an empty state if it has no record."""
    log = find_operation(ops, operation)
    return log.state() if log else OperationState()


def recent_operations(ops: Path) -> list[OperationLog]:
    """Return all records, the newest first. Raises `Refused` (state_unreadable)."""
    try:
        names = _list_ids(ops)
    except FileNotFoundError:
        return []
    except NotADirectoryError as error:
        raise state_unreadable(ops, error) from None
    in_second = Counter(name[:15] for name in names)

    def start_key(name: str) -> tuple[str, int]:
        """The name contains the second. Within one second, compare when the request was written."""
        return name[:15], _modified_ns(ops / name / "request.json") if in_second[name[:15]] > 1 else 0

    return [OperationLog(ops / name) for name in sorted(names, key=start_key, reverse=True)]


def _list_ids(ops: Path) -> list[str]:
    """Return the names of the folders that are named like operations. Raises `OSError`."""
    with os.scandir(ops) as entries:
        return [entry.name for entry in entries if _ID.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)]


def _modified_ns(path: Path) -> int:
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
    """Make room for one more record: remove the oldest ones whose worker is not alive."""
    import shutil

    folders = [ops / name for name in sorted(_list_ids(ops))]
    for folder in folders[: max(0, len(folders) - KEPT_OPERATIONS + 1)]:
        if not OperationLog(folder).alive():
            shutil.rmtree(folder, ignore_errors=True)
