"""What the system runs at boot, without anybody who asks: what it waits for, and what it does not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mlxops.agent import boot_restore, paths
from mlxops.agent.host.system import this_system
from mlxops.agent.paths import host_paths as placed
from mlxops.agent.state.store import Store
from mlxops.core.plan_restore import GIVE_UP
from mlxops.core.settings import PortRange, Settings
from tests.lab.ports import free_port

NAME = "tiny-org/tiny-llama"


@dataclass
class Clock:
    """Time passes only where it is waited; `then` happens after so many seconds."""

    now: float = 0.0
    pauses: list[float] = field(default_factory=list)
    then: tuple[float, Callable[[], object]] | None = None

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds
        if self.then and self.now >= self.then[0]:
            self.then[1]()
            self.then = None


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a disk is mounted, at times."""
    monkeypatch.setattr(paths, "VOLUMES", (str(tmp_path / "Volumes"),))
    (tmp_path / "Volumes").mkdir()
    return tmp_path / "Volumes" / "models"


@pytest.fixture
def store(tmp_path: Path, disk: Path) -> Store:
    port = free_port()
    settings = Settings(hub=str(disk), state=str(tmp_path / "state"), ports=PortRange(port, port))
    where = placed(settings, {})
    store = Store(where.state, where.registry)
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


def started(store: Store, monotonic: float) -> None:
    """By a restore of this boot."""
    when = {"boot_id": this_system().boot_id(), "wall": time.time(), "monotonic": monotonic}
    store.append_history(command="restore", model=NAME, port=port_of(store), **when)


def test_a_disk_that_is_mounted_late_is_waited_for(
    store: Store, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(then=(300, disk.mkdir))
    assert run(store, clock) == 0
    assert clock.pauses == [60] * 5
    assert operations(store) == []
    assert (
        capsys.readouterr().out.splitlines()[-1].endswith(f"no registry at {disk}/registry.json: nothing is assigned")
    )


def test_one_that_stays_away_is_given_up(store: Store) -> None:
    clock = Clock()
    assert run(store, clock) == 3
    assert clock.now == boot_restore.PATIENCE


def test_what_will_not_pass_is_not_waited_for(tmp_path: Path) -> None:
    clock = Clock()
    assert boot_restore.run(tmp_path / "state", clock.pause, lambda: clock.now) == 3
    assert clock.pauses == []


def test_a_registry_that_the_host_had_is_waited_for_and_its_absence_is_no_success(
    store: Store, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its disk is there late; what is in the place of it is an empty folder, or a link that leads nowhere."""
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


def test_the_pause_after_a_start_in_vain_is_waited_for(store: Store, disk: Path) -> None:
    """Else a host that is rebooted twice at once would stay without it, where no timer tries again. It is unloaded
    before it would be started."""
    disk.mkdir()
    assign(store)
    started(store, time.monotonic())
    clock = Clock(then=(60, store.registry.path.unlink))
    assert run(store, clock) == 0
    assert clock.pauses == [60] and operations(store) == []


def test_what_is_left_to_a_person_is_said_once_and_not_waited_for(
    store: Store, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.mkdir()
    assign(store)
    for _ in range(GIVE_UP):
        started(store, 0)
    clock = Clock()
    assert run(store, clock) == 4
    assert clock.pauses == [] and operations(store) == []
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(f"when it is mended: mlxctl load {NAME} {port_of(store)}")
