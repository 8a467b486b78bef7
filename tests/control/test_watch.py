"""`status --watch` with real hosts: it shows changes, reconnects, and leaves no process behind."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mlxops.common.build import build_id
from mlxops.core.protocol import AGAIN, HEARTBEAT
from mlxops.core.settings import Settings
from tests.lab.envelopes import envelope
from tests.lab.homelab import Homelab, Studio, script
from tests.lab.hub import Hub
from tests.lab.wire import Wire
from tests.lab.wired import wired as over_a_wire
from tests.lab.world import Process, wait_until
from tests.steps import REPO, Ask, error_of, finish, quiet, register, tree, with_fake

SOON = 20.0
"""Seconds that an expected change may take on a busy machine."""
QUICKLY = 5.0
"""Seconds within which an agent must end after its client."""
OFTEN = ("status", "--watch", "--interval", "0.1")


@pytest.fixture
def wired(remote: Ask) -> Iterator[tuple[Ask, Wire]]:
    """The Mini reaches the studio over a wire that can be cut."""
    with over_a_wire(remote.lab) as wire:
        yield remote, wire


class Reader:
    """Collect the output of a command from a pipe or a terminal. Never block."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.text = ""
        os.set_blocking(fd, False)

    def read(self) -> str:
        try:
            while data := os.read(self._fd, 65536):
                self.text += data.decode(errors="replace")
        except (BlockingIOError, OSError):  # nothing new, or a terminal without a writer
            pass
        return self.text

    def until(self, pattern: str) -> None:
        try:
            wait_until(lambda: re.search(pattern, self.read(), re.MULTILINE), SOON, pattern)
        except TimeoutError as late:
            raise AssertionError(f"{late}; the output is:\n{self.text}") from None


@contextmanager
def watching(ask: Ask, *flags: str) -> Iterator[tuple[subprocess.Popen[str], Reader]]:
    with ask.running(*OFTEN, *flags) as process:
        assert process.stdout is not None
        yield process, Reader(process.stdout.fileno())


def agents(studio: Studio) -> set[Process]:
    return {p for p in studio.processes() if "mlxops.agent" in p.command and "--worker" not in p.command}


def one_agent(studio: Studio) -> Process:
    (agent,) = wait_until(lambda: found if len(found := agents(studio)) == 1 else set(), SOON, "one agent")
    return agent


def gone(studio: Studio) -> None:
    """Wait until no agent is left on the host."""
    wait_until(lambda: not agents(studio), QUICKLY, "the agent's end")


def interrupted(process: subprocess.Popen[str]) -> None:
    """Press Ctrl-C. It is the normal end of a watch: no error is printed."""
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert (done.exit, done.stderr) == (130, ""), str(done)


