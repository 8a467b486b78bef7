"""A terminal that is drawn anew in place, and given back as it was. The part of the sink for what does not scroll.

The sequences are those of xterm, which every terminal of the last decades understands (xterm's ctlseqs): 1049 the
alternate screen, 25 the cursor, 7 whether long lines go on in the next one.
"""

from __future__ import annotations

import os
import select
import signal
import stat
import sys
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Self, TextIO

ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l"
LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"
HOME, LINE_END, REST = "\x1b[H", "\x1b[K\n", "\x1b[K\x1b[J"


def is_screen(stream: TextIO) -> bool:
    """Whether frames can be drawn on it."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def still_read(stream: TextIO) -> None:
    """Raises `BrokenPipeError` when nobody reads any more what would be written to it, without writing anything."""
    mode = os.fstat(stream.fileno()).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return  # files have no readers, and macOS cannot poll devices
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    if any(event & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, event in poll.poll(0)):
        raise BrokenPipeError


class Screen:
    """While it is entered, the terminal shows what was drawn last. `changed` is called when that must be done again:
    the terminal has another size, or comes back from a shell in between (Ctrl-Z)."""

    def __init__(self, changed: Callable[[], None], stream: TextIO | None = None) -> None:
        self._changed = changed
        self._stream = stream or sys.stdout

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines, as they are now."""
        try:
            size = os.get_terminal_size(self._stream.fileno())
        except OSError:
            return 80, 24
        return size.columns or 80, size.lines or 24

    def draw(self, lines: Sequence[str]) -> None:
        """These lines and nothing else; each fits, and so do all of them."""
        self._write(HOME + LINE_END.join(lines) + REST)

    def __enter__(self) -> Self:
        self._before = {
            signal.SIGWINCH: signal.signal(signal.SIGWINCH, lambda number, frame: self._changed()),
            signal.SIGTSTP: signal.signal(signal.SIGTSTP, self._stop),
        }
        self._write(ENTER)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        try:
            self._write(LEAVE)
        except OSError:
            pass  # the terminal is gone

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Stop as everybody does, but not with the shell's prompt on our screen."""
        self._write(LEAVE)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        # Here it goes on after SIGCONT.
        signal.signal(signal.SIGTSTP, self._stop)
        self._write(ENTER)
        self._changed()

    def _write(self, text: str) -> None:
        """One write(2), most of the time, so that no half frame is seen."""
        data = memoryview(text.encode(self._stream.encoding or "utf-8", "replace"))
        try:
            while data:
                data = data[os.write(self._stream.fileno(), data) :]
        except OSError as error:
            # What a terminal says that has been closed; whoever is deaf to its SIGHUP hears it here.
            raise BrokenPipeError(error.errno, error.strerror) from error
