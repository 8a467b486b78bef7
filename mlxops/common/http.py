"""HTTP answers within a deadline, and the one small chat completion that both sides ask for.

A completion proves a server, and the way through a gateway.
"""

from __future__ import annotations

import io
import json
import socket
import time
from collections.abc import Mapping
from http.client import HTTPResponse
from typing import Any


class _Reads(io.RawIOBase):
    """What comes from a socket until `deadline`. Its own timeout is for one read: what trickles would never be late."""

    def __init__(self, connected: socket.socket, deadline: float) -> None:
        self._socket, self._deadline = connected, deadline
        self._raw = connected.makefile("rb", buffering=0)  # it stays open, though http.client closes it before the end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def answer_until(deadline: float) -> type[HTTPResponse]:
    """The `response_class` of an http.client connection whose reads raise `TimeoutError` after `deadline` (monotonic
    seconds)."""

    class Answer(HTTPResponse):
        def __init__(self, sock: socket.socket, *arguments: Any, **named: Any) -> None:
            super().__init__(sock, *arguments, **named)
            self.fp.close()
            self.fp = io.BufferedReader(_Reads(sock, deadline))

    return Answer


def question(model: str, number: int | None = None, extra: Mapping[str, object] | None = None) -> bytes:
    """Return the body of the request. `number` makes it new to every cache; `extra`: further fields."""
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": "Say hi." if number is None else f"{number}: say hi."}],
        "max_tokens": 4,
        "temperature": 0,
        "stream": False,
        **(extra or {}),
    }
    return json.dumps(asked).encode()


def completion(body: bytes) -> dict[str, object] | None:
    """The answer, None if it is no completion. What was generated does not matter (reasoning alone is an answer): that
    something was does."""
    try:
        answer = json.loads(body)
        return dict(answer) if isinstance(answer["choices"][0]["message"], dict) else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
