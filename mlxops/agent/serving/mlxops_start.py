"""Start an engine's program after its modules were imported, and let a server of `http.server` finish its requests.

The engine's own Python (3.9 or later) runs it as `python mlxops_start.py FD MODULES COMMAND...`. FD is a socket,
MODULES are separated by commas, COMMAND is a script with its arguments, or `python -m MODULE` with them. It imports the
modules, sends a newline, and waits. The answer is the folder to work in, with a NUL: then it runs COMMAND as Python
would have run it. End of file means that mlxops is gone: exit, so that nothing unrecorded runs.

A server made of `http.server`, such as mlx_lm.server, gets a new meaning of SIGINT: it stops to accept connections,
finishes the open requests, and then cleans up as at Ctrl-C. A second SIGINT cuts the requests. A client that loses its
connection before the first byte may ask again, so a stream gets its first byte with its first event (`Stream`).
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # As if COMMAND was run: this file's own folder has other modules. With -m it would be the working directory, which
    # has nothing to import.
    sys.path[:1] = [] if sys.argv[4:5] == ["-m"] else [os.path.dirname(sys.argv[3])]

import contextlib
import http.server
import importlib
import runpy
import selectors
import signal
import socket
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


SILENCE_SECONDS = 50.0
"""How long a stream may keep back its head. Proxies commonly end a connection that is silent for a minute."""


class Stream:
    """A connection that keeps back the head of an event stream, and its comments, until the first event.

    mlx-lm sends the head at once, and comments while it reads the prompt. LiteLLM repeats no request whose answer has
    begun, and makes an empty answer of one that ends then.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._kept = b""
        self._until = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def sendall(self, data: Any) -> None:
        part = bytes(data)
        if part.startswith(b"HTTP/") and b"text/event-stream" in part:
            self._kept, self._until = part, time.monotonic() + SILENCE_SECONDS
        elif self._kept and part.startswith(b":") and time.monotonic() < self._until:
            self._check_client()
            self._kept += part
        else:
            kept, self._kept = self._kept, b""
            self._connection.sendall(kept + part)

    def flush(self) -> None:
        if self._kept:
            self.sendall(b"")

    def _check_client(self) -> None:
        """Raise `BrokenPipeError` if the client is gone, as sending the comment would have done."""
        with contextlib.suppress(BlockingIOError):
            if not self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                raise BrokenPipeError


class FinishingServer(http.server.ThreadingHTTPServer):
    """Replaces ThreadingHTTPServer, which cuts its open requests when it ends."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._open = 0
        self._changed = threading.Condition()
        super().__init__(*arguments, **named)

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until SIGINT. Raises KeyboardInterrupt when no request is open any more."""
        interrupted: list[int] = []
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        with selectors.DefaultSelector() as selector, reader, writer:
            selector.register(self, selectors.EVENT_READ)
            selector.register(reader, selectors.EVENT_READ)
            wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
            signal.signal(signal.SIGINT, lambda number, frame: interrupted.append(number))
            while not interrupted:
                self._handle_ready(_ready(selector, None), reader)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for _ in range(self.request_queue_size):  # connections that the kernel has accepted already
                self._handle_ready(_ready(selector, 0), reader)
            signal.set_wakeup_fd(wakeup)
        self.server_close()
        with self._changed:
            self._changed.wait_for(lambda: self._open == 0)
        raise KeyboardInterrupt

    def shutdown(self) -> None:
        """Do nothing: `serve_forever` has ended, or the process is about to."""

    def _handle_ready(self, ready: Iterable[object], reader: socket.socket) -> None:
        for each in ready:
            if each is reader:
                reader.recv(4096)
            else:
                self._handle_request_noblock()  # type: ignore[attr-defined]  # not in typeshed

    def process_request(self, request: Any, client_address: Any) -> None:
        self._count(1)
        super().process_request(request, client_address)

    def finish_request(self, request: Any, client_address: Any) -> None:
        stream = Stream(request)
        super().finish_request(stream, client_address)  # type: ignore[arg-type]  # it is used as a socket
        stream.flush()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            self._wait_for_request(request)
            super().process_request_thread(request, client_address)
        finally:
            self._count(-1)

    def _wait_for_request(self, connection: socket.socket) -> None:
        """Wait until the client sends something. Until then the connection does not count as an open request."""
        with contextlib.suppress(OSError):
            try:
                connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._count(-1)
                try:
                    connection.recv(1, socket.MSG_PEEK)
                finally:
                    self._count(1)

    def _count(self, change: int) -> None:
        with self._changed:
            self._open += change
            self._changed.notify_all()


def _ready(selector: selectors.BaseSelector, timeout: float | None) -> list[object]:
    return [key.fileobj for key, _ in selector.select(timeout)]


def _import(module: str) -> None:
    """Import a module. If this version of the program does not have it, go on: it imports what it needs itself."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise


def _received(gate: socket.socket) -> bytes:
    """Return the folder that is sent. Raises `SystemExit` at the end of file."""
    data = b""
    while not data.endswith(b"\0"):
        more = gate.recv(4096)
        if not more:
            raise SystemExit(0)
        data += more
    return data[:-1]


def _run(command: Sequence[str]) -> None:
    if command[1:2] != ["-m"]:
        sys.argv = [*command]
        runpy.run_path(command[0], run_name="__main__")
        return
    # Python warns of a module that it has imported already.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
    sys.argv = [*command[2:]]
    runpy.run_module(command[2], run_name="__main__", alter_sys=True)


def main() -> None:
    fd, modules, *command = sys.argv[1:]
    http.server.ThreadingHTTPServer = FinishingServer  # type: ignore[misc]
    for module in modules.split(","):
        _import(module)
    with socket.socket(fileno=int(fd)) as gate:
        with contextlib.suppress(OSError):  # the gate may be open already, and then mlxops has closed it
            gate.sendall(b"\n")
        os.chdir(_received(gate))
    _run(command)


if __name__ == "__main__":
    main()