class TestLines:
    def test_load_and_unload_appear_as_they_happen(self, ask: Ask) -> None:
        register(ask.studio, "mine")
        with watching(ask) as (process, reader):
            reader.until(rf"^PORT.*\n{ask.port} +jerry-xl +idle")
            ask("load", "--model", "mine", "--port", ask.port).ok()
            reader.until(rf"^\S+Z studio {ask.port} (idle|loading) -> (loading|ready) mine")
            reader.until(rf"^\S+Z studio {ask.port} .*ready mine$")
            ask("unload", "--port", ask.port).ok()
            reader.until(rf"^\S+Z studio {ask.port} \w+ -> idle$")
            interrupted(process)
            output = reader.read()
        assert output.count("PORT") == 1, "the table is shown once"
        assert "\x1b" not in output
        assert "drift" not in output and "orphan" not in output, "a poll during a change reports no drift"
        gone(ask.studio)
        quiet(ask.studio)

    def test_one_agent_serves_all_polls_over_one_connection(self, wired: tuple[Ask, Wire]) -> None:
        ask, wire = wired
        with watching(ask) as (process, reader):
            reader.until("^PORT")
            agent, passed = one_agent(ask.studio), wire.passed
            wait_until(lambda: wire.passed > passed + 20_000, SOON, "several polls")
            assert agents(ask.studio) == {agent} and wire.accepted == 1
            interrupted(process)
        gone(ask.studio)

    def test_drift_appears_with_its_hint_and_disappears(self, remote: Ask) -> None:
        register(remote.studio, "mine")
        with watching(remote) as (process, reader):
            reader.until("^PORT")
            register(remote.studio, "mine", port=remote.port)
            reader.until(rf"studio {remote.port} drift: mine is assigned to {remote.port}, .*; mlxctl load mine")
            register(remote.studio, "mine")
            reader.until(rf"studio {remote.port} no more drift: mine is assigned")
            interrupted(process)
        gone(remote.studio)

    def test_heartbeats_keep_the_agent_through_a_long_interval(self, remote: Ask) -> None:
        short = remote.studio.folder / "python"
        program = "import sys, mlxops.agent.__main__ as agent; agent.AWAY_SECONDS = 6; sys.exit(agent.main([]))"
        short.write_text(f"#!/bin/sh\nexec {sys.executable} -P -c '{program}'\n")
        short.chmod(0o755)
        remote.lab.configure(python=[str(short)])
        with remote.running("status", "--watch", "--interval", "60", "--json") as process:
            assert process.stdout is not None
            process.stdout.readline()
            (agent,) = (p for p in remote.studio.processes() if "AWAY_SECONDS" in p.command)
            until = time.monotonic() + 8.0
            while time.monotonic() < until:
                assert agent in remote.studio.processes()
                time.sleep(0.2)  # it must stay for all of these seconds
            interrupted(process)
        quiet(remote.studio)

    def test_watching_changes_no_file(self, remote: Ask) -> None:
        register(remote.studio, "mine")
        remote("load", "--model", "mine", "--port", remote.port).ok()
        before = tree(remote.studio.folder)
        with watching(remote, "--json") as (process, reader):
            reader.until('"ready"')
            agent = one_agent(remote.studio)
            assert tree(remote.studio.folder) == before
            interrupted(process)
        gone(remote.studio)
        assert agent and tree(remote.studio.folder) == before

    def test_closed_pipe_ends_the_watch_without_a_change(self, remote: Ask) -> None:
        with remote.running(*OFTEN) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.stdout.close()
            assert process.wait(SOON) == 141
            assert process.stderr is not None and process.stderr.read() == ""
        gone(remote.studio)

    def test_missing_standard_output_ends_the_watch_at_once(self, remote: Ask) -> None:
        line = f'exec "{script("mlxctl")}" {" ".join(OFTEN)} >&-'
        done = remote.lab.mini.run("/bin/sh", "-c", line, timeout=SOON)
        assert (done.exit, done.stderr) == (141, "")

    def test_sigterm_ends_the_watch_without_an_error(self, ask: Ask) -> None:
        with watching(ask) as (process, reader):
            reader.until("^PORT")
            process.terminate()
            done = finish(process)
            assert (done.exit, done.stderr) == (143, ""), str(done)
        gone(ask.studio)


class TestDocuments:
    def test_download_can_be_followed(self, make_homelab: Callable[..., Homelab], hub: Hub) -> None:
        with Wire(("127.0.0.1", int(hub.url.rpartition(":")[2])), delay=0.1) as slow:
            ask = Ask(with_fake(make_homelab(hub_url=f"http://127.0.0.1:{slow.port}")), "ssh")
            with watching(ask, "--json") as (process, reader):
                reader.until('"idle"')
                ask("load", "--model", "mine", "--repo", REPO, "--port", ask.port).ok()
                reader.until(rf'"port": {ask.port}, "text": "[^"]*ready mine"')
                interrupted(process)
                documents: list[Any] = [json.loads(line) for line in reader.read().splitlines()]
            gone(ask.studio)
        assert all(document["schema"] == 1 and document["ok"] for document in documents)
        rows = [document["hosts"][0]["ports"][0] for document in documents]
        assert rows[0]["state"] == "idle" and rows[-1]["state"] == "ready"
        progress = [row["progress"] for row in rows if row["progress"]]
        assert progress and all(part["name"] == "download" and part["done"] <= part["total"] for part in progress)


