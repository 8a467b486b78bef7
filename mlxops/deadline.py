"""HTTP answers that end in time, however they trickle.

Beside core, which opens no sockets, because both sides ask for completions.
"""

from __future__ import annotations

import io
import socket
import time
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
