"""`probe --through` and a gateway that shows the key that it does not accept."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mlxops.common.conformance import run_checks
from mlxops.common.http import ChatServer
from mlxops.core.conformance import Mark
from mlxops.core.redaction import without_key

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
