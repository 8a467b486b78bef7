"""What comes out of a command: lines of bounded length, and the end of its standard error."""

from __future__ import annotations

import codecs

from mlxops.core.protocol import MAX_LINE

STDERR_BYTES = 8192


class Lines:
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
