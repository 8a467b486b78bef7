"""`restore` as run at boot: which failures it retries, and which it does not."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mlxops.agent import boot_restore, paths
from mlxops.agent.host.system import this_system
from mlxops.agent.paths import host_paths
from mlxops.agent.state.store import Store
from mlxops.core.plan_restore import GIVE_UP
from mlxops.core.settings import PortRange, Settings
from tests.lab.ports import free_port

NAME = "tiny-org/tiny-llama"


@dataclass
class Clock:
    """Only `pause` advances the time. `then`: seconds after which to call a function once."""

    now: float = 0.0
    pauses: list[float] = field(default_factory=list)
    then: tuple[float, Callable[[], object]] | None = None

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds
        if self.then and self.now >= self.then[0]:
            self.then[1]()
            self.then = None


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    """The job sets the umask of its own process, which is this one here."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path on a disk that is not mounted yet."""
    monkeypatch.setattr(paths, "VOLUMES", (str(tmp_path / "Volumes"),))
    (tmp_path / "Volumes").mkdir()
    return tmp_path / "Volumes" / "models"


@pytest.fixture
def store(tmp_path: Path, disk: Path) -> Store:
    port = free_port()
    settings = Settings(hub=str(disk), state=str(tmp_path / "state"), ports=PortRange(port, port))
    host = host_paths(settings, {})
    store = Store(host.state, host.registry)
    store.create_folders()
    store.save_agreed_settings(settings)
    return store


def run(store: Store, clock: Clock) -> int:
    return boot_restore.run(store.state, clock.pause, lambda: clock.now)


def operations(store: Store) -> list[Path]:
    return list((store.state / "ops").iterdir())


def port_of(store: Store) -> int:
    agreed = store.agreed_settings()
    assert agreed is not None
    return agreed.ports.first


def assign(store: Store) -> None:
    entry = {"repo_id": NAME, "model_id": NAME, "cache_path": "/x", "format": "mlx", "port": port_of(store)}
    store.registry.path.parent.mkdir(exist_ok=True)
    store.registry.path.write_text(json.dumps({"version": 1, "models": {NAME: entry}}))


def record_start(store: Store, monotonic: float) -> None:
    """Add a start by a restore of this boot to the history."""
    when = {"boot_id": this_system().boot_id(), "wall": time.time(), "monotonic": monotonic}
    store.append_history(command="restore", model=NAME, port=port_of(store), **when)


def test_restore_waits_for_a_disk_that_is_mounted_late(
    store: Store, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(then=(300, disk.mkdir))
    assert run(store, clock) == 0
    assert clock.pauses == [60] * 5
    assert operations(store) == []
    assert (
        capsys.readouterr().out.splitlines()[-1].endswith(f"no registry at {disk}/registry.json: nothing is assigned")
    )


def test_restore_gives_up_if_the_disk_stays_missing(store: Store) -> None:
    clock = Clock()
    assert run(store, clock) == 3
    assert clock.now == boot_restore.RETRY_LIMIT_SECONDS


def test_missing_agreement_is_not_retried(tmp_path: Path) -> None:
    clock = Clock()
    assert boot_restore.run(tmp_path / "state", clock.pause, lambda: clock.now) == 3
    assert clock.pauses == []


def test_missing_registry_is_retried_and_fails(store: Store, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its disk is mounted late. Until then the path is an empty folder, or a dangling link."""
    disk.mkdir()
    assign(store)
    store.registry.check_writable()
    away = disk.with_name("away")
    store.registry.path.rename(away)
    clock = Clock()
    assert run(store, clock) == 3
    assert len(clock.pauses) > 10 and "is not there" in capsys.readouterr().out
    store.registry.path.symlink_to("/nowhere/registry.json")
    assert run(store, Clock()) == 3 and operations(store) == []


def test_restore_waits_for_the_pause_after_a_failed_start(store: Store, disk: Path) -> None:
    """Otherwise a host that is rebooted twice in a row would stay without the server if no timer retries.

    Here the model is unloaded before the start is due.
    """
    disk.mkdir()
    assign(store)
    record_start(store, time.monotonic())
    clock = Clock(then=(60, store.registry.path.unlink))
    assert run(store, clock) == 0
    assert clock.pauses == [60] and operations(store) == []


def test_server_that_needs_a_person_is_reported_once_and_not_retried(
    store: Store, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.mkdir()
    assign(store)
    for _ in range(GIVE_UP):
        record_start(store, 0)
    clock = Clock()
    assert run(store, clock) == 4
    assert clock.pauses == [] and operations(store) == []
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(f": mlxctl load {NAME} {port_of(store)}")
