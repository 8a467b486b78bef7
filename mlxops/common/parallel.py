"""Make several calls at once, each within a time limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from mlxops.core.errors import MlxopsError

T = TypeVar("T")


BEAT_SECONDS = 0.5


def within(
    seconds: float, calls: Mapping[str, Callable[[], T]], beat: Callable[[], None] = lambda: None
) -> dict[str, T | Exception]:
    """Return each call's value, or the exception that it raised. A call that takes longer is a `TimeoutError`.

    `beat` is called every `BEAT_SECONDS` in between, in this thread. What it raises ends the wait.
    A call that hangs, for example on a network disk, keeps its thread until this process ends.
    """
    outcomes: dict[str, T | Exception] = {}

    def run(name: str, call: Callable[[], T]) -> None:
        try:
            value: T | Exception = call()
        except Exception as error:  # noqa: BLE001 - the caller gets it
            value = error
        outcomes.setdefault(name, value)

    threads = [threading.Thread(target=run, args=item, name=item[0], daemon=True) for item in calls.items()]
    for thread in list(threads):
        try:
            thread.start()
        except RuntimeError as error:  # the host has no room for another thread
            outcomes[thread.name] = error
            threads.remove(thread)
    deadline = time.monotonic() + seconds
    for thread in threads:
        while thread.is_alive() and (left := deadline - time.monotonic()) > 0:
            thread.join(min(left, BEAT_SECONDS))
            beat()
    late = {name: TimeoutError(f"it took longer than {seconds:.0f} s") for name in calls}
    return {name: outcomes.setdefault(name, late[name]) for name in calls}


def reason(error: Exception) -> str:
    """Return an exception on one line, for people."""
    if isinstance(error, MlxopsError):
        return f"{error.message}: {error.why}" if error.why else error.message
    text = " ".join(str(error).split())
    return text if isinstance(error, TimeoutError) and text else f"{type(error).__name__}: {text}"
