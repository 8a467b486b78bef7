"""The only place that prints: data to standard output, messages and progress to standard error.

Text from a host is not trusted. It is escaped before it is printed.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from mlxops.core.errors import Exit, MlxopsError, OutputFailed, worst
from mlxops.core.protocol import Event, LogLine, Note, Phase, Progress
from mlxops.core.replies import HostReply
from mlxops.core.tables import harmless, one_log_line

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

SCHEMA = 1
LINE_SECONDS = 60.0
"""Longest time between two lines of progress without a terminal."""


def document(command: str, answers: Sequence[HostReply[object]], per_host: Mapping[str, Mapping[str, object]]) -> str:
    """Return the JSON document of a command. `per_host`: further keys of each host's row."""
    return _json(_document(command, answers, per_host))


def document_line(
    command: str, answers: Sequence[HostReply[object]], per_host: Mapping[str, Mapping[str, object]]
) -> str:
    """Return the JSON document of a command on one line."""
    return json_line(_document(command, answers, per_host))


def _document(
    command: str, answers: Sequence[HostReply[object]], per_host: Mapping[str, Mapping[str, object]]
) -> dict[str, object]:
    hosts = [
        {
            "host": answer.host,
            "reachable": answer.reachable,
            "error": answer.error.to_wire() if answer.error else None,
            **per_host.get(answer.host, {}),
        }
        for answer in answers
    ]
    return {"schema": SCHEMA, "command": command, "ok": all(a.error is None for a in answers), "hosts": hosts}


def error_document(command: str, error: MlxopsError, *, indent: int | None = 2) -> str:
    """Return the JSON document of an error that is not of one host. `indent` None: on one line."""
    document = {"schema": SCHEMA, "command": command, "ok": False, "hosts": [], "error": error.to_wire()}
    return _json(document) if indent else json_line(document)


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=True)


def json_line(value: object) -> str:
    """Return a document on one line."""
    return json.dumps(value, ensure_ascii=True)


def exit_of(answers: Sequence[HostReply[object]]) -> Exit:
    return worst([answer.error.exit for answer in answers if answer.error])


class Console:
    """Print notes, phases, progress and errors to standard error. Threads of several hosts may use it at once.

    On a terminal a download has a bar. Otherwise its progress is a line for every tenth, and at least every minute.
    The lines of a log are data, and go to standard output.
    """

    def __init__(self, *, many: bool, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self.many = many
        """Begin each line with its host's name."""
        self._lock = threading.Lock()
        self._tenths: dict[str, tuple[int, float]] = {}
        self._bar: Bar | None = None
        self._tasks: dict[str, TaskID] = {}
        self._terminal = self._stream.isatty()

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the progress bar. Plain lines follow."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._tasks.clear()

    def hear(self, host: str, event: Event) -> None:
        """Print an event of a host: the callback of `client.ask`."""
        with self._lock:
            match event:
                case Note(message, level):
                    self._line(host, f"warning: {message}" if level == "warning" else message)
                case Phase(name, message):
                    self._line(host, f"{name}: {message}")
                case Progress() as progress:
                    self._progress(host, progress)
                case LogLine(text):
                    say(one_log_line(text))

    def note(self, message: str) -> None:
        with self._lock:
            self._line("", message)

    def error(self, host: str, error: MlxopsError) -> None:
        """Print the message, the reason and the next step, a line each."""
        with self._lock:
            self._line(host, f"error: {error.message}")
            for word, text in (("why", error.why), ("next", error.hint)):
                if text:
                    self._line(host, f"  {word}: {text}")

    def _line(self, host: str, text: str) -> None:
        prefix = f"{host}: " if self.many and host else ""
        words = prefix + (harmless(text).replace("\n", " "))
        if self._bar is not None:
            self._bar.console.print(words, markup=False, highlight=False, soft_wrap=True)
        else:
            try:
                print(words, file=self._stream, flush=True)
            except OSError:
                discard(self._stream.fileno())  # the command goes on without messages

    def _progress(self, host: str, progress: Progress) -> None:
        name, done, total = progress.name, progress.done, progress.total
        if not self._terminal:
            tenth = done * 10 // total if total else 0
            printed, at = self._tenths.get(host, (-1, 0.0))
            if tenth > printed or time.monotonic() - at > LINE_SECONDS:
                self._tenths[host] = (tenth, time.monotonic())
                self._line(host, f"{name}: {progress}")
            return
        if self._bar is None:
            self._bar = self._new_bar()
            self._bar.start()
        key = f"{host} {name}"
        if key not in self._tasks:
            self._tasks[key] = self._bar.add_task(key if self.many else name, total=total or None)
        self._bar.update(self._tasks[key], completed=done, total=total or None)

    def _new_bar(self) -> Bar:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as RichProgress

        return RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(file=self._stream),
        )


def discard(number: int) -> None:
    """Replace a descriptor that cannot be written to, so that the interpreter reports no error at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)


def say(text: str, end: str = "\n") -> None:
    """Print data to standard output. Raises `BrokenPipeError` if it has no reader any more, else `OutputFailed`."""
    try:
        if sys.stdout is None:  # Python sets it to None if it was closed before the start
            raise OSError("it is closed")
        print(text, end=end, flush=True)  # noqa: T201
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputFailed(
            "output_unwritten",
            "the result could not be written to standard output",
            why=error.strerror or str(error),
            hint="the command was carried out; see: `mlxctl status`, `mlxctl ops`",
        ) from None
