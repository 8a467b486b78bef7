"""Stopping a server: its port must be free, too."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from mlxops.agent.context import Context
from mlxops.agent.host.system import this_system
from mlxops.agent.operations import stop as stopping
from mlxops.agent.operations.stop import stop
from mlxops.agent.paths import HostPaths
from mlxops.agent.serving import processes
from mlxops.agent.state.store import Store
from mlxops.core.ports import Owner, PortView, State
from mlxops.core.protocol import Event, Note
from mlxops.core.records import Run
from mlxops.core.settings import PortRange, Settings
from tests.core.worlds import run
from tests.lab.envelopes import envelope
from tests.lab.ports import free_port
from tests.lab.world import listening, wait_until

LINGERS = """
import ctypes, os, platform, signal, socket, sys, threading, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
asked = threading.Event()
def last():
    asked.wait()
    time.sleep(float(sys.argv[2]))
    os._exit(0)
threading.Thread(target=last).start()
signal.sigwait([signal.SIGINT])
asked.set()
exit_of_one_thread = {"x86_64": 60, "aarch64": 93}[platform.machine()]
ctypes.CDLL(None).syscall(exit_of_one_thread, 0)
"""
"""A server whose main thread ends on SIGINT, and whose other thread ends seconds later. Until then the port is open,
while the process looks like a zombie."""


@pytest.mark.skipif(sys.platform != "linux", reason="how Linux shows a process whose first thread has ended")
def test_stop_waits_until_the_port_is_free(tmp_path: Path) -> None:
    port = free_port()
    argv = (sys.executable, "-c", LINGERS, str(port), "1")
    with subprocess.Popen(argv, start_new_session=True, cwd=tmp_path) as child:
        # A thread must collect it when it ends, as init does for a server whose agent has gone.
        reaper = threading.Thread(target=child.wait)
        reaper.start()
        try:
            wait_until(lambda: listening("127.0.0.1", port), 30, "the server")
            context, view = _context(tmp_path, port), _view(child.pid, port, argv)
            stop(context, view)
            assert not listening("127.0.0.1", port)
        finally:
            child.kill()
            reaper.join()


def test_stop_does_not_wait_for_new_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a server in use would never end."""
    events: list[Event] = []
    context = replace(_context(tmp_path, 8103), emit=events.append)
    open_now = iter([{("there", 1), ("there", 2)}, {("there", 2), ("there", 3)}])
    monkeypatch.setattr(stopping, "_connections", lambda ctx, run: frozenset(next(open_now, {("there", 3)})))
    view = PortView(8103, None, State.READY, Owner.MLXOPS, "x", run=run())
    assert stopping._drain(context, view, run()) is None
    assert events == [Note("2 open requests get up to 30 s")]


@pytest.mark.parametrize(
    ("requests", "drain", "seconds", "told"),
    [
        (2, None, 30, ["2 open requests get up to 30 s"]),
        (2, 0.0, 0, ["2 open requests get up to 0 s"]),
        (0, None, 30, []),
        (0, 100.0, 100, []),
        (0, 0.0, 10, []),
    ],
    ids=["open", "open, cut", "none seen", "none seen, long", "none seen, cut"],
)
def test_server_gets_the_drain_for_requests_that_come_before_the_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requests: int, drain: float | None, seconds: int, told: list[str]
) -> None:
    events: list[Event] = []
    request = envelope("unload", {"drain": drain}, Settings(), "").request
    context = replace(_context(tmp_path, 8103), emit=events.append, request=request)
    connections = frozenset(("there", number) for number in range(requests))
    monkeypatch.setattr(stopping, "_connections", lambda ctx, run: connections)
    monkeypatch.setattr(processes, "finishes_requests", lambda system, run: True)
    view = PortView(8103, None, State.READY, Owner.MLXOPS, "x", run=run())
    assert stopping._drain(context, view, run()) == seconds
    assert events == [Note(each) for each in told]


def _context(folder: Path, port: int) -> Context:
    settings = Settings(ports=PortRange(port, port))
    paths = HostPaths(settings, folder, folder / "registry.json", folder / "state")
    store = Store(paths.state, paths.registry)
    store.create_folders()
    return Context(
        envelope("unload", {}, settings, "").request,
        paths,
        store,
        this_system(),
        lambda event: None,
        {},
        operation="op",
    )


def _view(pid: int, port: int, argv: tuple[str, ...]) -> PortView:
    system = this_system()
    process = system.process(pid)
    assert process is not None
    run = Run(
        port=port,
        model="x",
        alias="x",
        repo_id="o/x",
        revision="1",
        engine="mlx-lm",
        argv=argv,
        run_id="1",
        pid=pid,
        pgid=process.pgid,
        start=process.start,
        boot_id=system.boot_id(),
        operation="op",
        log_path="",
        started_at="",
    )
    return PortView(port, None, State.READY, Owner.MLXOPS, "x", run=run)
