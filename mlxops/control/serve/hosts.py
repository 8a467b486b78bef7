"""Look at the hosts, each over one open connection, and keep what was last seen.

A host that is away is looked for again and again. So is one whose error needs a user's action, only less often.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from traceback import format_exc

from mlxops.control.client import HostReply, HostTarget
from mlxops.control.watch.link import CLOSE_SECONDS, Observation, Watch
from mlxops.control.watch.view import stamp
from mlxops.core.commands.observe import Observe, ObserveResult
from mlxops.core.errors import MlxopsError, bug
from mlxops.core.metrics import HostView, after_look
from mlxops.core.protocol import Event
from mlxops.core.tables import one_line

RETRY_SECONDS = 60.0
"""After an error that needs a user's action."""

Say = Callable[[str], None]


class Looker:
    """One host, with the thread that looks at it."""

    def __init__(self, target: HostTarget, interval: float, say: Say) -> None:
        self.target = target
        self.view = HostView(target.name)
        """Replaced as a whole, so that another thread may read it at any time."""
        self._interval = interval
        self._say = say
        self._closing = threading.Event()
        self._watch: Watch[ObserveResult] | None = None
        self._thread = threading.Thread(target=self._run, name=f"look {target.name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let the thread end. Do not wait for it."""
        self._closing.set()
        if self._watch is not None:
            self._watch.wake()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._look_until_closed()
            except Exception as error:  # noqa: BLE001 - a bug about one host must not hide the others
                self._take(HostReply(self.target.name, error=bug(error, format_exc())))
            self._closing.wait(RETRY_SECONDS)

    def _look_until_closed(self) -> None:
        """Return when closed, or after an error that lasts until a user acts."""
        with Watch([self.target], Observe(), self._interval, _ignore) as self._watch:
            for observation in self._watch if not self._closing.is_set() else ():
                if observation is None or self._closing.is_set():
                    return
                self._take(observation.reply, observation)
                error = observation.reply.error
                if error is not None and error.code == "unknown_command":
                    return  # an older agent

    def _take(self, reply: HostReply[ObserveResult], observation: Observation[ObserveResult] | None = None) -> None:
        before, at = self.view, observation.at if observation else time.time()
        self.view = after_look(before, at, reply.result, reply.error.code if reply.error else None)
        if reply.error is not None and before.error != reply.error.code:
            self._say(one_line(f"{stamp(at)} {reply.host} away: {_described(reply.error)}"))
        elif reply.error is None and before.result is None:
            self._say(one_line(f"{stamp(at)} {reply.host} up"))


def _ignore(host: str, event: Event) -> None:
    """Drop what the agent notes at each look: the metrics have it as drift."""


def _described(error: MlxopsError) -> str:
    return "; ".join(filter(None, [f"{error.code}: {error.message}", error.why, error.hint]))


class Hosts:
    """The hosts of hosts.yaml. `refresh` reads the file again if it has changed."""

    def __init__(self, find: Callable[[], Sequence[HostTarget]], path: Path | None, interval: float, say: Say) -> None:
        """Raises what `find` raises."""
        self._find = find
        self._path = path
        self._interval = interval
        self._say = say
        self._version = self._read_version()
        self._lookers = [Looker(target, interval, say) for target in find()]
        self.file_valid = True

    @property
    def views(self) -> tuple[HostView, ...]:
        return tuple(looker.view for looker in self._lookers)

    def refresh(self) -> None:
        version = self._read_version()
        if version == self._version:
            return
        self._version = version
        try:
            self._change_to(self._find())
            self.file_valid = True
        except Exception as error:  # noqa: BLE001 - the server must go on with the hosts that it has
            self.file_valid = False
            why = _described(error) if isinstance(error, MlxopsError) else f"{type(error).__name__}: {error}"
            self._say(one_line(f"{stamp(time.time())} the hosts stay as they were: {why}"))

    def _change_to(self, targets: Sequence[HostTarget]) -> None:
        before = self._lookers
        for looker in before:
            if looker.target not in targets:
                looker.close()
        self._lookers = [
            next((each for each in before if each.target == target), None) or Looker(target, self._interval, self._say)
            for target in targets
        ]
        self._say(f"{stamp(time.time())} hosts.yaml was read again: {', '.join(target.name for target in targets)}")

    def _read_version(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat() if self._path else None
        except OSError:
            return None
        return (found.st_ino, found.st_size, found.st_mtime_ns) if found else None

    def begin_close(self) -> None:
        for looker in self._lookers:
            looker.close()

    def close(self) -> None:
        """End all threads, as far as they end in time. Those that connect at that moment end with the process."""
        self.begin_close()
        deadline = time.monotonic() + CLOSE_SECONDS
        for looker in self._lookers:
            looker.join(max(0.0, deadline - time.monotonic()))
