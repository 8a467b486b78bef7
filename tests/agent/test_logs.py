"""The servers' logs: rotated at start, truncated under a writer, read remotely without control characters."""

from __future__ import annotations

import fcntl
import os
import subprocess
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxops.agent import worker
from mlxops.agent.context import Context
from mlxops.agent.host.system import this_system
from mlxops.agent.paths import host_paths
from mlxops.agent.serving import logs
from mlxops.agent.state import locks
from mlxops.agent.state.store import Store
from mlxops.core.errors import Busy
from mlxops.core.settings import Settings
from tests.lab import models
from tests.lab.envelopes import envelope
from tests.lab.homelab import Homelab
from tests.lab.wired import client, wired
from tests.lab.world import wait_until

QWEN = "tiny-org/tiny-qwen3"
HOSTILE = b"\x1b[31mred\x1b[0m \x1b]0;title\x07 caf\xc3\xa9 \xff\xfe\x9b2J\r\nlast\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "8100.log"


def end_of(log: Path, count: int) -> list[str]:
    return [line.text for line in logs.read(log, logs.last_lines(log, count))]


class TestLastLines:
    def test_last_lines_have_no_control_characters(self, log: Path) -> None:
        log.write_bytes(b"".join(b"line %d\n" % number for number in range(200_000)) + HOSTILE + b"unfinished")
        first, hostile, last, rest = end_of(log, 3)
        assert (first, last, rest) == ("line 199999", "last", "unfinished")
        assert hostile.startswith("red ") and "café \ufffd" in hostile
        assert all(character.isprintable() or character == "\ufffd" for character in hostile)

    @pytest.mark.parametrize("count", [0, 1, 2, 3, 9])
    def test_last_lines_are_at_most_the_requested_number(self, log: Path, count: int) -> None:
        log.write_bytes(b"\none\ntwo\n")
        assert end_of(log, count) == ["", "one", "two"][max(0, 3 - count) :]

    def test_last_lines_of_a_long_log_need_one_block(self, log: Path) -> None:
        """A reader that keeps all blocks takes minutes for a log of millions of lines."""
        log.write_bytes(b"\n" * 5_000_000)
        tracemalloc.start()
        try:
            assert logs.last_lines(log, 4_000_000).position == 1_000_000
            assert tracemalloc.get_traced_memory()[1] < 4_000_000
        finally:
            tracemalloc.stop()

    def test_empty_log_has_no_last_lines(self, log: Path) -> None:
        log.touch()
        assert end_of(log, 5) == []

    def test_last_lines_include_a_line_longer_than_any_buffer(self, log: Path) -> None:
        log.write_bytes(b"a" * 300_000 + b"\nlast\n")
        pieces = end_of(log, 2)
        assert "".join(pieces) == "a" * 300_000 + "last"


def following(log: Path, start: logs.Mark = logs.START) -> Iterator[logs.Line]:
    """Follow the log; fail if no line comes for long."""
    waiting: list[None] = []
    lines = logs.follow(log, start, lambda: waiting.append(None) if len(waiting) < 20 else pytest.fail("no line"))
    for line in lines:
        waiting.clear()
        yield line


def texts(lines: Iterator[logs.Line], count: int) -> list[str]:
    return [next(lines).text for _ in range(count)]


class TestFollowing:
    def test_following_continues_after_rotation_and_truncation(self, log: Path) -> None:
        with open(log, "ab", buffering=0) as server:
            server.write(b"one\ntw")
            lines = following(log)
            assert texts(lines, 1) == ["one"]
            server.write(b"o\n")
            assert texts(lines, 1) == ["two"]
            logs.rotate(log)
            server.write(b"the last words\n")
            assert texts(lines, 1) == ["the last words"], "the old server's last line"
        with open(log, "ab", buffering=0) as server:
            server.write(b"a new server\n")
            assert texts(lines, 1) == ["a new server"]
            logs.cut(log, 0)
            server.write(b"cut\n")
            assert texts(lines, 1) == ["cut"]

    def test_following_misses_no_start_between_two_polls(self, log: Path) -> None:
        log.write_bytes(b"one\n")
        lines = following(log)
        assert texts(lines, 1) == ["one"]
        with open(log, "ab") as server:
            server.write(b"last words without an end")
        for number in range(2):
            logs.rotate(log)
            log.write_text(f"start {number}\n")
        assert texts(lines, 3) == ["last words without an end", "start 0", "start 1"]

    def test_following_begins_before_the_log_exists(self, log: Path) -> None:
        calls = 0

        def idle() -> None:
            nonlocal calls
            calls += 1
            log.write_bytes(b"here\n")

        assert next(logs.follow(log, logs.START, idle)).text == "here" and calls == 1

    def test_following_continues_after_each_mark(self, log: Path) -> None:
        log.write_bytes(b"one\ntwo\n")
        marks = [logs.START, *(next(lines).mark for lines in [following(log)] for _ in range(2))]
        logs.rotate(log)
        log.write_bytes(b"three\n")
        for count, mark in enumerate(marks[1:], 1):
            parsed = logs.parse_mark(str(mark))
            assert parsed == mark
            assert texts(following(log, parsed), 3 - count) == ["one", "two", "three"][count:]

    @pytest.mark.parametrize("spoil", ["cut", "other", "gone"])
    def test_mark_of_a_missing_log_is_an_error(self, log: Path, spoil: str) -> None:
        log.write_bytes(b"one\ntwo\n")
        start = second_mark(log)
        match spoil:
            case "cut":
                logs.cut(log, 0)
            case "other":
                log.write_bytes(b"eno\nowt\nand more\n")  # the same file, as if its number were used again
            case "gone":
                log.unlink()
        with pytest.raises(LookupError):
            next(logs.follow(log, start, lambda: None))

    @pytest.mark.parametrize("text", ["", "-", "1-2", "1-2-3-4", "x-1-1", "1-2-3\n", "f" * 17 + "-1-1", "\u0661-1-1"])
    def test_invalid_mark_is_rejected(self, text: str) -> None:
        assert logs.parse_mark(text) is None


