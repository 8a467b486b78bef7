"""Send chat requests to a server, and wait while it is busy with the requests of others."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mlxops.common.http import CHAT_COMPLETIONS, MAX_RESPONSE_BYTES, ChatServer, NotHttp, open_response
from mlxops.core import conformance
from mlxops.core.conformance import Answer, Messages
from mlxops.core.frozen import dataclass

if TYPE_CHECKING:
    from http.client import HTTPResponse

PAUSE_SECONDS = 0.5
FIRST_BYTES = 65536
_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
_BUSY, _UNAVAILABLE = 429, 503


@dataclass(frozen=True)
class TimeLimits:
    """Limits in seconds."""

    answer: float = 120.0
    """Of one answer."""
    busy: float = 60.0
    """Of waiting for a busy server, over all requests."""
    total: float = 480.0
    """After so long no further check begins."""


LIMITS = TimeLimits()


class ServerBusy(Exception):
    """The server does not answer because it is busy with the requests of others. The message says what was tried."""


class NoAnswer(Exception):
    """The server does not answer, and nothing shows that it is busy. The message says why."""


class ChatClient:
    """A client of one server: it asks for whole answers and for streams."""

    def __init__(self, server: ChatServer, connections: Callable[[], int], limits: TimeLimits) -> None:
        """`connections` counts the connections to the server, those of this client included."""
        self._server, self._connections, self._limits = server, connections, limits
        self._deadline = time.monotonic() + limits.total
        self._busy_until: float | None = None
        self._own: list[Reading] = []
        """The answers for which a connection of this client is open."""

    @property
    def seconds_left(self) -> float:
        """Seconds until no further check may begin."""
        return self._deadline - time.monotonic()

    def has_others(self) -> bool:
        """Return whether others are connected to the server."""
        return self._connections() > sum(not reading.ended for reading in self._own)

    def ask(self, messages: Messages, limit: int, **fields: object) -> Answer:
        """Return a whole answer of at most `limit` tokens. Raises `ServerBusy`, `NoAnswer`."""
        with self._answered(messages, limit, {"stream": False, **fields}) as reading:
            answer = reading.rest()
        if reading.late:
            raise self._no_answer(answer.problem)
        return answer

    @contextmanager
    def stream(self, messages: Messages, limit: int) -> Iterator[Reading]:
        """Open a stream of at most `limit` tokens, and close it at the end of the block.

        Raises `ServerBusy`, also if a busy server did not send all of it in time, and `NoAnswer`.
        """
        with self._answered(messages, limit, _STREAMED) as reading:
            yield reading
        if reading.late and self.has_others():
            raise self._no_answer(reading.answer.problem)

    @contextmanager
    def _answered(self, messages: Messages, limit: int, fields: Mapping[str, object]) -> Iterator[Reading]:
        """Send a request, again while the server says that it is busy."""
        server = self._server
        body = {"model": server.model, "messages": list(messages), "max_tokens": limit, "temperature": 0}
        data = json.dumps({**body, **(server.fields or {}), **fields}).encode()
        while True:
            with self._sent(data) as reading:
                if reading.status not in (_BUSY, _UNAVAILABLE):
                    yield reading
                    return
                reading.rest()
            # 503 is also the answer of a server that is broken.
            if reading.status == _UNAVAILABLE and not self.has_others():
                yield reading
                return
            self._wait(f"it answered {reading.status}")

    @contextmanager
    def _sent(self, data: bytes) -> Iterator[Reading]:
        """Send a request once. The connection is closed at the end of the block."""
        server, path = self._server, self._server.base + CHAT_COMPLETIONS
        # A connection that the server kept open after an answer would look like another client.
        headers = {"Content-Type": "application/json", "Connection": "close", **(server.headers or {})}
        timeout = max(1.0, min(self._limits.answer, self.seconds_left))
        try:
            with open_response(
                server.scheme, server.host, server.port, "POST", path, data, headers, timeout=timeout
            ) as response:
                self._own.append(reading := Reading(response))
                try:
                    yield reading
                finally:
                    self._own.remove(reading)
            return
        except (OSError, NotHttp, ValueError) as error:
            problem = _problem(error)
        raise self._no_answer(problem)

    def _no_answer(self, problem: str) -> ServerBusy | NoAnswer:
        if self.has_others():
            return ServerBusy(f"the server is busy with other requests: {problem}")
        return NoAnswer(problem)

    def _wait(self, why: str) -> None:
        """Wait a moment for a busy server. Raises `ServerBusy` once the limit is reached."""
        now = time.monotonic()
        self._busy_until = self._busy_until or now + self._limits.busy
        if now > min(self._busy_until, self._deadline):
            raise ServerBusy(f"the server is busy: {why} for {self._limits.busy:.0f} s")
        time.sleep(PAUSE_SECONDS)


class Reading:
    """An answer that is being read."""

    def __init__(self, response: HTTPResponse) -> None:
        self._response = response
        self._data = b""
        self._problem = ""
        self.ended = False
        self.late = False
        """It was not complete in time."""

    @property
    def status(self) -> int:
        return self._response.status

    def first_bytes(self) -> Answer:
        """Read what comes first, such as a comment. Return it."""
        self._read()
        return self.answer

    def first_chunk(self) -> Answer:
        """Read a stream until there is a part of an answer, or until the end. Return what was read.

        Do not look for the part in what is long.
        """
        while not self.ended and len(self._data) < FIRST_BYTES and not conformance.has_chunk(self._data):
            self._read()
        return self.answer

    def rest(self) -> Answer:
        while not self.ended:
            self._read()
        return self.answer

    @property
    def answer(self) -> Answer:
        kind = self._response.getheader("content-type", "") or ""
        return Answer(self.status, self._data, kind, self._problem)

    def _read(self) -> None:
        from http.client import HTTPException

        try:
            part = self._response.read1(65536)
        except HTTPException:
            part, self._problem = b"", "the answer was cut"
        except OSError as error:
            part, self._problem, self.late = b"", _problem(error), isinstance(error, TimeoutError)
        self._data += part
        if len(self._data) > MAX_RESPONSE_BYTES:
            part, self._problem = b"", f"it sent more than {MAX_RESPONSE_BYTES} bytes"
        if not part and self._response.length:
            self._problem = self._problem or "the answer was cut"
        self.ended = not part


def _problem(error: Exception) -> str:
    if str(error) == "RemoteDisconnected":
        return "it closed the connection without an answer"
    if isinstance(error, NotHttp):
        return f"it does not speak HTTP: {error}"
    if isinstance(error, ValueError):
        return "the key has characters that no HTTP header can hold"  # the exception's text has the key
    return "no complete answer in time" if isinstance(error, TimeoutError) else str(error)[:200]
