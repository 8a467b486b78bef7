"""End a server. Every path that stops one ends it here: a stop, a swap, a failed load, a cancelled one.

The server gets the signals that its engine prefers, then time for its size: if a process is killed while it holds
hundreds of gigabytes, a Mac may not get them back before its next reboot. So a server that holds more than the host's
`kill_limit` is never killed without `--kill`. If it has not ended in time, the stop ends with `still_ending`: the
server stays recorded, its port is `draining`, and a later stop, load or reconcile finishes it.

The record says that the server is being stopped before its first signal. So the port is `draining` also if the worker
is killed during the stop, and the next stop does not interrupt the server's cleanup.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace

from mlxops.agent.engines import ENGINES
from mlxops.agent.engines.base import Engine
from mlxops.agent.host.system import System
from mlxops.agent.serving.processes import Signaller
from mlxops.agent.state.store import Store, utc_now
from mlxops.core.errors import Busy, MlxopsError, Refused
from mlxops.core.frozen import dataclass
from mlxops.core.memory import release_seconds
from mlxops.core.protocol import Event, Note, Phase, Progress
from mlxops.core.records import Run
from mlxops.core.settings import NO_LIMIT, Settings
from mlxops.core.text import amount

SIGNAL_SECONDS = 10.0
"""Time to end after a signal before the next one is sent."""
END_SECONDS = 30.0
"""Time to end after the last signal, for a server that holds nothing."""
GRACE_SECONDS = 5.0
"""Time to end before the kill, for a server that has had all the time of an earlier stop."""
KILL_SECONDS = 30.0
"""Time for the kernel to remove a killed server that holds nothing."""
LEFTOVER_SECONDS = 2.0
"""Time for a server's children and the processes above it to end by themselves after it."""
SHOW_SECONDS = 1.0
QUIET_SECONDS = 2.0
"""A server that ends this fast needs no message."""
STILL_ENDING = "still_ending"
"""The code of the error for a server that has not ended in time and is not killed."""
MAC_KILL_LIMIT = 64_000_000_000


@dataclass(frozen=True)
class Terms:
    """What a stop may do."""

    command: str
    """The command that stops the server, for its record."""
    kill_limit: int | None = None
    """Bytes. A server that holds more is not killed; None: any server may be."""
    drain: float | None = None
    """Seconds for the open requests of an engine that finishes them after the first signal; None: it has none."""


@dataclass(frozen=True)
class Ended:
    seconds: float
    killed: bool
    """It did not end after the signals and was killed."""


def end_seconds(held: int | None) -> float:
    """Return the time to end after the last signal for a server that holds so many bytes; None: not known."""
    return END_SECONDS + release_seconds(held)


def longest_seconds(held: int | None) -> float:
    """Return how long `end` may take for a server without open requests that holds so many bytes."""
    kill = KILL_SECONDS + release_seconds(held)
    return SIGNAL_SECONDS + end_seconds(held) + LEFTOVER_SECONDS + end_seconds(held) + kill


def kill_limit(settings: Settings) -> int | None:
    """Return the bytes above which a server of this host is not killed; None for no limit."""
    if settings.kill_limit is not None:
        return None if settings.kill_limit == NO_LIMIT else settings.kill_limit
    return MAC_KILL_LIMIT if sys.platform == "darwin" else None


def may_kill(limit: int | None, held: int | None) -> bool:
    """Return whether a server that holds so much may be killed. If that is not known, only without a limit."""
    return limit is None or (held is not None and held <= limit)


def end(
    system: System,
    run: Run,
    terms: Terms,
    *,
    store: Store | None = None,
    emit: Callable[[Event], object] = lambda event: None,
    reap: Callable[[], object] = lambda: None,
) -> Ended:
    """End the recorded server. Prove that no process of it is left.

    `store`: where the record of the stop is kept; None for a server whose port is another one's. `reap` collects
    zombies that are this process's own children.

    Raises `Busy` (still_ending) if it holds more than the limit and has not ended; `Refused`, and signals nothing, if
    its group has a process that is not proven ours (not_ours), or if it may outlive this stop and that cannot be
    recorded (state_unwritable); `MlxopsError` (will_not_die) if it survives SIGKILL.
    """
    began = time.monotonic()
    signaller = Signaller(system, run, reap)
    waiting = _Waiting(system, signaller, run, emit)
    recorded = None
    if store is not None and (stopping := signaller.prove()):
        since = run.stopping_since or utc_now()
        recorded = replace(run, stopping=stopping, stopped_by=terms.command, stopping_since=since)
        _record_stop(store, recorded, run, terms, waiting)
    if _ask(signaller, run, terms, waiting) and _end_rest(signaller, waiting):
        return Ended(time.monotonic() - began, killed=False)
    held = waiting.measure()
    if not may_kill(terms.kill_limit, waiting.held):
        if store is not None and recorded is not None:
            with contextlib.suppress(OSError, MlxopsError):  # then a later stop gives it the whole time again
                store.save_run(replace(recorded, overdue=True))
        pid = run.pid_among(signaller.alive)
        raise _still_ending(run, pid, terms.kill_limit, held, recorded=store is not None)
    killed = signaller.send(signal.SIGKILL)
    if not waiting.ended(KILL_SECONDS + release_seconds(waiting.held)):
        raise _will_not_die(time.monotonic() - began)
    return Ended(time.monotonic() - began, killed)


def _ask(signaller: Signaller, run: Run, terms: Terms, waiting: _Waiting) -> bool:
    """Send the server the signals of its engine until it has ended. Return whether it has."""
    *earlier, last = steps = _steps(ENGINES.get(run.engine), run, terms, waiting.held)
    for step, (number, seconds) in enumerate(earlier):
        if not signaller.ignores(number):
            longest = sum(wait for _, wait in steps[step:])
            if not signaller.ask(number) or waiting.ended(seconds, longest, signalled_only=True):
                return True
            if terms.drain is not None and step == 0:
                waiting.note(f"open requests did not end within {terms.drain:.4g} s and are cut off")
    return not signaller.ask(last[0]) or waiting.ended(last[1], signalled_only=True)


