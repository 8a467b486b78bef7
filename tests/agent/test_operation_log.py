"""The record of an operation: followed from first to last, whoever follows and however its worker ends."""

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

from mlxops.agent.state import locks
from mlxops.agent.state import operation_log as journals
from mlxops.agent.state.operation_log import OperationLog, create, find_operation
from mlxops.core.errors import Bug, Busy, Exit, Refused
from mlxops.core.protocol import Done, Event, Failed, Note, Phase, Request, encode_event
from mlxops.core.settings import Settings

pytestmark = pytest.mark.timeout(30)
"""Following has no end of its own where a worker lives."""

REQUEST = Request("load", {"model": "a\u202e", "port": "8100"}, Settings(), "build")


@pytest.fixture
def ops(tmp_path: Path) -> Path:
    folder = tmp_path / "ops"
    folder.mkdir()
    return folder


def made(ops: Path, request: Request = REQUEST) -> OperationLog:
    """A record without a worker."""
    journal, lock = create(ops, request)
    assert lock is not None
    os.close(lock)
    return journal


@pytest.fixture
def journal(ops: Path) -> OperationLog:
    return made(ops)


@pytest.fixture
def held(journal: OperationLog) -> Iterator[int]:
    """This process is the worker."""
    fd = journal.hold()
    yield fd
    try:
        os.close(fd)
    except OSError:
        pass  # the test let go of it


def told(found: Iterator[Event | None]) -> Event:
    """The next event that there is."""
    for event in found:
        if event is not None:
            return event
    raise AssertionError("it has no further event")


def write(journal: OperationLog, data: bytes) -> None:
    with open(journal.folder / "events.jsonl", "ab") as file:
        file.write(data)


def line(event: Event) -> bytes:
    return encode_event(event).encode() + b"\n"


def test_a_record_keeps_the_request_and_is_the_users_alone(journal: OperationLog) -> None:
    assert journal.request() == REQUEST
    assert journal.folder.stat().st_mode & 0o777 == 0o700
    assert (journal.folder / "request.json").stat().st_mode & 0o777 == 0o600


def test_who_follows_hears_every_event_in_order_and_then_the_result(journal: OperationLog, held: int) -> None:
    emit = journal.emitter()
    events: list[Event] = [Phase("start", "é\n\u2028"), Note("half"), Done({"port": 8100})]
    for event in events:
        emit(event)
    assert list(journal.follow()) == events


def test_events_are_heard_as_they_come(journal: OperationLog, held: int) -> None:
    emit, found = journal.emitter(), journal.follow()
    assert next(found) is None, "nothing yet"
    for event in (Note("one"), Note("two"), Phase("proof", "three")):
        emit(event)
        assert told(found) == event
        assert next(found) is None


def test_a_line_that_is_half_written_is_heard_once_it_is_whole(journal: OperationLog, held: int) -> None:
    found, whole = journal.follow(), line(Note("whole ü"))
    for cut in (1, 10, len(whole) - 1):
        write(journal, whole[:cut])
        assert next(found) is None
        write(journal, whole[cut:])
        assert told(found) == Note("whole ü")
        assert next(found) is None


def test_who_comes_late_hears_everything_from_the_first_event(journal: OperationLog, held: int) -> None:
    emit = journal.emitter()
    emit(Note("one"))
    first = journal.follow()
    assert told(first) == Note("one")
    emit(Done({}))
    assert told(first) == Done({})
    assert list(journal.follow()) == [Note("one"), Done({})]


def test_nothing_after_the_result_counts(journal: OperationLog, held: int) -> None:
    write(journal, line(Failed(Refused("no", "refused"))) + line(Note("later")) + line(Done({})))
    (only,) = journal.follow()
    assert isinstance(only, Failed) and only.error.code == "no"


def test_what_is_no_event_is_passed_over(journal: OperationLog, held: int) -> None:
    write(journal, b"noise\n\n\xff\xfe\n{}\n" + line(Done({})))
    assert list(journal.follow()) == [Done({})]


def last_of(journal: OperationLog) -> Failed:
    *_, last = journal.follow()
    assert isinstance(last, Failed)
    return last


def test_a_worker_that_ends_without_a_word_was_interrupted(journal: OperationLog, held: int) -> None:
    write(journal, line(Note("begun")) + line(Done({}))[:-5])
    os.close(held)
    error = last_of(journal).error
    assert (error.code, error.exit) == ("operation_interrupted", Exit.REFUSED)
    assert journal.id in error.message and error.hint


