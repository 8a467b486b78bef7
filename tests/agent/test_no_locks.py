"""File systems without locks, or whose lock service does not respond: detected before anything is stopped."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlxops.agent import __main__ as agent
from mlxops.agent import install
from mlxops.agent.context import Context
from mlxops.agent.host.system import this_system
from mlxops.agent.operations import status
from mlxops.agent.paths import host_paths
from mlxops.agent.state import locks
from mlxops.agent.state.locks import NoLocks
from mlxops.agent.state.operation_log import create
from mlxops.agent.state.store import Store
from mlxops.agent.worker import begin, finish
from mlxops.core.commands.status import Status
from mlxops.core.errors import Refused
from mlxops.core.protocol import Event, Failed
from mlxops.core.records import Operation
from mlxops.core.settings import Settings
from tests.lab.envelopes import envelope
from tests.lab.homelab import Homelab, run, script
from tests.lab.sshd import missing
from tests.steps import REPO, Ask, error_of, listener, register, with_fake

LOCK_ERRORS = {
    "ENOTSUP: SMB on a Mac": errno.ENOTSUP,
    "ENOLCK: NFS without a lock service": errno.ENOLCK,
    "EOPNOTSUPP: FUSE": errno.EOPNOTSUPP,
    "EINVAL: AFS, 9p": errno.EINVAL,
    "ENOSYS: gVisor, old FUSE": errno.ENOSYS,
    "EBADF: a folder on Linux's NFS": errno.EBADF,
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "share").mkdir()
    store = Store(tmp_path / "state", tmp_path / "share" / "registry.json")
    store.create_folders()
    store.registry.update(lambda registry: registry.assign("a", 8100))
    return store


@pytest.fixture
def on_flock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Callable[[], None]], None]:
    """Call a function first when a file below a folder is locked."""
    real = fcntl.flock
    monkeypatch.setattr(locks, "_responsive_devices", set())

    def install_hook(folder: Path, hook: Callable[[], None]) -> None:
        def flock(fd: int, operation: int) -> None:
            if Path(os.path.realpath(f"/dev/fd/{fd}")).is_relative_to(folder):
                hook()
            real(fd, operation)

        monkeypatch.setattr(fcntl, "flock", flock)

    return install_hook


def failing(number: int) -> Callable[[], None]:
    def flock() -> None:
        raise OSError(number, os.strerror(number))

    return flock


OnFlock = Callable[[Path, Callable[[], None]], None]


@pytest.mark.parametrize("number", LOCK_ERRORS.values(), ids=LOCK_ERRORS)
def test_registry_without_locks_is_refused_first(store: Store, on_flock: OnFlock, number: int) -> None:
    on_flock(store.registry.path.parent, failing(number))
    for change in (store.registry.check_writable, store.registry.read_usable):
        with pytest.raises(Refused) as caught:
            change()
        error = caught.value
        assert error.code == "registry_unwritable" and str(store.registry.path) in error.message
        assert error.why.startswith("this file system has no locks") and "local disk" in error.hint
    assert store.registry.read().models["a"].port == 8100


@pytest.mark.parametrize("number", LOCK_ERRORS.values(), ids=LOCK_ERRORS)
def test_every_writer_reports_a_state_folder_without_locks(store: Store, on_flock: OnFlock, number: int) -> None:
    (store.state / "locks" / "port-8100").touch()
    on_flock(store.state, failing(number))
    me = Operation("op1", "load")
    writers: list[Callable[[], object]] = [
        lambda: store.lock("port-8100", me),
        lambda: store.settings_lock().__enter__(),
        lambda: begin(store, envelope("init", {}, Settings(state=str(store.state)), "")),
    ]
    for write in writers:
        with pytest.raises(Refused) as caught:
            write()
        error = caught.value
        assert error.code == "state_unwritable" and str(store.state) in error.message
        assert "this file system has no locks" in error.why and "local disk" in error.hint
    with pytest.raises(NoLocks):
        store.holder("port-8100")


def test_readers_report_a_state_folder_without_locks(store: Store, on_flock: OnFlock) -> None:
    settings = Settings(hub=str(store.registry.path.parent), state=str(store.state))
    log, lock = create(store.state / "ops", envelope("load", {"model": "a", "port": "8100"}, settings, ""))
    assert lock is not None
    os.close(lock)
    for name in ("port-8100", "repo-org--a"):
        (store.state / "locks" / name).touch()
    on_flock(store.state, failing(errno.ENOTSUP))

    def context_of(command: str) -> tuple[Context, list[Event]]:
        events: list[Event] = []
        paths = host_paths(settings, os.environ)
        return Context(
            envelope(command, {}, settings, "").request, paths, store, this_system(), events.append, {}
        ), events

    context, events = context_of("ops")
    assert finish(context, events.append) == 3
    (failed,) = events
    assert isinstance(failed, Failed) and failed.error.code == "state_unreadable"
    assert str(store.state) in failed.error.message and "local disk" in failed.error.hint
    result = status.run(context_of("status")[0], Status())
    assert next(row for row in result.ports if row.port == 8100).state == "unknown"
    assert "state_unreadable" in {row.code for row in result.drift}
    assert status.downloads(context) == []
    assert not log.ended


def test_deploy_reports_a_state_folder_without_locks(tmp_path: Path, on_flock: OnFlock) -> None:
    (tmp_path / "state").mkdir()
    on_flock(tmp_path / "state", failing(errno.ENOTSUP))
    lock = os.open(tmp_path / "state" / "deploy.lock", os.O_RDWR | os.O_CREAT)
    try:
        with pytest.raises(install.ProblemError) as caught:
            install.wait_for_lock(lock)
    finally:
        os.close(lock)
    assert "no locks" in caught.value.why and "local disk" in caught.value.hint


def test_agent_starts_and_download_begins_without_locks(
    tmp_path: Path, on_flock: OnFlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp, lock = tmp_path / "installed.json", tmp_path / "etag.lock"
    stamp.touch()
    lock.touch()
    monkeypatch.setattr(agent, "STAMP", str(stamp))
    on_flock(tmp_path, failing(errno.ENOTSUP))
    agent._use_build()
    assert locks.is_locked(lock)


def test_unresponsive_lock_service_is_not_waited_for(
    store: Store, on_flock: OnFlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS while the server's lock service is down: files can be read, but flock(2) does not return."""
    monkeypatch.setattr(locks, "ANSWER_SECONDS", 0.05)
    released = threading.Event()

    def hang() -> None:
        released.wait(30)

    on_flock(store.registry.path.parent, hang)
    try:
        with pytest.raises(Refused) as caught:
            store.registry.check_writable()
    finally:
        released.set()
    assert "does not respond" in caught.value.why and "local disk" in caught.value.hint


