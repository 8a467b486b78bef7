"""Servers that hold much memory and take long to end: every path that stops one, with and without `--kill`.

The operations run in this process, with real servers and shorter times. A server holds 300 MB, the limit is 100 MB.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlxops.agent.context import Context
from mlxops.agent.host.system import this_system
from mlxops.agent.operations import operation
from mlxops.agent.operations.stop import _is_left
from mlxops.agent.operations.unload import CANCEL_SECONDS, cancel_seconds, drain_of
from mlxops.agent.paths import host_paths
from mlxops.agent.serving import ending
from mlxops.agent.serving.stranded import return_seconds
from mlxops.agent.state.operation_log import create
from mlxops.agent.state.store import Store
from mlxops.core import wire
from mlxops.core.errors import Busy, Interrupted, MlxopsError, NotStarted, Refused
from mlxops.core.ports import PortView, State
from mlxops.core.protocol import Event, Note, Phase, Progress
from mlxops.core.records import Run
from mlxops.core.settings import NO_LIMIT, PortRange, Settings
from tests.agent.test_openai_server import Stream
from tests.lab import cache, models
from tests.lab.envelopes import envelope
from tests.lab.homelab import Homelab
from tests.lab.ports import free_ports
from tests.lab.quick import ENGINE, install_engine
from tests.lab.world import wait_until
from tests.steps import ENDED_BY_SIGINT, REPO, Ask, assigned, finish, register, with_fake

MB = 1_000_000
HEAVY = ["--fake-memory", "300"]
STUBBORN = [*HEAVY, "--fake-ignore", "int,term"]


class Host:
    """A managed host in a folder, whose operations run in this process."""

    def __init__(self, folder: Path, ports: range) -> None:
        self.first, self.second = ports[0], ports[1]
        self.hub = folder / "hub"
        self.events: list[Event] = []
        self.settings = Settings(
            hub=str(self.hub),
            state=str(folder / "state"),
            engine="mlx-lm",
            launch={"mlx-lm": (str(install_engine(folder / "bin")),)},
            ports=PortRange(ports[0], ports[-1]),
            memory=10**12,
            kill_limit=100 * MB,
        )
        self.snapshot = models.install_snapshot(self.hub, REPO, models.tiny_models() / models.QWEN)
        self.paths = host_paths(self.settings, {"HOME": str(folder)})
        self.store = Store(self.paths.state, self.paths.registry)
        self.store.create_folders()

    def register(self, **args: list[str]) -> None:
        entry = {"repo_id": REPO, "model_id": REPO, "cache_path": str(self.snapshot), "format": "mlx", "port": None}
        entries = {name: entry | {"args": words} for name, words in args.items()}
        self.paths.registry.write_text(json.dumps({"version": 1, "models": entries}), encoding="utf-8")

    def context(self, command: str, args: dict[str, object]) -> Context:
        paths = replace(self.paths, settings=self.settings)
        request = envelope(command, args, self.settings, "").request
        return Context(request, paths, self.store, this_system(), self.events.append, {}, operation=f"op-{command}")

    def __call__(self, command: str, **args: object) -> Any:
        ctx = self.context(command, args)
        return operation(command)(ctx, ctx.request)

    def view(self, port: int | None = None) -> PortView:
        return self.context("status", {}).observe_port(port or self.first)

    def run(self) -> Run:
        run = self.store.run(self.first)
        assert run is not None
        return run

    @property
    def assigned(self) -> dict[str, int]:
        return {name: model.port for name, model in self.store.registry.read().models.items() if model.port}

    def end(self) -> None:
        """Kill the servers that are left, and collect those that have ended: they are this process's children."""
        for each in [
            each for each in psutil.Process().children() if is_zombie(each) or ENGINE in " ".join(each.cmdline())
        ]:
            each.kill()
            os.waitpid(each.pid, 0)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    for name in ("SIGNAL_SECONDS", "END_SECONDS", "LEFTOVER_SECONDS"):
        monkeypatch.setattr(ending, name, 0.3)
    made = Host(tmp_path, free_ports(["127.0.0.1"], 2))
    yield made
    made.end()


