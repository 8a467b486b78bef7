"""A worker that is to end hears that, as often as it is asked; one that hears nothing is told of, not waited for."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlxops.agent.operations import ops
from mlxops.agent.operations.ops import Cancelling
from mlxops.agent.state.operation_log import OperationLog, create, recent_operations
from mlxops.common.build import build_id
from mlxops.core.errors import OutcomeUnknown, Refused
from mlxops.core.settings import Settings
from tests.lab.envelopes import envelope
from tests.lab.homelab import Homelab, Studio
from tests.lab.world import wait_until
from tests.steps import FAKE, Ask, error_of, finish, nothing_runs, register, with_fake


@pytest.fixture
def ask(homelab: Homelab) -> Ask:
    register(homelab.studio, "mine", "deaf")
    return Ask(with_fake(homelab), "local")


@contextmanager
def loading(ask: Ask) -> Iterator[tuple[subprocess.Popen[str], OperationLog]]:
    """A load that waits for a proof that will never come, and its record."""
    with ask.running("load", "--model", "mine", "--port", ask.port) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.startswith("proof: "))
        yield process, recent_operations(ask.studio.state / "ops")[0]


def pid_of(studio: Studio, word: str) -> int:
    """Once it has got past the gate, which the operation does not wait for."""

    def found() -> int:
        processes = studio.processes()
        return next((each.pid for each in processes if word in each.command and "gate.py" not in each.command), 0)

    return wait_until(found, 10, f"a process of {word}")


def test_a_worker_that_was_stopped_is_told_of_with_what_to_do_and_ends_once_it_goes_on(ask: Ask) -> None:
    with loading(ask) as (process, journal):
        worker = pid_of(ask.studio, "--worker")
        os.kill(worker, signal.SIGSTOP)
        try:
            began = time.monotonic()
            answer = ask("ops", "--cancel", journal.id, "--json")
            assert time.monotonic() - began < ops.HEARD_SECONDS + 10
            error = error_of(answer)
            assert (answer.exit, error["code"], error["details"]["pid"]) == (7, "worker_silent", worker)
            assert f"kill -CONT {worker}" in error["hint"] and "reconcile" in error["hint"]
        finally:
            os.kill(worker, signal.SIGCONT)
        assert finish(process).exit == 130, "what was asked for is heard then"
    nothing_runs(ask.studio)


def test_a_worker_that_is_cleaning_up_hears_every_time(ask: Ask) -> None:
    with loading(ask) as (process, journal):
        os.kill(pid_of(ask.studio, str(FAKE)), signal.SIGSTOP)  # it does not end when it is asked: that takes a while
        for _ in range(2):
            assert journal.alive()
            journal.cancel()
            wait_until(lambda: not journal.cancel_requested, 10, "the worker to hear it")
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


def test_whoever_waits_for_a_long_end_goes_on_as_long_as_it_is_heard(
    journal: OperationLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "AGAIN_SECONDS", 0.02)
    monkeypatch.setattr(ops, "HEARD_SECONDS", 1.0)
    heard = 0
    ends = threading.Event()

    def worker() -> None:
        nonlocal heard
        while not ends.wait(0.005):
            if journal.cancel_requested:
                heard += 1
                journal.clear_cancel()

    thread = threading.Thread(target=worker)
    thread.start()
    try:
        cancelling = Cancelling(journal)

        def enough() -> bool:
            cancelling()
            return heard > 20

        wait_until(enough, 20, "more than one answer")
    finally:
        ends.set()
        thread.join()
    with pytest.raises(OutcomeUnknown, match="does not react"):
        wait_until(cancelling, 20, "the end of patience")


def test_what_would_be_worse_half_done_is_not_asked_to_end(tmp_path: Path) -> None:
    folder = tmp_path / "ops"
    folder.mkdir()
    made, lock = create(folder, envelope("unload", {}, Settings(), build_id()))
    assert lock is not None
    with pytest.raises(Refused) as caught:
        Cancelling(made)
    os.close(lock)
    assert caught.value.code == "not_cancellable" and not made.cancel_requested