class TestHostThatReturns:
    def test_cut_connection_is_reported_and_made_again(self, wired: tuple[Ask, Wire]) -> None:
        ask, wire = wired
        with watching(ask) as (process, reader):
            reader.until("^PORT")
            first = one_agent(ask.studio)
            wire.cut()
            reader.until(r"^\S+Z studio - away since \S+Z: connection_lost: the connection to studio was lost")
            reader.until(r"^\S+Z studio - back, was away since ")
            wait_until(lambda: first not in agents(ask.studio), QUICKLY, "the first agent's end")
            assert one_agent(ask.studio) != first
            interrupted(process)
        gone(ask.studio)

    def test_host_is_away_while_down_and_its_changes_follow(self, remote: Ask) -> None:
        with watching(remote) as (process, reader):
            reader.until("^PORT")
            remote.studio.sshd.stop()
            reader.until("studio - away since .*: connection_lost: ")
            reader.until("studio - away since .*: connection_refused: ")
            register(remote.studio, "mine", port=remote.port)
            remote.studio.sshd.start()
            reader.until("studio - back, was away since ")
            reader.until(f"studio {remote.port} drift: mine is assigned")
            interrupted(process)
        gone(remote.studio)

    def test_dead_agent_is_started_again(self, ask: Ask) -> None:
        with watching(ask) as (process, reader):
            reader.until("^PORT")
            os.kill(one_agent(ask.studio).pid, signal.SIGKILL)
            reader.until("studio - away since .*: connection_lost: ")
            reader.until("studio - back, ")
            interrupted(process)
        gone(ask.studio)

    def test_table_comes_although_one_host_is_down(self, make_homelab: Callable[..., Homelab]) -> None:
        ask = Ask(with_fake(make_homelab(studios=2)), "ssh")
        second = ask.lab.studios[1]
        second.sshd.stop()
        with watching(ask) as (process, reader):
            reader.until("^HOST(.*\n)*studio2 .*connection_refused")
            second.sshd.start()
            reader.until("studio2 - back, ")
            interrupted(process)
        gone(ask.studio)
        gone(second)


class TestPulledCable:
    def test_watch_continues_after_a_stalled_network(self, wired: tuple[Ask, Wire]) -> None:
        """Neither side gets a signal: no end of input here, no closed connection there."""
        ask, wire = wired
        with watching(ask) as (process, reader):
            reader.until("^PORT")
            one_agent(ask.studio)
            wire.stalled = True
            # The client gives up first. The agent does while the client reconnects.
            reader.until("studio - away since .*: connection_lost: ")
            wait_until(lambda: not agents(ask.studio), SOON, "the end of an agent without a client")
            wire.stalled = False
            wire.cut()
            reader.until("studio - back, was away since ")
            interrupted(process)
        gone(ask.studio)


class TestPermanentErrors:
    def test_changed_host_key_ends_the_watch_at_once(self, remote: Ask) -> None:
        remote.studio.sshd.rekey()
        done = remote(*OFTEN, timeout=SOON)
        assert done.exit == 5 and "host_key_changed" in done.stdout and "  next: " in done.stderr, str(done)

    def test_missing_agent_ends_the_watch_at_once(self, remote: Ask) -> None:
        remote.lab.configure(python=["/nowhere/bin/python"])
        done = remote(*OFTEN, "--json", timeout=SOON)
        (line,) = done.stdout.splitlines()
        assert done.exit == 6 and json.loads(line)["hosts"][0]["error"]["code"] == "agent_missing"
        assert done.stderr.endswith("next: install it: mlxctl deploy\n")

    def test_other_hosts_are_still_watched(self, make_homelab: Callable[..., Homelab]) -> None:
        ask = Ask(with_fake(make_homelab(studios=2)), "ssh")
        ask.lab.configure("studio2", python=["/nowhere/bin/python"])
        with watching(ask) as (process, reader):
            reader.until("^HOST(.*\n)*studio2 .*agent_missing")
            register(ask.studio, "mine", port=ask.port)
            reader.until(f"studio {ask.port} drift: ")
            process.send_signal(signal.SIGINT)
            done = finish(process)
            assert done.exit == 130 and "mlxctl deploy --host studio2" in done.stderr, str(done)
        gone(ask.studio)

    def test_strict_ends_the_watch_at_the_first_drift(self, remote: Ask) -> None:
        register(remote.studio, "mine")
        with watching(remote, "--strict") as (process, reader):
            reader.until("^PORT")
            register(remote.studio, "mine", port=remote.port)
            reader.until("drift: mine is assigned")
            done = finish(process)
            assert done.exit == 3 and "error: 1 difference between the registry and what is running" in done.stderr, (
                str(done)
            )
        gone(remote.studio)

    @pytest.mark.parametrize(
        "flags",
        [
            *(("--watch", "--interval", value) for value in ("0", "-1", "abc", "", "1e3", "nan", "0.01", "86401")),
            ("--interval", "2"),
            ("--watch", "--probe"),
        ],
    )
    def test_invalid_flags_are_refused_before_a_connection(self, homelab: Homelab, flags: tuple[str]) -> None:
        homelab.studio.sshd.stop()
        done = homelab.mini.mlxctl("status", *flags, "--json", timeout=SOON)
        assert done.exit == 2 and error_of(done)["exit"] == 2, str(done)
        assert "--watch" not in flags or len(done.stdout.splitlines()) == 1


