"""Poll hosts over connections that stay open and are made again after they break.

One agent runs on each watched host. It reads the status only on request, so that neither a slow host nor a slow reader
builds up a queue. It ends when its requests end.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Generic, Self, TypeVar, cast

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
    decoded,
    ended_early,
    envelope_for,
    lost,
    read_events,
    with_address,
)
from mlxops.core.command import Request
from mlxops.core.errors import MlxopsError
from mlxops.core.frozen import dataclass
from mlxops.core.protocol import AGAIN, HEARTBEAT, Done, Failed, Hello

HEARTBEAT_SECONDS = 5.0
"""A third of the silence after which the agent assumes that its client is gone."""
REPLY_SECONDS = 10.0
"""A host that does not answer on an open connection within this time is away."""
RETRYABLE_CODES = PASSING | {"connection_lost", "host_locked"}
"""Errors after which a host is tried again. The others need a user's action first."""
RETRYABLE_CODES_OF_KNOWN_AGENT = RETRYABLE_CODES | {"agent_missing", "agent_not_started"}
"""The same once an agent has answered: if it is missing now, it is probably being replaced."""
CLOSE_SECONDS = 1.0
"""How long closing waits for connections that are being made at that moment."""

R = TypeVar("R")


class Link(Generic[R]):
    """A connection to one host's agent. The first poll opens it, and it stays open.

    A poll on an open link is one round trip: the agent already has the request.
    """

    def __init__(self, target: HostTarget, request: Request[R], listen: Listen) -> None:
        self._target = target
        self._request = request
        self._envelope = envelope_for(target, request)
        self._listen = listen
        self._transport: Transport | None = None
        self._dialogue: Dialogue | None = None
        self._greeted = False

    @property
    def is_open(self) -> bool:
        return self._dialogue is not None

    def poll(self) -> R:
        """Repeat the request and return its result.

        Raises `MlxopsError`. After an error from the agent the link stays open. After `Unreachable` and `AgentProblem`
        it is closed, and the next poll opens it again.
        """
        try:
            outcome = self._read_outcome(self._send_request(), REPLY_SECONDS if self._greeted else SILENCE_SECONDS)
        except ConnectionLost as why:
            self.close()
            raise lost(self._target, why) from None
        except BaseException:
            self.close()
            raise
        if isinstance(outcome, Failed):
            raise outcome.error
        return cast("R", decoded(self._target, self._request.result, outcome.result))

    def send_heartbeat(self) -> None:
        """Keep the agent running. Ignore a broken connection: the next poll reports it."""
        if self._dialogue is not None:
            try:
                self._dialogue.send(HEARTBEAT)
            except ConnectionLost:
                pass

    def close(self) -> None:
        """Close the connection. The agent reads the end of its input and ends."""
        dialogue, transport, self._dialogue, self._transport = self._dialogue, self._transport, None, None
        self._greeted = False
        if dialogue is not None:
            dialogue.close()
        if transport is not None:
            transport.close()

    def _send_request(self) -> Dialogue:
        if self._dialogue is not None:
            self._dialogue.send(AGAIN)
            return self._dialogue
        self._transport = connect(self._target)
        request = replace(self._envelope, settings=with_address(self._target))
        self._dialogue = self._transport.converse(agent_argv(self._target), request.encode() + b"\n")
        return self._dialogue

    def _read_outcome(self, dialogue: Dialogue, silence: float) -> Done | Failed:
        for event in read_events(self._target, dialogue, ReadLimits(silence, NOISE_BYTES, greeted=self._greeted)):
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
class Observation(Generic[R]):
    """The outcome of one poll of one host. `at` is wall time in seconds, for display."""

    reply: HostReply[R]
    at: float
    last: bool = False
    """The host is not polled again: its error needs a user's action."""


class Watch(Generic[R]):
    """Repeat a request to every target each `interval` seconds. Iterate over it for the observations.

    The iteration ends by itself only when no host is left that may recover. A call of `wake` yields None.
    """

    def __init__(self, targets: Sequence[HostTarget], request: Request[R], interval: float, listen: Listen) -> None:
        self._request = request
        self._interval = interval
        self._polled_hosts = len(targets)
        self._queue: queue.SimpleQueue[Observation[R] | BaseException | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=self._run_thread, args=(target, listen), name=f"watch {target.name}", daemon=True)
            for target in targets
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def wake(self) -> None:
        """Let the iteration yield None once. A signal handler may call this."""
        self._queue.put(None)

    def __iter__(self) -> Iterator[Observation[R] | None]:
        while self._polled_hosts:
            item = self._queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is not None:
                self._polled_hosts -= item.last
            yield item

    def _run_thread(self, target: HostTarget, listen: Listen) -> None:
        link = Link(target, self._request, listen)
        try:
            self._poll_until_closed(link, target)
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            self._queue.put(error)
        finally:
            link.close()

    def _poll_until_closed(self, link: Link[R], target: HostTarget) -> None:
        pause, retryable = FIRST_PAUSE, RETRYABLE_CODES
        while not self._closing.is_set():
            began = time.monotonic()
            reply = _poll(link, target)
            last = reply.error is not None and not link.is_open and reply.error.code not in retryable
            self._queue.put(Observation(reply, time.time(), last))
            if last:
                return
            if link.is_open:
                pause, retryable = FIRST_PAUSE, RETRYABLE_CODES_OF_KNOWN_AGENT
                self._wait(link, began + self._interval)
            else:
                self._closing.wait(pause)
                pause = min(pause * 2, LONGEST_PAUSE)

    def _wait(self, link: Link[R], until: float) -> None:
        """Wait for the time of the next poll, and send heartbeats in between."""
        while (left := until - time.monotonic()) > 0 and not self._closing.wait(min(left, HEARTBEAT_SECONDS)):
            if left > HEARTBEAT_SECONDS:
                link.send_heartbeat()


def _poll(link: Link[R], target: HostTarget) -> HostReply[R]:
    try:
        return HostReply(target.name, link.poll())
    except MlxopsError as error:
        return HostReply(target.name, error=error)
