"""HTTP within a time limit: one request, a stream, a GET's status, a health probe, and a small chat completion.

http.client is imported where it is used: with TLS and mail it takes longer to import than all probes of a `status`.
"""

from __future__ import annotations

import errno
import io
import json
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mlxops.core.frozen import dataclass
from mlxops.core.ports import Health

if TYPE_CHECKING:
    from http.client import HTTPResponse

    from mlxops.core.completion import Completion

MAX_RESPONSE_BYTES = 1024 * 1024
CHAT_COMPLETIONS = "/v1/chat/completions"
FEW_TOKENS = 4
MORE_TOKENS = 256
"""The limit of a second completion if the first has no text. Its few tokens may have been markup that the engine takes
out, such as `<|channel|>analysis<|message|>`."""


class RequestNotSent(Exception):
    """This host could not send the request. The server's state is unknown."""


class NotHttp(Exception):
    """The answer is not HTTP."""


class NoCompletion(Exception):
    """The server answered with something other than a completion. The message describes the answer."""


@dataclass(frozen=True)
class ChatServer:
    """Where to send requests, and the model name that they have."""

    scheme: str
    host: str
    port: int | None
    model: str
    base: str = ""
    """The path before `/v1`."""
    headers: Mapping[str, str] | None = None
    fields: Mapping[str, object] | None = None
    """Added to each request's body."""


@dataclass(frozen=True)
class HttpReply:
    status: int
    body: bytes
    headers: Mapping[str, str]
    """Names are in lower case."""


def send_request(
    scheme: str,
    host: str,
    port: int | None,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    timeout: float,
    limit: int = MAX_RESPONSE_BYTES,
) -> HttpReply:
    """Send one request and read at most `limit` bytes of the body. The whole exchange takes at most `timeout` seconds.

    Raises `OSError` if there is no answer, `NotHttp`, and `ValueError` for a header that cannot be sent.
    """
    with open_response(scheme, host, port, method, path, body, headers, timeout=timeout) as response:
        data = response.read(limit)
        return HttpReply(response.status, data, {name.lower(): value for name, value in response.getheaders()})


@contextmanager
def open_response(
    scheme: str,
    host: str,
    port: int | None,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    timeout: float,
) -> Iterator[HTTPResponse]:
    """Send one request, and read its response in the block, such as a stream with `read1`. The connection is closed at
    the end of the block. Reads raise `TimeoutError` after `timeout` seconds.

    Raises `OSError` if there is no answer, `NotHttp`, also if the body ends too early, and `ValueError` for a header
    that cannot be sent.
    """
    import http.client

    kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
    connection = kind(host, port, timeout=timeout)
    connection.response_class = _response_class(time.monotonic() + timeout)
    try:
        connection.request(method, path, body, dict(headers or {}))
        with connection.getresponse() as response:
            yield response
    except http.client.HTTPException as error:
        raise NotHttp(type(error).__name__) from None
    finally:
        connection.close()


class _DeadlineReader(io.RawIOBase):
    """Reads from a socket until `deadline`. A socket's own timeout limits one read, so a slow trickle never ends."""

    def __init__(self, connected: socket.socket, deadline: float) -> None:
        self._socket, self._deadline = connected, deadline
        self._raw = connected.makefile("rb", buffering=0)  # stays open when http.client closes the socket early

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(seconds)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _response_class(deadline: float) -> type[HTTPResponse]:
    """Return a `response_class` for http.client whose reads raise `TimeoutError` after `deadline` (monotonic time)."""
    from http.client import HTTPResponse

    class DeadlineResponse(HTTPResponse):
        def __init__(self, sock: socket.socket, *arguments: Any, **keywords: Any) -> None:
            super().__init__(sock, *arguments, **keywords)
            self.fp.close()
            self.fp = io.BufferedReader(_DeadlineReader(sock, deadline))

    return DeadlineResponse


_LOCAL_ERRORS = {
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOBUFS,
    errno.EADDRNOTAVAIL,
    errno.EPERM,
    errno.EACCES,
}
"""This host has no descriptor, memory or local port for a connection, or its firewall forbids it."""


def get_status(host: str, port: int, path: str, timeout: float) -> int | None:
    """Return the HTTP status of a GET; None without an answer within `timeout` seconds. Raises `RequestNotSent`.

    It does not import http.client, because that would slow down `status`.
    """
    name = f"[{host}]" if ":" in host else host
    request = f"GET {path} HTTP/1.1\r\nHost: {name}:{port}\r\nConnection: close\r\n\r\n"
    answer = b""
    deadline = time.monotonic() + timeout
    try:
        with socket.create_connection((host, port), timeout) as connection:
            connection.sendall(request.encode())
            # The first line is enough, but a server logs an error if its answer is cut off. So read to the end.
            while len(answer) < MAX_RESPONSE_BYTES and (seconds := deadline - time.monotonic()) > 0:
                connection.settimeout(seconds)  # for each read: one byte a second would otherwise never end
                if not (part := connection.recv(65536)):
                    break
                answer += part
    except OSError as error:
        if error.errno in _LOCAL_ERRORS:
            raise RequestNotSent(str(error)) from None
        # For other errors, the status may have arrived before the connection failed.
    status = re.match(rb"HTTP/1\.[01] (\d{3})\b", answer)
    return int(status[1]) if status else None


def probe_health(host: str, port: int, timeout: float) -> Health:
    """Send GET /health. Status 200 means serving, any other status broken, no answer silent."""
    try:
        status = get_status(host, port, "/health", timeout)
    except RequestNotSent:
        return Health.NOT_ASKED
    match status:
        case None:
            return Health.SILENT
        case 200:
            return Health.SERVING
        case _:
            return Health.BROKEN


def completion_request(model: str, number: int | None = None, fields: Mapping[str, object] | None = None) -> bytes:
    """Return the body of a small chat completion request.

    A fresh `number` makes the prompt new to every cache. `fields` are added to the body.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Say hi." if number is None else f"{number}: say hi."}],
        "max_tokens": FEW_TOKENS,
        "temperature": 0,
        "stream": False,
        **(fields or {}),
    }
    return json.dumps(body).encode()


def request_completion(host: str, port: int, model: str, timeout: float) -> Completion:
    """Return a small chat completion of a server, received within `timeout` seconds. At least one token was generated,
    by its usage and by its text, and it has a finish reason.

    Raises `OSError` if there is no answer, and `NoCompletion`.
    """
    from mlxops.core.completion import lacking

    deadline = time.monotonic() + timeout
    completion = _request_completion(host, port, model, FEW_TOKENS, timeout)
    if not completion.text and (completion.tokens or 0) >= FEW_TOKENS:
        completion = _request_completion(host, port, model, MORE_TOKENS, max(0.1, deadline - time.monotonic()))
    if problem := lacking(completion):
        raise NoCompletion(f"it answered 200 with an empty completion: {problem}")
    return completion


def _request_completion(host: str, port: int, model: str, tokens: int, timeout: float) -> Completion:
    from mlxops.core.completion import NotCompletion, parse

    headers = {"Content-Type": "application/json"}
    body = completion_request(model, fields={"max_tokens": tokens})
    try:
        reply = send_request("http", host, port, "POST", CHAT_COMPLETIONS, body, headers, timeout=timeout)
    except NotHttp as error:
        raise NoCompletion(f"it does not speak HTTP: {error}") from None
    start = reply.body[:300].decode(errors="replace")
    if reply.status != 200:
        raise NoCompletion(f"it answered {reply.status}: {start}")
    try:
        return parse(reply.body)
    except NotCompletion:
        raise NoCompletion(f"it answered 200 without a completion: {start}") from None
