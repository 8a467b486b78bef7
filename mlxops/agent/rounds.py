"""A round of the keeper: one small completion from each server that mlxops started, all at once.

Raw sockets, because the keeper has to stay small: http.client and its imports take some megabytes.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import field

from mlxops.agent.host.system import System
from mlxops.core.errors import MlxopsError
from mlxops.core.frozen import dataclass
from mlxops.core.records import Run
from mlxops.core.wedged import Answer, Asked

ANSWER_SECONDS = 20.0
"""Limit of one completion of a token, as of `status --probe`."""
MAX_BYTES = 65536
_END = (b"data: [DONE]", b"\r\n0\r\n\r\n")


@dataclass
class Round:
    """A running round. Its threads end by themselves after `ANSWER_SECONDS`."""

    results: dict[int, Asked] = field(default_factory=dict)
    runs: dict[int, Run] = field(default_factory=dict)
    """The servers that were asked, by port."""
    threads: list[threading.Thread] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return not any(thread.is_alive() for thread in self.threads)


def begin(system: System, host: str, runs: Sequence[Run]) -> Round:
    """Ask these servers. `host`: the address at which the host reaches them."""
    begun = Round(runs={run.port: run for run in runs})

    def ask(run: Run) -> None:
        begun.results[run.port] = _ask(system, host, run)

    begun.threads += [threading.Thread(target=ask, args=(run,), daemon=True) for run in runs]
    for thread in begun.threads:
        thread.start()
    return begun


def _ask(system: System, host: str, run: Run) -> Asked:
    try:
        pids = [process.pid for process in system.process_table(()).group(run.pgid)]
        if run.pid not in pids:
            return Asked(Answer.UNKNOWN)  # of no process, all processor time is 0: it would look idle
        used, began = system.cpu_seconds(pids), time.monotonic()
        with socket.create_connection((host, run.port), ANSWER_SECONDS) as connection:
            answer = _complete(connection, host, run.alias, began + ANSWER_SECONDS)
            if answer is not Answer.SILENT:
                return Asked(answer)
            own = connection.getsockname()[:2]
            others = system.connections(run.port, pids) - {own}
        now, seconds = system.cpu_seconds(pids), time.monotonic() - began
    except (MlxopsError, OSError):
        return Asked(Answer.UNKNOWN)
    share = None if used is None or now is None else (now - used) / seconds
    return Asked(answer, bool(others), share)


def _complete(connection: socket.socket, host: str, model: str, deadline: float) -> Answer:
    """Request a token, and read the answer to its end: a server may stumble over a client that leaves."""
    connection.sendall(_request(host, model))
    data = b""
    try:
        while len(data) < MAX_BYTES and not any(end in data for end in _END):
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            part = connection.recv(MAX_BYTES)
            if not part:
                break
            data += part
    except OSError:  # the time is up, or the server closed the connection
        pass
    return judge(data)


def judge(data: bytes) -> Answer:
    """Return what a response is, as far as it has arrived. The headers alone are none: engines send them at once."""
    head, _, body = data.partition(b"\r\n\r\n")
    if b"data:" in body or (head and not head.startswith((b"HTTP/1.1 200", b"HTTP/1.0 200"))):
        return Answer.ANSWERED
    return Answer.PROGRESS if body.strip() else Answer.SILENT


def _request(host: str, model: str) -> bytes:
    message = {"role": "user", "content": "Say hi."}
    body = json.dumps({"model": model, "messages": [message], "max_tokens": 1, "temperature": 0, "stream": True})
    name = f"[{host}]" if ":" in host else host
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {name}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()
