"""Run programs: to their end, or while a block of the test runs. Standard library only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

TIMEOUT = 120.0
"""Seconds for one command."""


class TimedOut(AssertionError):
    """A command did not end in time; it was killed. The message has what it wrote."""


@dataclass(frozen=True)
class Completed:
    """A command that ended by itself. `exit` is negative for a signal."""

    argv: tuple[str, ...]
    exit: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The one JSON document on standard output. Raises `AssertionError` when there is anything else."""
        try:
            return json.loads(self.stdout)
        except ValueError as error:
            raise AssertionError(f"standard output is not one JSON document\n{self}") from error

    def ok(self) -> Self:
        """Itself, if the exit status is 0. Raises `AssertionError` that shows all of it."""
        assert self.exit == 0, str(self)
        return self

    def __str__(self) -> str:
        return f"$ {' '.join(self.argv)}\n-> {self.exit}\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}\n---"


def run(
    argv: Sequence[str],
    cwd: Path,
    env: Mapping[str, str],
    stdin: str | None = None,
    timeout: float = TIMEOUT,
) -> Completed:
    """Run a command to its end, and to the end of its output: a child that keeps the pipes open counts as well.

    Without `stdin` it has none. Raises `TimedOut`.
    """
    with subprocess.Popen(
        argv,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="surrogateescape",
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(stdin, timeout)
        except subprocess.TimeoutExpired as late:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            said = "\n".join(part.decode("utf-8", "replace") for part in (late.stdout, late.stderr) if part)
            raise TimedOut(f"{' '.join(argv)}: not done after {timeout:g} s; it said:\n{said}") from None
    return Completed(tuple(argv), process.returncode, stdout, stderr)


@contextmanager
def running(
    argv: Sequence[str],
    cwd: Path,
    env: Mapping[str, str],
    *,
    stdout: int = subprocess.PIPE,
    stderr: int = subprocess.PIPE,
) -> Iterator[subprocess.Popen[str]]:
    """Run a program in a session of its own, without input. At the end of the block kill its process group."""
    with subprocess.Popen(
        argv,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it has ended


def script(name: str) -> str:
    """A console script of the environment that runs the tests."""
    return str(Path(sysconfig.get_path("scripts")) / name)