class TestLostClient:
    def test_killed_client_leaves_no_agent(self, ask: Ask) -> None:
        with watching(ask) as (process, reader):
            reader.until("^PORT")
            one_agent(ask.studio)
            process.kill()
            gone(ask.studio)

    def test_killed_connection_leaves_no_agent(self, remote: Ask) -> None:
        with watching(remote) as (process, reader):
            reader.until("^PORT")
            agent = one_agent(remote.studio)
            remote.studio.sshd.kill_connections()
            wait_until(lambda: agent not in agents(remote.studio), QUICKLY, "the agent's end")
            interrupted(process)
        gone(remote.studio)


class TestAgent:
    """The agent alone, driven by its standard input."""

    @pytest.fixture
    def agent(self, homelab: Homelab) -> Iterator[subprocess.Popen[bytes]]:
        # A short silence, so that the test is short.
        program = "import sys, mlxops.agent.__main__ as agent; agent.AWAY_SECONDS = 1; sys.exit(agent.main([]))"
        with subprocess.Popen(
            [sys.executable, "-P", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=homelab.studio.env | {"PATH": os.defpath},
        ) as process:
            yield process
            process.kill()

    @staticmethod
    def send(agent: subprocess.Popen[bytes], data: bytes) -> None:
        assert agent.stdin is not None
        agent.stdin.write(data)
        agent.stdin.flush()

    @staticmethod
    def answer(agent: subprocess.Popen[bytes]) -> str:
        assert agent.stdout is not None
        return next(str(event) for line in agent.stdout if (event := json.loads(line)["event"]) in {"done", "failed"})

    def request(self, homelab: Homelab, command: str = "status") -> bytes:
        settings = Settings(hub=str(homelab.studio.hub), state=str(homelab.studio.state))
        return envelope(command, {}, settings, build_id()).encode() + b"\n"

    def test_agent_answers_each_request_and_ends_with_its_input(
        self, homelab: Homelab, agent: subprocess.Popen[bytes]
    ) -> None:
        self.send(agent, self.request(homelab))
        assert self.answer(agent) == "done"
        for _ in range(3):
            self.send(agent, HEARTBEAT + AGAIN)
            assert self.answer(agent) == "done"
        assert agent.stdin is not None
        agent.stdin.close()
        assert agent.wait(QUICKLY) == 0

    def test_agent_ends_after_silence_but_not_between_heartbeats(
        self, homelab: Homelab, agent: subprocess.Popen[bytes]
    ) -> None:
        """A pulled cable: its input does not end."""
        self.send(agent, self.request(homelab))
        assert self.answer(agent) == "done"
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            self.send(agent, HEARTBEAT)
            time.sleep(0.2)  # the interval of the heartbeats
        assert agent.poll() is None
        assert agent.wait(QUICKLY) == -signal.SIGALRM

    def test_agent_continues_after_a_refusal(self, homelab: Homelab, agent: subprocess.Popen[bytes]) -> None:
        homelab.studio.state.mkdir()
        agreed = homelab.studio.state / "host.json"
        agreed.write_text("{")
        self.send(agent, self.request(homelab))
        assert self.answer(agent) == "failed"
        agreed.unlink()
        self.send(agent, AGAIN)
        assert self.answer(agent) == "done"

    def test_agent_never_repeats_a_change(self, homelab: Homelab, agent: subprocess.Popen[bytes]) -> None:
        self.send(agent, self.request(homelab, "init") + AGAIN)
        assert self.answer(agent) == "done"
        assert agent.wait(QUICKLY) == 0
        assert agent.stdout is not None and b'"event":"done"' not in agent.stdout.read()


ENTER, HOME, LEAVE = "\x1b[?1049h", "\x1b[H", "\x1b[?25h\x1b[?1049l"
"""xterm's sequences for the alternate screen and the cursor, as rich writes them."""


class Terminal:
    """`mlxctl status --watch` on a pseudo-terminal of the given size."""

    def __init__(
        self,
        lab: Homelab,
        *,
        interval: str = "0.1",
        columns: int = 60,
        lines: int = 24,
        shell: str = 'exec "$@"',
        **environ: str,
    ) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(lab.mini.elsewhere)
            command = [str(script("mlxctl")), "status", "--watch", "--interval", interval]
            argv = ["/bin/sh", "-c", shell, "sh", *command]
            os.execve(argv[0], argv, lab.mini.env | {"TERM": "xterm"} | environ)
        self.resize(columns, lines)
        self.before = termios.tcgetattr(self.fd)
        self.reader = Reader(self.fd)

    def resize(self, columns: int, lines: int) -> None:
        self.columns, self.lines = columns, lines
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    @property
    def frame(self) -> list[str]:
        """The lines of the last frame that fills the whole terminal at its present size."""
        frames = [frame.split("\r\n") for frame in self.reader.read().split(HOME)[1:]]
        full = [f for f in frames if len(f) == self.lines and all(len(line) >= self.columns for line in f)]
        return [line.rstrip() for line in full[-1]] if full else []

    def shows(self, *texts: str) -> list[str]:
        def lines_with_texts() -> list[str]:
            lines = self.frame
            return lines if all(any(text in line for line in lines) for text in texts) else []

        try:
            return wait_until(lines_with_texts, SOON, f"{texts} on the screen")
        except TimeoutError as late:
            raise AssertionError(f"{late}; it shows:\n" + "\n".join(self.frame)) from None

    def press(self, key: bytes) -> None:
        os.write(self.fd, key)

    def exit_status(self) -> int:
        """Wait for the end. Read the rest of the output, so that it can end."""
        statuses = wait_until(self._waited, SOON, "its end")
        self.reader.read()
        return os.waitstatus_to_exitcode(statuses[0])

    def _waited(self) -> list[int]:
        self.reader.read()
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            return []
        self.pid = 0
        return [status]

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


class TestTerminal:
    def test_view_fits_60_columns_and_ctrl_c_restores_the_terminal(self, remote: Ask) -> None:
        name = "mlx-community.Qwen3-235B-A22B-Instruct-2507-6bit-and-more"
        register(remote.studio, name)
        with Terminal(remote.lab) as terminal:
            terminal.shows(f"{remote.port}  jerry-xl  idle")
            remote("load", "--model", name, "--port", remote.port).ok()
            lines = terminal.shows(f"{remote.port}  jerry-xl  ready", "-> ready mlx")
            assert max(map(len, lines)) <= 60 and any("Qwen3-235B" in line and line.endswith("…") for line in lines)
            terminal.press(b"\x03")
            assert terminal.exit_status() == 130
            output = terminal.reader.text
            assert termios.tcgetattr(terminal.fd) == terminal.before
        assert output.count(ENTER) == output.count(LEAVE) == 1
        assert output.endswith(LEAVE), "nothing is written after the terminal was restored"
        assert "Traceback" not in output and "interrupted" not in output
        gone(remote.studio)

    def test_frames_overwrite_each_other_without_clearing_the_screen(self, homelab: Homelab) -> None:
        with Terminal(homelab) as terminal:
            terminal.shows("idle")
            wait_until(lambda: terminal.reader.read().count(HOME) > 10, SOON, "ten frames")
            terminal.press(b"\x03")
            assert terminal.exit_status() == 130
            assert not re.search(r"\x1b\[\d*[JK]", terminal.reader.text), "an erased cell flickers"
        gone(homelab.studio)

    def test_resized_terminal_is_redrawn(self, homelab: Homelab) -> None:
        # Exported sizes of a shell are those of its start.
        with Terminal(homelab, interval="60", COLUMNS="60", LINES="24") as terminal:
            terminal.shows("ALIAS     STATE  MODEL")
            terminal.resize(120, 10)
            terminal.shows("OWNER  MODEL  MEMORY")
            terminal.resize(60, 4)
            terminal.shows("mlxops status")
            terminal.press(b"\x03")
            assert terminal.exit_status() == 130
        gone(homelab.studio)

    def test_host_that_goes_away_is_shown_with_the_time(self, homelab: Homelab) -> None:
        with Terminal(homelab, columns=100) as terminal:
            terminal.shows("idle")
            homelab.studio.sshd.stop()
            lines = terminal.shows("studio: away since 20", "connection_refused")
            assert not [line for line in lines if "jerry-xl" in line], "its earlier status is not shown as present"
            homelab.studio.sshd.start()
            terminal.shows("jerry-xl", "back, was away since")
            terminal.press(b"\x03")
            assert terminal.exit_status() == 130
        gone(homelab.studio)

    def test_sigterm_restores_the_terminal(self, homelab: Homelab) -> None:
        with Terminal(homelab) as terminal:
            terminal.shows("idle")
            os.kill(terminal.pid, signal.SIGTERM)
            assert terminal.exit_status() == 143
            assert terminal.reader.text.endswith(LEAVE)
        gone(homelab.studio)

    def test_ctrl_c_before_the_first_reply_restores_the_terminal(self, homelab: Homelab) -> None:
        with Terminal(homelab) as terminal:
            terminal.reader.until(re.escape(ENTER))
            terminal.press(b"\x03")
            assert terminal.exit_status() == 130, terminal.reader.text
            assert terminal.reader.text.count(ENTER) == terminal.reader.text.count(LEAVE) == 1
        gone(homelab.studio)

    def test_ctrl_z_gives_the_shell_its_screen_until_fg(self, homelab: Homelab) -> None:
        with Terminal(homelab, shell='set -m; "$@"; echo "status $?"; fg') as terminal:
            terminal.shows("idle")
            terminal.press(b"\x1a")
            terminal.reader.until(f"{re.escape(LEAVE)}[^\x1b]*status 1[0-9]+[^\x1b]*{re.escape(ENTER)}")
            frames = terminal.reader.text.count(HOME)
            wait_until(lambda: terminal.reader.read().count(HOME) > frames + 2, SOON, "further frames")
            terminal.press(b"\x03")
            assert terminal.exit_status() == 130
            assert LEAVE in terminal.reader.text.rpartition(ENTER)[2]
        gone(homelab.studio)

    def test_encoding_without_an_ellipsis_is_enough(self, homelab: Homelab) -> None:
        with Terminal(homelab, columns=12, PYTHONIOENCODING="ascii") as terminal:
            terminal.shows("mlxops stat?")
            terminal.press(b"\x03")
            assert terminal.exit_status() == 130
        gone(homelab.studio)

    def test_closed_terminal_ends_the_watch(self, homelab: Homelab) -> None:
        with Terminal(homelab) as terminal:
            terminal.shows("idle")
            one_agent(homelab.studio)
            process, terminal.pid = terminal.pid, 0
        os.waitpid(process, 0)
        gone(homelab.studio)

    def test_closed_terminal_ends_a_watch_that_ignores_sighup(self, homelab: Homelab) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            terminal = Terminal(homelab)
        finally:
            signal.signal(signal.SIGHUP, before)
        with terminal:
            terminal.shows("idle")
            process, terminal.pid = terminal.pid, 0
        _, status = os.waitpid(process, 0)
        assert os.waitstatus_to_exitcode(status) == 141
        gone(homelab.studio)
