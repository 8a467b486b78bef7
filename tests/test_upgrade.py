"""Upgrades, both ways, against an earlier build of this program: real SSH, real processes, a fake engine.

Everything goes through the command line, because that and the files on the host's disk are all that two builds share.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlxops.common.build import build_id
from tests.lab import leaks
from tests.lab.builds import Build, NoHistory, earlier_build
from tests.lab.homelab import Completed, Homelab, script
from tests.lab.sshd import missing
from tests.lab.world import alive, wait_until
from tests.steps import assigned, listener, nothing_runs, register, servers, with_fake

BARE_DEPLOY = """\
import runpy, sys
from mlxops.control import deploy
deploy.DEPENDENCIES = ()
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a program of a build whose `deploy` installs no dependencies: a package index takes minutes."""
NAMES = ("first", "second", "third", "fourth")
READS = (
    ("status",),
    ("status", "--probe"),
    ("list",),
    ("list", "--memory"),
    ("ops",),
    ("logs", "--port", "PORT"),
)


@dataclass(frozen=True)
class ControlNode:
    """The lab's control node, with the programs of one build."""

    lab: Homelab
    python: str
    mlxctl: str
    build: str

    def __call__(self, *arguments: object) -> Completed:
        argv = [self.python, self.mlxctl, *map(str, arguments)]
        if arguments[0] == "deploy":
            argv[1:1] = ["-c", BARE_DEPLOY]
        return self.lab.mini.run(*argv)

    def document(self, *arguments: object) -> Any:
        """Return the host's row of the JSON document. The command must succeed."""
        (host,) = self(*arguments, "--json").ok().json["hosts"]
        return host

    def result(self, *arguments: object) -> Any:
        return self.document(*arguments)["result"]

    def states(self) -> dict[int, tuple[str, str | None]]:
        """Return (state, model) of every port that is not idle. There must be no drift."""
        host = self.document("status")
        assert host["drift"] == [], host["drift"]
        return {row["port"]: (row["state"], row["model"]) for row in host["ports"] if row["state"] != "idle"}


@pytest.fixture(scope="module")
def earlier(watch: leaks.Watch, tmp_path_factory: pytest.TempPathFactory) -> Build:
    try:
        return earlier_build(tmp_path_factory.mktemp("earlier"))
    except NoHistory as error:
        if error.shallow:
            pytest.skip(str(error))
        missing(str(error))


@pytest.fixture
def lab(homelab: Homelab) -> Iterator[Homelab]:
    """A homelab with four registered models of a fake engine. All servers are stopped after the test."""
    with_fake(homelab)
    for name in NAMES:
        register(homelab.studio, name)
    yield homelab
    homelab.studio.sweep()


@pytest.fixture
def new(lab: Homelab) -> ControlNode:
    return ControlNode(lab, sys.executable, script("mlxctl"), build_id())


@pytest.fixture
def old(lab: Homelab, earlier: Build) -> ControlNode:
    return ControlNode(lab, earlier.python, earlier.script("mlxctl"), earlier.build_id)


# -- reads between two builds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("newer", ["agent", "control node"])
def test_other_build_may_read_but_not_change(
    lab: Homelab, old: ControlNode, new: ControlNode, earlier: Build, newer: str
) -> None:
    # `ours` has the agent's build, `theirs` is the other control node.
    ours, theirs = (new, old) if newer == "agent" else (old, new)
    lab.configure(python=[sys.executable if newer == "agent" else earlier.python])
    port = lab.studio.ports[0]
    ours.result("load", "first", port)
    (server,) = servers(lab.studio)
    warning = f"warning: the agent on the host is not this mlxops: the host has {ours.build}, this is {theirs.build}"
    for read in READS:
        arguments = [str(port) if word == "PORT" else word for word in read]
        done = theirs(*arguments, "--json").ok()
        assert warning in done.stderr and " deploy" in done.stderr, str(done)
        reply, expected = (json.loads(each.stdout) for each in (done, ours(*arguments, "--json").ok()))
        assert_same_keys(reply, expected)
        assert warning in theirs(*arguments).ok().stderr
    assert theirs.states() == {port: ("ready", "first")}
    assert "first" in theirs("list").ok().stdout and "load" in theirs("ops").ok().stdout
    assert "loading" in theirs("logs", "--port", port).ok().stdout

    for change in (("load", "second", lab.studio.ports[1]), ("unload", port), ("reconcile",), ("init",)):
        done = theirs(*change, "--json")
        error = done.json["hosts"][0]["error"]
        assert (done.exit, error["code"]) == (6, "agent_differs"), str(done)
        assert f"the host has {ours.build}" in error["why"] and " deploy" in error["hint"]
    assert servers(lab.studio) == {server} and assigned(lab.studio) == {"first": port}
    ours.result("unload", port)
    nothing_runs(lab.studio)


