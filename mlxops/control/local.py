"""The runner that needs no connection: commands of this machine, under the rules of a remote session."""

from __future__ import annotations

import os
import pwd
import selectors
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from mlxops.control.channel import ConnectionLost, Dialogue, Ended, LineBuffer, ReadLimits, Session, Tail
from mlxops.control.ssh.config import words

_PIPE = 1024 * 1024
"""Bytes, the most that a pipe holds (Linux, for anybody but root)."""


class LocalTransport:
    """The same, without SSH: in the home directory, out of reach of this terminal's Ctrl-C."""

    def start(self, argv: Sequence[str], data: bytes) -> Session:
        process = _started(argv)
        return process if isinstance(process, _NeverStarted) else _LocalSession(process, data)

    def converse(self, argv: Sequence[str], data: bytes) -> Dialogue:
        process = _started(argv)
        return process if isinstance(process, _NeverStarted) else _LocalDialogue(process, data)

    def close(self) -> None:
        pass


def _started(argv: Sequence[str]) -> subprocess.Popen[bytes] | _NeverStarted:
    home = os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir
    expanded = [f"{home}/{argument[2:]}" if argument.startswith("~/") else argument for argument in argv]
    if any("\0" in argument for argument in expanded):
        raise ValueError("an argument cannot contain NUL")
    try:
        process = subprocess.Popen(
            expanded,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=home if os.path.isdir(home) else "/",
            process_group=0,
        )
    except OSError as error:
        # What a shell would answer, so that both sides of the seam fail alike.
        status = 127 if isinstance(error, FileNotFoundError) else 126
        return _NeverStarted(Ended(status, f"{expanded[0]}: {words(error)}"))
    return process


class _NeverStarted:
    def __init__(self, ended: Ended) -> None:
        self._ended = ended

    def lines(self, patience: ReadLimits) -> Iterator[str]:
        return iter(())

    def wait(self, timeout: float) -> Ended:
        return self._ended

    def send(self, data: bytes) -> None:
        raise ConnectionLost("the command was never started")

    def close(self) -> None:
        pass


class _LocalSession:
    """One thread does it all: whatever pipe is ready is read or written."""

    def __init__(self, process: subprocess.Popen[bytes], data: bytes) -> None:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        self._process = process
        self._stdin, self._stdout, self._stderr_stream = process.stdin, process.stdout, process.stderr
        self._unsent = memoryview(data)
        self._stderr = Tail()
        self._selector = selectors.DefaultSelector()
        self._out: deque[bytes] = deque()
        for stream, event, ready in (
            (self._stdin, selectors.EVENT_WRITE, self._write),
            (self._stdout, selectors.EVENT_READ, lambda: self._read(self._stdout, self._out.append)),
            (
                self._stderr_stream,
                selectors.EVENT_READ,
                lambda: self._read(self._stderr_stream, self._stderr.add),
            ),
        ):
            os.set_blocking(stream.fileno(), False)
            self._selector.register(stream, event, ready)
        self._write()

    def lines(self, patience: ReadLimits) -> Iterator[str]:
        lines = LineBuffer()
        while not self._stdout.closed or self._out:
            while self._out:
                data = self._out.popleft()
                patience.took(len(data))
                yield from lines.feed(data)
                patience.waits_for_the_rest_of(lines.rest)
            if patience.over:
                raise ConnectionLost(f"the command {patience}")
            if not self._stdout.closed:
                self._turn(patience.left)
        yield from lines.end()

    def wait(self, timeout: float) -> Ended:
        deadline = time.monotonic() + timeout
        try:
            # A child of the command may hold standard error open for ever; its own end is what counts.
            while self._process.poll() is None and self._selector.get_map():
                if time.monotonic() >= deadline:
                    raise subprocess.TimeoutExpired(self._process.args, timeout)
                self._turn(0.02)
                self._out.clear()
            status = self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise ConnectionLost(f"the command did not end within {timeout:.0f} s") from None
        for _ in range(_PIPE // 65536):  # what it wrote itself; a child of it may go on for ever
            if not self._selector.get_map() or not self._turn(0):
                break
            self._out.clear()
        return Ended(status, str(self._stderr))

    def close(self) -> None:
        for stream in (self._stdin, self._stdout, self._stderr_stream):
            self._end(stream)
        self._selector.close()
        reap(self._process)

    def _turn(self, timeout: float) -> bool:
        """Wait for any of the pipes, and serve all that are ready; False: none was."""
        events = self._selector.select(timeout)
        for key, _ in events:
            key.data()
        return bool(events)

    def _read(self, stream: IO[bytes], take: Callable[[bytes], None]) -> None:
        data = os.read(stream.fileno(), 65536)
        if data:
            take(data)
        else:
            self._end(stream)

    def _write(self) -> None:
        try:
            while self._unsent:
                self._unsent = self._unsent[os.write(self._stdin.fileno(), self._unsent[:65536]) :]
        except BlockingIOError:
            return
        except OSError:
            self._end(self._stdin)  # it does not read; its end tells why
        else:
            self._sent()

    def _sent(self) -> None:
        self._end(self._stdin)

    def _end(self, stream: IO[bytes]) -> None:
        if not stream.closed:
            if stream in self._selector.get_map():
                self._selector.unregister(stream)
            stream.close()


class _LocalDialogue(_LocalSession):
    def send(self, data: bytes) -> None:
        if self._stdin.closed:
            raise ConnectionLost("the command does not read any more")
        self._unsent = memoryview(bytes(self._unsent) + data)
        if self._stdin not in self._selector.get_map():
            self._selector.register(self._stdin, selectors.EVENT_WRITE, self._write)
        self._write()

    def _sent(self) -> None:
        """Its standard input stays open; until there is more, nobody waits to write."""
        self._selector.unregister(self._stdin)


def reap(process: subprocess.Popen[bytes]) -> None:
    """Collect its exit status when it comes; a child that nobody waits for stays a zombie."""
    if process.poll() is None:
        threading.Thread(target=process.wait, name="reap", daemon=True).start()
