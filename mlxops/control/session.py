"""The one seam between local and remote: a command that runs on a host, and how its words come back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


class ConnectionLost(Exception):
    """The connection broke, or was silent for too long, before the command's end was seen."""


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status, and the last of what it wrote to standard error."""

    status: int
    stderr: str


class Session(Protocol):
    """One command that is running on a host; its standard input was sent and closed."""

    def lines(self, silence: float) -> Iterator[str]:
        """Its standard output, decoded as UTF-8 (errors replaced), line by line without line ends.

        Raises `ConnectionLost` when the connection breaks or nothing at all arrives for `silence` seconds.
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