def assert_same_keys(reply: Any, expected: Any) -> None:
    """The other build's document has every key that this one's has, and the other way round is an addition."""
    if isinstance(expected, dict) and isinstance(reply, dict):
        for key in expected.keys() & reply.keys():
            assert_same_keys(reply[key], expected[key])
        assert expected.keys() <= reply.keys() or reply.keys() <= expected.keys(), (reply.keys(), expected.keys())


# -- a host with running servers is upgraded, and goes back --------------------------------------------------------


@pytest.fixture
def deployed(lab: Homelab, old: ControlNode) -> Homelab:
    """A host that the earlier build deployed to and worked on: `second` replaced `first` on the first port, `third`
    runs on the second one, `fourth` on the fourth, and the third port was loaded and unloaded."""
    studio = lab.studio
    # The interpreter of the tests comes first on the host's PATH: the system's own may lack venv.
    lab.configure(state="~/.mlxops", python=None)
    studio.sshd.stop()
    studio.sshd.env["PATH"] = f"{Path(sys.base_prefix) / 'bin'}:/usr/bin:/bin"
    studio.sshd.start()
    assert old.result("deploy")["build"] == old.build
    one, two, three, four = studio.ports
    for model, port, *flags in (("first", one), ("second", one, "--force"), ("third", two), ("fourth", four)):
        old.result("load", model, port, *flags)
    old.result("load", "first", three)
    old.result("unload", three)
    assert old.states() == {one: ("ready", "second"), two: ("ready", "third"), four: ("ready", "fourth")}
    return lab


def operations(control: ControlNode) -> dict[str, tuple[object, ...]]:
    """Return what `ops` shows of every recorded operation, by id."""
    keys = ("command", "model", "port", "state", "error")
    return {row["operation"]: tuple(row[key] for key in keys) for row in control.document("ops")["operations"]}


def crash(lab: Homelab, port: int) -> None:
    """Kill the server on a port, as a power cut would."""
    pid = listener(lab.studio, port)
    assert pid is not None
    os.killpg(os.getpgid(pid), signal.SIGKILL)
    wait_until(lambda: listener(lab.studio, port) is None, 30, "the server's end")


def test_deploy_takes_over_running_servers(deployed: Homelab, old: ControlNode, new: ControlNode) -> None:
    studio = deployed.studio
    one, two, three, four = studio.ports
    running, recorded = servers(studio), operations(old)
    agreed = json.loads((studio.home / ".mlxops" / "host.json").read_text())

    result = new.result("deploy")
    assert (result["build"], result["changed"]) == (new.build, True)
    assert new.states() == {one: ("ready", "second"), two: ("ready", "third"), four: ("ready", "fourth")}
    assert servers(studio) == running and all(map(alive, running))
    assert operations(new) == recorded
    now = json.loads((studio.home / ".mlxops" / "host.json").read_text())
    assert agreed.items() <= now.items(), "the agreed settings lost a key that the build before reads"
    assert "loading" in new("logs", "--port", two).ok().stdout

    # Each of these is the first change to a record that the earlier build wrote.
    loaded = new.result("load", "third", two)
    assert (loaded["state"], loaded["changed"]) == ("ready", False)
    back = new.result("rollback", "--port", one)
    assert (back["model"], back["state"]) == ("first", "ready")
    assert new.result("unload", four)["changed"] is True
    crash(deployed, two)
    new("restore").ok()
    assert new.result("rollback", "--port", four)["model"] == "fourth"
    new.result("load", "second", three)
    expected = {one: "first", two: "third", three: "second", four: "fourth"}
    assert new.states() == {port: ("ready", model) for port, model in expected.items()}
    new("unload-all", "--yes").ok()
    nothing_runs(studio)


def test_rollback_of_deploy_reads_newer_state(deployed: Homelab, old: ControlNode, new: ControlNode) -> None:
    studio = deployed.studio
    one, two, three, four = studio.ports
    new.result("deploy")
    new.result("unload", two)
    new.result("load", "third", one, "--force")
    new.result("load", "first", three)
    error = new("load", "first", two, "--json").json["hosts"][0]["error"]
    assert error["code"] == "model_elsewhere"
    expected = {one: ("ready", "third"), three: ("ready", "first"), four: ("ready", "fourth")}
    assert new.states() == expected
    running, recorded = servers(studio), operations(new)

    assert new.result("deploy", "--rollback")["build"] == old.build
    assert old.states() == expected
    assert servers(studio) == running and all(map(alive, running))
    assert operations(old) == recorded
    for operation, (*_, code) in recorded.items():
        assert bool(old("ops", "--follow", operation).exit) is bool(code), operation
    assert "loading" in old("logs", "--port", three).ok().stdout
    models = {row["name"]: row["port"] for row in old.document("list")["models"]}
    assert models == {"first": three, "second": None, "third": one, "fourth": four}

    back = old.result("rollback", "--port", one)
    assert (back["model"], back["state"]) == ("second", "ready")
    crash(deployed, three)
    old("restore").ok()
    assert old.states() == {one: ("ready", "second"), three: ("ready", "first"), four: ("ready", "fourth")}
    for port in (one, three, four):
        assert old.result("unload", port)["changed"] is True
    nothing_runs(studio)
