"""The keeper starts a server again as soon as it has ended, and what an operator does is never undone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mlxops.agent.state.store import KEEPER, Store
from mlxops.core.records import Run
from tests.lab.quick import MODELS, QuickHost
from tests.lab.world import wait_until

ALPHA, BETA = MODELS[:2]
HEALED_SECONDS = 15.0
"""Usually one second; the tests share the machine."""


class KeptHost:
    """A host with a keeper, and what it wrote."""

    def __init__(self, host: QuickHost) -> None:
        self.host = host
        self.ports = host.ports
        self.store = Store(host.studio.state, host.studio.registry_path)
        self.log = host.studio.folder / "keeper.log"

    @contextmanager
    def keeper(self) -> Iterator[subprocess.Popen[bytes]]:
        """Run a keeper until the end of the block. Yield it once it acts."""
        argv = [sys.executable, "-P", "-m", "mlxops.agent", "--keeper", str(self.store.state)]
        with open(self.log, "ab") as log:
            process = subprocess.Popen(argv, env=self.host.studio.environment, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def acts(self, process: subprocess.Popen[bytes]) -> bool:
        holder = self.store.holder(KEEPER)
        return holder is not None and holder.id == f"pid {process.pid}"

    def run(self, port: int) -> Run:
        found = self.store.run(port)
        assert found is not None
        return found

    def load(self, model: str, port: int) -> Run:
        self.host.mlxctl("load", model, str(port)).ok()
        return self.run(port)

    def is_healed(self, dead: Run) -> bool:
        now = self.store.run(dead.port)
        return now is not None and now.pid != dead.pid and now.proven_at is not None

    def deaths(self) -> list[dict[str, Any]]:
        return [line for line in self.store.history() if line.get("command") == "died"]

    def said(self, words: str) -> bool:
        return words in self.log.read_text()


@pytest.fixture
def kept(host: QuickHost) -> KeptHost:
    return KeptHost(host)


def kill(run: Run) -> None:
    os.kill(run.pid, signal.SIGKILL)


def test_killed_server_is_started_again_and_its_death_recorded(kept: KeptHost) -> None:
    port = kept.ports[0]
    run = kept.load(ALPHA, port)
    with kept.keeper() as keeper:
        wait_until(lambda: kept.acts(keeper), 20, "the keeper")
        kill(run)
        wait_until(lambda: kept.is_healed(run), HEALED_SECONDS, "another server")
        again = kept.run(port)
        wait_until(lambda: kept.said("restored 1"), 10, "the end of the restore")
        kill(again)
        wait_until(lambda: kept.said("the next try may be in"), HEALED_SECONDS, "the pause of restore")
    assert [(line["model"], line["port"], line["cause"]) for line in kept.deaths()] == [(ALPHA, port, "unknown")] * 2
    assert str(kept.deaths()[0]["by"]).startswith("keeper@")
    assert kept.run(port).pid == again.pid, "it is not started again before the pause is over"


def test_unload_beside_a_keeper_is_not_undone(kept: KeptHost) -> None:
    run, other = kept.load(ALPHA, kept.ports[0]), kept.load(BETA, kept.ports[1])
    with kept.keeper() as keeper:
        wait_until(lambda: kept.acts(keeper), 20, "the keeper")
        kept.host.mlxctl("unload", str(run.port)).ok()
        kill(other)
        wait_until(lambda: kept.is_healed(other), HEALED_SECONDS, "the other server")
        wait_until(lambda: kept.said("restored 1"), 10, "the end of the restore")
        assert not kept.host.studio.listening(run.port)
    assert [line["port"] for line in kept.deaths()] == [other.port], "a server that is stopped has not died"
    assert kept.store.run(run.port) is None


def test_second_keeper_waits_and_a_killed_one_leaves_the_servers(kept: KeptHost) -> None:
    run = kept.load(ALPHA, kept.ports[0])
    with kept.keeper() as first:
        wait_until(lambda: kept.acts(first), 20, "the keeper")
        with kept.keeper() as second:
            wait_until(lambda: kept.said("another keeper runs"), 20, "the second keeper")
            assert kept.acts(first) and second.poll() is None
            first.kill()
            first.wait()
            assert kept.host.studio.listening(run.port)
    with kept.keeper() as third:
        wait_until(lambda: kept.acts(third), 20, "the keeper after it")
        kill(run)
        wait_until(lambda: kept.is_healed(run), HEALED_SECONDS, "another server")


def test_server_that_died_before_the_keeper_began_is_started(kept: KeptHost) -> None:
    run, off = kept.load(ALPHA, kept.ports[0]), kept.load(BETA, kept.ports[1])
    slots = kept.host.studio.settings["slots"]
    assert isinstance(slots, dict)
    kept.host.lab.configure(slots=slots | {off.port: {"alias": slots[off.port], "keep": "off"}})
    kept.host.mlxctl("reconcile").ok()  # the host gets the settings of the next change
    kill(run)
    kill(off)
    with kept.keeper():
        wait_until(lambda: kept.is_healed(run), HEALED_SECONDS, "another server")
        wait_until(lambda: kept.said("restored 1"), 10, "the end of the restore")
    assert kept.run(off.port).pid == off.pid, "keep: off leaves it down"
