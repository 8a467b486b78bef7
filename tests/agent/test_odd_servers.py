"""The checks of `probe` against servers with unusual, valid habits of transport, and against some that die."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mlxops.common.chat import TimeLimits
from mlxops.common.conformance import run_checks
from mlxops.common.http import ChatServer
from mlxops.core.conformance import Check, Mark, Verdict

WANTED = (Check.TOKENS, Check.STREAM, Check.PARALLEL, Check.CANCEL)
Send = Callable[[bytes], None]


@contextmanager
def server(serve: Callable[[Send, Any], None]) -> Iterator[int]:
    """Answer each request with `serve`. Close the connection afterwards."""

    def answer(connection: socket.socket) -> None:
        with connection:
            data = b""
            while b"\r\n\r\n" not in data or len(data.partition(b"\r\n\r\n")[2]) < _length(data):
                if not (part := connection.recv(65536)):
                    return
                data += part
            try:
                serve(connection.sendall, json.loads(data.partition(b"\r\n\r\n")[2]))
            except OSError:
                pass  # the client left

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def _length(data: bytes) -> int:
    return int(data.lower().partition(b"content-length:")[2].split(b"\r\n")[0])


def whole(send: Send, request: Any, http: str = "1.1", missing: int = 0) -> None:
    """`missing`: bytes by which the answer is shorter than it says."""
    tokens = request["max_tokens"]
    choices = [{"message": {"role": "assistant", "content": "数" * tokens}, "finish_reason": "length"}]
    body = json.dumps({"choices": choices, "usage": {"completion_tokens": tokens}}, ensure_ascii=False).encode()
    length = f"Content-Length: {len(body)}\r\n" if http == "1.1" else ""
    send(f"HTTP/{http} 200 OK\r\nContent-Type: application/json\r\n{length}\r\n".encode() + body[: len(body) - missing])


def habit(http: str = "1.1", end: str = "\n", piece: int = 10_000, pause: float = 0.002) -> Callable[[Send, Any], None]:
    """Return a server. `end`: of a line. `piece`: bytes that are sent at once."""

    def serve(send: Send, request: Any) -> None:
        if not request["stream"]:
            return whole(send, request, http)
        tokens = request["max_tokens"]
        parts = [{"choices": [{"index": 0, "delta": {"content": "é🍌"}}]}] * tokens
        last = [{"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}]
        usage = [{"choices": [], "usage": {"completion_tokens": tokens}}]
        events = [json.dumps(each, ensure_ascii=False) for each in [*parts, *last, *usage]]
        coding = "Transfer-Encoding: chunked\r\n" if http == "1.1" else ""
        send(f"HTTP/{http} 200 OK\r\nContent-Type: text/event-stream\r\n{coding}\r\n".encode())
        for event in [*events, "[DONE]"]:
            data = f"data: {event}{end}{end}".encode()
            for at in range(0, len(data), piece):
                part = data[at : at + piece]
                send(b"%x\r\n%s\r\n" % (len(part), part) if coding else part)
            stop.wait(pause)
        if coding:
            send(b"0\r\n\r\n")

    stop = threading.Event()
    return serve


def checked(serve: Callable[[Send, Any], None]) -> dict[Check, Verdict]:
    with server(serve) as port:
        limits = TimeLimits(answer=5.0, busy=0.2, total=30.0)
        found = run_checks(ChatServer("http", "127.0.0.1", port, "m"), WANTED, json_schema=False, limits=limits)
    return {each.check: each for each in found}


@pytest.mark.parametrize(
    "serve",
    [habit("1.0"), habit(end="\r\n"), habit(end="\r", piece=7), habit(end="\r\n", piece=1)],
    ids=["HTTP/1.0", "CR LF", "CR, in pieces", "in bytes"],
)
def test_unusual_transport_passes(serve: Callable[[Send, Any], None]) -> None:
    found = checked(serve)
    assert {each.mark for each in found.values()} == {Mark.PASS}, found


def test_stream_in_one_piece_shows_nothing_about_a_second_request() -> None:
    def serve(send: Send, request: Any) -> None:
        sent: list[bytes] = []
        tokens = 5 if request["stream"] else request["max_tokens"]
        habit("1.0", pause=0)(sent.append, request | {"max_tokens": tokens})
        send(b"".join(sent))

    found = checked(serve)
    assert found[Check.STREAM].mark is Mark.PASS
    assert {found[check].mark for check in (Check.PARALLEL, Check.CANCEL)} == {Mark.SKIP}, found


def test_answer_that_is_cut_fails() -> None:
    found = checked(lambda send, request: whole(send, request, missing=5))
    assert (found[Check.TOKENS].mark, found[Check.TOKENS].detail) == (Mark.FAIL, "the answer was cut")


def test_server_that_dies_fails_the_check_and_is_not_asked_again() -> None:
    def serve(send: Send, request: Any) -> None:
        if not request["stream"]:
            whole(send, request)

    found = checked(serve)
    assert found[Check.TOKENS].mark is Mark.PASS
    assert (found[Check.STREAM].mark, found[Check.CANCEL].mark) == (Mark.FAIL, Mark.SKIP)
    assert found[Check.CANCEL].detail == "not asked: it closed the connection without an answer"
