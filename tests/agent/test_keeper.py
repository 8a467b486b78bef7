"""The keeper starts a server again as soon as it has ended, and what an operator does is never undone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlxops.agent import rounds
from mlxops.agent.host.exits import process_exits
from mlxops.agent.host.system import this_system
from mlxops.agent.keeper import Keeper, renew
from mlxops.agent.state.store import KEEPER, UNKNOWN_HOLDER, Lock, Store
from mlxops.core.deaths import Wedged
from mlxops.core.records import Run
from mlxops.core.wedged import FAILURES, Answer, Asked
from tests.lab.quick import MODELS, QuickHost
from tests.lab.world import wait_until

ALPHA, BETA = MODELS[:2]
AGENT = ("-P", "-m", "mlxops.agent")
HEALED_SECONDS = 15.0
"""Usually one second; the tests share the machine."""


class KeptHost:
    """A host with a keeper, and what it wrote."""

    def __init__(self, host: QuickHost) -> None:
        self.host = host
        self.ports = host.ports
        self.store = Store(host.studio.state, host.studio.registry_path)
        self.log = host.studio.folder / "keeper.log"

    @contextmanager
    def keeper(self, *argv: str, log: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
        """Run a keeper until the end of the block. `argv`: how it is started, if not as usual."""
        argv = argv or (sys.executable, *AGENT, "--keeper", str(self.store.state))
        with open(log or self.log, "ab") as written:
            process = subprocess.Popen(argv, env=self.host.studio.environment, stdout=written, stderr=written)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def acts(self, process: subprocess.Popen[bytes]) -> bool:
        holder = self.store.holder(KEEPER)
        return holder is not None and holder.id == f"pid {process.pid}"

    def wait_for_keeper(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until the keeper acts and its first pass is over: that would restart a dead server, too."""
        wait_until(lambda: self.acts(process), 20, "the keeper")
        children = psutil.Process(process.pid).children
        wait_until(children, 20, "its first pass")
        wait_until(lambda: not children(), 20, "the end of its first pass")

    def run(self, port: int) -> Run:
        found = self.store.run(port)
        assert found is not None
        return found

    def load(self, model: str, port: int) -> Run:
        self.host.mlxctl("load", model, str(port)).ok()
        return self.run(port)

    def is_healed(self, dead: Run) -> bool:
        now = self.store.run(dead.port)
        return now is not None and now.pid != dead.pid and now.proven_at is not None

    def keep(self, port: int, how: str) -> None:
        """Set `keep` of a slot, and let the host save it with the next change."""
        slots = self.host.studio.settings["slots"]
        assert isinstance(slots, dict)
        self.host.lab.configure(slots=slots | {port: {"alias": slots[port], "keep": how}})
        self.host.mlxctl("reconcile").ok()

    def silence(self, run: Run) -> list[dict[str, Any]]:
        """Do what the keeper does when it has found a wedged server. Return the drift after it."""
        about = Wedged(run.port, run.pid, run.start).to_text()
        argv = [sys.executable, *AGENT, "--keeper-pass", str(self.store.state), "1", about]
        done = subprocess.run(argv, env=self.host.studio.environment, capture_output=True, text=True, check=True)
        assert done.stdout.endswith('{"again_in": null}'), done.stdout + done.stderr
        return [row for row in self.host.status()["drift"] if row["code"] == "no_completion"]

    def deaths(self) -> list[dict[str, Any]]:
        return [line for line in self.store.history() if line.get("command") == "died"]

    def said(self, words: str) -> bool:
        return words in self.log.read_text()


@pytest.fixture
def kept(host: QuickHost) -> KeptHost:
    return KeptHost(host)


def kill(run: Run) -> None:
    os.kill(run.pid, signal.SIGKILL)


def test_killed_server_is_started_again_and_its_death_recorded(kept: KeptHost) -> None:
    port = kept.ports[0]
    run = kept.load(ALPHA, port)
    with kept.keeper() as keeper:
        kept.wait_for_keeper(keeper)
        kill(run)
        wait_until(lambda: kept.is_healed(run), HEALED_SECONDS, "another server")
        again = kept.run(port)
        wait_until(lambda: kept.said("restored 1"), 10, "the end of the restore")
        kill(again)
        wait_until(lambda: kept.said("the next try may be in"), HEALED_SECONDS, "the pause of restore")
    assert [(line["model"], line["port"], line["cause"]) for line in kept.deaths()] == [(ALPHA, port, "unknown")] * 2
    assert str(kept.deaths()[0]["by"]).startswith("keeper@")
    assert kept.run(port).pid == again.pid, "it is not started again before the pause is over"


def test_unload_beside_a_keeper_is_not_undone(kept: KeptHost) -> None:
    run, other = kept.load(ALPHA, kept.ports[0]), kept.load(BETA, kept.ports[1])
    with kept.keeper() as keeper:
        kept.wait_for_keeper(keeper)
        kept.host.mlxctl("unload", str(run.port)).ok()
        kill(other)
        wait_until(lambda: kept.is_healed(other), HEALED_SECONDS, "the other server")
        wait_until(lambda: kept.said("restored 1"), 10, "the end of the restore")
        assert not kept.host.studio.listening(run.port)
    assert [line["port"] for line in kept.deaths()] == [other.port], "a server that is stopped has not died"
    assert kept.store.run(run.port) is None


