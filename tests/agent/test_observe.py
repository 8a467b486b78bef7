"""One look at a port: whose a server is, what nobody can see, and what comes in between."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from mlxops.agent.host.system import LinuxSystem, Listener, Look, Process, PsutilSystem, this_system
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
    """A system that says of each process on which ports it listens."""

    def __init__(self, **ports: frozenset[int] | None) -> None:
        self.ports = ports

    def ports_of(self, pid: int) -> frozenset[int] | None:
        return self.ports[f"pid{pid}"]


def seen(
    paths: HostPaths, port: int, *processes: Process, listening: int = 0, **ports: frozenset[int] | None
) -> ByHand:
    listeners = (Listener("127.0.0.1", port, frozenset({listening})),) if listening else ()
    look = Look({each.pid: each for each in processes}, listeners)
    return _hand_started(paths, Ports(**ports), look, [port]).get(port, ByHand())


NOWHERE: frozenset[int] = frozenset()


def test_a_server_of_another_user_is_none_that_we_could_take_over(paths: HostPaths, port: int) -> None:
    own = engine(port)
    other = replace(own, uid=os.getuid() + 1)
    for listening in (0, 77):
        assert seen(paths, port, own, listening=listening, pid77=NOWHERE) != ByHand()
        assert seen(paths, port, other, listening=listening, pid77=NOWHERE) == ByHand()


class TestAPort:
    def test_belongs_to_the_server_that_listens_there_whatever_its_argv_says(self, paths: HostPaths, port: int) -> None:
        for words in (engine(port + 1).argv, ("/usr/bin/mlx_lm.server",), ("mlx_lm.server", "--port", "1")):
            process = replace(engine(port), argv=words)
            found = seen(paths, port, process, listening=77)
            assert found.listening is not None and found.listening.pid == 77 and not found.portless

    def test_is_not_that_of_a_server_that_listens_elsewhere(self, paths: HostPaths, port: int) -> None:
        assert seen(paths, port, engine(port), pid77=frozenset({port + 1})) == ByHand()

    def test_is_not_that_of_a_server_whose_ports_cannot_be_seen(self, paths: HostPaths, port: int) -> None:
        assert seen(paths, port, engine(port), pid77=None) == ByHand()

    def test_has_a_server_that_does_not_listen_yet(self, paths: HostPaths, port: int) -> None:
        found = seen(paths, port, engine(port), pid77=NOWHERE)
        assert found.listening is None and [each.pid for each in found.portless] == [77]

    def test_has_a_server_that_lost_it_to_another_one(self, paths: HostPaths, port: int) -> None:
        found = seen(paths, port, engine(port), engine(port, 78), listening=77, pid78=NOWHERE)
        assert found.listening is not None and found.listening.pid == 77
        assert [each.pid for each in found.portless] == [78]

    def test_that_a_child_of_a_server_listens_on_is_the_servers(self, paths: HostPaths, port: int) -> None:
        child = replace(engine(port), pid=78, ppid=77, argv=("python", "-c", "spawn_main()"))
        found = seen(paths, port, engine(port), child, listening=78)
        assert found.listening is not None and found.listening.pid == 77

    def test_on_which_another_process_listens_too_is_no_servers(self, paths: HostPaths, port: int) -> None:
        both = (Listener("127.0.0.1", port, frozenset({77})), Listener("0.0.0.0", port, frozenset({99})))
        look = Look({77: engine(port), 99: Process(99, 1, 99, os.getuid(), "1", False, ("nc", "-l"))}, both)
        assert _hand_started(paths, Ports(), look, [port]) == {}


@pytest.mark.parametrize(
    ("error", "state", "detail"),
    [
        (ConnectionRefusedError(), State.IDLE, ""),
        (TimeoutError("timed out"), State.UNKNOWN, "cannot find out whether anything listens: timed out"),
        (None, State.UNKNOWN, "something listens"),
    ],
)
def test_where_listeners_of_others_cannot_be_seen_only_a_refused_connection_says_that_there_is_none(
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


def test_a_load_that_begins_while_its_port_is_looked_at_is_not_taken_for_one_that_was_cut_short(
    paths: HostPaths, store: Store, port: int, monkeypatch: pytest.MonkeyPatch
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
    view: PortView = observe(paths, store, store.registry.read(), system).ports[port]
    assert view.state is State.LOADING and view.operation is not None and view.operation.id == "op"
    for lock in locks:
        assert isinstance(lock, Lock)
        lock.release()
