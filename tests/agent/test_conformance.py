"""The checks of `probe` against a real process that misbehaves in one way at a time."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from mlxops.agent.host.system import this_system
from mlxops.common.chat import ChatClient, TimeLimits
from mlxops.common.conformance import run_checks
from mlxops.common.http import ChatServer
from mlxops.core.conformance import COUNT, Check, Mark, Verdict
from tests.lab.ports import free_port, listening
from tests.lab.quick import install_engine
from tests.lab.run import running
from tests.lab.world import wait_until

SHORT = TimeLimits(answer=2.0, busy=2.0, total=60.0)


class Server:
    """The fake engine, with a flaw that can be changed while it runs."""

    def __init__(self, folder: Path, port: int, pid: int) -> None:
        self._folder, self.port, self._pids = folder, port, (pid,)

    def check(self, flaw: str = "", *wanted: Check) -> dict[Check, Verdict]:
        self.without_flaw()
        if flaw:
            (self._folder / "flaw").write_text(flaw, encoding="utf-8")
        server = ChatServer("http", "127.0.0.1", self.port, "m")
        found = run_checks(server, wanted or tuple(Check), json_schema=True, connections=self.connections, limits=SHORT)
        return {verdict.check: verdict for verdict in found}

    def without_flaw(self) -> None:
        (self._folder / "flaw").unlink(missing_ok=True)

    def connections(self) -> int:
        return len(this_system().connections(self.port, self._pids))

    @contextmanager
    def others(self, number: int) -> Iterator[None]:
        """Have other clients connected while the block runs."""
        with ExitStack() as stack:
            for _ in range(number):
                stack.enter_context(socket.create_connection(("127.0.0.1", self.port)))
            yield


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder, port = tmp_path_factory.mktemp("checks"), free_port()
    argv = [str(install_engine(folder)), "--model", "m", "--host", "127.0.0.1", "--port", str(port)]
    with running(argv, folder, {"PATH": os.defpath}) as process:
        wait_until(lambda: listening("127.0.0.1", port), 30, "the engine's port")
        yield Server(folder, port, process.pid)


def test_good_server_passes_every_check(server: Server) -> None:
    found = server.check()
    assert list(found) == list(Check)
    assert {check: verdict.mark for check, verdict in found.items()} == dict.fromkeys(Check, Mark.PASS), found


@pytest.mark.parametrize(
    ("flaw", "check", "mark", "words"),
    [
        ("empty", Check.TOKENS, Mark.FAIL, "its usage counts no generated token"),
        ("wordy", Check.LENGTH, Mark.FAIL, "it generated 18 tokens, and max_tokens was 12"),
        ("no-reason", Check.STOP, Mark.FAIL, "it has no finish reason"),
        ("no-done", Check.STREAM, Mark.FAIL, "it does not end with [DONE]"),
        ("no-usage", Check.STREAM, Mark.FAIL, "no chunk has the usage that was asked for"),
        ("comment", Check.STREAM, Mark.FAIL, "a comment shares an event with data"),
        ("error", Check.STREAM, Mark.FAIL, "an event is not a chunk"),
        ("cut", Check.STREAM, Mark.FAIL, "the answer was cut"),
        ("deaf-system", Check.SYSTEM, Mark.WARN, "the model answered 'Paris'"),
        ("no-system", Check.SYSTEM, Mark.WARN, "it answered 500"),
        ("no-call", Check.TOOLS, Mark.WARN, "the model called no tool"),
        ("bad-call", Check.TOOLS, Mark.FAIL, "the arguments of a tool call are not JSON"),
        ("other-call", Check.TOOLS, Mark.WARN, "an argument that the schema does not have: 'town'"),
        ("no-turn", Check.TOOLS, Mark.FAIL, "the second turn, with the tool's result: it answered 500"),
        ("think", Check.REASONING, Mark.FAIL, "reasoning leaks into the answer: <think>"),
        ("no-think", Check.REASONING, Mark.WARN, "no reasoning in a field of its own"),
        ("markup", Check.MARKUP, Mark.FAIL, "an answer of the check system has <|im_end|>"),
        ("no-json", Check.JSON, Mark.FAIL, "the answer is not JSON: 'Paris'"),
        ("one-at-a-time", Check.PARALLEL, Mark.FAIL, "the second request: it answered 500"),
        ("silent-beside", Check.PARALLEL, Mark.FAIL, "no complete answer in time"),
        ("serial", Check.PARALLEL, Mark.WARN, "until the first stream had ended: the server answers one request"),
        ("busy-beside", Check.PARALLEL, Mark.WARN, "until the first stream had ended: the server answers one request"),
        ("left", Check.CANCEL, Mark.FAIL, "after a client has left a stream: it answered 500"),
    ],
)
def test_flaw_is_found_by_its_check(server: Server, flaw: str, check: Check, mark: Mark, words: str) -> None:
    verdict = server.check(flaw, check)[check]
    assert verdict.mark is mark and words in verdict.detail, verdict


def test_flaw_in_one_answer_leaves_the_other_checks(server: Server) -> None:
    found = server.check("bad-call")
    assert [check for check, verdict in found.items() if verdict.mark is not Mark.PASS] == [Check.TOOLS]


def test_busy_server_is_skipped_after_a_bounded_wait(server: Server) -> None:
    found = server.check("busy")
    assert {verdict.mark for verdict in found.values()} == {Mark.SKIP}
    assert "the server is busy: it answered 429" in found[Check.TOKENS].detail


@pytest.mark.parametrize(("others", "mark"), [(0, Mark.FAIL), (1, Mark.SKIP)])
def test_silent_server_is_broken_unless_others_use_it(server: Server, others: int, mark: Mark) -> None:
    with server.others(others):
        found = server.check("mute")
    assert found[Check.TOKENS].mark is mark and "no complete answer in time" in found[Check.TOKENS].detail
    assert {found[check].mark for check in Check if check not in (Check.TOKENS, Check.LENGTH)} == {Mark.SKIP}


@pytest.mark.parametrize("flaw", ["silent-beside", "serial", "busy-beside"])
def test_second_request_to_a_server_that_others_use_is_skipped(server: Server, flaw: str) -> None:
    with server.others(1):
        verdict = server.check(flaw, Check.PARALLEL)[Check.PARALLEL]
    assert (verdict.mark, verdict.busy) == (Mark.SKIP, True) and "busy with other requests" in verdict.detail, verdict


def test_stream_is_not_refused_by_a_server_that_is_busy_for_a_moment(server: Server) -> None:
    assert server.check("busy-twice", Check.STREAM)[Check.STREAM].mark is Mark.PASS


def test_own_stream_is_not_another_client(server: Server) -> None:
    server.without_flaw()
    client = ChatClient(ChatServer("http", "127.0.0.1", server.port, "m"), server.connections, SHORT)
    with client.stream(COUNT, 512) as reading:
        reading.first_chunk()
        assert server.connections() == 1 and not client.has_others()
        with server.others(1):
            assert client.has_others()


def test_server_that_is_gone_fails() -> None:
    gone = ChatServer("http", "127.0.0.1", free_port(), "m")
    found = run_checks(gone, [Check.TOKENS, Check.STREAM], json_schema=False, limits=SHORT)
    assert [verdict.mark for verdict in found] == [Mark.FAIL, Mark.SKIP], found


def test_engine_without_json_schemas_is_not_asked_for_one(server: Server) -> None:
    (verdict,) = run_checks(
        ChatServer("http", "127.0.0.1", server.port, "m"), [Check.JSON], json_schema=False, limits=SHORT
    )
    assert (verdict.mark, verdict.detail) == (Mark.SKIP, "the engine has no JSON schemas")