def second_mark(log: Path) -> logs.Mark:
    """Return the mark after the second line."""
    lines = following(log)
    next(lines)
    return next(lines).mark


def test_three_earlier_logs_are_kept(log: Path) -> None:
    for number in range(6):
        logs.rotate(log)
        log.write_text(f"start {number}")
    assert {path.name: path.read_text() for path in log.parent.iterdir()} == {
        "8100.log": "start 5",
        "8100.log.1": "start 4",
        "8100.log.2": "start 3",
        "8100.log.3": "start 2",
    }


def test_new_log_becomes_current_and_the_old_one_stays_readable(log: Path) -> None:
    log.write_text("old")
    new = log.with_suffix(".starting")
    with new.open("a") as server:
        server.write("begun, ")
        server.flush()
        logs.make_current(new, log)
        server.write("goes on")
    assert {path.name: path.read_text() for path in log.parent.iterdir()} == {
        "8100.log": "begun, goes on",
        "8100.log.1": "old",
    }


def test_log_that_is_renamed_during_the_check_is_not_too_big(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log.touch()
    os.truncate(log, logs.CAP + 1)
    gone = log.with_name("8101.log")
    monkeypatch.setattr(logs, "list_matching", lambda *args: [gone, log])
    assert logs.too_big(log.parent) == [(log, logs.CAP + 1)]


@pytest.fixture
def stuck(log: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Another process hangs while it holds the lock of the folder."""
    monkeypatch.setattr(locks, "LOCK_SECONDS", 0.05)
    fd = os.open(log.parent, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    yield
    os.close(fd)


def test_wait_for_a_hung_holder_of_the_logs_is_limited(log: Path, stuck: None) -> None:
    log.write_text("one\n")
    with pytest.raises(Busy) as caught:
        logs.cut(log, 0)
    assert caught.value.code == "logs_locked"
    logs.rotate(log)
    assert log.read_text() == "one\n", "a server can start, and appends to the old log"


def test_log_that_cannot_be_truncated_fails_no_operation(log: Path, stuck: None, tmp_path: Path) -> None:
    settings = Settings(hub=str(tmp_path / "hub"), state=str(tmp_path))
    paths = host_paths(settings, {})
    store = Store(paths.state, paths.registry)
    store.create_folders()
    big = store.log_path(8100)
    big.touch()
    os.truncate(big, logs.CAP + 1)
    fd = os.open(big.parent, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        worker._cut_logs(
            Context(envelope("set", {}, settings, "").request, paths, store, this_system(), lambda event: None, {})
        )
    finally:
        os.close(fd)
    assert big.stat().st_size == logs.CAP + 1


def test_log_that_is_not_too_big_any_more_is_not_truncated(log: Path) -> None:
    """Another process truncated it, or it is the next server's log."""
    log.write_bytes(b"12345")
    assert not logs.cut(log, 5) and log.read_bytes() == b"12345"
    assert logs.cut(log, 4) and log.read_bytes() == b""


def test_truncation_keeps_three_earlier_logs(log: Path) -> None:
    for number in range(6):
        log.write_text(f"cut {number}")
        logs.cut(log, 0)
    assert [logs._numbered(log, number).read_text() for number in (1, 2, 3)] == ["cut 5", "cut 4", "cut 3"]
    assert len(os.listdir(log.parent)) == 4


def test_truncation_keeps_later_output(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "KEPT_BYTES", 100)
    with subprocess.Popen(
        ["sh", "-c", f"exec >>'{log}'; seq 1000; read x; echo after"], stdin=subprocess.PIPE
    ) as server:
        assert server.stdin is not None
        while not log.exists() or not log.read_bytes().endswith(b"\n1000\n"):
            os.sched_yield()
        logs.cut(log, 0)
        assert log.stat().st_size == 0
        server.stdin.close()
        assert server.wait(30) == 0
    assert log.read_text() == "after\n", "no hole, nothing lost"
    assert log.with_name("8100.log.1").read_text().endswith("\n999\n1000\n")
    assert log.with_name("8100.log.1").stat().st_size == 100


def test_logs_are_read_and_truncated_from_the_mini(homelab: Homelab) -> None:
    """A load writes the first line, the Mini reads and follows the log, status warns, the next change truncates it."""
    lab, studio = homelab, homelab.studio
    port = studio.ports[0]
    assert lab.mini.mlxctl("logs", str(port), "--json").json["hosts"][0]["error"]["code"] == "no_log"
    studio.install(QWEN, models.QWEN)
    lab.mini.mlxctl("load", QWEN, str(port)).ok()
    log = studio.state / "logs" / f"{port}.log"
    assert log.read_text().splitlines()[0].startswith("--- mlxops 20")
    assert " mlx-lm 0.32.2: " in log.read_text().splitlines()[0]
    with log.open("ab") as server:
        server.write(HOSTILE)
    output = lab.mini.mlxctl("logs", str(port), "--lines", "2").ok().stdout
    assert "\x1b" not in output and "\x07" not in output and output.endswith("\nlast\n") and "café" in output
    document = lab.mini.mlxctl("logs", "--port", str(port), "--lines", "1", "--json").ok().json
    assert document["hosts"][0]["lines"] == ["last"]
    with client(lab, "logs", str(port), "--lines", "1", "--follow") as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == "last\n"
        with log.open("ab") as server:
            server.write(b"and more\n")
        assert follower.stdout.readline() == "and more\n"
        follower.kill()
    with log.open("r+b") as server:
        server.truncate(1_000_000_000)  # sparse: it costs no disk
        server.seek(0, 2)
        server.write(b"\nlast of many\n")
    drift = lab.mini.mlxctl("status", "--json").ok().json["hosts"][0]["drift"]
    assert [(row["code"], row["port"]) for row in drift] == [("log_too_big", port)]
    assert "1000 MB" in drift[0]["message"] or "1.0 GB" in drift[0]["message"]
    assert "cut " in lab.mini.mlxctl("reconcile").ok().stderr
    assert log.stat().st_size < 1000
    assert log.with_name(f"{port}.log.1").read_bytes().count(b"\nlast of many\n") == 1
    assert lab.mini.mlxctl("status", "--json", "--strict").ok().json["hosts"][0]["drift"] == []


def test_following_across_lost_connections_repeats_and_loses_no_line(homelab: Homelab) -> None:
    """The connection is cut between lines, among many lines, and during a rotation. The log does not exist at first."""
    port = homelab.studio.ports[0]
    log = homelab.studio.state / "logs" / f"{port}.log"
    log.parent.mkdir(parents=True)
    count = 0

    def write(lines: int) -> None:
        nonlocal count
        with log.open("a") as server:
            for _ in range(lines):
                count += 1
                server.write(f"line {count}\n")

    with wired(homelab) as wire, client(homelab, "logs", str(port), "--follow") as follower:
        assert follower.stdout is not None and follower.stderr is not None
        received = 0

        def read_lines(until: int) -> None:
            nonlocal received
            while received < until:
                received += 1
                assert follower.stdout is not None
                assert follower.stdout.readline() == f"line {received}\n"

        write(1)
        read_lines(1)
        for cut in (wire.cut, homelab.studio.sshd.kill_connections, homelab.studio.sshd.kill_sessions):
            cut()
            write(3)
            read_lines(count)
            write(3000)
            read_lines(count - 2000)
            cut()
            logs.rotate(log)
            write(3)
            read_lines(count)
        follower.kill()
        errors = follower.stderr.read()
    write(1)  # an agent that still follows now notices that its connection is gone
    wait_until(lambda: not homelab.studio.processes(), 30, "the end of the agents")
    assert errors.count("reconnecting") == 6 and "the operation goes on" not in errors, errors
    assert "cut or removed" not in errors, errors


def test_read_without_follow_is_not_resumed(homelab: Homelab) -> None:
    """A read that ends by itself can be repeated by the user."""
    port = homelab.studio.ports[0]
    log = homelab.studio.state / "logs" / f"{port}.log"
    log.parent.mkdir(parents=True)
    log.write_text("a line that is long enough to be noticed on its way\n" * 20_000)
    with wired(homelab) as wire:
        wire.cut_after = 100_000
        done = homelab.mini.mlxctl("logs", str(port), "--lines", "20000", "--json")
    assert (done.exit, done.json["hosts"][0]["error"]["code"]) == (5, "connection_lost")
