"""The settings on which all who ask a host must agree: one truth, whoever asks first and whatever comes between."""

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

from mlxops.agent.agreement import agree, agree_anew
from mlxops.agent.paths import host_paths
from mlxops.agent.state.operation_log import create
from mlxops.agent.state.store import Store
from mlxops.agent.worker import begin
from mlxops.common.build import build_id
from mlxops.core.errors import Busy, Refused
from mlxops.core.protocol import Failed, Request
from mlxops.core.settings import BootJob, Settings
from tests.lab.sshd import missing


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Those of a host that nobody has asked before."""
    return Settings(hub=str(tmp_path / "hub"), state=str(tmp_path / "state"), registry=str(tmp_path / "one.json"))


@pytest.fixture
def other(settings: Settings, tmp_path: Path) -> Settings:
    """The same host, as somebody has it who means another registry."""
    return replace(settings, registry=str(tmp_path / "two.json"))


@pytest.fixture
def store(settings: Settings) -> Store:
    paths = host_paths(settings, {})
    return Store(paths.state, paths.registry)


def agent(settings: Settings, command: str, *before: str) -> subprocess.Popen[bytes]:
    """An agent that has been asked."""
    process = subprocess.Popen(
        [*before, sys.executable, "-P", "-m", "mlxops.agent"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert process.stdin is not None
    process.stdin.write(Request(command, {}, settings, build_id()).encode())
    process.stdin.close()
    process.stdin = None
    return process


def said(process: subprocess.Popen[bytes]) -> Any:
    """The last event of what an agent tells."""
    out, _ = process.communicate(timeout=60)
    return json.loads(out.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="strace is Linux's")
def test_of_two_that_differ_on_a_fresh_host_one_is_heard(settings: Settings, other: Settings) -> None:
    if shutil.which("strace") is None:
        missing("strace (Debian and Ubuntu: apt-get install strace)")
    # Between reading and writing there is time for the other to read, too.
    calls = "?rename,?renameat,?renameat2"
    slow = ["strace", "-qq", "-o", os.devnull, "-e", f"trace={calls}", "-e", f"inject={calls}:delay_enter=1500000"]
    asked = [agent(each, "reconcile", *slow) for each in (settings, other)]
    last = [said(each) for each in asked]
    assert sorted(event["event"] for event in last) == ["done", "failed"], last
    refused = next(event for event in last if event["event"] == "failed")
    assert (refused["error"]["code"], refused["error"]["exit"]) == ("settings_differ", 3)
    assert json.loads(Path(settings.state, "host.json").read_bytes())["registry"] in refused["error"]["why"]


def test_what_need_not_be_agreed_on_is_kept_as_it_was_asked_last(settings: Settings, store: Store) -> None:
    agree(store, host_paths(settings, {}))
    changed = replace(settings, address="studio.local", env={"A": "1"}, boot=(BootJob(8100, "/opt/start.sh"),))
    agree(store, host_paths(changed, {}))
    assert store.agreed_settings() == changed


def test_a_worker_whose_settings_were_agreed_anew_before_it_began_does_nothing(
    settings: Settings, other: Settings, store: Store
) -> None:
    agree(store, host_paths(settings, {}))
    agree_anew(store, host_paths(other, {}))
    journal, child = begin(store, Request("set", {"model": "a/b", "fields": {}}, settings, build_id()))
    (final,) = [event for event in journal.follow() if event is not None]
    assert child is not None and child.wait(30) == 3
    assert isinstance(final, Failed) and final.error.code == "settings_differ", final
    assert not Path(settings.registry or "").exists()


def test_settings_are_not_agreed_anew_while_an_operation_works_with_others(
    settings: Settings, other: Settings, store: Store
) -> None:
    agree(store, host_paths(settings, {}))
    journal, lock = create(store.state / "ops", Request("load", {}, settings, build_id()))
    assert lock is not None
    try:
        agree_anew(store, host_paths(replace(settings, address="studio.local"), {}))
        with pytest.raises(Busy) as caught:
            agree_anew(store, host_paths(other, {}))
    finally:
        os.close(lock)
    assert caught.value.code == "settings_in_use" and journal.id in caught.value.why
    agree_anew(store, host_paths(other, {}))
    with pytest.raises(Refused, match="do not agree"):
        agree(store, host_paths(settings, {}))


@pytest.mark.parametrize("content", [b"{", b"", b"[]"])
def test_agreed_settings_that_are_damaged_are_mended_by_agreeing_anew(
    settings: Settings, store: Store, content: bytes
) -> None:
    store.create_folders()
    (store.state / "host.json").write_bytes(content)
    assert said(agent(settings, "status"))["error"]["code"] == "host_json_unusable"
    assert said(agent(settings, "agree"))["event"] == "done"
    assert store.agreed_settings() == settings
