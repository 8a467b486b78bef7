"""`serve` against hostile clients, over real sockets."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from mlxops.control.serve import web
from mlxops.control.serve.access import access_to
from mlxops.control.serve.exposition import Exposition
from mlxops.control.serve.hosts import Hosts
from mlxops.core.commands.serve import Address
from tests.lab.world import wait_until

HOST = "Host: localhost\r\nConnection: close\r\n"
GET = f"GET /metrics HTTP/1.1\r\n{HOST}"
KEPT = "GET /metrics HTTP/1.1\r\nHost: localhost\r\n"


@dataclass
class Served:
    address: tuple[str, int]
    said: list[str] = field(default_factory=list)

    def send(self, text: str | bytes, *, end: bool = False) -> socket.socket:
        sock = socket.create_connection(self.address, timeout=10)
        sock.sendall(text if isinstance(text, bytes) else text.encode("latin-1"))
        if end:
            sock.shutdown(socket.SHUT_WR)
        return sock

    def ask(self, text: str | bytes) -> str:
        """Send a request and return all that comes back until the server closes the connection."""
        with self.send(text) as sock:
            return received(sock)

    def works(self) -> bool:
        return self.ask(f"{GET}\r\n").startswith("HTTP/1.1 200")


def received(sock: socket.socket) -> str:
    answer = b""
    try:
        while data := sock.recv(65536):
            answer += data
    except ConnectionError:
        pass  # reset
    return answer.decode()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """The web server of `serve` with short time limits, without hosts."""
    for name, value in {
        "CHECK_SECONDS": 0.05,
        "REQUEST_SECONDS": 0.5,
        "READ_SECONDS": 0.5,
        "MAX_CONNECTIONS": 8,
    }.items():
        monkeypatch.setattr(web, name, value)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # full soon if a client does not read
    served = Served(listener.getsockname()[:2])
    hosts = Hosts(lambda: (), None, 1.0, served.said.append)
    access = access_to(Address("127.0.0.1", 0), None, ())
    app = web.application(Exposition(hosts), access, served.said.append)
    server = web.server(app, hosts.refresh)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield served
        assert served.works(), "it serves after each attack"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        (f"{GET}\r\n", 200),
        (f"{GET}User-Agent: Prometheus/3.0\r\nAccept: application/openmetrics-text\r\n\r\n", 200),
        (f"HEAD /metrics HTTP/1.1\r\n{HOST}\r\n", 200),
        (f"GET /metrics?name[]=up HTTP/1.1\r\n{HOST}\r\n", 200),
        (f"GET /metrics HTTP/1.0\r\n{HOST}\r\n", 200),
        ("GET /metrics HTTP/1.0\r\n\r\n", 403),
        ("GET /metrics HTTP/1.1\r\n\r\n", 400),
        ("GET /metrics HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
        (f"GET /metrics HTTP/1.1\r\n{HOST}Host: evil.example\r\n\r\n", 400),
        (f"{GET}Origin: http://evil.example\r\n\r\n", 403),
        (f"{GET}Origin: null\r\n\r\n", 403),
        (f"OPTIONS /metrics HTTP/1.1\r\n{HOST}\r\n", 405),
        (f"POST /metrics HTTP/1.1\r\n{HOST}Content-Length: 2\r\n\r\nhi", 405),
        (f"DELETE /metrics HTTP/1.1\r\n{HOST}\r\n", 405),
        (f"TRACE /metrics HTTP/1.1\r\n{HOST}\r\n", 405),
        (f"CONNECT evil.example:80 HTTP/1.1\r\n{HOST}\r\n", 404),
        (f"GET / HTTP/1.1\r\n{HOST}\r\n", 404),
        (f"GET /metrics/ HTTP/1.1\r\n{HOST}\r\n", 404),
        (f"GET //metrics HTTP/1.1\r\n{HOST}\r\n", 404),
        (f"GET /../etc/passwd HTTP/1.1\r\n{HOST}\r\n", 404),
        (f"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\n{HOST}\r\n", 404),
        (f"GET /metrics%00 HTTP/1.1\r\n{HOST}\r\n", 404),
        (f"GET /metrics%ff HTTP/1.1\r\n{HOST}\r\n", 404),
        (f"GET http://evil.example/metrics HTTP/1.1\r\n{HOST}\r\n", 404),
        (f"GET /metrics HTTP/1.1\r\n{HOST}Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n", 200),
        (f"POST /metrics HTTP/1.1\r\n{HOST}Content-Length: 99999999\r\n\r\n", 413),
        (f"POST /metrics HTTP/1.1\r\n{HOST}Content-Length: -1\r\n\r\n", 400),
        (f"POST /metrics HTTP/1.1\r\n{HOST}Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (f"POST /metrics HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n", 411),
        ("\r\n" * 5 + "nonsense\r\n\r\n", 400),
        ("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        ("GET /metrics HTTP/9.9\r\n\r\n", 403),
    ],
)
def test_request_has_its_status(served: Served, request_text: str, status: int) -> None:
    answer = served.ask(request_text)
    assert re.match(rf"HTTP/1\.1 {status} ", answer), answer[:200]
    assert "Traceback" not in answer and not served.said


@pytest.mark.parametrize(
    "request_text",
    [
        f"{GET}X: {'x' * 20_000}\r\n\r\n",
        f"GET /{'x' * 20_000} HTTP/1.1\r\n{HOST}\r\n",
        f"GET /metrics?{'x' * 20_000} HTTP/1.1\r\n{HOST}\r\n",
        GET + "X: y\r\n" * 10_000 + "\r\n",
        GET + "X" * 5_000_000,
    ],
    ids=["value", "path", "query", "headers", "endless"],
)
def test_long_head_is_refused(served: Served, request_text: str) -> None:
    """It has one of two statuses: how much arrives at once depends on the network."""
    try:
        answer = served.ask(request_text)
    except ConnectionError:
        return  # closed before all of it was sent
    assert re.match(r"HTTP/1\.1 (400|431) |$", answer), answer[:200]


def test_answer_is_closed_to_other_sites_and_caches(served: Served) -> None:
    head = served.ask(f"{GET}\r\n").partition("\r\n\r\n")[0].lower()
    for name, value in web.HEADERS:
        assert f"{name}: {value}".lower() in head
    assert "access-control" not in head and "server:" not in head


@pytest.mark.parametrize("start", ["", "GET /met", KEPT, f"{KEPT}X-Slow: ", f"{KEPT}\r\n"], ids=range(5))
def test_slow_client_is_closed(served: Served, start: str) -> None:
    """The last one has its answer, and then sends nothing."""
    with served.send(start) as sock:
        received(sock)


def test_client_that_drips_is_closed(served: Served) -> None:
    with served.send(KEPT) as sock:
        sock.settimeout(0.05)
        for _ in range(200):
            try:
                sock.sendall(b"X: y\r\n")
                if sock.recv(1) == b"":
                    return
            except TimeoutError:
                continue
            except ConnectionError:
                return
    raise AssertionError("the connection stays open")


def test_client_that_does_not_read_is_closed(served: Served) -> None:
    with served.send("") as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(0.2)
        wait_until(lambda: _refuses(sock), 20.0, "the end of the connection")


def _refuses(sock: socket.socket) -> bool:
    """Send more requests. Return whether the connection is closed."""
    try:
        sock.sendall(f"{KEPT}\r\n".encode() * 500)
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return False


def test_connections_beyond_the_limit_are_closed_and_the_others_served(served: Served) -> None:
    many = [served.send("") for _ in range(40)]
    try:
        wait_until(served.works, 10.0, "an answer, after the idle connections are closed")
    finally:
        for sock in many:
            sock.close()


def test_garbage_behind_a_request_ends_the_connection(served: Served) -> None:
    assert served.ask(f"{KEPT}\r\n\x00\x00\r\n\r\n").count("HTTP/1.1 200") <= 1


def test_failing_request_is_answered_without_its_traceback(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Exposition, accept: str) -> tuple[bytes, str]:
        raise RuntimeError("secret")

    with monkeypatch.context() as broken:
        broken.setattr(Exposition, "render", fail)
        answer = served.ask(f"{GET}\r\n")
    assert answer.startswith("HTTP/1.1 500 ") and "secret" not in answer
    assert served.said == ["a request failed: RuntimeError: secret"]
