"""Run a command on a host and read its output within limits: the interface that SSH and this machine share."""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from mlxops.core.frozen import dataclass
from mlxops.core.protocol import MARKER, MAX_LINE, Event, Hello, decode_event

NOISE_BYTES = 1024 * 1024
"""Hundreds of times the text that a host prints at a login."""


class ConnectionLost(Exception):
    """The connection broke, or was silent for too long, before the command was known to have ended."""


@dataclass(frozen=True)
class Ended:
    """The exit status of a command, and the end of its standard error."""

    status: int
    stderr: str


class ReadLimits:
    """Limits on reading from a command that sends nothing useful: seconds and bytes.

    The reader calls `restart` after it has handled a useful line, so its own time does not count. Other output is no
    sign of a living agent: an account may run a program at login that never stops printing.
    """

    def __init__(self, seconds: float, noise: int | None = None, *, greeted: bool = False) -> None:
        self.seconds = seconds
        self.greeted = greeted
        """An agent has sent its greeting."""
        self._noise = noise
        self._since = time.monotonic()
        self._bytes = 0

    @property
    def left(self) -> float:
        return max(0.0, self._since + self.seconds - time.monotonic())

    @property
    def over(self) -> bool:
        return self.left == 0.0 or (self._noise is not None and self._bytes > self._noise)

    def restart(self) -> None:
        self._since, self._bytes = time.monotonic(), 0

    def count(self, count: int) -> None:
        """Count bytes that were received. If they turn out useful, the reader calls `restart`."""
        self._bytes += count

    def allow_unfinished(self, line: bytes | bytearray) -> None:
        """Restart the limits if the unfinished line begins an event. Events can be long, and the connection slow."""
        if self.greeted and line.startswith(MARKER.encode()):
            self.restart()

    def __str__(self) -> str:
        if self._noise is None or not self._bytes:
            return f"was silent for {self.seconds:.0f} s"
        return f"sent {self._bytes} bytes, but nothing from an agent: see what its account runs at a login"


class Session(Protocol):
    """A command that is running on a host. Its standard input was sent and closed."""

    def lines(self, limits: ReadLimits) -> Iterator[str]:
        """Yield the lines of its standard output without line ends, decoded as UTF-8 (errors replaced).

        Raises `ConnectionLost` when the connection breaks or a limit is reached.
        """

    def wait(self, timeout: float) -> Ended:
        """Wait for its end, after the last line. Raises `ConnectionLost`."""

    def close(self) -> None:
        """Close the session without blocking. Processes that the command started on the host keep running."""


class Dialogue(Session, Protocol):
    """A command whose standard input stays open for more requests. `close` closes it."""

    def send(self, data: bytes) -> None:
        """Write a few more bytes to its standard input. Raises `ConnectionLost`."""


class Transport(Protocol):
    """A way to run commands on one host. Use it from one thread only."""

    def start(self, argv: Sequence[str], data: bytes) -> Session:
        """Run `argv`, which no shell parses, with `data` as its standard input.

        `~/` at the beginning of an argument is the host's home directory.
        Raises `Unreachable` if there is no connection, `ConnectionLost` if it breaks.
        """

    def converse(self, argv: Sequence[str], data: bytes) -> Dialogue:
        """Run `argv` in the same way, but leave its standard input open after `data`."""

    def close(self) -> None: ...


def events(session: Session, limits: ReadLimits) -> Iterator[Event | None]:
    """Yield the agent's events; None for the empty line that it sends as a sign of life. Skip all other lines.

    Raises `ConnectionLost`.
    """
    for line in session.lines(limits):
        event = decode_event(line)
        limits.greeted = limits.greeted or isinstance(event, Hello)
        if event is not None or (not line and limits.greeted):
            yield event
            if limits.greeted:
                limits.restart()


STDERR_BYTES = 8192


class LineBuffer:
    """Split bytes into lines: UTF-8 with errors replaced, without line ends. Drop lines longer than MAX_LINE."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._dropping = False

    @property
    def unfinished(self) -> bytearray:
        """The line that has no end yet; empty if it is already too long."""
        return self._buffer

    def feed(self, data: bytes) -> list[str]:
        lines: list[str] = []
        *complete, rest = data.split(b"\n")
        for piece in complete:
            self._add(piece)
            if not self._dropping:
                lines.append(self._text())
            self._buffer.clear()
            self._dropping = False
        self._add(rest)
        return lines

    def end(self) -> list[str]:
        """Return the last line if it has no line end."""
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
