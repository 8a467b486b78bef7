"""The servers' logs: rotated at start, cut under a writer, read from afar and made harmless."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxops.agent import logs
from tests.control.test_attach import client
from tests.lab import models
from tests.lab.homelab import Homelab

QWEN = "tiny-org/tiny-qwen3"
HOSTILE = b"\x1b[31mred\x1b[0m \x1b]0;title\x07 caf\xc3\xa9 \xff\xfe\x9b2J\r\nlast\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "8100.log"


class TestTheEnd:
    def test_is_the_last_lines_made_harmless(self, log: Path) -> None:
        log.write_bytes(b"".join(b"line %d\n" % number for number in range(200_000)) + HOSTILE + b"unfinished")
        end = logs.end_of(log, 3)
        assert end.lines[0] == "line 199999" and end.lines[2] == "last"
        assert end.lines[1].startswith("red ") and "café \ufffd" in end.lines[1]
        assert all(character.isprintable() or character == "\ufffd" for line in end.lines for character in line)
        assert (end.rest, end.position) == ("unfinished", log.stat().st_size - len("unfinished"))

    @pytest.mark.parametrize("count", [0, 1, 2, 3, 9])
    def test_is_never_more_than_was_asked_for(self, log: Path, count: int) -> None:
        log.write_bytes(b"\none\ntwo\n")
        assert logs.end_of(log, count).lines == ["", "one", "two"][max(0, 3 - count) :]

    def test_of_an_empty_log_is_nothing(self, log: Path) -> None:
        log.touch()
        assert logs.end_of(log, 5) == logs.End([], "", 0)


def following(log: Path, position: int = 0) -> Iterator[str | None]:
    """What is followed; None each time there is nothing to tell."""
    waiting: list[None] = []
    lines = logs.follow(log, position, lambda: waiting.append(None) if len(waiting) < 20 else pytest.fail("no line"))
    for line in lines:
        waiting.clear()
        yield line


class TestFollowing:
    def test_goes_on_over_a_rotation_and_a_cut(self, log: Path) -> None:
        with open(log, "ab", buffering=0) as server:
            server.write(b"one\ntw")
            lines = following(log)
            assert next(lines) == "one"
            server.write(b"o\n")
            assert next(lines) == "two"
            logs.rotate(log)
            server.write(b"the last words\n")
            assert next(lines) == "the last words", "what the old server still said"
        with open(log, "ab", buffering=0) as server:
            server.write(b"a new server\n")
            assert next(lines) == "a new server"
            logs.cut(log)
            server.write(b"cut\n")
            assert next(lines) == "cut"

    def test_begins_before_there_is_a_log(self, log: Path) -> None:
        rests = 0

        def rest() -> None:
            nonlocal rests
            rests += 1
            log.write_bytes(b"here\n")

        assert next(logs.follow(log, 0, rest)) == "here" and rests == 1


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


def test_a_cut_takes_nothing_away_that_comes_after_it(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "KEPT_BYTES", 100)
    with subprocess.Popen(
        ["sh", "-c", f"exec >>'{log}'; seq 1000; read x; echo after"], stdin=subprocess.PIPE
    ) as server:
        assert server.stdin is not None
        while not log.exists() or not log.read_bytes().endswith(b"\n1000\n"):
            os.sched_yield()
        logs.cut(log)
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
