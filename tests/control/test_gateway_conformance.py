"""`probe --through`: a gateway that shows the key that it does not accept, and a server that changes or is busy."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mlxops.common.chat import TimeLimits
from mlxops.common.conformance import run_checks
from mlxops.common.http import ChatServer
from mlxops.control.gateway.conformance import check_through
from mlxops.control.gateway.route import Route
from mlxops.core.commands.probe import CheckedPort, ProbeResult
from mlxops.core.conformance import Mark
from mlxops.core.ports import State
from mlxops.core.redaction import without_key
from mlxops.core.replies import HostReply

KEY = "sk-4f1c77-not-accepted"


class _Refusing(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(401)
        self.end_headers()
        self.wfile.write(f"unknown: {self.headers['Authorization']}".encode())

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    gateway = ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    thread = threading.Thread(target=gateway.serve_forever, args=(0.05,))
    thread.start()
    yield gateway.server_address[1]
    gateway.shutdown()
    gateway.server_close()
    thread.join()


def test_refusal_ends_the_checks_and_shows_no_key(port: int) -> None:
    server = ChatServer("http", "127.0.0.1", port, "m", headers={"Authorization": f"Bearer {KEY}"})
    found = run_checks(server, json_schema=False)
    shown = [without_key(verdict.detail, KEY) for verdict in found]
    assert found[0].mark is Mark.FAIL and shown[0] == "it answered 401: unknown: Bearer [key]"
    assert all(KEY not in detail for detail in shown)
    assert {verdict.mark for verdict in found[2:]} == {Mark.SKIP}


def test_key_that_no_header_can_hold_is_not_shown() -> None:
    server = ChatServer("http", "127.0.0.1", 9, "m", headers={"Authorization": f"Bearer {KEY}\n"})
    (first, *_) = run_checks(server, json_schema=False)
    assert (first.mark, first.detail) == (Mark.FAIL, "the key has characters that no HTTP header can hold")


# -- what the hosts say -----------------------------------------------------------------------------------------------


def through(port: int, *looks: CheckedPort) -> CheckedPort:
    """Return the row of a port that is checked through a gateway. `looks`: the rows that its host gives in turn."""
    alias = SimpleNamespace(port=8100, state=State.READY)
    route = SimpleNamespace(
        url="http://gateway",
        names=lambda row: ["jerry"],
        why_not=lambda name: None,
        server=lambda name: ChatServer("http", "127.0.0.1", port, name),
        gateway=SimpleNamespace(key=None),
    )
    replies = chain(looks, repeat(looks[-1]))

    def look() -> tuple[HostReply[ProbeResult], ...]:
        return (HostReply("studio", ProbeResult((next(replies),))),)

    aliases: Any = [HostReply("studio", SimpleNamespace(aliases=[alias]))]
    (reply,) = check_through(cast(Route, route), aliases, look(), look, TimeLimits(answer=1.0, busy=0.1, total=5.0))
    assert reply.result
    return reply.result.ports[0]


SEEN = CheckedPort(8100, "jerry", "qwen", pid=7, since="2026-11-27T03:00:00Z")


def test_server_that_died_during_the_checks_keeps_its_verdicts(port: int) -> None:
    row = through(port, SEEN, replace(SEEN, pid=None, not_asked="the port is failed"))
    assert row.not_asked is None and row.verdicts[0].verdict == "fail"


@pytest.mark.parametrize("change", [{"pid": 8}, {"since": "2026-11-27T03:01:00Z"}, {"pid": None, "since": None}])
def test_server_that_changed_during_the_checks_has_no_verdicts(port: int, change: dict[str, Any]) -> None:
    assert through(port, SEEN).verdicts
    row = through(port, SEEN, replace(SEEN, **change))
    assert row.verdicts == () and row.not_asked == "the server was stopped, restarted or replaced during the checks"


@pytest.mark.parametrize(("before", "now", "mark"), [(0, 1, "fail"), (1, 1, "skip"), (0, 2, "skip")])
def test_late_answer_of_a_server_with_other_clients_is_skipped(before: int, now: int, mark: str) -> None:
    """One connection is that of the request itself."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        row = through(port, replace(SEEN, clients=before), replace(SEEN, clients=now))
    assert row.verdicts[0].verdict == mark and "no complete answer in time" in row.verdicts[0].detail
