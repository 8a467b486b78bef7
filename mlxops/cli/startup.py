"""Prepare the process before anything else is imported: standard streams and Ctrl-C.

The imports of the command line take a good part of a second. Ctrl-C during the imports has the same effect as later:
status 130, no traceback, and one document with `--json`.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130
WHY, NEXT = "Ctrl-C was pressed before anything was asked", "asking for it again is safe"
GARBAGE = 50_000
"""New objects until Python collects garbage. With the default, 700, it searches the imported objects a hundred times,
and finds no garbage in them."""


def prepare() -> None:
    """Prepare the whole process. Programs call it first."""
    gc.set_threshold(GARBAGE)
    # Invoke disables writing bytecode. uv installs packages without bytecode. Without this line each command would
    # compile them, which makes it half as long again.
    sys.dont_write_bytecode = bool(sys.flags.dont_write_bytecode)
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which a socket could get otherwise
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 - open until the process ends
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    # Otherwise the caller ignores it (a shell, for a background process) or has a handler of its own.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def interruptible() -> None:
    """Make Ctrl-C raise `KeyboardInterrupt`, because a command begins that handles it."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def ignore_interrupts() -> None:
    """Ignore Ctrl-C, because the command has printed its result."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _leave(number: int, frame: FrameType | None) -> None:
    if "--json" in sys.argv:
        words = [word for word in sys.argv[1:] if word.replace("-", "").isalpha() and not word.startswith("-")]
        parts = f'"message": "interrupted", "why": "{WHY}", "hint": "{NEXT}"'
        error = f'{{"code": "interrupted", "exit": {INTERRUPTED}, {parts}}}'
        command = words[0] if words else ""
        _write(1, f'{{"schema": 1, "command": "{command}", "ok": false, "hosts": [], "error": {error}}}\n')
    _write(2, f"error: interrupted\n  why: {WHY}\n  next: {NEXT}\n")
    os._exit(INTERRUPTED)


def _write(number: int, text: str) -> None:
    try:
        os.write(number, text.encode())
    except OSError:
        pass  # it has no reader
