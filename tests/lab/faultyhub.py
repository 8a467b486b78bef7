"""A server that stands in front of a real hub and misbehaves on request: refuses, postpones, stalls, cuts, lies.

What no fault matches is passed on to the hub, and the answer back, byte for byte.
"""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from urllib.parse import urlsplit

from tests.lab.service import Service

_PASSED_ON = ("Authorization", "Range", "User-Agent", "Accept")
_NOT_PASSED_BACK = frozenset({"connection", "transfer-encoding", "date", "server", "keep-alive"})


@dataclass(frozen=True)
class Answer:
    """Instead of asking the hub."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b"{}"


@dataclass(frozen=True)
class Stall:
    """The hub's answer, of which only the first bytes of the body ever come."""

    after: int = 0


@dataclass(frozen=True)
class Cut:
    """The hub's answer, its connection closed after the first bytes of the body."""

    after: int = 0


@dataclass(frozen=True)
class Lie:
    """The hub's answer, the body replaced by as many other bytes."""


@dataclass(frozen=True)
class Slow:
    """The hub's answer, its body at so many bytes a second."""

    rate: int


@dataclass(frozen=True)
class Endless:
    """The hub's answer, of unsaid length, and after its body `piece` again and again, `pause` seconds apart."""

    piece: bytes = bytes(65536)
    pause: float = 0.0


@dataclass(frozen=True)
class EndlessHead:
    """An answer of which the head goes on and on, in lines that are `pause` seconds apart."""

    pause: float


Fault = Answer | Stall | Cut | Lie | Slow | Endless | EndlessHead
PIECE_SECONDS = 0.05


def refusal(status: int, code: str = "", message: str = "") -> Answer:
    """A refusal as huggingface.co says it: the reason is in headers of its own."""
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    return Answer(status, {name: value for name, value in headers.items() if value})


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str]


@dataclass
class _Rule:
    fault: Fault
    method: str
    part: str
    times: int


class FaultyHub(Service):
    """A hub in front of the one at `upstream`, on a port of its own, while it is entered."""

    def __init__(self, upstream: str) -> None:
        self._upstream = urlsplit(upstream)
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        self.requests: list[Request] = []
        self.sent = 0
        """Bytes of slow and of endless answers so far."""

    def fail(self, fault: Fault, *, method: str = "", part: str = "", times: int = 1_000_000) -> None:
        """From now on, requests of `method` with `part` in their path meet the fault, but only the first `times`."""
        with self._lock:
            self._rules.append(_Rule(fault, method, part, times))

    def heal(self) -> None:
        with self._lock:
            self._rules.clear()
            self.requests.clear()

    def asked(self, method: str = "", part: str = "") -> int:
        """How many such requests have come."""
        with self._lock:
            return sum(request.method.startswith(method) and part in request.path for request in self.requests)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def start(self) -> None:
        class Handler(_Handler):
            pass

        Handler.faulty = self
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False  # so that closing waits for them
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def take(self, request: Request) -> Fault | None:
        """Note the request; the fault that it meets."""
        with self._lock:
            self.requests.append(request)
            for rule in self._rules:
                if rule.times and request.method.startswith(rule.method) and rule.part in request.path:
                    rule.times -= 1
                    return rule.fault
        return None

    def ask(self, request: Request) -> tuple[int, list[tuple[str, str]], bytes]:
        """The hub's own answer."""
        connection = http.client.HTTPConnection(self._upstream.hostname or "", self._upstream.port or 80, timeout=30)
        try:
            headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
            connection.request(request.method, request.path, headers={**headers, "Accept-Encoding": "identity"})
            answer = connection.getresponse()
            kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _NOT_PASSED_BACK]
            return answer.status, kept, answer.read()
        finally:
            connection.close()

    def trickle(self, body: bytes, rate: int) -> Iterator[bytes]:
        """The body in pieces, each a moment after the one before."""
        size = max(1, int(rate * PIECE_SECONDS))
        for start in range(0, len(body), size):
            if self._over.wait(PIECE_SECONDS):
                return
            piece = body[start : start + size]
            with self._lock:
                self.sent += len(piece)
            yield piece

    def again_and_again(self, piece: bytes, pause: float) -> Iterator[bytes]:
        while not self._over.wait(pause):
            with self._lock:
                self.sent += len(piece)
            yield piece

    def wait_for_the_end(self) -> None:
        self._over.wait()


class _Handler(BaseHTTPRequestHandler):
    faulty: FaultyHub

    def do_GET(self) -> None:
        request = Request(self.command, self.path, dict(self.headers.items()))
        fault = self.faulty.take(request)
        if isinstance(fault, Answer):
            headers = [*fault.headers.items(), ("Content-Length", str(len(fault.body)))]
            self._send(fault.status, headers, [fault.body])
            return
        if isinstance(fault, EndlessHead):
            self.send_response(200)
            self.flush_headers()
            self._write(self.faulty.again_and_again(b"X-Line: and\r\n", fault.pause))
            return
        status, headers, body = self.faulty.ask(request)
        match fault:
            case Stall(after):
                self._send(status, headers, [body[:after]])
                self.faulty.wait_for_the_end()
            case Cut(after):
                self._send(status, headers, [body[:after]])
                self.connection.shutdown(socket.SHUT_RDWR)
            case Lie():
                self._send(status, headers, [b"\xff" * len(body)])
            case Slow(rate):
                self._send(status, headers, self.faulty.trickle(body, rate))
            case Endless(piece, pause):
                unsaid = [(name, value) for name, value in headers if name.lower() != "content-length"]
                self._send(status, unsaid, chain([body], self.faulty.again_and_again(piece, pause)))
            case None:
                self._send(status, headers, [body])

    do_HEAD = do_GET

    def _send(self, status: int, headers: list[tuple[str, str]], body: Iterable[bytes]) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._write(body)

    def _write(self, pieces: Iterable[bytes]) -> None:
        try:
            for piece in pieces:
                self.wfile.write(piece)
                self.wfile.flush()
        except OSError:
            pass  # the client has gone

    def log_message(self, format: str, *args: object) -> None:
        pass
