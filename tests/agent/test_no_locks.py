"""File systems without locks, or whose locks never answer: found out before anything is stopped, and told as such."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxops.agent import __main__ as agent
from mlxops.agent import install
from mlxops.agent.context import Context
from mlxops.agent.host.system import this_system
from mlxops.agent.operations import ops
from mlxops.agent.operations.status import status
from mlxops.agent.paths import host_paths
from mlxops.agent.state import locks
from mlxops.agent.state.locks import NoLocks
from mlxops.agent.state.operation_log import create
from mlxops.agent.state.store import Store
from mlxops.agent.worker import begin, finish
from mlxops.core.errors import Refused
from mlxops.core.protocol import Event, Failed, Request
from mlxops.core.records import Operation
from mlxops.core.settings import Settings
from tests.lab.homelab import Homelab, run, script
from tests.lab.sshd import missing
from tests.steps import REPO, Ask, error_of, listener, register, with_fake

ANSWERS = {
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
    store.ready()
    store.registry.update(lambda registry: registry.assign("a", 8100))
    return store


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Callable[[], None]], None]:
    """flock(2) of what lies in a folder does this from now on."""
    real = fcntl.flock
    monkeypatch.setattr(locks, "_answering", set())

    def on(folder: Path, does: Callable[[], None]) -> None:
        def flock(fd: int, operation: int) -> None:
            if Path(os.path.realpath(f"/dev/fd/{fd}")).is_relative_to(folder):
                does()
            real(fd, operation)

        monkeypatch.setattr(fcntl, "flock", flock)

    return on


def refusing(number: int) -> Callable[[], None]:
    def flock() -> None:
        raise OSError(number, os.strerror(number))

    return flock


Answer = Callable[[Path, Callable[[], None]], None]


@pytest.mark.parametrize("number", ANSWERS.values(), ids=ANSWERS)
def test_a_registry_without_locks_is_refused_before_anything_else(store: Store, answer: Answer, number: int) -> None:
    answer(store.registry.path.parent, refusing(number))
    for change in (store.registry.check_writable, store.registry.usable):
        with pytest.raises(Refused) as caught:
            change()
        error = caught.value
        assert error.code == "registry_unwritable" and str(store.registry.path) in error.message
        assert error.why.startswith("this file system has no locks") and "local disk" in error.hint
    assert store.registry.read().models["a"].port == 8100


@pytest.mark.parametrize("number", ANSWERS.values(), ids=ANSWERS)
def test_a_state_folder_without_locks_is_told_by_every_way_in(store: Store, answer: Answer, number: int) -> None:
    (store.state / "locks" / "port-8100").touch()
    answer(store.state, refusing(number))
    me = Operation("op1", "load")
    ways: list[Callable[[], object]] = [
        lambda: store.lock("port-8100", me),
        lambda: store.settling().__enter__(),
        lambda: begin(store, Request("init", {}, Settings(state=str(store.state)), "")),
    ]
    for way in ways:
        with pytest.raises(Refused) as caught:
            way()
        error = caught.value
        assert error.code == "state_unwritable" and str(store.state) in error.message
        assert "this file system has no locks" in error.why and "local disk" in error.hint
    with pytest.raises(NoLocks):
        store.holder("port-8100")


def test_readers_of_a_state_folder_without_locks_have_an_error_or_do_not_know(store: Store, answer: Answer) -> None:
    settings = Settings(hub=str(store.registry.path.parent), state=str(store.state))
    journal, lock = create(store.state / "ops", Request("load", {"model": "a", "port": "8100"}, settings, ""))
    assert lock is not None
    os.close(lock)
    for name in ("port-8100", "repo-org--a"):
        (store.state / "locks" / name).touch()
    answer(store.state, refusing(errno.ENOTSUP))

    def told(command: str) -> tuple[Context, list[Event]]:
        heard: list[Event] = []
        paths = host_paths(settings, os.environ)
        return Context(Request(command, {}, settings, ""), paths, store, this_system(), heard.append, {}), heard

    context, heard = told("ops")
    assert finish(context, heard.append) == 3
    (failed,) = heard
    assert isinstance(failed, Failed) and failed.error.code == "state_unreadable"
    assert str(store.state) in failed.error.message and "local disk" in failed.error.hint
    rows: Any = status(told("status")[0])
    assert next(row for row in rows["ports"] if row["port"] == 8100)["state"] == "unknown"
    assert "state_unreadable" in {each["code"] for each in rows["drift"]}
    assert ops.downloads(context) == []
    assert not journal.ended


def test_a_deploy_to_a_state_folder_without_locks_says_so(tmp_path: Path, answer: Answer) -> None:
    (tmp_path / "state").mkdir()
    answer(tmp_path / "state", refusing(errno.ENOTSUP))
    lock = os.open(tmp_path / "state" / "deploy.lock", os.O_RDWR | os.O_CREAT)
    try:
        with pytest.raises(install.ProblemError) as caught:
            install.wait_for(lock)
    finally:
        os.close(lock)
    assert "no locks" in caught.value.why and "local disk" in caught.value.hint


def test_an_agent_starts_and_a_download_begins_where_there_are_no_locks(
    tmp_path: Path, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp, lock = tmp_path / "installed.json", tmp_path / "etag.lock"
    stamp.touch()
    lock.touch()
    monkeypatch.setattr(agent, "STAMP", str(stamp))
    answer(tmp_path, refusing(errno.ENOTSUP))
    agent._use_build()
    assert locks.is_locked(lock)


def test_locks_that_never_answer_are_not_waited_for(
    store: Store, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with NFS when the server's lock service is down: files can be read, and flock(2) does not return."""
    monkeypatch.setattr(locks, "ANSWER_SECONDS", 0.05)
    goes = threading.Event()

    def hang() -> None:
        goes.wait(30)

    answer(store.registry.path.parent, hang)
    try:
        with pytest.raises(Refused) as caught:
            store.registry.check_writable()
    finally:
        goes.set()
    assert "do not answer" in caught.value.why and "local disk" in caught.value.hint


