"""The one seam between local and remote: run a command on a host, and read its output within limits."""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from mlxops.core.protocol import MARKER, MAX_LINE, Event, Hello, decode_event

NOISE_BYTES = 1024 * 1024
"""Hundreds of times what a host prints as a greeting."""


class ConnectionLost(Exception):
    """The connection broke, or was silent for too long, before the command's end was seen."""


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status, and the last of what it wrote to standard error."""

    status: int
    stderr: str


class ReadLimits:
    """How long a command is listened to that says nothing which matters: so many seconds, and so many bytes.

    Whoever listens tells what mattered (`heard`), after having dealt with it: the time that takes is not the host's.
    That there is something at all is no sign of life of an agent; an account may run a program that prints for ever.
    """

    def __init__(self, seconds: float, noise: int | None = None, *, greeted: bool = False) -> None:
        self.seconds = seconds
        self.greeted = greeted
        """An agent is there."""
        self._noise = noise
        self._since = time.monotonic()
        self._bytes = 0

    @property
    def left(self) -> float:
        return max(0.0, self._since + self.seconds - time.monotonic())

    @property
    def over(self) -> bool:
        return self.left == 0.0 or (self._noise is not None and self._bytes > self._noise)

    def heard(self) -> None:
        self._since, self._bytes = time.monotonic(), 0

    def took(self, count: int) -> None:
        """So many bytes came; whether they matter is told later."""
        self._bytes += count

    def waits_for_the_rest_of(self, line: bytes | bytearray) -> None:
        """What came last is a line without its end."""
        if self.greeted and line.startswith(MARKER.encode()):
            self.heard()  # a long event over a slow connection

    def __str__(self) -> str:
        if self._noise is None or not self._bytes:
            return f"was silent for {self.seconds:.0f} s"
        told = f"said nothing that an agent says, and {self._bytes} bytes of something else"
        return f"{told}: see what its account runs at a login"


class Session(Protocol):
    """One command that is running on a host; its standard input was sent and closed."""

    def lines(self, patience: ReadLimits) -> Iterator[str]:
        """Its standard output, decoded as UTF-8 (errors replaced), line by line without line ends.

        Raises `ConnectionLost` when the connection breaks or `patience` is over.
        """

    def wait(self, timeout: float) -> Ended:
        """After the last line: how it ended. Raises `ConnectionLost`."""

    def close(self) -> None:
        """Let go of it; never blocks. What it started on the host goes on."""


class Dialogue(Session, Protocol):
    """A command whose standard input stays open, so that more can be asked of it. `close` ends its input."""

    def send(self, data: bytes) -> None:
        """A few bytes more for its standard input. Raises `ConnectionLost`."""


class Transport(Protocol):
    """A way to run commands on one host. Not shared between threads."""

    def start(self, argv: Sequence[str], data: bytes) -> Session:
        """Run `argv`, which no shell ever parses, with `data` as its standard input.

        An argument that begins with `~/` means the host's home directory.
        Raises `Unreachable` when the connection cannot be had, `ConnectionLost` when it breaks.
        """

    def converse(self, argv: Sequence[str], data: bytes) -> Dialogue:
        """The same, but its standard input stays open after `data`."""

    def close(self) -> None: ...


def events(session: Session, patience: ReadLimits) -> Iterator[Event | None]:
    """What an agent says; None for the empty line that says that it is there. What is no agent's is passed over.

    Raises `ConnectionLost`.
    """
    for line in session.lines(patience):
        event = decode_event(line)
        patience.greeted = patience.greeted or isinstance(event, Hello)
        if event is not None or (not line and patience.greeted):
            yield event
            if patience.greeted:
                patience.heard()


STDERR_BYTES = 8192


class LineBuffer:
    """Bytes in, lines out: UTF-8 with errors replaced, without line ends; lines longer than MAX_LINE are dropped."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._dropping = False

    @property
    def rest(self) -> bytearray:
        """The line that has no end yet; empty if it is too long already."""
        return self._buffer

    def feed(self, data: bytes) -> list[str]:
        lines: list[str] = []
        *ended, rest = data.split(b"\n")
        for piece in ended:
            self._add(piece)
            if not self._dropping:
                lines.append(self._text())
            self._buffer.clear()
            self._dropping = False
        self._add(rest)
        return lines

    def end(self) -> list[str]:
        """The last line, if it had no end."""
        return [self._text()] if self._buffer and not self._dropping else []

    def _add(self, piece: bytes) -> None:
        if len(self._buffer) + len(piece) > MAX_LINE:
            self._dropping = True
            self._buffer.clear()
        if not self._dropping:
            self._buffer += piece

    def _text(self) -> str:
        return codecs.decode(self._buffer, "utf-8", "replace").removesuffix("\r")


class Tail:
    """The last bytes of a stream."""

    def __init__(self) -> None:
        self._kept = b""

    def add(self, data: bytes) -> None:
        self._kept = (self._kept + data)[-STDERR_BYTES:]

    def __str__(self) -> str:
        return self._kept.decode("utf-8", "replace")
