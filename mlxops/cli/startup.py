"""Before anything else: three open standard streams, and a Ctrl-C that is answered.

What the command line imports takes a good part of a second. Whoever presses Ctrl-C meanwhile gets what they would get
later: status 130, no traceback, and one document where `--json` asks for it.
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
"""Objects more than before, after which they are looked through for garbage. By default it is 700, and what a command
imports, all of which stays, is looked through a hundred times."""


def prepare() -> None:
    """For programs, at their very start: this is about the whole process."""
    gc.set_threshold(GARBAGE)
    # Invoke keeps Python from writing bytecode. What was installed without any, as uv does, would then be compiled anew
    # by every command, which takes half as long again.
    sys.dont_write_bytecode = bool(sys.flags.dont_write_bytecode)
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: no socket may get it
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 - as long as the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    # Elsewhere somebody wants it ignored (a shell that runs us in the background), or sees to it already.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def interruptible() -> None:
    """A command begins that answers Ctrl-C itself, as a `KeyboardInterrupt`."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def told() -> None:
    """The command has said what came of it: there is nothing left to interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _leave(number: int, frame: FrameType | None) -> None:
    if "--json" in sys.argv:
        words = [word for word in sys.argv[1:] if word.replace("-", "").isalpha() and not word.startswith("-")]
        told = f'"message": "interrupted", "why": "{WHY}", "hint": "{NEXT}"'
        error = f'{{"code": "interrupted", "exit": {INTERRUPTED}, {told}}}'
        command = words[0] if words else ""
        _write(1, f'{{"schema": 1, "command": "{command}", "ok": false, "hosts": [], "error": {error}}}\n')
    _write(2, f"error: interrupted\n  why: {WHY}\n  next: {NEXT}\n")
    os._exit(INTERRUPTED)


def _write(number: int, text: str) -> None:
    try:
        os.write(number, text.encode())
    except OSError:
        pass  # nobody reads it
