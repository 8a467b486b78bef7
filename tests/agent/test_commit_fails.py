"""The registry becomes unwritable during an operation: a server that was proven keeps serving."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.lab.homelab import Completed, Homelab, Studio
from tests.lab.quick import MODELS, QuickHost
from tests.lab.world import wait_until
from tests.steps import Ask, assigned, error_of, finish, listener, register, with_fake

OLD, NEW = MODELS[0], MODELS[1]


@dataclass(frozen=True)
class Host:
    quick: QuickHost
    spoils: Path
    """The shell commands that the next server that is started carries out before all else, once."""

    @property
    def port(self) -> int:
        return self.quick.ports[0]

    @property
    def registry(self) -> Path:
        return self.quick.studio.registry_path

    def spoil(self, *commands: str) -> None:
        self.spoils.write_text("\n".join(commands))

    def __call__(self, *words: object) -> Completed:
        return self.quick.mlxctl(*map(str, words), "--json")

    def row(self) -> Any:
        return next(row for row in self.quick.status()["ports"] if row["port"] == self.port)


@pytest.fixture
def host(make_homelab: Callable[..., Homelab]) -> Iterator[Host]:
    quick = QuickHost(make_homelab())
    program, spoils = quick.studio.folder / "bin" / "spoiling", quick.studio.folder / "spoils"
    program.write_text(
        f'#!/bin/sh\nif [ -e {spoils} ]; then mv {spoils} {spoils}.now; . {spoils}.now; fi\nexec {quick.program} "$@"\n'
    )
    program.chmod(0o755)
    quick.lab.configure(launch={"mlx-lm": [str(program)]}, memory="1000 GB")
    quick.mlxctl("init").ok()
    yield Host(quick, spoils)
    quick.studio.sweep()


def gone(host: Host) -> str:
    return f"mv {host.registry} {host.registry}.kept"


def back(host: Host) -> None:
    host.registry.with_name("registry.json.kept").rename(host.registry)


def other(host: Host) -> str:
    """Another program writes an unsupported version. (The other case is a missing registry.)"""
    return f"cp {host.registry} {host.registry}.kept; echo '{{\"version\": 2}}' > {host.registry}"


@pytest.mark.parametrize("spoil", [gone, other])
def test_swap_that_cannot_be_written_restarts_the_old_server(host: Host, spoil: Callable[[Host], str]) -> None:
    host("load", OLD, host.port).ok()
    host.spoil(spoil(host))
    failed = host("load", NEW, host.port, "--force")
    error = error_of(failed)
    assert (failed.exit, error["code"]) == (4, "not_committed")
    assert f"{OLD} serves port {host.port} again" in error["why"] and NEW in error["message"]
    row = host.row()
    assert (row["state"], row["model"]) == ("ready", OLD)
    back(host)
    assert assigned(host.quick.studio) == {OLD: host.port} and host.row()["state"] == "ready"
    assert not host.quick.status()["drift"]


def test_restart_of_the_assigned_server_writes_nothing(host: Host) -> None:
    """The registry still assigns the port to the old server, so no write is needed."""
    host("load", OLD, host.port).ok()
    previous = host.quick.studio.state / "registry.previous.json"
    host.spoil(f"rm -f {previous}; mkdir {previous}")
    failed = host("load", NEW, host.port, "--force")
    error = error_of(failed)
    assert (failed.exit, error["details"]["cause"]) == (4, "registry_unwritable")
    assert f"{OLD} serves port {host.port} again" in error["why"] and "could not be written" not in error["why"]
    assert host.row()["state"] == "ready" and assigned(host.quick.studio) == {OLD: host.port}
    assert f"mv {previous} {previous}.away" in error["hint"]
    previous.rmdir()


def test_new_server_stays_if_the_old_one_cannot_restart(host: Host) -> None:
    """The registry and the models are on the same disk, which is gone."""
    host("load", OLD, host.port).ok()
    host.spoil(gone(host), f"mv {host.quick.snapshots[OLD]} {host.quick.snapshots[OLD]}.gone")
    failed = host("load", NEW, host.port, "--force")
    error = error_of(failed)
    assert (failed.exit, error["code"]) == (7, "not_committed")
    assert f"{NEW} serves port {host.port}" in error["message"] and OLD in error["why"]
    row = host.row()
    assert (row["state"], row["model"]) == ("ready", NEW)
    pid = row["pid"]

    back(host)
    row = host.row()
    assert (row["state"], row["pid"]) == ("mismatch", pid)
    assert f"mlxctl load --local {NEW} {host.port}" in error["hint"]
    done = host("load", NEW, host.port).ok()
    assert done.json["hosts"][0]["result"]["changed"] is False
    assert assigned(host.quick.studio) == {NEW: host.port} and host.row()["pid"] == pid
    assert host.row()["state"] == "ready"


def test_first_load_that_cannot_be_written_leaves_nothing(host: Host) -> None:
    host.spoil(gone(host))
    failed = host("load", NEW, host.port)
    error = error_of(failed)
    assert (failed.exit, error["code"]) == (3, "registry_missing")
    assert "stopped again" in error["why"] and host.row()["state"] == "idle"
    assert not host.quick.process("--model")


def test_unload_that_cannot_be_written_reports_the_stopped_server(homelab: Homelab) -> None:
    """The registry disappears while the server is still ending."""
    ask = Ask(with_fake(homelab), "local")
    studio = homelab.studio
    register(studio, "mine", args=["--fake-linger", "5"])
    ask.result("load", "--model", "mine", "--port", ask.port)
    kept = studio.registry_path.with_name("kept")
    with ask.running("unload", "--port", ask.port, "--json") as unloading:
        wait_until(lambda: stopping(studio), 30, "the stop")
        studio.registry_path.rename(kept)
        answer = finish(unloading)
    error = error_of(answer)
    assert (answer.exit, error["code"]) == (7, "registry_behind")
    assert f"port {ask.port} was stopped" in error["message"] and error["details"]["cause"] == "registry_missing"
    assert listener(studio, ask.port) is None
    assert f"mlxctl unload --local {ask.port}" in error["hint"]
    kept.rename(studio.registry_path)
    ask.result("unload", "--port", ask.port)
    assert assigned(studio) == {} and not ask.document("status")["drift"]


def stopping(studio: Studio) -> bool:
    return any(b'"stop"' in path.read_bytes() for path in (studio.state / "ops").glob("*/events.jsonl"))