def test_a_worker_that_is_killed_was_interrupted(journal: OperationLog) -> None:
    program = """
import sys
from pathlib import Path
from mlxops.agent.state.operation_log import Journal
from mlxops.core.protocol import Note
journal = Journal(Path(sys.argv[1]))
journal.hold()
journal.emitter()(Note("begun"))
print("held", flush=True)
sys.stdin.readline()
"""
    worker = subprocess.Popen(
        [sys.executable, "-P", "-c", program, str(journal.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert worker.stdout is not None and worker.stdout.readline() == b"held\n"
        assert journal.alive()
        found = journal.follow()
        assert told(found) == Note("begun")
    finally:
        worker.kill()
        worker.communicate()
    assert not journal.alive()
    last = told(found)
    assert isinstance(last, Failed) and last.error.code == "operation_interrupted"


def test_a_worker_that_broke_down_is_told_with_its_last_words(journal: OperationLog) -> None:
    (journal.folder / "stderr").write_text("Traceback:\n  File x\nMemoryError\n")
    error = last_of(journal).error
    assert isinstance(error, Bug) and (error.code, error.why) == ("worker_failed", "MemoryError")


def test_an_operation_lives_from_its_first_moment(ops: Path) -> None:
    """Its lock is held before anybody can see it, and is handed on to the worker."""
    journal, lock = create(ops, REQUEST)
    assert lock is not None and journal.alive()
    child = subprocess.Popen(["sleep", "1000"], pass_fds=(lock,))
    os.close(lock)
    assert journal.alive()
    child.kill()
    child.wait()
    assert not journal.alive()


def test_a_ticket_has_one_record(ops: Path) -> None:
    wish = replace(REQUEST, ticket="0123abcd")
    first = made(ops, wish)
    assert create(ops, wish) == (first, None)
    assert made(ops, replace(wish, ticket="0123abce")) != first


def test_the_last_word_of_a_worker_that_ends_just_behind_a_look_is_heard(
    journal: OperationLog, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    emit, read = journal.emitter(), OperationLog._read_from
    looks: list[int] = []

    def and_then_it_ends(self: OperationLog, position: int) -> bytes:
        data = read(self, position)
        looks.append(position)
        if len(looks) == 1:
            emit(Done({}))
            os.close(held)
        return data

    monkeypatch.setattr(OperationLog, "_read_from", and_then_it_ends)
    assert [event for event in journal.follow() if event] == [Done({})]


def test_what_was_heard_is_not_told_again(journal: OperationLog) -> None:
    emit = journal.emitter()
    for number in range(4):
        emit(Note(str(number)))
    emit(Done({}))
    assert list(journal.follow(skip=2)) == [Note("2"), Note("3"), Done({})]
    assert list(journal.follow(skip=99)) == [Done({})], "the end is always told"


def test_only_one_worker_holds_a_record(journal: OperationLog, held: int) -> None:
    assert journal.alive()
    with pytest.raises(BlockingIOError):
        journal.hold()
    os.close(held)
    assert not journal.alive()
    os.close(journal.hold())


def test_who_only_asks_whether_a_worker_lives_keeps_none_from_beginning(
    journal: OperationLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While `alive` looks, the lock is taken, for an instant."""
    looks: list[int] = []

    def look() -> None:
        looks.append(os.open(journal.folder / "lock", os.O_RDONLY))
        fcntl.flock(looks[-1], fcntl.LOCK_SH)

    monkeypatch.setattr(time, "sleep", lambda seconds: os.close(looks.pop()))
    look()
    os.close(journal.hold())
    look()
    journal.append(Done({}))
    assert not looks and journal.ended


def test_whoever_hangs_with_the_records_does_not_make_others_wait_for_ever(
    ops: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LOCK_SECONDS", 0.05)
    fd = os.open(ops, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(Busy) as caught:
            create(ops, REQUEST)
        assert caught.value.code == "operations_locked"
    finally:
        os.close(fd)


def test_asking_whether_a_worker_lives_makes_nothing(journal: OperationLog) -> None:
    before = sorted(os.listdir(journal.folder))
    assert not journal.alive() and sorted(os.listdir(journal.folder)) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_does_not_end_an_operation(journal: OperationLog) -> None:
    events = journal.folder / "events.jsonl"
    events.unlink()
    events.symlink_to("/dev/full")
    emit = journal.emitter()
    emit(Note("lost"))
    emit(Done({}))


def test_the_wish_to_end_is_seen_by_the_worker(journal: OperationLog) -> None:
    assert not journal.cancel_requested
    journal.cancel()
    journal.cancel()
    assert journal.cancel_requested
    journal.clear_cancel()
    journal.clear_cancel()
    assert not journal.cancel_requested


def test_an_operation_is_found_by_its_id(ops: Path, journal: OperationLog) -> None:
    assert find_operation(ops, journal.id) == journal


@pytest.mark.parametrize(
    "hostile",
    [
        *("", ".", "..", "/", "/etc", "../ops", "~", "*", "\0", "lock", "20260101T000000-abcdef", "-rf", "a" * 5000),
        *("{id}/..", "{id}/", "{id}\n", "{id}\0", " {id}", "{id} ", "./{id}", "x/../{id}", "{id}/request.json"),
    ],
)
def test_what_is_no_id_of_an_operation_finds_nothing(ops: Path, journal: OperationLog, hostile: str) -> None:
    assert find_operation(ops, hostile.replace("{id}", journal.id)) is None


def test_old_records_go_but_for_those_whose_worker_lives(ops: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "KEPT", 4)
    old = [f"20200101T00000{number}-aaaaaa" for number in range(6)]
    for name in old:
        (ops / name).mkdir()
    (ops / "somebody's").mkdir()
    fd = OperationLog(ops / old[0]).hold()
    try:
        new = made(ops)
        assert sorted(os.listdir(ops)) == sorted([old[0], *old[3:], new.id, "somebody's"])
    finally:
        os.close(fd)
    newest = made(ops)
    assert sorted(os.listdir(ops)) == sorted([*old[4:], new.id, newest.id, "somebody's"])
