"""`status --watch`, from the first look to the last."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from mlxops.control import render
from mlxops.control.client import HostReply, HostTarget
from mlxops.control.watch.link import Observation, Watch
from mlxops.control.watch.screen import Screen, is_screen, still_read
from mlxops.control.watch.view import Documents, LineView, Watched, clock, frame
from mlxops.core import names
from mlxops.core.errors import Exit, UsageError
from mlxops.core.protocol import Event, Note

INTERVAL_SECONDS = 2.0
LEAST_SECONDS = 0.1
"""A host that is looked at more often has nothing else to do."""


def interval_of(text: str | None) -> float:
    """Raises `UsageError`."""
    seconds = INTERVAL_SECONDS if text is None else names.seconds(text, "--interval")
    if seconds < LEAST_SECONDS:
        why = f"a look more often than every {LEAST_SECONDS:g} s would keep the host busy"
        raise UsageError("bad_duration", f"--interval {text} is too short", why=why, hint="for example: --interval 2")
    return seconds


def stay(
    targets: Sequence[HostTarget], interval: float, console: render.Console, *, json: bool, until_drift: bool
) -> tuple[HostReply, ...]:
    """Show what changes until Ctrl-C (130) or SIGTERM (143), both of which are its usual end and so need no words.

    Returns, with what was seen last, only when no host is left that may come back by itself, or with `until_drift` when
    registry and life disagree. Raises `SystemExit`, `BrokenPipeError`.
    """
    if sys.stdout is None:  # closed before we began
        raise BrokenPipeError
    watched = Watched([target.name for target in targets])
    try:
        with _terminated():
            if not json and is_screen(sys.stdout):
                _on_screen(targets, interval, watched, until_drift)
            else:
                _in_lines(
                    targets, interval, watched, console, Documents(watched) if json else LineView(watched), until_drift
                )
    except KeyboardInterrupt:
        raise SystemExit(int(Exit.INTERRUPTED)) from None
    return watched.answers


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM goes the way of Ctrl-C: what was drawn is taken away, what was opened is closed."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _in_lines(
    targets: Sequence[HostTarget],
    interval: float,
    watched: Watched,
    console: render.Console,
    form: Documents | LineView,
    until_drift: bool,
) -> None:
    with Watch(targets, interval, console.hear) as watch:
        for sighting in _sightings(watch):
            for line in form.lines(sighting):
                render.say(line)
            if sighting.last and sighting.answer.error is not None and len(targets) > 1:
                console.error(sighting.answer.host, sighting.answer.error)
            still_read(sys.stdout)
            if until_drift and watched.drifted:
                return


def _sightings(watch: Watch) -> Iterator[Observation]:
    return (each for each in watch if each is not None)


def _on_screen(targets: Sequence[HostTarget], interval: float, watched: Watched, until_drift: bool) -> None:
    def hear(host: str, event: Event) -> None:
        if isinstance(event, Note):
            watched.note(host, event.message)

    watch = Watch(targets, interval, hear)
    with Screen(watch.wake) as screen, watch:
        at = ""
        for sighting in _with_a_first_frame(watch):
            if sighting is not None:
                watched.take(sighting)
                at = clock(sighting.at)
            width, height = screen.size
            screen.draw(frame(watched, f"mlxops status  {at or '-'}  every {interval:g} s", width, height))
            if until_drift and watched.drifted:
                return


def _with_a_first_frame(watch: Watch) -> Iterator[Observation | None]:
    """Before anything is known, there is something to be seen: who is being connected to."""
    yield None
    yield from watch