def test_a_lock_that_comes_too_late_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(locks, "_answering", set())
    real, goes, done = fcntl.flock, threading.Event(), threading.Event()

    def late(fd: int, operation: int) -> None:
        goes.wait(30)
        real(fd, operation)
        done.set()

    monkeypatch.setattr(fcntl, "flock", late)
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(NoLocks):
        locks.try_flock(fd)
    os.close(fd)
    goes.set()
    assert done.wait(30)
    monkeypatch.setattr(fcntl, "flock", real)
    other = os.open(tmp_path, os.O_RDONLY)
    try:
        assert locks.flock_within(other, 5.0)
    finally:
        os.close(other)


@pytest.fixture
def share(homelab: Homelab) -> Iterator[list[str]]:
    """What has to be put before a command so that flock(2) is refused in the registry's folder."""
    if sys.platform != "linux":
        pytest.skip("strace is Linux's")
    if shutil.which("strace") is None:
        missing("strace (Debian and Ubuntu: apt-get install strace)")
    strace = ["strace", "-f", "-qq", "-o", os.devnull, "-P", str(homelab.studio.hub)]
    yield [*strace, "-e", "trace=flock", "-e", "inject=flock:error=EOPNOTSUPP"]


def test_no_server_is_stopped_or_started_for_a_registry_without_locks(homelab: Homelab, share: list[str]) -> None:
    studio, ask = homelab.studio, Ask(with_fake(homelab), "local")
    register(studio, "mine")
    register(studio, "other", repo=REPO)
    ask.result("load", "--model", "mine", "--port", ask.port)
    pid, registry = listener(studio, ask.port), studio.registry_path.read_bytes()
    port, free = str(ask.port), str(studio.ports[1])
    try:
        for words in (
            ["load", "other", port, "--force"],
            ["load", "other", port, "--force", "--dry-run"],
            ["load", "other", free],
            ["unload", port],
        ):
            answer = run(
                [*share, script("mlxctl"), *words, "--json", "--local"], studio.home, studio.environment, None, 60
            )
            error = error_of(answer)
            assert (answer.exit, error["code"]) == (3, "registry_unwritable"), str(answer)
            assert "no locks" in error["why"] and "local disk" in error["hint"]
            assert str(studio.registry_path) in error["message"]
            assert listener(studio, ask.port) == pid and listener(studio, int(free)) is None
        for words in (["status"], ["list"]):
            seen = run([*share, script("mlxctl"), *words, "--local"], studio.home, studio.environment, None, 60)
            assert seen.exit == 0 and "mine" in seen.stdout, str(seen)
        assert studio.registry_path.read_bytes() == registry
    finally:
        ask.result("unload", "--port", ask.port)
