"""One observation of a port: the owner of a server, invisible listeners, and concurrent changes."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from mlxops.agent.host.system import LinuxSystem, Listener, Process, ProcessTable, PsutilSystem, this_system
from mlxops.agent.paths import HostPaths
from mlxops.agent.serving.observe import ByHand, _hand_started, observe
from mlxops.agent.state.store import Lock, Store
from mlxops.core.ports import PortView, State
from mlxops.core.records import Operation, Run
from mlxops.core.settings import PortRange, Settings
from tests.core.worlds import run as sample_run
from tests.lab.ports import free_port


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def paths(tmp_path: Path, port: int) -> HostPaths:
    settings = Settings(bind="127.0.0.1", ports=PortRange(port, port))
    return HostPaths(settings, tmp_path, tmp_path / "registry.json", tmp_path / "state")


@pytest.fixture
def store(paths: HostPaths) -> Store:
    made = Store(paths.state, paths.registry)
    made.create_folders()
    return made


def engine(port: int, pid: int = 77, *, ppid: int = 1) -> Process:
    argv = ("/usr/bin/mlx_lm.server", "--model", "org/a", "--host", "127.0.0.1", "--port", str(port))
    return Process(pid, ppid, pid, os.getuid(), "1", False, argv)


class Ports(LinuxSystem):
    """A system with scripted listening ports of each process."""

    def __init__(self, **ports: frozenset[int] | None) -> None:
        self.ports = ports

    def ports_of(self, pid: int) -> frozenset[int] | None:
        return self.ports[f"pid{pid}"]

    def folder(self, pid: int) -> str | None:
        return "/"  # pids of this machine have folders of their own


def hand_started(
    paths: HostPaths, port: int, *processes: Process, listening: int = 0, **ports: frozenset[int] | None
) -> ByHand:
    listeners = (Listener("127.0.0.1", port, frozenset({listening})),) if listening else ()
    table = ProcessTable({each.pid: each for each in processes}, listeners)
    return _hand_started(paths, Ports(**ports), table, [port]).get(port, ByHand())


NOWHERE: frozenset[int] = frozenset()


def test_server_of_another_user_is_not_hand_started(paths: HostPaths, port: int) -> None:
    own = engine(port)
    other = replace(own, uid=os.getuid() + 1)
    for listening in (0, 77):
        assert hand_started(paths, port, own, listening=listening, pid77=NOWHERE) != ByHand()
        assert hand_started(paths, port, other, listening=listening, pid77=NOWHERE) == ByHand()


class TestPort:
    def test_port_belongs_to_the_listening_server_with_any_arguments(self, paths: HostPaths, port: int) -> None:
        for argv in (engine(port + 1).argv, ("/usr/bin/mlx_lm.server",), ("mlx_lm.server", "--port", "1")):
            process = replace(engine(port), argv=argv)
            found = hand_started(paths, port, process, listening=77)
            assert found.listening is not None and found.listening.pid == 77 and not found.portless

    def test_port_does_not_belong_to_a_server_that_listens_elsewhere(self, paths: HostPaths, port: int) -> None:
        assert hand_started(paths, port, engine(port), pid77=frozenset({port + 1})) == ByHand()

    def test_port_does_not_belong_to_a_server_with_hidden_ports(self, paths: HostPaths, port: int) -> None:
        assert hand_started(paths, port, engine(port), pid77=None) == ByHand()

    def test_port_has_a_server_that_does_not_listen_yet(self, paths: HostPaths, port: int) -> None:
        found = hand_started(paths, port, engine(port), pid77=NOWHERE)
        assert found.listening is None and [each.pid for each in found.portless] == [77]

    def test_port_has_no_server_that_waits_behind_the_gate(self, paths: HostPaths, port: int) -> None:
        waiting = replace(engine(port), argv=("python", "/x/mlxops_start.py", "7", "mlx_lm.server", *engine(port).argv))
        assert hand_started(paths, port, waiting, pid77=NOWHERE) == ByHand()

    def test_port_has_a_server_that_lost_it_to_another(self, paths: HostPaths, port: int) -> None:
        found = hand_started(paths, port, engine(port), engine(port, 78), listening=77, pid78=NOWHERE)
        assert found.listening is not None and found.listening.pid == 77
        assert [each.pid for each in found.portless] == [78]

    def test_port_belongs_to_the_server_whose_child_listens(self, paths: HostPaths, port: int) -> None:
        child = replace(engine(port), pid=78, ppid=77, argv=("python", "-c", "spawn_main()"))
        found = hand_started(paths, port, engine(port), child, listening=78)
        assert found.listening is not None and found.listening.pid == 77

    def test_port_with_a_second_listener_belongs_to_no_server(self, paths: HostPaths, port: int) -> None:
        both = (Listener("127.0.0.1", port, frozenset({77})), Listener("0.0.0.0", port, frozenset({99})))
        table = ProcessTable({77: engine(port), 99: Process(99, 1, 99, os.getuid(), "1", False, ("nc", "-l"))}, both)
        assert _hand_started(paths, Ports(), table, [port]) == {}


@pytest.mark.parametrize(
    ("error", "state", "detail"),
    [
        (ConnectionRefusedError(), State.IDLE, ""),
        (TimeoutError("timed out"), State.UNKNOWN, "cannot find out whether anything listens: timed out"),
        (None, State.UNKNOWN, "something listens"),
    ],
)
def test_only_a_refused_connect_proves_that_no_invisible_listener_exists(
    paths: HostPaths,
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
    view = observe(paths, store, store.registry.read(), PsutilSystem()).ports[port]
    assert view.state is state and detail in view.detail


def test_load_that_begins_during_an_observation_is_not_interrupted(
    paths: HostPaths, store: Store, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the lock after the holder was read, and before it writes its record."""
    own = this_system().process(os.getpid())
    assert own is not None
    system = this_system()
    began = replace(
        sample_run(port=port, proven=False), pid=own.pid, pgid=own.pgid, start=own.start, argv=own.argv,
        boot_id=system.boot_id(),
    )  # fmt: skip
    locks: list[Lock | Operation] = []
    read = store.run

    def run(number: int) -> Run | None:
        locks.append(store.lock(f"port-{port}", Operation("op", "load", "a", port)))
        store.save_run(began)
        return read(number)

    monkeypatch.setattr(store, "run", run)
    view: PortView = observe(paths, store, store.registry.read(), system).ports[port]
    assert view.state is State.LOADING and view.operation is not None and view.operation.id == "op"
    for lock in locks:
        assert isinstance(lock, Lock)
        lock.release()
