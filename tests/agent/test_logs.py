"""The servers' logs: rotated at start, cut under a writer, read from afar and made harmless."""

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


class TestTheEnd:
    def test_is_the_last_lines_made_harmless(self, log: Path) -> None:
        log.write_bytes(b"".join(b"line %d\n" % number for number in range(200_000)) + HOSTILE + b"unfinished")
        first, hostile, last, rest = end_of(log, 3)
        assert (first, last, rest) == ("line 199999", "last", "unfinished")
        assert hostile.startswith("red ") and "café \ufffd" in hostile
        assert all(character.isprintable() or character == "\ufffd" for character in hostile)

    @pytest.mark.parametrize("count", [0, 1, 2, 3, 9])
    def test_is_never_more_than_was_asked_for(self, log: Path, count: int) -> None:
        log.write_bytes(b"\none\ntwo\n")
        assert end_of(log, count) == ["", "one", "two"][max(0, 3 - count) :]

    def test_of_very_many_lines_is_found_with_one_block_in_memory(self, log: Path) -> None:
        """Whoever keeps what has been read reads a log of millions of lines for minutes."""
        log.write_bytes(b"\n" * 5_000_000)
        tracemalloc.start()
        try:
            assert logs.last_lines(log, 4_000_000).position == 1_000_000
            assert tracemalloc.get_traced_memory()[1] < 4_000_000
        finally:
            tracemalloc.stop()

    def test_of_an_empty_log_is_nothing(self, log: Path) -> None:
        log.touch()
        assert end_of(log, 5) == []

    def test_with_a_line_longer_than_any_buffer_is_all_of_it(self, log: Path) -> None:
        log.write_bytes(b"a" * 300_000 + b"\nlast\n")
        pieces = end_of(log, 2)
        assert "".join(pieces) == "a" * 300_000 + "last"


def following(log: Path, start: logs.Mark = logs.START) -> Iterator[logs.Read]:
    """What is followed; fails when there is nothing to tell for long."""
    waiting: list[None] = []
    lines = logs.follow(log, start, lambda: waiting.append(None) if len(waiting) < 20 else pytest.fail("no line"))
    for line in lines:
        waiting.clear()
        yield line


def texts(lines: Iterator[logs.Read], count: int) -> list[str]:
    return [next(lines).text for _ in range(count)]


class TestFollowing:
    def test_goes_on_over_a_rotation_and_a_cut(self, log: Path) -> None:
        with open(log, "ab", buffering=0) as server:
            server.write(b"one\ntw")
            lines = following(log)
            assert texts(lines, 1) == ["one"]
            server.write(b"o\n")
            assert texts(lines, 1) == ["two"]
            logs.rotate(log)
            server.write(b"the last words\n")
            assert texts(lines, 1) == ["the last words"], "what the old server still said"
        with open(log, "ab", buffering=0) as server:
            server.write(b"a new server\n")
            assert texts(lines, 1) == ["a new server"]
            logs.cut(log, 0)
            server.write(b"cut\n")
            assert texts(lines, 1) == ["cut"]

    def test_misses_no_start_that_came_and_went_between_two_looks(self, log: Path) -> None:
        log.write_bytes(b"one\n")
        lines = following(log)
        assert texts(lines, 1) == ["one"]
        with open(log, "ab") as server:
            server.write(b"last words without an end")
        for number in range(2):
            logs.rotate(log)
            log.write_text(f"start {number}\n")
        assert texts(lines, 3) == ["last words without an end", "start 0", "start 1"]

    def test_begins_before_there_is_a_log(self, log: Path) -> None:
        rests = 0

        def rest() -> None:
            nonlocal rests
            rests += 1
            log.write_bytes(b"here\n")

        assert next(logs.follow(log, logs.START, rest)).text == "here" and rests == 1

    def test_goes_on_behind_every_line_whose_mark_is_known(self, log: Path) -> None:
        log.write_bytes(b"one\ntwo\n")
        marks = [logs.START, *(next(lines).mark for lines in [following(log)] for _ in range(2))]
        logs.rotate(log)
        log.write_bytes(b"three\n")
        for heard, start in enumerate(marks[1:], 1):
            again = logs.mark(str(start))
            assert again == start
            assert texts(following(log, again), 3 - heard) == ["one", "two", "three"][heard:]

    @pytest.mark.parametrize("spoil", ["cut", "other", "gone"])
    def test_behind_a_mark_that_is_in_no_log_any_more_is_said(self, log: Path, spoil: str) -> None:
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
    def test_of_no_mark_is_known_as_such(self, text: str) -> None:
        assert logs.mark(text) is None


