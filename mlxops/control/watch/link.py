"""Looking at hosts again and again, over connections that stay open and come back by themselves.

One agent lives on each host for as long as it is watched. It looks when it is asked to and at no other time, so a slow
host or a slow reader never makes a queue; and when the asking ends, so does the agent.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from mlxops.control.channel import NOISE_BYTES, ConnectionLost, Dialogue, ReadLimits, Transport
from mlxops.control.client import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    PASSING,
    SILENCE_SECONDS,
    HostReply,
    HostTarget,
    Listen,
    agent_argv,
    connect,
    ended_early,
    envelope_for,
    heard,
    lost,
    with_address,
)
from mlxops.core.command import AnyRequest
from mlxops.core.commands.status import Status
from mlxops.core.errors import MlxopsError
from mlxops.core.protocol import AGAIN, HEARTBEAT, Done, Failed, Hello

HEARTBEAT_SECONDS = 5.0
"""A third of the silence after which the agent takes us for gone."""
GONE_SECONDS = 10.0
"""A host that does not answer for so long on an open connection is away."""
COMES_BACK = PASSING | {"connection_lost", "host_locked"}
"""Ways of being away after which a host is tried again. For the others somebody has to do something first; but an agent
that was there and is missing is probably being replaced."""
LEAVING_SECONDS = 1.0
"""How long leaving waits for connections that are just being made."""


class Link:
    """A connection to one host's agent that is opened when it is first needed and then stays open.

    One `look` on an open link is one round trip: the request is known there already.
    """

    def __init__(self, target: HostTarget, request: AnyRequest, listen: Listen) -> None:
        self._target = target
        self._envelope = envelope_for(target, request)
        self._listen = listen
        self._transport: Transport | None = None
        self._dialogue: Dialogue | None = None
        self._greeted = False

    @property
    def is_open(self) -> bool:
        return self._dialogue is not None

    def look(self) -> Mapping[str, object]:
        """The result of the request, as it is now.

        Raises `MlxopsError`: what the agent says, and then the link stays open; or `Unreachable` and `AgentProblem`,
        and then it is closed. The next look opens it again.
        """
        try:
            outcome = self._hear(self._asked(), GONE_SECONDS if self._greeted else SILENCE_SECONDS)
        except ConnectionLost as why:
            self.close()
            raise lost(self._target, why) from None
        except BaseException:
            self.close()
            raise
        if isinstance(outcome, Failed):
            raise outcome.error
        return outcome.result

    def beat(self) -> None:
        """Say that we are still here. A link that is broken is found so by the next look."""
        if self._dialogue is not None:
            try:
                self._dialogue.send(HEARTBEAT)
            except ConnectionLost:
                pass

    def close(self) -> None:
        """The agent sees the end of its input, and ends."""
        dialogue, transport, self._dialogue, self._transport = self._dialogue, self._transport, None, None
        self._greeted = False
        if dialogue is not None:
            dialogue.close()
        if transport is not None:
            transport.close()

    def _asked(self) -> Dialogue:
        if self._dialogue is not None:
            self._dialogue.send(AGAIN)
            return self._dialogue
        self._transport = connect(self._target)
        request = replace(self._envelope, settings=with_address(self._target))
        self._dialogue = self._transport.converse(agent_argv(self._target), request.encode() + b"\n")
        return self._dialogue

    def _hear(self, dialogue: Dialogue, silence: float) -> Done | Failed:
        for event in heard(self._target, dialogue, ReadLimits(silence, NOISE_BYTES, greeted=self._greeted)):
            match event:
                case None:
                    continue
                case Hello():
                    self._greeted = True
                case Done() | Failed() as outcome:
                    return outcome
                case _:
                    self._listen(self._target.name, event)
        raise ended_early(self._target, dialogue.wait(silence), greeted=self._greeted)


@dataclass(frozen=True)
class Observation:
    """What one look at one host brought, and when: wall time in seconds, for display."""

    answer: HostReply[Mapping[str, object]]
    at: float
    last: bool = False
    """It is not looked at again: what keeps it away does not pass by itself."""


class Watch:
    """Every target is looked at each `interval` seconds; iterate over it for what is seen.

    It ends by itself only when no host is left that may come back. None is what `wake` brings.
    """

    def __init__(self, targets: Sequence[HostTarget], interval: float, listen: Listen) -> None:
        self._interval = interval
        self._watching = len(targets)
        self._news: queue.SimpleQueue[Observation | BaseException | None] = queue.SimpleQueue()
        self._leaving = threading.Event()
        self._threads = [
            threading.Thread(target=self._keep_looking, args=(target, listen), name=f"watch {target.name}", daemon=True)
            for target in targets
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        deadline = time.monotonic() + LEAVING_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def wake(self) -> None:
        """Have the iteration go round once, from a signal's handler for instance."""
        self._news.put(None)

    def __iter__(self) -> Iterator[Observation | None]:
        while self._watching:
            news = self._news.get()
            if isinstance(news, BaseException):
                raise news
            if news is not None:
                self._watching -= news.last
            yield news

    def _keep_looking(self, target: HostTarget, listen: Listen) -> None:
        link = Link(target, Status(), listen)
        try:
            self._look_until_told(link, target)
        except BaseException as error:  # noqa: BLE001 - carried to the main thread, which is the boundary
            self._news.put(error)
        finally:
            link.close()

    def _look_until_told(self, link: Link, target: HostTarget) -> None:
        pause, comes_back = FIRST_PAUSE, COMES_BACK
        while not self._leaving.is_set():
            began = time.monotonic()
            answer = _look(link, target)
            last = answer.error is not None and not link.is_open and answer.error.code not in comes_back
            self._news.put(Observation(answer, time.time(), last))
            if last:
                return
            if link.is_open:
                pause, comes_back = FIRST_PAUSE, COMES_BACK | {"agent_missing", "agent_not_started"}
                self._wait(link, began + self._interval)
            else:
                self._leaving.wait(pause)
                pause = min(pause * 2, LONGEST_PAUSE)

    def _wait(self, link: Link, until: float) -> None:
        """Until it is time for the next look; meanwhile the agent hears that we are still here."""
        while (left := until - time.monotonic()) > 0 and not self._leaving.wait(min(left, HEARTBEAT_SECONDS)):
            if left > HEARTBEAT_SECONDS:
                link.beat()


def _look(link: Link, target: HostTarget) -> HostReply[Mapping[str, object]]:
    try:
        return HostReply(target.name, link.look())
    except MlxopsError as error:
        return HostReply(target.name, error=error)
