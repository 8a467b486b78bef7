"""The record of an operation: followers see every event, however the worker ends."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mlxops.agent.state import locks, operation_log
from mlxops.agent.state.operation_log import OperationLog, create, find_operation
from mlxops.core.errors import Bug, Busy, Exit, Refused
from mlxops.core.protocol import Done, Envelope, Event, Failed, Note, Phase, encode_event
from mlxops.core.settings import Settings
from tests.lab.envelopes import envelope

pytestmark = pytest.mark.timeout(30)
"""Following does not end while a worker is alive."""

REQUEST = envelope("load", {"model": "a\u202e", "port": "8100"}, Settings(), "build")


@pytest.fixture
def ops(tmp_path: Path) -> Path:
    folder = tmp_path / "ops"
    folder.mkdir()
    return folder


def create_log(ops: Path, request: Envelope = REQUEST) -> OperationLog:
    """Create a record without a worker."""
    log, lock = create(ops, request)
    assert lock is not None
    os.close(lock)
    return log


@pytest.fixture
def log(ops: Path) -> OperationLog:
    return create_log(ops)


@pytest.fixture
def held(log: OperationLog) -> Iterator[int]:
    """Make this process the worker; return the lock."""
    fd = log.hold()
    yield fd
    try:
        os.close(fd)
    except OSError:
        pass  # the test has closed it


def next_event(events: Iterator[Event | None]) -> Event:
    for event in events:
        if event is not None:
            return event
    raise AssertionError("there is no further event")


def write(log: OperationLog, data: bytes) -> None:
    with open(log.folder / "events.jsonl", "ab") as file:
        file.write(data)


def line(event: Event) -> bytes:
    return encode_event(event).encode() + b"\n"


def test_record_has_the_request_and_is_private_to_the_user(log: OperationLog) -> None:
    assert log.request() == REQUEST
    assert log.folder.stat().st_mode & 0o777 == 0o700
    assert (log.folder / "request.json").stat().st_mode & 0o777 == 0o600


def test_follower_gets_every_event_in_order_and_then_the_result(log: OperationLog, held: int) -> None:
    emit = log.emitter()
    events: list[Event] = [Phase("start", "é\n\u2028"), Note("half"), Done({"port": 8100})]
    for event in events:
        emit(event)
    assert list(log.follow()) == events


def test_follower_gets_each_event_when_it_is_written(log: OperationLog, held: int) -> None:
    emit, events = log.emitter(), log.follow()
    assert next(events) is None, "nothing yet"
    for event in (Note("one"), Note("two"), Phase("proof", "three")):
        emit(event)
        assert next_event(events) == event
        assert next(events) is None


def test_incomplete_line_is_returned_once_it_is_complete(log: OperationLog, held: int) -> None:
    events, whole = log.follow(), line(Note("whole ü"))
    for cut in (1, 10, len(whole) - 1):
        write(log, whole[:cut])
        assert next(events) is None
        write(log, whole[cut:])
        assert next_event(events) == Note("whole ü")
        assert next(events) is None


def test_late_follower_gets_all_events(log: OperationLog, held: int) -> None:
    emit = log.emitter()
    emit(Note("one"))
    first = log.follow()
    assert next_event(first) == Note("one")
    emit(Done({}))
    assert next_event(first) == Done({})
    assert list(log.follow()) == [Note("one"), Done({})]


def test_events_after_the_result_are_ignored(log: OperationLog, held: int) -> None:
    write(log, line(Failed(Refused("no", "refused"))) + line(Note("later")) + line(Done({})))
    (only,) = log.follow()
    assert isinstance(only, Failed) and only.error.code == "no"


def test_lines_that_are_no_events_are_skipped(log: OperationLog, held: int) -> None:
    write(log, b"noise\n\n\xff\xfe\n{}\n" + line(Done({})))
    assert list(log.follow()) == [Done({})]


def final_failure(log: OperationLog) -> Failed:
    *_, last = log.follow()
    assert isinstance(last, Failed)
    return last


def test_worker_that_ends_without_a_result_was_interrupted(log: OperationLog, held: int) -> None:
    write(log, line(Note("begun")) + line(Done({}))[:-5])
    os.close(held)
    error = final_failure(log).error
    assert (error.code, error.exit) == ("operation_interrupted", Exit.REFUSED)
    assert log.id in error.message and error.hint


def test_killed_worker_was_interrupted(log: OperationLog) -> None:
    program = """