def test_second_keeper_waits_and_a_killed_one_leaves_the_servers(kept: KeptHost) -> None:
    run = kept.load(ALPHA, kept.ports[0])
    with kept.keeper() as first:
        wait_until(lambda: kept.acts(first), 20, "the keeper")
        with kept.keeper() as second:
            wait_until(lambda: kept.said("another keeper runs"), 20, "the second keeper")
            assert kept.acts(first) and second.poll() is None
            first.kill()
            first.wait()
            assert kept.host.studio.listening(run.port)
    with kept.keeper() as third:
        wait_until(lambda: kept.acts(third), 20, "the keeper after it")
        kill(run)
        wait_until(lambda: kept.is_healed(run), HEALED_SECONDS, "another server")


def test_server_that_died_before_the_keeper_began_is_started(kept: KeptHost) -> None:
    run, off = kept.load(ALPHA, kept.ports[0]), kept.load(BETA, kept.ports[1])
    kept.keep(off.port, "off")
    kill(run)
    kill(off)
    with kept.keeper():
        wait_until(lambda: kept.is_healed(run), HEALED_SECONDS, "another server")
        wait_until(lambda: kept.said("restored 1"), 10, "the end of the restore")
    assert kept.run(off.port).pid == off.pid, "keep: off leaves it down"


def build(kept: KeptHost, name: str) -> Path:
    """Install what looks like a deployed agent, and let `venv` link to it."""
    home, own = kept.store.state / "agents" / name, Path(sys.prefix)
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    (home / "pyvenv.cfg").write_text((own / "pyvenv.cfg").read_text())
    (home / "lib").symlink_to(own / "lib")
    (kept.store.state / "venv").unlink(missing_ok=True)
    (kept.store.state / "venv").symlink_to(home)
    return home


QUICK = "import sys, pathlib; from mlxops.agent import keeper; keeper.LOOK_SECONDS = 0.2; keeper.run(pathlib.Path(%r))"


def test_keeper_starts_again_with_a_new_build(kept: KeptHost) -> None:
    run = kept.load(ALPHA, kept.ports[0])
    build(kept, "one")
    python = str(kept.store.state / "venv" / "bin" / "python")
    with kept.keeper(python, "-c", QUICK % str(kept.store.state)) as keeper:
        wait_until(lambda: kept.acts(keeper), 20, "the keeper")
        build(kept, "two")
        wait_until(lambda: kept.log.read_text().count("the keeper 0") == 2, 20, "the same process with the new build")
        words = this_system().process(keeper.pid)
        assert words is not None and words.argv == (python, *AGENT, "--keeper", str(kept.store.state))
        wait_until(lambda: kept.acts(keeper), 20, "its lock")
        kill(run)
        wait_until(lambda: kept.is_healed(run), HEALED_SECONDS, "another server")


def test_keeper_stays_if_the_new_build_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "agents").mkdir()
    older = tmp_path / "python"
    older.write_text("#!/bin/sh\nexit 1\n")
    older.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(older))
        renew(tmp_path)
    assert "has no keeper: this one goes on" in capsys.readouterr().out


def test_round_tells_silent_servers_from_others(kept: KeptHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "ANSWER_SECONDS", 1.0)
    mute, well = kept.load(ALPHA, kept.ports[0]), kept.load(BETA, kept.ports[1])
    (kept.store.run_folder(mute.port) / "flaw").write_text("mute")

    def asked() -> dict[int, Asked]:
        begun = rounds.begin(this_system(), kept.host.studio.address, [mute, well])
        wait_until(lambda: begun.over, 10, "the end of the round")
        return begun.results

    found = asked()
    assert found[well.port].answer is Answer.ANSWERED
    assert (found[mute.port].answer, found[mute.port].in_use) == (Answer.SILENT, False)
    assert (found[mute.port].share or 0) < 0.5
    with socket.create_connection((kept.host.studio.address, mute.port)):
        assert asked()[mute.port].in_use, "another client is connected"
    elsewhere = rounds.begin(this_system(), kept.host.studio.address, [replace(mute, pgid=well.pgid)])
    wait_until(lambda: elsewhere.over, 10, "the end of the round")
    assert elsewhere.results[mute.port] == Asked(Answer.UNKNOWN), "its processor time is not known"
    kill(mute)
    wait_until(lambda: not kept.host.studio.listening(mute.port), 10, "its end")
    assert asked()[mute.port] == Asked(Answer.UNKNOWN)


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b"", Answer.SILENT),
        (b"HTTP/1.1 200 OK\r\n\r\n", Answer.SILENT),
        (b"HTTP/1.1 200 OK\r\n\r\n: keepalive 5/900\n\n", Answer.PROGRESS),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: {}\n\n", Answer.ANSWERED),
        (b"HTTP/1.1 429 Busy\r\n\r\n", Answer.ANSWERED),
    ],
)
def test_headers_alone_are_no_answer(data: bytes, answer: Answer) -> None:
    assert rounds.judge(data) is answer


