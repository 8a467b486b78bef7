"""One look at a port: whose a server is, what nobody can see, and what comes in between."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from mlxops.agent.observe import _hand_started, observe
from mlxops.agent.place import Place
from mlxops.agent.store import Lock, Store
from mlxops.agent.system import Look, Process, PsutilSystem, this_system
from mlxops.core.settings import PortRange, Settings
from mlxops.core.world import Operation, PortView, Run, State
from tests.core.worlds import run as sample_run
from tests.lab.ports import free_port


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def where(tmp_path: Path, port: int) -> Place:
    settings = Settings(bind="127.0.0.1", ports=PortRange(port, port))
    return Place(settings, tmp_path, tmp_path / "registry.json", tmp_path / "state")


@pytest.fixture
def store(where: Place) -> Store:
    made = Store(where.state, where.registry)
    made.ready()
    return made


def test_a_server_of_another_user_is_none_that_we_could_take_over(where: Place, port: int) -> None:
    argv = ("/usr/bin/mlx_lm.server", "--model", "org/a", "--host", "127.0.0.1", "--port", str(port))
    own = Process(2**22 - 1, 1, 2**22 - 1, os.getuid(), "1", False, argv)
    for process, found in ((own, [port]), (replace(own, uid=os.getuid() + 1), [])):
        assert list(_hand_started(where, this_system(), Look({process.pid: process}), [port])) == found


@pytest.mark.parametrize(
    ("error", "state", "detail"),
    [
        (ConnectionRefusedError(), State.IDLE, ""),
        (TimeoutError("timed out"), State.UNKNOWN, "could not be found out: timed out"),
        (None, State.UNKNOWN, "something listens"),
    ],
)
def test_where_listeners_of_others_cannot_be_seen_only_a_refused_connection_says_that_there_is_none(
    where: Place,
    store: Store,
    port: int,
    monkeypatch: pytest.MonkeyPatch,
    error: OSError | None,
    state: State,
    detail: str,
) -> None:
    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        if error is not None:
            raise error
        return socket.socket()

    monkeypatch.setattr(socket, "create_connection", connect)
    view = observe(where, store, store.registry.read(), PsutilSystem()).ports[port]
    assert view.state is state and detail in view.detail


def test_a_load_that_begins_while_its_port_is_looked_at_is_not_taken_for_one_that_was_cut_short(
    where: Place, store: Store, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the lock before it writes its record, and nobody had it when it was asked for first."""
    own = this_system().process(os.getpid())
    assert own is not None
    system = this_system()
    began = replace(
        sample_run(port=port, proven=False), pid=own.pid, pgid=own.pgid, start=own.start, argv=own.argv,
        boot_id=system.boot_id(),
    )  # fmt: skip
    locks: list[Lock | Operation] = []
    read = store.run

    def run(asked: int) -> Run | None:
        locks.append(store.lock(f"port-{port}", Operation("op", "load", "a", port)))
        store.save_run(began)
        return read(asked)

    monkeypatch.setattr(store, "run", run)
    view: PortView = observe(where, store, store.registry.read(), system).ports[port]
    assert view.state is State.LOADING and view.operation is not None and view.operation.id == "op"
    for lock in locks:
        assert isinstance(lock, Lock)
        lock.release()
