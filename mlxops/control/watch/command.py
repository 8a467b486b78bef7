"""`status --watch`: poll the hosts and show what changes, until the user ends it."""

from __future__ import annotations

import os
import select
import signal
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

from mlxops.control import output
from mlxops.control.client import HostReply, HostTarget
from mlxops.control.watch.link import Watch
from mlxops.control.watch.view import Documents, LineView, Watched
from mlxops.core import names
from mlxops.core.commands.status import Status, StatusResult
from mlxops.core.errors import Exit, UsageError
from mlxops.core.protocol import Event, Note

DEFAULT_INTERVAL_SECONDS = 2.0
SHORTEST_INTERVAL_SECONDS = 0.1
"""A shorter interval keeps the host busy with nothing else."""


def parse_interval(text: str | None) -> float:
    """Return the value of `--interval` in seconds. Raises `UsageError` (bad_duration)."""
    seconds = DEFAULT_INTERVAL_SECONDS if text is None else names.seconds(text, "--interval")
    if seconds < SHORTEST_INTERVAL_SECONDS:
        why = f"polling a host more often than every {SHORTEST_INTERVAL_SECONDS:g} s would keep it busy"
        raise UsageError("bad_duration", f"--interval {text} is too short", why=why, hint="for example: --interval 2")
    return seconds


def watch_hosts(
    targets: Sequence[HostTarget], interval: float, console: output.Console, *, json: bool, until_drift: bool
) -> tuple[HostReply[StatusResult], ...]:
    """Show what changes until Ctrl-C (exit status 130) or SIGTERM (143). Both are normal ends: print no error.

    Return the latest replies when no host can recover by itself, or with `until_drift` when there is drift.
    Raises `SystemExit`, and `BrokenPipeError` if the output has no reader.
    """
    if sys.stdout is None:  # it was closed before the start
        raise BrokenPipeError
    watched = Watched([target.name for target in targets])
    try:
        with _sigterm_as_exit():
            if not json and _is_terminal(sys.stdout):
                _show_on_terminal(targets, interval, watched, until_drift)
            else:
                form = Documents(watched) if json else LineView(watched)
                _print_lines(targets, interval, watched, console, form, until_drift)
    except KeyboardInterrupt:
        raise SystemExit(int(Exit.INTERRUPTED)) from None
    return watched.replies


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Turn SIGTERM into `SystemExit`, so that the terminal is restored and connections are closed."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_terminal(stream: TextIO) -> bool:
    """Return whether the stream can show a live view. rich draws nothing on the `unknown` terminal either."""
    return stream.isatty() and os.environ.get("TERM", "dumb").lower() not in {"dumb", "unknown"}


def _print_lines(
    targets: Sequence[HostTarget],
    interval: float,
    watched: Watched,
    console: output.Console,
    form: Documents | LineView,
    until_drift: bool,
) -> None:
    with Watch(targets, Status(), interval, console.hear) as watch:
        for observation in watch:
            if observation is None:
                continue
            for line in form.lines(observation):
                output.say(line)
            reply = observation.reply
            if observation.last and reply.error is not None and len(targets) > 1:
                console.error(reply.host, reply.error)
            _require_reader(sys.stdout)
            if until_drift and watched.drifted:
                return


def _require_reader(stream: TextIO) -> None:
    """Raise `BrokenPipeError` if the reader of a pipe or socket is gone. Write nothing."""
    mode = os.fstat(stream.fileno()).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return  # files have no readers, and macOS cannot poll devices
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    if any(event & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, event in poll.poll(0)):
        raise BrokenPipeError


def _show_on_terminal(targets: Sequence[HostTarget], interval: float, watched: Watched, until_drift: bool) -> None:
    from mlxops.control.watch.terminal import TerminalView  # imports rich

    def take_note(host: str, event: Event) -> None:
        if isinstance(event, Note):
            watched.set_note(host, event.message)

    watch = Watch(targets, Status(), interval, take_note)
    with TerminalView(watched, interval, watch.wake) as view, watch:
        view.draw()  # before the first reply it shows which hosts are being connected to
        for observation in watch:
            if observation is not None:
                watched.update(observation)
            view.draw()
            if until_drift and watched.drifted:
                return
