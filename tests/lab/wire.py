"""A TCP proxy that can do to a connection what networks do: delay it, stall it, cut it."""

from __future__ import annotations

import selectors
import socket
import struct
import threading
import time
from collections import deque

from tests.lab.service import Service


class _Side:
    """What one end has sent and the other has not got yet."""

    def __init__(self, source: socket.socket, *, target: bool) -> None:
        self.source = source
        self.target = target
        self.peer: _Side | None = None
        self.waiting: deque[tuple[float, bytes]] = deque()
        self.ended = False
        self.shut = False


class Wire(Service):
    """Listens on `port` (system-chosen) of `address`, and passes on to `target`; without one it never answers.

    The switches may be thrown at any time, from any thread, and hold for open connections too.
    """

    def __init__(self, target: tuple[str, int] | None, *, address: str = "127.0.0.1", delay: float = 0.0) -> None:
        self.delay = delay
        """Seconds that each piece of data takes, in each direction."""
        self.stalled = False
        """Connections stay open, nothing moves."""
        self.cut_after: int | None = None
        """Bytes from the target after which all connections are reset."""
        self.resets = True
        """Otherwise they are closed, as those of a program that ends."""
        self.passed = 0
        """Bytes that came from the target so far."""
        self.accepted = 0
        """Connections so far."""
        self._target = target
        self._listener = socket.create_server((address, 0))
        self.address, self.port = address, int(self._listener.getsockname()[1])
        self._sides: list[_Side] = []
        self._wake, self._woken = socket.socketpair()
        self._cut = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="wire")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._wake.send(b"x")
        self._thread.join()
        for sock in (self._wake, self._woken, self._listener):
            sock.close()

    def cut(self) -> None:
        """Reset every open connection; new ones are accepted."""
        self._cut.set()
        self._wake.send(b"x")

    def _run(self) -> None:
        while not self._stopping.is_set():
            with selectors.DefaultSelector() as ready:
                ready.register(self._listener, selectors.EVENT_READ)
                ready.register(self._woken, selectors.EVENT_READ)
                if not self.stalled:
                    for side in self._sides:
                        if not side.ended and len(side.waiting) < 64:
                            ready.register(side.source, selectors.EVENT_READ)
                events = [key.fileobj for key, _ in ready.select(self._pause())]
            if self._woken in events:
                self._woken.recv(64)
            if self._cut.is_set():
                self._cut.clear()
                self._reset()
                continue
            if self._listener in events:
                self._accept()
            for side in list(self._sides):
                if side.source in events:
                    self._read(side)
            if not self.stalled:
                self._deliver()
        self._reset()

    def _pause(self) -> float:
        """Seconds until there may be something to deliver; the switches are looked at as often."""
        due = [side.waiting[0][0] for side in self._sides if side.waiting]
        return min(0.02, max(0.0, min(due) - time.monotonic())) if due and not self.stalled else 0.02

    def _accept(self) -> None:
        inner, _ = self._listener.accept()
        self.accepted += 1
        near = _Side(inner, target=False)
        self._sides.append(near)
        if self._target is None:
            near.ended = True
            return
        try:
            outer = socket.create_connection(self._target, timeout=5)
        except OSError:
            self._drop(near)
            return
        far = _Side(outer, target=True)
        near.peer, far.peer = far, near
        for sock in (inner, outer):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sides.append(far)

    def _read(self, side: _Side) -> None:
        try:
            data = side.source.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            self._drop(side)
            return
        if not data:
            side.ended = True
        elif side.target:
            self.passed += len(data)
        side.waiting.append((time.monotonic() + self.delay, data))
        if self.cut_after is not None and self.passed >= self.cut_after:
            self.cut_after = None
            self._reset()

    def _deliver(self) -> None:
        now = time.monotonic()
        for side in list(self._sides):
            while side.waiting and side.waiting[0][0] <= now and side.peer is not None:
                _, data = side.waiting.popleft()
                try:
                    if not data:
                        side.peer.source.shutdown(socket.SHUT_WR)
                        side.shut = True
                        continue
                    sent = side.peer.source.send(data)
                except BlockingIOError:
                    side.waiting.appendleft((now + 0.001, data))
                    break
                except OSError:
                    self._drop(side)
                    break
                if sent < len(data):
                    side.waiting.appendleft((now + 0.001, data[sent:]))
                    break
            if side.shut and side.peer is not None and side.peer.shut:
                self._drop(side)

    def _drop(self, side: _Side) -> None:
        for each in (side, side.peer):
            if each is not None and each in self._sides:
                self._sides.remove(each)
                each.waiting.clear()
                each.source.close()

    def _reset(self) -> None:
        for side in self._sides:
            if self.resets:
                # With a linger time of zero, close sends RST.
                side.source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            side.source.close()
        self._sides.clear()