def test_wedged_server_is_restarted_only_if_its_slot_says_so(kept: KeptHost) -> None:
    run = kept.load(ALPHA, kept.ports[0])
    (drift,) = kept.silence(run)
    assert "does not say `keep: restart`" in drift["message"] and kept.run(run.port) == run
    kept.keep(run.port, "restart")
    assert kept.silence(run) == []
    again = kept.run(run.port)
    assert again.pid != run.pid and kept.host.studio.listening(run.port)
    (drift,) = kept.silence(again)
    assert "the next try may be in 2 min" in drift["message"] and kept.run(run.port) == again
    assert [line["restarted"] for line in kept.store.history() if line["command"] == "wedged"] == [False, True, False]
    assert kept.silence(run)[0]["message"] == drift["message"], "another server has its port: it is left alone"


def test_stop_that_an_operator_began_is_not_turned_into_a_restart(kept: KeptHost) -> None:
    run = kept.load(ALPHA, kept.ports[0])
    kept.keep(run.port, "restart")
    kept.store.save_run(replace(run, stopped_by="unload", stopping_since="2026-01-01T00:00:00Z"))
    assert kept.silence(run) == []
    assert kept.host.studio.listening(run.port) and kept.run(run.port).pid == run.pid


def test_what_became_of_an_earlier_server_does_not_count_for_the_next_one(
    kept: KeptHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = kept.load(ALPHA, kept.ports[0])
    passes: list[Wedged] = []
    monkeypatch.setattr(Keeper, "begin_pass", lambda self, about: passes.append(about))
    lock = kept.store.lock(KEEPER, UNKNOWN_HOLDER)
    assert isinstance(lock, Lock)
    keeper = Keeper(kept.store.state, this_system(), process_exits(), lock)
    keeper.watch_servers()
    silent = rounds.Round({run.port: Asked(Answer.SILENT, False, 0.0)}, {run.port: run})
    for _ in range(FAILURES - 1):
        keeper.judge(silent)
    again = kept.load(BETA, run.port) if kept.host.mlxctl("unload", str(run.port)).ok() else run
    keeper.watch_servers()
    keeper.judge(silent)  # a round that began with the server before
    keeper.judge(rounds.Round(silent.results, {run.port: again}))
    assert passes == []
    for _ in range(FAILURES - 1):
        keeper.judge(rounds.Round(silent.results, {run.port: again}))
    assert [each.pid for each in passes] == [again.pid]
    lock.release()


def test_server_that_dies_is_left_down_while_its_starts_cannot_be_counted(kept: KeptHost) -> None:
    run = kept.load(ALPHA, kept.ports[0])
    (kept.store.state / "history.jsonl").unlink()
    (kept.store.state / "history.jsonl").mkdir()
    with kept.keeper() as keeper:
        kept.wait_for_keeper(keeper)
        kill(run)
        wait_until(lambda: kept.said("not started again: the history cannot be used"), HEALED_SECONDS, "the reason")
        assert kept.run(run.port).pid == run.pid
        (kept.store.state / "history.jsonl").rmdir()
        kept.store.save_run(run)  # a change, which it looks after at once
        wait_until(lambda: kept.is_healed(run), 60, "another server")


def test_keeper_whose_log_cannot_be_written_goes_on(kept: KeptHost) -> None:
    run = kept.load(ALPHA, kept.ports[0])
    with kept.keeper(log=Path("/dev/full")) as keeper:
        kept.wait_for_keeper(keeper)
        kill(run)
        wait_until(lambda: kept.is_healed(run), HEALED_SECONDS, "another server")


def test_keeper_ends_when_its_state_folder_is_replaced(kept: KeptHost) -> None:
    state = kept.store.state
    with kept.keeper(sys.executable, "-c", QUICK % str(state)) as first:
        kept.wait_for_keeper(first)
        state.rename(state.with_name("moved"))
        kept.store.create_folders()
        wait_until(lambda: first.poll() is not None, 20, "its end")
    assert kept.said("was removed or replaced")


def test_death_is_recorded_for_the_model_that_ran(kept: KeptHost) -> None:
    run = kept.load(ALPHA, kept.ports[0])
    registry = kept.host.studio.registry_path
    registry.write_text(
        registry.read_text().replace(ALPHA, "org/other").replace(BETA, ALPHA).replace("org/other", BETA)
    )
    with kept.keeper() as keeper:
        kept.wait_for_keeper(keeper)
        kill(run)
        wait_until(kept.deaths, HEALED_SECONDS, "the record of the death")
    assert [line["model"] for line in kept.deaths()] == [ALPHA]


def test_recorded_pid_that_is_no_process_has_ended() -> None:
    exits, done = process_exits(), threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert thread.native_id is not None
        numbers = [2**31 - 1, 2**40, 2**63 - 1, *([thread.native_id] if sys.platform == "linux" else [])]
        assert [exits.watch(number) for number in numbers] == [False] * len(numbers)
    finally:
        done.set()
        thread.join()
