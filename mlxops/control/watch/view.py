"""The state of the watched hosts, and its forms for a pipe (lines) and for a program (documents).

`mlxops.control.watch.terminal` has the form for a terminal.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from mlxops.control.client import HostReply
from mlxops.control.output import document_line
from mlxops.control.watch.link import Observation
from mlxops.core import wire
from mlxops.core.commands.status import StatusResult, show
from mlxops.core.errors import MlxopsError
from mlxops.core.frozen import dataclass
from mlxops.core.status_diff import Change, changes, differ_beyond_memory
from mlxops.core.tables import one_line

MAX_KEPT_CHANGES = 50


@dataclass(frozen=True)
class HostState:
    """What is known of one host. Times are wall time in seconds, for display."""

    host: str
    result: StatusResult | None = None
    """Its last status."""
    error: MlxopsError | None = None
    """Why the last poll failed; None if it succeeded."""
    reachable: bool = True
    last_seen: float | None = None
    away_since: float | None = None
    note: str = ""
    """The latest note from its agent."""

    @property
    def known(self) -> bool:
        """Whether the host was polled at least once, with or without success."""
        return self.result is not None or self.error is not None

    @property
    def reply(self) -> HostReply[StatusResult]:
        """Return the last error, else the last status. A status from before the error may be wrong."""
        return HostReply(self.host, error=self.error) if self.error else HostReply(self.host, self.result)

    def away_text(self) -> str:
        """Return since when and why the host gives no status. Only for a state with an error."""
        error = self.error
        assert error is not None and self.away_since is not None
        # A reachable host whose agent refuses the request is not away.
        problem = "no status" if self.reachable else "away"
        return f"{problem} since {stamp(self.away_since)}: {error.code}: {error.message}"


@dataclass(frozen=True)
class ChangeEvent:
    """A change, with its host and the time at which it was observed."""

    at: float
    host: str
    change: Change

    def __str__(self) -> str:
        """Return `2026-11-23T08:12:03Z studio 8100 idle -> loading jerry-xl`; `-` if it is about no port."""
        return f"{stamp(self.at)} {self._text()}"

    def short(self) -> str:
        """Return the change as `__str__` does, with the time of day only."""
        return f"{clock(self.at)} {self._text()}"

    def _text(self) -> str:
        return one_line(f"{self.host} {self.change.port or '-'} {self.change.text}")


def stamp(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def clock(at: float) -> str:
    return time.strftime("%H:%M:%SZ", time.gmtime(at))


class Watched:
    """The watched hosts and their recent changes."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._states = {host: HostState(host) for host in hosts}
        self._recent: list[ChangeEvent] = []
        self.last_observed: float | None = None
        """Wall time of the latest observation."""

    @property
    def states(self) -> tuple[HostState, ...]:
        return tuple(self._states.values())

    @property
    def replies(self) -> tuple[HostReply[StatusResult], ...]:
        return tuple(state.reply for state in self.states)

    @property
    def complete(self) -> bool:
        """Whether every host was polled at least once."""
        return all(state.known for state in self.states)

    @property
    def drifted(self) -> bool:
        """Whether every host was polled at least once, and at least one has drift."""
        return self.complete and any(state.reply.result.drift for state in self.states if state.reply.result)

    @property
    def recent_changes(self) -> tuple[ChangeEvent, ...]:
        return tuple(self._recent)

    def state_of(self, host: str) -> HostState:
        return self._states[host]

    def set_note(self, host: str, text: str) -> None:
        self._states[host] = replace(self._states[host], note=text)

    def update(self, observation: Observation[StatusResult]) -> tuple[ChangeEvent, ...]:
        """Take in an observation and return what changed. The first observation of a host is no change."""
        self.last_observed = observation.at
        before = self._states[observation.reply.host]
        after = _next_state(before, observation)
        self._states[before.host] = after
        changes = _changes(before, after) if before.known else ()
        events = tuple(ChangeEvent(observation.at, before.host, change) for change in changes)
        self._recent = [*self._recent, *events][-MAX_KEPT_CHANGES:]
        return events


def _next_state(before: HostState, observation: Observation[StatusResult]) -> HostState:
    reply = observation.reply
    if reply.error is None:
        return replace(
            before, result=reply.result, error=None, reachable=True, last_seen=observation.at, away_since=None
        )
    # When the host went away is not known. It was there when it was last seen.
    since = before.away_since or before.last_seen or observation.at
    return replace(before, error=reply.error, reachable=reply.reachable, away_since=since, note="")


def _changes(before: HostState, after: HostState) -> Iterator[Change]:
    if after.error is not None:
        if before.error is None or before.error.code != after.error.code:
            yield Change("host", None, after.away_text())
        return
    if before.error is not None and before.away_since is not None:
        yield Change("host", None, f"back, was away since {stamp(before.away_since)}")
    if before.result is not None and after.result is not None:
        yield from changes(before.result, after.result)


class Documents:
    """The form for a program: one host's status document, each time anything but memory changes there."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched

    def lines(self, observation: Observation[StatusResult]) -> list[str]:
        host = observation.reply.host
        before = self._watched.state_of(host)
        events = self._watched.update(observation)
        after = self._watched.state_of(host)
        if before.known and not events and not _differ(before, after):
            return []
        fields = {
            **(wire.encode(observation.reply.result) or {}),
            "at": stamp(observation.at),
            "away_since": stamp(after.away_since) if after.away_since is not None else None,
            "changes": [wire.encode(event.change) for event in events],
        }
        return [document_line("status", [observation.reply], {host: fields})]


def _differ(before: HostState, after: HostState) -> bool:
    if before.error is not None or after.error is not None:
        return False  # a changed error is a change event already
    if before.result is None or after.result is None:
        return before.result is not after.result
    return differ_beyond_memory(before.result, after.result)


class LineView:
    """The form for a pipe: the status table once every host was polled, then one line for each change."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._table_shown = False

    def lines(self, observation: Observation[StatusResult]) -> list[str]:
        events = self._watched.update(observation)
        if self._table_shown:
            return list(map(str, events))
        if not self._watched.complete:
            return []
        self._table_shown = True
        return [show(self._watched.replies)]
