"""The settings on which all clients of a host must agree."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxops.agent.agreement import agree, replace_agreement
from mlxops.agent.paths import host_paths
from mlxops.agent.state.operation_log import create, recent_operations
from mlxops.agent.state.store import Store
from mlxops.agent.worker import begin
from mlxops.common.build import build_id
from mlxops.core.errors import Busy, Refused
from mlxops.core.protocol import Failed
from mlxops.core.settings import NO_LIMIT, BootJob, Settings
from tests.lab.envelopes import envelope
from tests.lab.sshd import missing


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of a fresh host."""
    return Settings(hub=str(tmp_path / "hub"), state=str(tmp_path / "state"), registry=str(tmp_path / "one.json"))


@pytest.fixture
def other(settings: Settings, tmp_path: Path) -> Settings:
    """Settings of the same host with another registry."""
    return replace(settings, registry=str(tmp_path / "two.json"))


@pytest.fixture
def store(settings: Settings) -> Store:
    paths = host_paths(settings, {})
    return Store(paths.state, paths.registry)


def agent(settings: Settings, command: str, *before: str) -> subprocess.Popen[bytes]:
    """Start an agent and send it a request. `before`: a command that runs it."""
    process = subprocess.Popen(
        [*before, sys.executable, "-P", "-m", "mlxops.agent"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert process.stdin is not None
    process.stdin.write(envelope(command, {}, settings, build_id()).encode())
    process.stdin.close()
    process.stdin = None
    return process


def last_event(process: subprocess.Popen[bytes]) -> Any:
    """Wait for an agent and return its last event."""
    out, _ = process.communicate(timeout=60)
    return json.loads(out.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="strace is Linux's")
def test_only_one_of_two_disagreeing_clients_is_accepted(settings: Settings, other: Settings) -> None:
    if shutil.which("strace") is None:
        missing("strace (Debian and Ubuntu: apt-get install strace)")
    # Delay the write, so that the second client can read before the first one has written.
    calls = "?rename,?renameat,?renameat2"
    slow = ["strace", "-qq", "-o", os.devnull, "-e", f"trace={calls}", "-e", f"inject={calls}:delay_enter=1500000"]
    agents = [agent(each, "reconcile", *slow) for each in (settings, other)]
    last = [last_event(process) for process in agents]
    assert sorted(event["event"] for event in last) == ["done", "failed"], last
    refused = next(event for event in last if event["event"] == "failed")
    assert (refused["error"]["code"], refused["error"]["exit"]) == ("settings_differ", 3)
    assert json.loads(Path(settings.state, "host.json").read_bytes())["registry"] in refused["error"]["why"]


def test_settings_that_need_no_agreement_take_the_latest_values(settings: Settings, store: Store) -> None:
    agree(store, host_paths(settings, {}))
    changed = replace(settings, address="studio.local", env={"A": "1"}, boot=(BootJob(8100, "/opt/start.sh"),))
    agree(store, host_paths(changed, {}))
    assert store.agreed_settings() == changed


@pytest.mark.parametrize(
    ("saved", "asked", "holds"),
    [
        (None, None, None),
        (None, 2, 2),
        (2, None, 2),
        (2, 1, 1),
        (1, 2, 1),
        (1, NO_LIMIT, 1),
        (NO_LIMIT, 1, 1),
        (NO_LIMIT, None, NO_LIMIT),
    ],
)
def test_stricter_kill_limit_stays_until_a_deploy(
    settings: Settings, store: Store, saved: int | None, asked: int | None, holds: int | None
) -> None:
    agree(store, host_paths(replace(settings, kill_limit=saved), {}))
    requested = host_paths(replace(settings, kill_limit=asked), {})
    assert agree(store, requested).kill_limit == holds
    assert agree(store, requested) == store.agreed_settings()
    replace_agreement(store, requested)
    assert agree(store, requested).kill_limit == asked


def test_change_gets_the_stricter_kill_limit_of_the_host(settings: Settings, store: Store) -> None:
    for limit in (10**9, 10**12):
        process = agent(replace(settings, kill_limit=limit), "reconcile")
        output, _ = process.communicate(timeout=60)
        request = recent_operations(store.state / "ops")[0].request()
        assert request.settings.kill_limit == 10**9
        assert (b"kill_limit is 1.0 GB: the host has saved it" in output) is (limit != 10**9), output


def test_worker_stops_if_the_agreed_settings_have_changed(settings: Settings, other: Settings, store: Store) -> None:
    agree(store, host_paths(settings, {}))
    replace_agreement(store, host_paths(other, {}))
    log, child = begin(store, envelope("set", {"model": "a/b", "fields": {}}, settings, build_id()))
    (final,) = [event for event in log.follow() if event is not None]
    assert child is not None and child.wait(30) == 3
    assert isinstance(final, Failed) and final.error.code == "settings_differ", final
    assert not Path(settings.registry or "").exists()


def test_agreed_settings_cannot_change_while_an_operation_uses_them(
    settings: Settings, other: Settings, store: Store
) -> None:
    agree(store, host_paths(settings, {}))
    log, lock = create(store.state / "ops", envelope("load", {}, settings, build_id()))
    assert lock is not None
    try:
        replace_agreement(store, host_paths(replace(settings, address="studio.local"), {}))
        with pytest.raises(Busy) as caught:
            replace_agreement(store, host_paths(other, {}))
    finally:
        os.close(lock)
    assert caught.value.code == "settings_in_use" and log.id in caught.value.why
    replace_agreement(store, host_paths(other, {}))
    with pytest.raises(Refused, match="differ"):
        agree(store, host_paths(settings, {}))


@pytest.mark.parametrize("content", [b"{", b"", b"[]"])
def test_deploy_replaces_damaged_agreed_settings(settings: Settings, store: Store, content: bytes) -> None:
    store.create_folders()
    (store.state / "host.json").write_bytes(content)
    assert last_event(agent(settings, "status"))["error"]["code"] == "host_json_unusable"
    assert last_event(agent(settings, "agree"))["event"] == "done"
    assert store.agreed_settings() == settings