def is_zombie(process: psutil.Process) -> bool:
    return process.status() == psutil.STATUS_ZOMBIE


def serve(host: Host) -> int:
    """Load the stubborn server `mine` on the first port; `next` is an ordinary one. Return its pid."""
    host.register(mine=STUBBORN, next=[])
    host("load", model="mine", port=str(host.first), force=True)
    return host.run().pid


def alive(pid: int) -> bool:
    found = this_system().process(pid)
    return found is not None and not found.zombie


def notes(host: Host) -> list[str]:
    return [event.message for event in host.events if isinstance(event, Note)]


def is_draining(host: Host, pid: int) -> None:
    """The server lives, is recorded, and its port is `draining` with what it holds."""
    view = host.view()
    assert alive(pid) and (view.state, view.pid, view.model) == (State.DRAINING, pid, "mine")
    assert (view.memory_bytes or 0) > 300 * MB
    world = host.context("status", {}).registry_and_world()[1]
    assert [drift.code for drift in world.drift if drift.port == host.first] == ["still_ending"]


PATHS: dict[str, tuple[str, dict[str, object]]] = {
    "unload": ("unload", {"port": "{first}"}),
    "unload of the model": ("unload", {"model": "mine"}),
    "unload-all": ("unload-all", {}),
    "swap": ("load", {"model": "next", "port": "{first}", "force": True}),
    "move": ("load", {"model": "mine", "port": "{second}", "force": True}),
    "rollback": ("rollback", {"port": "{first}"}),
    "reconcile": ("reconcile", {}),
}


@pytest.mark.parametrize("path", PATHS)
def test_server_above_the_limit_is_killed_only_on_request(host: Host, path: str) -> None:
    command, words = PATHS[path]
    ports = {"first": host.first, "second": host.second}
    args = {key: word.format(**ports) if isinstance(word, str) else word for key, word in words.items()}
    if path == "rollback":
        host.register(mine=STUBBORN, next=[])
        host("load", model="next", port=str(host.first))
    pid = serve(host)
    if path == "reconcile":
        host.store.save_run(replace(host.run(), proven_at=None))  # a load that was killed
    with pytest.raises(Busy) as caught:
        host(command, **args)
    error = caught.value
    assert (error.code, int(error.exit)) == ("still_ending", 75) and "--kill" in error.hint
    assert error.details["port"] == host.first and error.details["pid"] == pid
    assert host.run().stopped_by == {"rollback": "load"}.get(command, command)
    assert host.assigned == {"mine": host.first}
    is_draining(host, pid)

    host(command, **args, kill=True)
    assert not alive(pid)
    replaces = path in {"swap", "rollback"}
    after = {"next": host.first} if replaces else {"mine": host.second} if path == "move" else {}
    assert host.assigned == after
    assert host.view().state is (State.READY if replaces else State.IDLE)
    assert replaces or host.view().run is None


def test_process_that_outlives_its_leader_is_named(host: Host) -> None:
    host.register(mine=[*HEAVY, "--fake-act", "family", "--fake-ignore", "term"])
    host("load", model="mine", port=str(host.first))
    with pytest.raises(Busy) as caught:
        host("unload", port=str(host.first))
    child: Any = caught.value.details["pid"]
    assert child != host.run().pid and not alive(host.run().pid)
    is_draining(host, child)
    assert _is_left(host.context("unload-all", {}), caught.value)
    host("unload", port=str(host.first), kill=True)
    assert not _is_left(host.context("unload-all", {}), caught.value)
    nothing_is_left(host)


def test_swap_says_which_model_is_where(host: Host) -> None:
    serve(host)
    with pytest.raises(Busy) as caught:
        host("load", model="next", port=str(host.first), force=True)
    assert caught.value.message.startswith(f"mine on port {host.first}, pid {host.run().pid}, has not ended yet")
    assert caught.value.why.endswith("; next was not started")
    assert f"mlxctl load next {host.first} --force" in caught.value.hint