def test_lock_that_is_granted_too_late_is_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(locks, "_responsive_devices", set())
    real, released, done = fcntl.flock, threading.Event(), threading.Event()

    def late(fd: int, operation: int) -> None:
        released.wait(30)
        real(fd, operation)
        done.set()

    monkeypatch.setattr(fcntl, "flock", late)
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(NoLocks):
        locks.try_flock(fd)
    os.close(fd)
    released.set()
    assert done.wait(30)
    monkeypatch.setattr(fcntl, "flock", real)
    other = os.open(tmp_path, os.O_RDONLY)
    try:
        assert locks.flock_within(other, 5.0)
    finally:
        os.close(other)


@pytest.fixture
def share(homelab: Homelab) -> Iterator[list[str]]:
    """A command prefix that makes flock(2) fail in the registry's folder."""
    if sys.platform != "linux":
        pytest.skip("strace is Linux's")
    if shutil.which("strace") is None:
        missing("strace (Debian and Ubuntu: apt-get install strace)")
    strace = ["strace", "-f", "-qq", "-o", os.devnull, "-P", str(homelab.studio.hub)]
    yield [*strace, "-e", "trace=flock", "-e", "inject=flock:error=EOPNOTSUPP"]


def test_registry_without_locks_keeps_servers_from_stopping_or_starting(homelab: Homelab, share: list[str]) -> None:
    studio, ask = homelab.studio, Ask(with_fake(homelab), "local")
    register(studio, "mine")
    register(studio, "other", repo=REPO)
    ask.result("load", "--model", "mine", "--port", ask.port)
    pid, registry = listener(studio, ask.port), studio.registry_path.read_bytes()
    port, free = str(ask.port), str(studio.ports[1])
    try:
        for command in (
            ["load", "other", port, "--force"],
            ["load", "other", port, "--force", "--dry-run"],
            ["load", "other", free],
            ["unload", port],
        ):
            answer = run(
                [*share, script("mlxctl"), *command, "--json", "--local"], studio.home, studio.environment, None, 60
            )
            error = error_of(answer)
            assert (answer.exit, error["code"]) == (3, "registry_unwritable"), str(answer)
            assert "no locks" in error["why"] and "local disk" in error["hint"]
            assert str(studio.registry_path) in error["message"]
            assert listener(studio, ask.port) == pid and listener(studio, int(free)) is None
        for command in (["status"], ["list"]):
            answer = run([*share, script("mlxctl"), *command, "--local"], studio.home, studio.environment, None, 60)
            assert answer.exit == 0 and "mine" in answer.stdout, str(answer)
        assert studio.registry_path.read_bytes() == registry
    finally:
        ask.result("unload", "--port", ask.port)
