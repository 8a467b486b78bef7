"""Cancelling: a worker acknowledges each request. If a worker does not respond, the command reports it and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlxops.agent.operations import ops
from mlxops.agent.operations.ops import CancelRequest
from mlxops.agent.state.operation_log import OperationLog, create, recent_operations
from mlxops.common.build import build_id
from mlxops.core import wire
from mlxops.core.commands.cancel import CancelResult, show
from mlxops.core.errors import Busy, Interrupted, MlxopsError, NotStarted, OutcomeUnknown, Refused, error_from_wire
from mlxops.core.protocol import Done, Failed, decode_event
from mlxops.core.replies import HostReply
from mlxops.core.settings import Settings
from tests.lab.envelopes import envelope
from tests.lab.homelab import Homelab, Studio
from tests.lab.world import wait_until
from tests.steps import Ask, error_of, finish, nothing_runs, register, with_fake


@pytest.fixture
def ask(homelab: Homelab) -> Ask:
    register(homelab.studio, "mine", args=["--fake-act", "mute", "--fake-linger", "3"])
    return Ask(with_fake(homelab), "local")


@contextmanager
def loading(ask: Ask) -> Iterator[tuple[subprocess.Popen[str], OperationLog]]:
    """Start a load whose proof never comes, and whose server takes seconds to end; yield it and its record."""
    with ask.running("load", "--model", "mine", "--port", ask.port) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.startswith("proof: "))
        # Before it listens, the server may not handle signals yet, and ends at once.
        wait_until(lambda: ask.studio.listening(ask.port), 30, "the server")
        yield process, recent_operations(ask.studio.state / "ops")[0]


def pid_of(studio: Studio, word: str) -> int:
    """Wait for a process with `word` in its command that has passed the gate. Return its pid."""

    def find() -> int:
        processes = studio.processes()
        return next((each.pid for each in processes if word in each.command and "gate.py" not in each.command), 0)

    return wait_until(find, 30, f"a process of {word}")


def test_stopped_worker_is_reported_and_ends_when_continued(ask: Ask) -> None:
    with loading(ask) as (process, journal):
        worker = pid_of(ask.studio, "--worker")
        os.kill(worker, signal.SIGSTOP)
        try:
            began = time.monotonic()
            answer = ask("ops", "--cancel", journal.id, "--json")
            assert time.monotonic() - began < ops.RESPONSE_SECONDS + 10
            error = error_of(answer)
            assert (answer.exit, error["code"], error["details"]["pid"]) == (7, "worker_silent", worker)
            assert f"kill -CONT {worker}" in error["hint"] and "reconcile" in error["hint"]
        finally:
            os.kill(worker, signal.SIGCONT)
        assert finish(process).exit == 130, "the request is carried out later"
    nothing_runs(ask.studio)


def test_worker_that_cleans_up_acknowledges_each_request(ask: Ask) -> None:
    """The server takes seconds to end."""
    with loading(ask) as (process, journal):
        for _ in range(2):
            assert journal.alive()
            journal.cancel()
            wait_until(lambda: not journal.cancel_requested, 30, "the worker to acknowledge it")
        assert finish(process).exit == 130
    nothing_runs(ask.studio)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[OperationLog]:
    """The record of a load whose worker lives."""
    folder = tmp_path / "ops"
    folder.mkdir()
    made, lock = create(folder, envelope("load", {}, Settings(), build_id()))
    assert lock is not None
    yield made
    os.close(lock)


def test_request_is_repeated_while_the_worker_acknowledges_it(
    journal: OperationLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "REPEAT_SECONDS", 0.02)
    monkeypatch.setattr(ops, "RESPONSE_SECONDS", 1.0)
    acknowledged = 0
    ends = threading.Event()

    def worker() -> None:
        nonlocal acknowledged
        while not ends.wait(0.005):
            if journal.cancel_requested:
                acknowledged += 1
                journal.clear_cancel()

    thread = threading.Thread(target=worker)
    thread.start()
    try:
        request = CancelRequest(journal)

        def is_repeated() -> bool:
            request()
            return acknowledged > 20

        wait_until(is_repeated, 20, "more than 20 acknowledgements")
    finally:
        ends.set()
        thread.join()
    with pytest.raises(OutcomeUnknown, match="is not responding"):
        wait_until(request, 20, "the error")


def test_quick_change_cannot_be_cancelled(tmp_path: Path) -> None:
    folder = tmp_path / "ops"
    folder.mkdir()
    made, lock = create(folder, envelope("unload", {}, Settings(), build_id()))
    assert lock is not None
    with pytest.raises(Refused) as caught:
        CancelRequest(made)
    os.close(lock)
    assert caught.value.code == "not_cancellable" and not made.cancel_requested


def with_details(error: MlxopsError, **details: object) -> MlxopsError:
    changed = error_from_wire(error.to_wire())
    changed.details |= details
    return changed


STILL_ENDING = Busy("still_ending", "mine has not ended yet", why="it holds much", hint="later: `mlxctl reconcile`")
CANCELLED = Interrupted("cancelled", "it was cancelled", why="on request", hint="`mlxctl status`")
NO_RESTART = NotStarted("server_did_not_start", "old did not start", why="it broke", hint="`mlxctl status`")
CANCEL_OUTCOMES: dict[str, tuple[Done | Failed, int, str]] = {
    "done": (Done({}), 0, "was done before it could be cancelled"),
    "cancelled": (Failed(CANCELLED), 0, "was cancelled; nothing half done is left"),
    "cancelled, the old server is back": (
        Failed(with_details(CANCELLED, previous="old serves port 8100 again")),
        0,
        "was cancelled; old serves port 8100 again",
    ),
    "cancelled, the old server is not back": (
        Failed(with_details(CANCELLED, previous="old did not come back", not_restarted=NO_RESTART.to_wire())),
        4,
        "it broke; old did not come back; with this, operation",
    ),
    "cancelled, the old server is not back and left": (
        Failed(with_details(CANCELLED, not_restarted=NO_RESTART.to_wire(), left=STILL_ENDING.to_wire())),
        75,
        "it holds much; with this, operation",
    ),
    "another error": (Failed(STILL_ENDING), 75, "it holds much; with this, operation"),
    "cancelled, a server is left": (
        Failed(with_details(CANCELLED, left=STILL_ENDING.to_wire())),
        75,
        "it holds much; with this, operation",
    ),
    "an error and a server is left": (
        Failed(with_details(NotStarted("server_did_not_start", "no", why="it broke"), left=STILL_ENDING.to_wire())),
        4,
        "it broke; with this, operation",
    ),
}


@pytest.mark.parametrize("ending", CANCEL_OUTCOMES)
def test_cancel_says_how_the_operation_ended(tmp_path: Path, ending: str) -> None:
    final, status, says = CANCEL_OUTCOMES[ending]
    settings = Settings(state=str(tmp_path), hub=str(tmp_path), registry=str(tmp_path / "registry.json"))
    (tmp_path / "ops").mkdir()
    made, lock = create(tmp_path / "ops", envelope("load", {}, settings, build_id()))
    assert lock is not None
    agent = subprocess.Popen(
        [sys.executable, "-P", "-m", "mlxops.agent"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with agent:
        assert agent.stdin is not None and agent.stdout is not None
        agent.stdin.write(envelope("cancel", {"operation": made.id}, settings, build_id()).encode() + b"\n")
        agent.stdin.close()
        wait_until(lambda: made.cancel_requested, 30, "the request to cancel")
        made.emitter()(final)
        os.close(lock)
        last = decode_event(agent.stdout.read().decode().splitlines()[-1])
    assert agent.returncode == status
    if isinstance(last, Failed):
        assert f"{says} {made.id} ended" in last.error.why and int(last.error.exit) == status
    else:
        assert isinstance(last, Done)
        text = show([HostReply("studio", result=wire.decode(CancelResult, last.result))])
        assert text.endswith(f"operation {made.id} {says}")