def _steps(engine: Engine | None, run: Run, terms: Terms, held: int | None) -> list[tuple[signal.Signals, float]]:
    """Return the signals for a server, and how long each may take.

    A server that was asked before gets only SIGTERM: a second SIGINT interrupts its cleanup. One that has had its time
    and may be killed now gets a short one.
    """
    if run.overdue and terms.kill_limit is None:
        return [(signal.SIGTERM, GRACE_SECONDS)]
    if engine is None or run.stopping_since is not None:
        return [(signal.SIGTERM, max(terms.drain or 0.0, end_seconds(held)))]
    if terms.drain is None:
        signals, first = engine.stop_signals, SIGNAL_SECONDS
    else:
        signals, first = (engine.stop_signals[0], *engine.cut_signals), terms.drain
    waits = [first, *[SIGNAL_SECONDS] * (len(signals) - 2), end_seconds(held)]
    return list(zip(signals, waits[-len(signals) :], strict=True))


def _end_rest(signaller: Signaller, waiting: _Waiting) -> bool:
    """End the processes that outlive the server. Return whether none is left."""
    if waiting.ended(LEFTOVER_SECONDS):
        return True
    signaller.send(signal.SIGTERM)
    return waiting.ended(end_seconds(waiting.held))


class _Waiting:
    """Waits for a server's end, and shows how long that may take and what it has released."""

    def __init__(self, system: System, signaller: Signaller, run: Run, emit: Callable[[Event], object]) -> None:
        self.held: int | None = None
        """The most that it held so far; None if that is not known."""
        self._system = system
        self._signaller = signaller
        self._name = f"{run.model or 'the server'} on port {run.port}"
        self._emit = emit
        self._released = 0
        self._show_at = 0.0
        self._left = ""
        self.measure()

    def measure(self) -> int | None:
        """Return what it holds now; None if that is not known."""
        try:
            now = self._system.memory(self._signaller.alive)
        except Refused:  # the processes cannot be observed for a moment: do not stop half way
            return None
        self.held = max((size for size in (self.held, now) if size is not None), default=None)
        return now

    def note(self, message: str) -> None:
        self._emit(Note.of(message, "warning"))

    def ended(self, seconds: float, longest: float = 0.0, *, signalled_only: bool = False) -> bool:
        """Wait up to `seconds`; return whether the server, or the processes that were signalled, have ended.

        `longest`: the time until the server is killed or given up, if more than one wait follows.
        """
        self._show_at = time.monotonic() + QUIET_SECONDS
        self._left = f"{self._name} holds {_shown(self.held)}, and may take {max(seconds, longest):.0f} s to end"
        return self._signaller.ended(seconds, signalled_only=signalled_only, tick=self._show)

    def _show(self) -> None:
        if time.monotonic() < self._show_at:
            return
        self._show_at = time.monotonic() + SHOW_SECONDS
        if self._left:
            self._emit(Phase("ending", self._left))
            self._left = ""
        now = self.measure()
        if self.held is None or now is None:
            return
        released = self.held - now
        if released > self._released + self.held // 100:
            self._released = released
            self._emit(Progress("ending", released, self.held))


def _record_stop(store: Store, recorded: Run, before: Run, terms: Terms, waiting: _Waiting) -> None:
    """Record that the server is being stopped. Raises `Refused` (state_unwritable) if the server may not be killed:
    without the record, a later command would take one that has not ended for a serving one."""
    try:
        store.save_run(recorded)
    except (OSError, MlxopsError) as error:
        why = f"{error.message}: {error.why}" if isinstance(error, MlxopsError) else str(error)
        if isinstance(error, Refused) and not may_kill(terms.kill_limit, waiting.held) and not _is_known(before):
            error.why = f"{error.why}; without its record, the stop of a server that may not be killed does not begin"
            raise
        waiting.note(f"the stop could not be recorded: {why}")


def _is_known(run: Run) -> bool:
    """Return whether its record already says that the server is to be stopped, or that its load did not end."""
    return run.stopping_since is not None or (run.proven_at is None and not run.adopted)


def _still_ending(run: Run, pid: int, limit: int | None, held: int | None, *, recorded: bool) -> Busy:
    """Return the error. `pid`: of a process that is still there.

    `recorded`: the server has the port's record, so that `reconcile` can finish the stop.
    """
    assert limit is not None
    again = f"{run.port}{'' if recorded else ' --force'}"
    finish = "when it has ended: `mlxctl reconcile`" if recorded else f"wait for it again: `mlxctl unload {again}`"
    return Busy(
        STILL_ENDING,
        f"{run.model or 'the server'} on port {run.port}, pid {pid}, has not ended yet and holds {_shown(held)}",
        why=f"a server with more than {amount(limit)} (kill_limit) is not killed: its memory may then be "
        "lost until the next reboot",
        hint=f"{finish}; or kill it: `mlxctl unload {again} --kill`",
        details={"port": run.port, "model": run.model or None, "pid": pid, "held_bytes": held},
    )


def _shown(held: int | None) -> str:
    return "an unknown amount of memory" if held is None else amount(held)


def _will_not_die(seconds: float) -> MlxopsError:
    return MlxopsError(
        "will_not_die",
        f"the server's processes are still there {seconds:.0f} s after they were asked to end",
        why="they were killed, but the kernel has not removed them; the usual cause is a disk or driver that hangs",
        hint="check again: `mlxctl status`; if they stay, reboot the host",
    )