import sys
from pathlib import Path
from mlxops.agent.state.operation_log import OperationLog
from mlxops.core.protocol import Note
log = OperationLog(Path(sys.argv[1]))
log.hold()
log.emitter()(Note("begun"))
print("held", flush=True)
sys.stdin.readline()
"""
    worker = subprocess.Popen(
        [sys.executable, "-P", "-c", program, str(log.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert worker.stdout is not None and worker.stdout.readline() == b"held\n"
        assert log.alive()
        events = log.follow()
        assert next_event(events) == Note("begun")
    finally:
        worker.kill()
        worker.communicate()
    assert not log.alive()
    last = next_event(events)
    assert isinstance(last, Failed) and last.error.code == "operation_interrupted"


def test_crashed_worker_is_reported_with_its_last_error_line(log: OperationLog) -> None:
    (log.folder / "stderr").write_text("Traceback:\n  File x\nMemoryError\n")
    error = final_failure(log).error
    assert isinstance(error, Bug) and (error.code, error.why) == ("worker_failed", "MemoryError")


def test_operation_is_alive_from_its_creation(ops: Path) -> None:
    """Its lock is taken before other processes can see the record, and passed on to the worker."""
    log, lock = create(ops, REQUEST)
    assert lock is not None and log.alive()
    child = subprocess.Popen(["sleep", "1000"], pass_fds=(lock,))
    os.close(lock)
    assert log.alive()
    child.kill()
    child.wait()
    assert not log.alive()


def test_ticket_has_one_record(ops: Path) -> None:
    request = replace(REQUEST, ticket="0123abcd")
    first = create_log(ops, request)
    assert create(ops, request) == (first, None)
    assert create_log(ops, replace(request, ticket="0123abce")) != first


def test_result_written_just_after_a_read_is_not_missed(
    log: OperationLog, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    emit, read = log.emitter(), OperationLog._read_from
    positions: list[int] = []

    def read_then_end(self: OperationLog, position: int) -> bytes:
        data = read(self, position)
        positions.append(position)
        if len(positions) == 1:
            emit(Done({}))
            os.close(held)
        return data

    monkeypatch.setattr(OperationLog, "_read_from", read_then_end)
    assert [event for event in log.follow() if event] == [Done({})]


def test_skipped_events_are_not_repeated(log: OperationLog) -> None:
    emit = log.emitter()
    for number in range(4):
        emit(Note(str(number)))
    emit(Done({}))
    assert list(log.follow(skip=2)) == [Note("2"), Note("3"), Done({})]
    assert list(log.follow(skip=99)) == [Done({})], "the final event is always returned"


def test_only_one_worker_holds_the_lock(log: OperationLog, held: int) -> None:
    assert log.alive()
    with pytest.raises(BlockingIOError):
        log.hold()
    os.close(held)
    assert not log.alive()
    os.close(log.hold())


def test_alive_check_does_not_keep_a_worker_from_starting(log: OperationLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """`alive` holds the lock for an instant."""
    probes: list[int] = []

    def probe() -> None:
        probes.append(os.open(log.folder / "lock", os.O_RDONLY))
        fcntl.flock(probes[-1], fcntl.LOCK_SH)

    monkeypatch.setattr(time, "sleep", lambda seconds: os.close(probes.pop()))
    probe()
    os.close(log.hold())
    probe()
    log.append(Done({}))
    assert not probes and log.ended


def test_wait_for_a_hung_holder_of_the_record_is_limited(ops: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LOCK_SECONDS", 0.05)
    fd = os.open(ops, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(Busy) as caught:
            create(ops, REQUEST)
        assert caught.value.code == "operations_locked"
    finally:
        os.close(fd)


def test_alive_check_creates_no_file(log: OperationLog) -> None:
    before = sorted(os.listdir(log.folder))
    assert not log.alive() and sorted(os.listdir(log.folder)) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_disk_does_not_end_an_operation(log: OperationLog) -> None:
    events = log.folder / "events.jsonl"
    events.unlink()
    events.symlink_to("/dev/full")
    emit = log.emitter()
    emit(Note("lost"))
    emit(Done({}))


def test_worker_sees_and_clears_a_cancel_request(log: OperationLog) -> None:
    assert not log.cancel_requested
    log.cancel()
    log.cancel()
    assert log.cancel_requested
    log.clear_cancel()
    log.clear_cancel()
    assert not log.cancel_requested


def test_operation_is_found_by_its_id(ops: Path, log: OperationLog) -> None:
    assert find_operation(ops, log.id) == log


@pytest.mark.parametrize(
    "invalid_id",
    [
        *("", ".", "..", "/", "/etc", "../ops", "~", "*", "\0", "lock", "20260101T000000-abcdef", "-rf", "a" * 5000),
        *("{id}/..", "{id}/", "{id}\n", "{id}\0", " {id}", "{id} ", "./{id}", "x/../{id}", "{id}/request.json"),
    ],
)
def test_invalid_id_finds_no_operation(ops: Path, log: OperationLog, invalid_id: str) -> None:
    assert find_operation(ops, invalid_id.replace("{id}", log.id)) is None


def test_old_records_are_removed_unless_their_worker_is_alive(ops: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation_log, "KEPT_OPERATIONS", 4)
    old = [f"20200101T00000{number}-aaaaaa" for number in range(6)]
    for name in old:
        (ops / name).mkdir()
    (ops / "other").mkdir()
    fd = OperationLog(ops / old[0]).hold()
    try:
        new = create_log(ops)
        assert sorted(os.listdir(ops)) == sorted([old[0], *old[3:], new.id, "other"])
    finally:
        os.close(fd)
    newest = create_log(ops)
    assert sorted(os.listdir(ops)) == sorted([*old[4:], new.id, newest.id, "other"])