def test_load_and_reconcile_wait_for_a_server_that_ends(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    finishes: list[tuple[str, dict[str, object]]] = [
        ("load", {"model": "next", "port": str(host.first)}),
        ("reconcile", {}),
    ]
    for command, args in finishes:
        host.register(mine=[*HEAVY, "--fake-linger", "2"], next=[])
        host("load", model="mine", port=str(host.first))
        pid = host.run().pid
        with pytest.raises(Busy):
            host("unload", port=str(host.first))
        with monkeypatch.context() as patch:
            patch.setattr(ending, "END_SECONDS", 30.0)
            host(command, **args)
        assert not alive(pid)
        host("unload-all")
    assert host.assigned == {}


def test_time_and_released_memory_are_shown(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "END_SECONDS", 30.0)
    monkeypatch.setattr(ending, "QUIET_SECONDS", 0.1)
    host.register(mine=[*HEAVY, "--fake-linger", "1"])
    host("load", model="mine", port=str(host.first))
    assert host("unload", port=str(host.first)).changed
    shown = [event for event in host.events if isinstance(event, Phase | Progress) and event.name == "ending"]
    assert isinstance(shown[0], Phase) and "holds 3" in shown[0].message and "s to end" in shown[0].message


def test_shown_time_is_that_of_all_signals(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm gets SIGINT, and SIGTERM if it has not ended."""
    monkeypatch.setattr(ending, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(ending, "SIGNAL_SECONDS", 1.0)
    monkeypatch.setattr(ending, "END_SECONDS", 3.0)
    host.register(mine=["--fake-linger", "30"])
    host("load", model="mine", port=str(host.first))
    host("unload", port=str(host.first), kill=True)
    texts = [event.message for event in host.events if isinstance(event, Phase) and event.name == "ending"]
    assert [text.partition(", and ")[2] for text in texts[:2]] == ["may take 4 s to end", "may take 3 s to end"]


@pytest.mark.parametrize("gave_up", [True, False])
def test_server_that_has_had_its_time_is_killed_soon(
    host: Host, monkeypatch: pytest.MonkeyPatch, gave_up: bool
) -> None:
    """One whose stop was interrupted has not: it gets all of it."""
    pid = serve(host)
    with pytest.raises(Busy):
        host("unload", port=str(host.first))
    assert host.run().overdue
    host.store.save_run(replace(host.run(), overdue=gave_up))
    monkeypatch.setattr(ending, "END_SECONDS", 3.0)
    monkeypatch.setattr(ending, "GRACE_SECONDS", 0.1)
    began = time.monotonic()
    host("unload", port=str(host.first), kill=True)
    assert not alive(pid) and (time.monotonic() - began < 3) is gave_up


@pytest.mark.parametrize("limit", [NO_LIMIT, 10**9])
def test_server_below_the_limit_is_killed(host: Host, limit: int) -> None:
    host.settings = replace(host.settings, kill_limit=limit)
    pid = serve(host)
    assert host("unload", port=str(host.first)).changed and not alive(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="the default of Linux")
def test_there_is_no_limit_on_linux_by_default() -> None:
    assert ending.kill_limit(Settings()) is None


def test_more_memory_gets_more_time() -> None:
    assert [ending.end_seconds(size * 10**9) for size in (0, 4, 400)] == [30, 31, 130]


def nothing_is_left(host: Host) -> None:
    view = host.view()
    assert view.state is State.IDLE and view.run is None and not view.members
    world = host.context("status", {}).registry_and_world()[1]
    assert [drift for drift in world.drift if drift.code == "still_ending"] == []


@pytest.mark.parametrize("old", [True, False], ids=["a swap", "a first load"])
def test_failed_load_names_the_server_that_is_left(host: Host, old: bool) -> None:
    host.register(mine=[*STUBBORN, "--fake-act", "broken"], next=[])
    if old:
        host("load", model="next", port=str(host.first))
    with pytest.raises(NotStarted) as caught:
        host("load", model="mine", port=str(host.first), force=True)
    pid = host.run().pid
    assert f"mine on port {host.first}, pid {pid}, has not ended yet" in caught.value.why
    assert ("next is not started again there" in caught.value.why) is old
    is_draining(host, pid)
    host("reconcile", kill=True)
    assert not alive(pid) and host.view().state is State.IDLE and host.view().run is None


def test_reconcile_after_a_failed_swap_keeps_the_old_model(host: Host) -> None:
    """The new server has not ended: the port was never its own."""
    host.register(mine=[*STUBBORN, "--fake-act", "broken"], next=[])
    host("load", model="next", port=str(host.first))
    with pytest.raises(NotStarted):
        host("load", model="mine", port=str(host.first), force=True)
    host("reconcile", kill=True)
    assert host.assigned == {"next": host.first} and host.view().run is None
    assert f"to serve next on port {host.first} again: mlxctl load next {host.first}" in notes(host)


def test_reconcile_after_a_swap_that_did_not_happen_says_how_to_get_the_old_model_back(host: Host) -> None:
    pid = serve(host)
    with pytest.raises(Busy):
        host("load", model="next", port=str(host.first), force=True)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid), 10, "its end")
    host("reconcile")
    assert host.assigned == {}
    assert f"to serve mine on port {host.first} again: mlxctl load mine {host.first}" in notes(host)


def test_failed_load_kills_its_server_on_request(host: Host) -> None:
    host.register(mine=[*STUBBORN, "--fake-act", "broken"])
    with pytest.raises(NotStarted) as caught:
        host("load", model="mine", port=str(host.first), kill=True)
    assert "has not ended" not in caught.value.why
    nothing_is_left(host)


@pytest.mark.parametrize("kill", [False, True])
def test_failed_load_of_a_restore_obeys_the_limit(host: Host, kill: bool) -> None:
    host.register(mine=[*STUBBORN, "--fake-act", "broken"])
    host.store.registry.update(lambda registry: registry.assign("mine", host.first))
    with pytest.raises(NotStarted) as caught:
        host("restore", kill=kill)
    assert caught.value.code == "restore_incomplete"
    assert host.assigned == {"mine": host.first}
    if kill:
        assert host.view().owner is None and not host.view().members
    else:
        is_draining(host, host.run().pid)


@pytest.mark.parametrize("kill", [False, True])
def test_cancelled_load_leaves_what_has_not_ended_recorded(host: Host, kill: bool) -> None:
    host.register(mine=[*STUBBORN, "--fake-act", "deaf"])
    ctx = host.context("load", {"model": "mine", "port": str(host.first), "kill": kill})

    def cancel(event: Event) -> None:
        if isinstance(event, Phase) and event.name == "proof":
            holds = lambda: (host.view().memory_bytes or 0) > 300 * MB  # noqa: E731
            wait_until(holds, 30, "its memory")
            ctx.cancellation.request()

    ctx = replace(ctx, emit=cancel)
    with pytest.raises(Interrupted) as caught, ctx.cancellation.open():
        operation("load")(ctx, ctx.request)
    assert ("has not ended yet" in caught.value.why) is not kill
    if kill:
        nothing_is_left(host)
    else:
        left: Any = caught.value.details["left"]
        assert left["code"] == "still_ending" and left["details"]["pid"] == host.run().pid
        is_draining(host, host.run().pid)


def interrupted(ctx: Context, phase: str, port: int, first: Callable[[], object] = lambda: None) -> Any:
    """Run a command that is cancelled in a phase of a port, after `first`. Return the details of its error."""

    def cancel(event: Event) -> None:
        in_phase = isinstance(event, Phase) and event.name == phase
        if in_phase and (str(port) in str(event) or (phase == "proof" and ctx.store.run(port))):
            first()
            ctx.cancellation.request()

    ctx = replace(ctx, emit=cancel)
    with pytest.raises(Interrupted) as caught, ctx.cancellation.open():
        operation(ctx.request.name)(ctx, ctx.request)
    return caught.value.details


@pytest.mark.parametrize("command", ["restore", "unload-all", "reconcile"])
def test_cancelled_change_of_several_ports_names_what_an_earlier_step_left(host: Host, command: str) -> None:
    if command == "restore":
        host.register(mine=[*STUBBORN, "--fake-act", "broken"], next=["--fake-act", "deaf"])
        host.store.registry.update(lambda each: each.assign("mine", host.first).assign("next", host.second))
    else:
        serve(host)
        host("load", model="next", port=str(host.second))
    if command == "reconcile":
        for port in (host.first, host.second):
            run = host.store.run(port)
            assert run is not None
            host.store.save_run(replace(run, proven_at=None))  # loads that were killed
    phase = "proof" if command == "restore" else "stop"
    left = interrupted(host.context(command, {}), phase, host.second)["left"]
    assert (left["code"], left["details"]["port"]) == ("still_ending", host.first)
    assert left["details"]["pid"] == host.run().pid
    is_draining(host, host.run().pid)


def test_cancelled_restore_does_not_name_what_has_ended_since(host: Host) -> None:
    host.register(mine=[*STUBBORN, "--fake-act", "broken"], next=["--fake-act", "deaf"])
    host.store.registry.update(lambda each: each.assign("mine", host.first).assign("next", host.second))

    def end() -> None:
        os.kill(host.run().pid, signal.SIGKILL)
        wait_until(lambda: not alive(host.run().pid), 10, "its end")

    assert "left" not in interrupted(host.context("restore", {}), "proof", host.second, end)


RESTARTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "it fails and is left": (
        [*STUBBORN, "--fake-act", "broken"],
        {"left": "still_ending", "not_restarted": "server_did_not_start"},
    ),
    "it fails": (["--fake-act", "broken"], {"not_restarted": "server_did_not_start"}),
    "it serves": ([], {}),
}
"""How the old server behaves when it is started again -> the errors that the cancelled swap names, and their codes."""


@pytest.mark.parametrize("restart", RESTARTS)
def test_cancelled_swap_names_what_became_of_the_old_server(host: Host, restart: str) -> None:
    words, named = RESTARTS[restart]
    host.register(mine=[], next=["--fake-act", "deaf"])
    host("load", model="mine", port=str(host.first))
    host.store.save_run(replace(host.run(), argv=(*host.run().argv, *words)))
    swap = host.context("load", {"model": "next", "port": str(host.first), "force": True})
    details = interrupted(swap, "proof", host.first)
    assert {key: details[key]["code"] for key in ("left", "not_restarted") if key in details} == named
    if "left" in named:
        assert details["left"]["details"]["pid"] == host.run().pid
        is_draining(host, host.run().pid)
    assert ("did not come back" in details["previous"]) is bool(named)
    assert host.assigned == ({} if named else {"mine": host.first})


def test_incomplete_restore_names_what_is_left(host: Host) -> None:
    host.register(mine=[*STUBBORN, "--fake-act", "broken"], next=[])
    host.store.registry.update(lambda each: each.assign("mine", host.first).assign("next", host.second))
    with pytest.raises(NotStarted) as caught:
        host("restore")
    left: Any = caught.value.details["left"]
    assert (left["code"], left["exit"], left["details"]["port"]) == ("still_ending", 75, host.first)
    assert [row["model"] for row in caught.value.to_wire()["details"]["restored"]] == ["next"]  # type: ignore[index]


def test_restore_waits_for_a_draining_port(host: Host) -> None:
    pid = serve(host)
    with pytest.raises(Busy):
        host("load", model="next", port=str(host.first), force=True)
    (skipped,) = host("restore").skipped
    assert "has not ended yet" in skipped.why and skipped.commands == (("mlxctl", "reconcile"),)
    assert alive(pid)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid), 10, "its end")
    (restored,) = host("restore").restored
    assert (restored.model, host.view().state) == ("mine", State.READY)


def test_restore_does_not_start_what_an_unload_stopped(host: Host) -> None:
    pid = serve(host)
    with pytest.raises(Busy):
        host("unload", port=str(host.first))
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid), 10, "its end")
    result = host("restore")
    assert not result.restored and "unload began to stop it" in result.skipped[0].why
    host("reconcile")
    assert host.assigned == {} and host.view().run is None


def test_server_started_by_hand_is_recorded_until_it_ends(host: Host, tmp_path: Path) -> None:
    argv = [str(install_engine(tmp_path / "bin")), *STUBBORN, "--model", "mine", "--port", str(host.first)]
    with subprocess.Popen(argv, start_new_session=True, stdout=subprocess.DEVNULL) as server:
        try:
            wait_until(lambda: host.view().state is State.READY, 30, "the server")
            with pytest.raises(Busy):
                host("unload", port=str(host.first), force=True)
            is_draining(host, server.pid)
            host("unload", port=str(host.first), kill=True)
            assert server.wait(10) == -signal.SIGKILL and host.view().state is State.IDLE
        finally:
            server.kill()


@pytest.mark.parametrize("limits", [(), ("--decode-concurrency", "4", "--prompt-cache-bytes", "1000000")])
def test_server_started_by_hand_comes_back_with_its_limits(host: Host, tmp_path: Path, limits: tuple[str, ...]) -> None:
    host.register(mine=["--fake-act", "broken"], next=[])
    argv = [str(install_engine(tmp_path / "bin")), "--model", "next", "--port", str(host.first), *limits]
    with subprocess.Popen(argv, start_new_session=True, stdout=subprocess.DEVNULL) as server:
        try:
            wait_until(lambda: host.view().state is State.READY, 30, "the server")
            with pytest.raises(NotStarted) as caught:
                host("load", model="mine", port=str(host.first), force=True)
        finally:
            server.kill()
    assert host.run().model == "next" and host.run().budget == limits
    again = f"next serves port {host.first} again" + ("" if limits else ", as before without limits of its memory")
    assert caught.value.details["previous"] == again


def test_restore_of_an_interrupted_load_kills_only_on_request(host: Host) -> None:
    pid = serve(host)
    interrupted = replace(host.run(), proven_at=None)
    host.store.save_run(interrupted)
    with pytest.raises(MlxopsError) as caught:
        host("restore")
    assert caught.value.code == "restore_incomplete" and "still_ending" in caught.value.why
    is_draining(host, pid)
    host.store.save_run(interrupted)
    assert [row.model for row in host("restore", kill=True).restored] == ["mine"] and not alive(pid)


def test_unload_of_a_portless_server_above_the_limit_clears_the_port(host: Host, tmp_path: Path) -> None:
    """It is stopped after the port's own server, and has no record: the port must not be started again."""
    host.register(next=[])
    host("load", model="next", port=str(host.first))
    argv = [str(install_engine(tmp_path / "bin")), *STUBBORN, "--fake-act", "deaf", "--model", "mine"]
    argv += ["--host", host.settings.bind, "--port", str(host.first)]
    with subprocess.Popen(argv, start_new_session=True, stdout=subprocess.DEVNULL) as server:
        try:
            wait_until(lambda: (this_system().memory([server.pid]) or 0) > 300 * MB, 30, "its memory")
            wait_until(lambda: [each.pid for each in host.view().portless] == [server.pid], 30, "the server")
            with pytest.raises(Busy) as caught:
                host("unload", port=str(host.first), force=True)
            assert caught.value.details["pid"] == server.pid
            again = f"mlxctl unload {host.first} --force"
            assert caught.value.hint == f"wait for it again: {again}; or kill it: {again} --kill"
            assert host.assigned == {} and host.store.run(host.first) is None and alive(server.pid)
            assert host.store.history()[-1]["command"] == "unload"
            host("unload", port=str(host.first), force=True, kill=True)
            assert server.wait(10) == -signal.SIGKILL
            nothing_is_left(host)
        finally:
            server.kill()


@pytest.mark.parametrize(
    ("port", "model", "restarts"), [(0, "next", True), (0, "mine", True), (1, "mine", True), (1, "next", False)]
)
def test_unload_waits_until_a_cancelled_swap_has_restarted_the_old_server(
    host: Host, port: int, model: str, restarts: bool
) -> None:
    """`mine` is assigned to the first port. A load of it elsewhere moves it."""
    host.register(mine=[], next=[])
    host.store.registry.update(lambda registry: registry.assign("mine", host.first))
    weights = host.snapshot / "large.safetensors"
    with weights.open("wb") as file:
        file.truncate(80 * 10**9)
    ctx = host.context("unload", {"port": str(host.first)})
    stop = 500 + ending.longest_seconds(0) + return_seconds(0)
    stops = 2 if (port, model) == (1, "mine") else 1
    seconds = cancel_seconds(ctx, (host.first, host.second)[port], model, 500) - CANCEL_SECONDS - stops * stop
    assert seconds == pytest.approx(780 if restarts else 0, abs=1)


def test_unload_counts_the_drain_of_the_load_that_it_cancels(host: Host) -> None:
    ops = host.paths.state / "ops"
    for drain, seconds in ((None, 30.0), (600, 600.0), (0, 0.0)):
        args: dict[str, object] = {"model": "mine", "port": "8100"} | ({} if drain is None else {"drain": drain})
        journal, lock = create(ops, envelope("load", args, host.settings, ""))
        assert lock is not None
        os.close(lock)
        assert drain_of(journal) == seconds


class _WorkerKilled(BaseException):
    pass


def test_stop_whose_worker_is_killed_is_recorded(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "QUIET_SECONDS", 0.0)
    pid = serve(host)

    def kill_worker(event: Event) -> None:
        if isinstance(event, Phase) and event.name == "ending":
            raise _WorkerKilled

    ctx = replace(host.context("unload", {"port": str(host.first)}), emit=kill_worker)
    with pytest.raises(_WorkerKilled):
        operation("unload")(ctx, ctx.request)
    assert (host.run().stopped_by, host.run().pid) == ("unload", pid) and host.run().stopping_since
    is_draining(host, pid)
    assert not host("restore").restored
    host("unload", port=str(host.first), kill=True)
    nothing_is_left(host)


@pytest.mark.parametrize("command", ["unload", "reconcile", "load"])
def test_stop_whose_worker_was_killed_before_the_signal_is_finished(host: Host, command: str) -> None:
    """The server serves on, and its record says that it is being stopped."""
    host.register(mine=[], next=[])
    host("load", model="mine", port=str(host.first))
    pid = host.run().pid
    host.store.save_run(replace(host.run(), stopped_by="unload", stopping_since="2026-01-01T00:00:00Z"))
    assert host.view().state is State.DRAINING
    port = str(host.first)
    args: dict[str, dict[str, object]] = {"unload": {"port": port}, "load": {"model": "next", "port": port}}
    host(command, **args.get(command, {}))
    assert not alive(pid) and host.assigned == ({"next": host.first} if command == "load" else {})


@contextmanager
def full_disk() -> Iterator[None]:
    """Let each write to a file fail in this process."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_stop_that_cannot_be_recorded_does_not_begin_above_the_limit(host: Host) -> None:
    pid = serve(host)
    with pytest.raises(Refused) as caught, full_disk():
        ending.end(this_system(), host.run(), ending.Terms("unload", 100 * MB), store=host.store)
    assert caught.value.code == "state_unwritable" and "does not begin" in caught.value.why
    assert alive(pid) and host.view().state is State.READY and host.run().stopped_by is None


@pytest.mark.parametrize("limit", [None, 10**9])
def test_stop_that_cannot_be_recorded_warns_below_the_limit(host: Host, limit: int | None) -> None:
    pid = serve(host)
    with full_disk():
        ending.end(this_system(), host.run(), ending.Terms("unload", limit), store=host.store, emit=host.events.append)
    assert not alive(pid) and any("the stop could not be recorded" in note for note in notes(host))


@pytest.mark.parametrize("known", [{"proven_at": None}, {"stopping_since": "2026-01-01T00:00:00Z"}])
def test_stop_that_is_known_already_goes_on_without_a_record(host: Host, known: dict[str, Any]) -> None:
    pid = serve(host)
    with full_disk(), pytest.raises(Busy):
        run = replace(host.run(), **known)
        ending.end(this_system(), run, ending.Terms("load", 100 * MB), store=host.store, emit=host.events.append)
    assert alive(pid) and any("the stop could not be recorded" in note for note in notes(host))


def test_record_of_an_earlier_build_is_read(host: Host) -> None:
    serve(host)
    written: Any = wire.encode(host.run().to_wire())
    for key in ("stopped_by", "stopping_since"):
        written.pop(key)
    path = self_record(host)
    path.write_text(json.dumps(written))
    assert host.run().stopped_by is None and host.view().state is State.READY


def self_record(host: Host) -> Path:
    return host.paths.state / "run" / f"{host.first}.json"


# -- over SSH, with the real times ----------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_command_line_names_the_next_command(homelab: Homelab) -> None:
    ask = Ask(with_fake(homelab), "ssh")
    homelab.configure(kill_limit="100MB")
    register(ask.studio, "mine", args=STUBBORN)
    ask("load", "--model", "mine", "--port", ask.port).ok()
    pid = ask.row()["pid"]
    stopped = ask("unload", "--port", ask.port, timeout=120)
    again = f"mlxctl reconcile; or kill it: mlxctl unload {ask.port} --kill"
    assert stopped.exit == 75 and f"next: when it has ended: {again}" in stopped.stderr
    assert f"ending: mine on port {ask.port} holds 3" in stopped.stderr
    row = ask.row()
    assert (row["state"], row["owner"], row["pid"], row["model"]) == ("draining", "mlxops", pid, "mine")
    assert row["memory_bytes"] > 300 * MB and row["detail"].startswith("unload began to stop it at")
    assert assigned(ask.studio) == {"mine": ask.port}
    os.kill(pid, signal.SIGKILL)
    ask("reconcile").ok()
    assert assigned(ask.studio) == {} and ask.row()["state"] == "idle"


@pytest.mark.long
@pytest.mark.timeout(300)
def test_server_that_takes_twenty_seconds_gets_them(homelab: Homelab) -> None:
    ask = Ask(with_fake(homelab), "ssh")
    homelab.configure(kill_limit="100MB")
    slow = [*HEAVY, "--fake-linger", "20"]
    register(ask.studio, "mine", args=slow)
    register(ask.studio, "deaf", args=[*slow, "--fake-act", "deaf"])
    ask("load", "--model", "mine", "--port", ask.port).ok()
    began = time.monotonic()
    stopped = ask("unload", "--port", ask.port, timeout=120).ok()
    assert time.monotonic() - began > 20 and "killed" not in stopped.stderr
    assert assigned(ask.studio) == {} and ask.row()["state"] == "idle"

    with ask.running("load", "--model", "deaf", "--port", ask.port) as load:
        assert load.stderr is not None
        next(line for line in load.stderr if line.startswith("proof: "))
        wait_until(lambda: (ask.row()["memory_bytes"] or 0) > 300 * MB, 30, "its memory")
        began = time.monotonic()
        ask("unload", "--port", ask.port, timeout=120).ok()
        assert time.monotonic() - began > 20 and finish(load).exit == 130
    assert assigned(ask.studio) == {} and ask.row()["state"] == "idle"


# -- the real mlx-lm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True], ids=["in its own session", "started with &"])
@pytest.mark.timeout(300)
def test_mlx_lm_ends_by_sigint_under_a_stream(homelab: Homelab, background: bool) -> None:
    studio, port = homelab.studio, homelab.studio.ports[0]
    folder = studio.folder / "by-hand"
    folder.mkdir()
    (folder / "jerry-xl").symlink_to(studio.install(REPO, models.QWEN))
    program = str(cache.engine_venv("mlx-lm") / "bin" / "mlx_lm.server")
    # A shell makes what it starts with & ignore SIGINT, unless it is interactive.
    ignore = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    prefix = [sys.executable, "-c", ignore] if background else []
    argv = [*prefix, program, "--model", "jerry-xl", "--host", studio.address, "--port", str(port)]
    env = {"HOME": str(studio.home), "PATH": os.defpath, "HF_HUB_OFFLINE": "1"}
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(argv, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True) as server,
    ):
        try:
            wait_until(lambda: studio.listening(port), 60, "the engine's port")
            stream = Stream(studio, port, 1_000_000)
            unloaded = studio.mlxctl("unload", str(port), "--force", "--drain", "0.5").ok()
            stream.close()
            status = server.wait(10)
        finally:
            server.kill()
    assert "are cut off" in unloaded.stderr and "killed" not in unloaded.stderr
    assert status == -signal.SIGTERM if background else status in ENDED_BY_SIGINT
