"""Run commands on this machine, with the interface and the limits of a remote session."""

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
from mlxops.control.ssh.config import error_text

_PIPE = 1024 * 1024
"""The most bytes that a pipe holds (Linux, for users other than root)."""


class LocalTransport:
    """Runs commands in the home directory, as sshd does. Ctrl-C in this terminal does not reach them."""

    def start(self, argv: Sequence[str], data: bytes) -> Session:
        process = _start_process(argv)
        return process if isinstance(process, _NeverStarted) else _LocalSession(process, data)

    def converse(self, argv: Sequence[str], data: bytes) -> Dialogue:
        process = _start_process(argv)
        return process if isinstance(process, _NeverStarted) else _LocalDialogue(process, data)

    def close(self) -> None:
        pass


def _start_process(argv: Sequence[str]) -> subprocess.Popen[bytes] | _NeverStarted:
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
        # A shell's exit statuses, so that this fails as it does over SSH.
        status = 127 if isinstance(error, FileNotFoundError) else 126
        return _NeverStarted(Ended(status, f"{expanded[0]}: {error_text(error)}"))
    return process


class _NeverStarted:
    def __init__(self, ended: Ended) -> None:
        self._ended = ended

    def lines(self, limits: ReadLimits) -> Iterator[str]:
        return iter(())

    def wait(self, timeout: float) -> Ended:
        return self._ended

    def send(self, data: bytes) -> None:
        raise ConnectionLost("the command was never started")

    def close(self) -> None:
        pass


class _LocalSession:
    """Reads and writes the pipes as they become ready, without threads."""

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

    def lines(self, limits: ReadLimits) -> Iterator[str]:
        lines = LineBuffer()
        while not self._stdout.closed or self._out:
            while self._out:
                data = self._out.popleft()
                limits.count(len(data))
                yield from lines.feed(data)
                limits.allow_unfinished(lines.unfinished)
            if limits.over:
                raise ConnectionLost(f"the command {limits}")
            if not self._stdout.closed:
                self._turn(limits.left)
        yield from lines.end()

    def wait(self, timeout: float) -> Ended:
        deadline = time.monotonic() + timeout
        try:
            # Wait for the command, not for its standard error: a child of it may keep that open indefinitely.
            while self._process.poll() is None and self._selector.get_map():
                if time.monotonic() >= deadline:
                    raise subprocess.TimeoutExpired(self._process.args, timeout)
                self._turn(0.02)
                self._out.clear()
            status = self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise ConnectionLost(f"the command did not end within {timeout:.0f} s") from None
        for _ in range(_PIPE // 65536):  # its own last output; a child of it may write without end
            if not self._selector.get_map() or not self._turn(0):
                break
            self._out.clear()
        return Ended(status, str(self._stderr))

    def close(self) -> None:
        for stream in (self._stdin, self._stdout, self._stderr_stream):
            self._close(stream)
        self._selector.close()
        reap(self._process)

    def _turn(self, timeout: float) -> bool:
        """Wait for the pipes, and read or write those that are ready. Return whether there were any."""
        events = self._selector.select(timeout)
        for key, _ in events:
            key.data()
        return bool(events)

    def _read(self, stream: IO[bytes], take: Callable[[bytes], None]) -> None:
        data = os.read(stream.fileno(), 65536)
        if data:
            take(data)
        else:
            self._close(stream)

    def _write(self) -> None:
        try:
            while self._unsent:
                self._unsent = self._unsent[os.write(self._stdin.fileno(), self._unsent[:65536]) :]
        except BlockingIOError:
            return
        except OSError:
            self._close(self._stdin)  # it does not read any more; `wait` returns why
        else:
            self._sent()

    def _sent(self) -> None:
        self._close(self._stdin)

    def _close(self, stream: IO[bytes]) -> None:
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
        """Leave standard input open, and stop waiting for it until there is more to write."""
        self._selector.unregister(self._stdin)


def reap(process: subprocess.Popen[bytes]) -> None:
    """Collect its exit status when it ends. Otherwise it would stay a zombie."""
    if process.poll() is None:
        threading.Thread(target=process.wait, name="reap", daemon=True).start()