def second_mark(log: Path) -> logs.Mark:
    """The mark behind the second line."""
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


def test_a_log_that_gets_another_name_meanwhile_is_none_that_is_too_big(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.touch()
    os.truncate(log, logs.CAP + 1)
    gone = log.with_name("8101.log")
    monkeypatch.setattr(logs, "list_matching", lambda *args: [gone, log])
    assert logs.too_big(log.parent) == [(log, logs.CAP + 1)]


@pytest.fixture
def stuck(log: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Somebody was stopped while it cut a log of the folder."""
    monkeypatch.setattr(locks, "LOCK_SECONDS", 0.05)
    fd = os.open(log.parent, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    yield
    os.close(fd)


def test_whoever_hangs_with_the_logs_does_not_make_others_wait_for_ever(log: Path, stuck: None) -> None:
    log.write_text("one\n")
    with pytest.raises(Busy) as caught:
        logs.cut(log, 0)
    assert caught.value.code == "logs_locked"
    logs.rotate(log)
    assert log.read_text() == "one\n", "a server starts all the same, and its log begins behind"


def test_a_log_that_cannot_be_cut_ends_no_operation(log: Path, stuck: None, tmp_path: Path) -> None:
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


def test_what_is_not_too_big_any_more_is_not_cut(log: Path) -> None:
    """Another one was quicker, or it is the log of the next server by now."""
    log.write_bytes(b"12345")
    assert not logs.cut(log, 5) and log.read_bytes() == b"12345"
    assert logs.cut(log, 4) and log.read_bytes() == b""


def test_a_cut_keeps_three_earlier_logs_too(log: Path) -> None:
    for number in range(6):
        log.write_text(f"cut {number}")
        logs.cut(log, 0)
    assert [logs._numbered(log, number).read_text() for number in (1, 2, 3)] == ["cut 5", "cut 4", "cut 3"]
    assert len(os.listdir(log.parent)) == 4


def test_a_cut_takes_nothing_away_that_comes_after_it(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_from_the_mini(homelab: Homelab) -> None:
    """The whole way: a load heads its log, the Mini reads and follows it, status warns, the next change cuts it."""
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
    shown = lab.mini.mlxctl("logs", str(port), "--lines", "2").ok().stdout
    assert "\x1b" not in shown and "\x07" not in shown and shown.endswith("\nlast\n") and "café" in shown
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


def test_followed_from_the_mini_over_cuts_has_no_line_twice_and_none_lost(homelab: Homelab) -> None:
    """It is cut between lines, in the middle of many, and over a rotation; the log is there only later."""
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
        heard = 0

        def hear(until: int) -> None:
            nonlocal heard
            while heard < until:
                heard += 1
                assert follower.stdout is not None
                assert follower.stdout.readline() == f"line {heard}\n"

        write(1)
        hear(1)
        for cut in (wire.cut, homelab.studio.sshd.kill_connections, homelab.studio.sshd.kill_sessions):
            cut()
            write(3)
            hear(count)
            write(3000)
            hear(count - 2000)
            cut()
            logs.rotate(log)
            write(3)
            hear(count)
        follower.kill()
        said = follower.stderr.read()
    write(1)  # whoever still follows notices now that nobody listens
    wait_until(lambda: not homelab.studio.processes(), 30, "the end of the agents")
    assert said.count("reconnecting") == 6 and "the operation goes on" not in said, said
    assert "cut or is gone" not in said, said


def test_that_is_not_followed_is_not_taken_up_again(homelab: Homelab) -> None:
    """A question that changes nothing and has an end is asked again by whoever asked it."""
    port = homelab.studio.ports[0]
    log = homelab.studio.state / "logs" / f"{port}.log"
    log.parent.mkdir(parents=True)
    log.write_text("a line that is long enough to be noticed on its way\n" * 20_000)
    with wired(homelab) as wire:
        wire.cut_after = 100_000
        done = homelab.mini.mlxctl("logs", str(port), "--lines", "20000", "--json")
    assert (done.exit, done.json["hosts"][0]["error"]["code"]) == (5, "connection_lost")
