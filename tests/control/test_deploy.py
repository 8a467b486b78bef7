"""Deploy to an empty home folder behind a real sshd, with real Python and pip."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import zipfile
from contextlib import closing, suppress
from pathlib import Path

import pytest

from mlxops.common.build import PACKAGE, build_id
from mlxops.control import deploy
from mlxops.control.inventory import Host
from mlxops.control.ssh.connection import open_local, open_ssh
from mlxops.core.errors import AgentProblem, Exit, MlxopsError, OutcomeUnknown, Refused
from mlxops.core.settings import Settings
from tests.lab import models
from tests.lab.homelab import Homelab
from tests.lab.sshd import SshClient, Sshd
from tests.lab.world import descendants, wait_until
from tests.steps import nothing_runs, servers

pytestmark = pytest.mark.lab

HERE = [str(Path(sys.base_prefix) / "bin")]
"""The folder of the tests' interpreter. Other tests search the folders of a real host."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home of the host"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install an agent without dependencies: a slow package index can take minutes."""
    monkeypatch.setattr(deploy, "AGENT_DEPENDENCIES", ())


def host(state: str = "~/.mlxops") -> Host:
    return Host("studio", "studio", None, Settings(state=state))


def quiet(_: str) -> None:
    pass


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def build_of(home: Path) -> str:
    python = home / ".mlxops" / "venv" / "bin" / "python"
    answer = subprocess.run([python, "-I", "-m", "mlxops.agent", "--build"], capture_output=True, text=True, check=True)
    return answer.stdout.strip()


def refusal(*places: Path | str) -> AgentProblem:
    with pytest.raises(AgentProblem) as caught:
        deploy.install(open_local(), host(), quiet, places=[str(place) for place in places])
    error = caught.value
    assert error.exit == Exit.AGENT and error.why and error.hint
    assert all("\n" not in part for part in (error.message, error.why, error.hint))
    return error


def test_fresh_host_gets_a_complete_agent_over_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home of the host"
    home.mkdir()
    mirror = {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
    with Sshd(tmp_path / "sshd", env={"HOME": str(home), **mirror}) as sshd:
        client = SshClient(tmp_path / "client")
        client.host("studio", sshd)
        monkeypatch.setenv("PATH", client.path)
        notes: list[str] = []
        with closing(open_ssh("studio")) as transport:
            first = deploy.install(transport, host(), notes.append, places=HERE)
            again = deploy.install(transport, host(), quiet, places=HERE)
    state = home / ".mlxops"
    assert (first["build"], first["changed"], first["path"]) == (build_id(), True, str(state / "agents" / build_id()))
    assert str(first["python"]).startswith(sys.version.split()[0])
    assert any("huggingface_hub" in note for note in notes)
    assert (again["changed"], again["path"]) == (False, first["path"])
    assert float(str(again["seconds"])) < float(str(first["seconds"])), "nothing is installed again"
    assert build_of(home) == build_id()
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert not [path for path in state.iterdir() if not path.is_symlink() and path.stat().st_mode & 0o077]
    assert os.readlink(state / "venv") == f"agents/{build_id()}"
    package = next((state / "venv" / "lib").glob("python*/site-packages/mlxops"))
    assert sorted(path.name for path in package.iterdir()) == [
        "__init__.py",
        "__pycache__",
        "agent",
        "common",
        "core",
    ]
    python = state / "venv" / "bin" / "python"
    subprocess.run([python, "-I", "-c", "import huggingface_hub"], check=True)
    for module in (package / "core", next((state / "venv").glob("lib/python*/site-packages/huggingface_hub"))):
        assert list((module / "__pycache__").iterdir()), f"{module} was not compiled"


def test_interrupted_deploy_keeps_the_old_agent_and_the_next_repairs(
    home: Path, bare: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A killed process leaves its temporary files.
    (tmp_path / "tmp").mkdir(exist_ok=True)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    others = descendants()
    deploy.install(open_local(), host(), quiet, places=HERE)
    state = home / ".mlxops"
    old = state / "agents" / "an-older-build"
    new = state / "agents" / build_id()
    shutil.copytree(new, old, symlinks=True)
    shutil.rmtree(new)
    (state / "venv").unlink()
    (state / "venv").symlink_to("agents/an-older-build")

    def kill(note: str) -> None:
        if "creating the environment" in note:
            for process in descendants() - others:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)

    with pytest.raises(MlxopsError):
        deploy.install(open_local(), host(), kill, places=HERE)
    assert not (new / "installed.json").exists()
    assert os.readlink(state / "venv") == "agents/an-older-build" and build_of(home) == build_id()

    assert deploy.install(open_local(), host(), quiet, places=HERE)["changed"] is True
    assert os.readlink(state / "venv") == f"agents/{build_id()}"
    assert (new / "installed.json").exists() and old.exists()


def test_damaged_agent_is_replaced(home: Path, bare: None) -> None:
    deploy.install(open_local(), host(), quiet, places=HERE)
    package = next((home / ".mlxops" / "venv" / "lib").glob("python*/site-packages/mlxops"))
    (package / "core" / "errors.py").write_text("")
    notes: list[str] = []
    assert deploy.install(open_local(), host(), notes.append, places=HERE)["changed"] is True
    assert any("rebuilding the agent" in note for note in notes)
    assert build_of(home) == build_id()


def test_two_deploys_at_once_wait_for_each_other(home: Path, bare: None) -> None:
    results: list[object] = []
    notes: list[str] = []

    def one() -> None:
        results.append(deploy.install(open_local(), host(), notes.append, places=HERE)["changed"])

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, results)) == ["False", "True"]
    assert any("waiting" in note for note in notes)


def test_error_of_pip_is_quoted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "requirements", lambda: ["no such requirement !!"])
    error = refusal(*HERE)
    assert error.code == "install_failed" and "no such requirement" in error.why
    assert not (home / ".mlxops" / "venv").exists()


def test_broken_connection_is_an_unknown_outcome(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bare: None
) -> None:
    with Sshd(tmp_path / "sshd", env={"HOME": str(home)}) as sshd:
        client = SshClient(tmp_path / "client")
        client.host("studio", sshd)
        monkeypatch.setenv("PATH", client.path)
        with closing(open_ssh("studio")) as transport, pytest.raises(OutcomeUnknown) as caught:
            deploy.install(
                transport,
                host(),
                lambda note: sshd.kill_sessions() if "creating the environment" in note else None,
                places=HERE,
            )
    assert caught.value.exit == Exit.OUTCOME_UNKNOWN and "run deploy again" in caught.value.hint


# -- builds: kept, pruned, gone back to ---------------------------------------------------------------------------


def older_build(home: Path, name: str) -> Path:
    """Make an older build, and point `venv` to it."""
    state = home / ".mlxops"
    shutil.copytree(state / "agents" / build_id(), state / "agents" / name, symlinks=True)
    stamp = state / "agents" / name / "installed.json"
    stamp.write_text(json.dumps({"build": name, "by": "chris@mini2", "at": "2026-01-02T03:04:05Z"}))
    (state / "venv").unlink()
    (state / "venv").symlink_to(f"agents/{name}")
    return state / "agents" / name


def builds(home: Path) -> set[str]:
    return {path.name for path in (home / ".mlxops" / "agents").iterdir()}


def test_build_in_use_is_kept_and_older_builds_are_removed(home: Path, bare: None) -> None:
    deploy.install(open_local(), host(), quiet, places=HERE)
    older_build(home, "unused")
    used = older_build(home, "used")
    older_build(home, "before")
    # An agent of that build, at work: it waits for its request.
    with subprocess.Popen(
        [used / "bin" / "python", "-P", "-m", "mlxops.agent"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as agent:
        assert agent.stdout is not None and agent.stdin is not None
        assert b"hello" in agent.stdout.readline()
        notes: list[str] = []
        assert deploy.install(open_local(), host(), notes.append, places=HERE)["pruned"] == ["unused"]
        assert "this replaces before, deployed by chris@mini2 at 2026-01-02T03:04:05Z" in notes
        assert builds(home) == {"used", "before", build_id()}
        agent.stdin.close()
        agent.wait(60)
    assert deploy.install(open_local(), host(), quiet, places=HERE)["pruned"] == ["used"]
    assert builds(home) == {"before", build_id()}


def another_build(home: Path) -> str:
    """Deploy like another control node whose sources differ by one line. Return the name of the build."""
    state = home / ".mlxops"
    other = older_build(home, "0.1.0+000000000000")
    core = next(other.glob("lib/python*/site-packages/mlxops/core/__init__.py"))
    core.write_text("# another\n")
    python = other / "bin" / "python"
    notes = subprocess.run([python, "-I", "-m", "mlxops.agent", "--build"], capture_output=True, text=True, check=True)
    name = notes.stdout.strip()
    other.rename(state / "agents" / name)
    (state / "venv").unlink()
    (state / "venv").symlink_to(f"agents/{name}")
    return name


def test_deploys_of_two_control_nodes_keep_servers_and_are_reported(
    homelab: Homelab, bare: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio, port = homelab.studio, homelab.studio.ports[0]
    monkeypatch.setenv("HOME", str(studio.home))
    homelab.configure(state="~/.mlxops", python=None)
    studio.install("tiny-org/tiny-qwen3", models.QWEN)
    deploy.install(open_local(), host(), quiet, places=HERE)
    homelab.mini.mlxctl("load", "tiny-org/tiny-qwen3", str(port)).ok()
    (server,) = servers(studio)

    theirs = another_build(studio.home)
    status = homelab.mini.mlxctl("status", "--json").ok()
    assert status.json["hosts"][0]["ports"][0]["state"] == "ready"
    who = f"the host has {theirs} (deployed by chris@mini2 at 2026-01-02T03:04:05Z), this is {build_id()}"
    assert (
        f"warning: the agent on the host is not this mlxops: {who}; make both sides equal: mlxctl deploy"
        in status.stderr
    )
    refused = homelab.mini.mlxctl("unload", str(port), "--json")
    error = refused.json["hosts"][0]["error"]
    assert (refused.exit, error["code"], error["why"]) == (6, "agent_differs", who)

    deploy.install(open_local(), host(), quiet, places=HERE)
    wait_until(lambda: studio.processes() == {server}, 30, "nothing but the server, which serves through a deploy")
    assert studio.completion(port, "jerry-xl")["model"] == "jerry-xl"
    document = homelab.mini.mlxctl("status", "--json").ok().json["hosts"][0]
    assert (document["ports"][0]["state"], document["drift"]) == ("ready", [])
    homelab.mini.mlxctl("unload", str(port)).ok()
    nothing_runs(studio)


def test_rollback_goes_to_the_build_before_and_back(home: Path, bare: None) -> None:
    back = deploy.DeployOptions(rollback=True)
    deploy.install(open_local(), host(), quiet, places=HERE)
    with pytest.raises(Refused, match="no previous build"):
        deploy.install(open_local(), host(), quiet, places=HERE, options=back)
    looked = deploy.install(open_local(), host(), quiet, places=HERE, options=deploy.DeployOptions(dry_run=True))
    assert looked["changed"] is False and looked["dry_run"] is True
    name = another_build(home)
    assert deploy.install(open_local(), host(), quiet, places=HERE)["changed"] is True
    assert build_of(home) == build_id()
    assert deploy.install(open_local(), host(), quiet, places=HERE, options=back)["build"] == name
    assert build_of(home) == name
    again = deploy.install(open_local(), host(), quiet, places=HERE, options=deploy.DeployOptions(dry_run=True))
    assert again["changed"] is True and again["build"] == build_id() and build_of(home) == name
    deploy.install(open_local(), host(), quiet, places=HERE, options=back)
    assert build_of(home) == build_id()


def test_worker_runs_from_its_own_build(home: Path, bare: None) -> None:
    """`venv` may lead to another build before the worker ends, and it imports some modules late."""
    deploy.install(open_local(), host(), quiet, places=HERE)
    python = home / ".mlxops" / "venv" / "bin" / "python"
    code = "from mlxops.agent.worker import _own_python; print(_own_python())"
    notes = subprocess.run([python, "-P", "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert notes == str(home / ".mlxops" / "agents" / build_id() / "bin" / "python")


def test_mlxctl_is_linked_and_stays_with_the_next_deploy(
    home: Path, bare: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploy, "control_requirements", lambda: ())
    notes: list[str] = []
    done = deploy.install(open_local(), host(), notes.append, places=HERE, options=deploy.DeployOptions(mlxctl=True))
    link = home / ".local" / "bin" / "mlxctl"
    assert os.readlink(link) == done["mlxctl"] and any(str(link) in note for note in notes)
    assert "venv/bin/python" in link.read_text()
    package = next((home / ".mlxops" / "venv" / "lib").glob("python*/site-packages/mlxops"))
    assert (package / "tasks.py").is_file() and (package / "control").is_dir()
    shutil.rmtree(home / ".mlxops" / "agents" / build_id())
    deploy.install(open_local(), host(), quiet, places=HERE)
    assert (package / "tasks.py").is_file(), "without it the link would lead to half a program"


def test_foreign_mlxctl_is_kept(home: Path, bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "control_requirements", lambda: ())
    link = program(home / ".local" / "bin" / "mlxctl", "echo theirs")
    notes: list[str] = []
    deploy.install(open_local(), host(), notes.append, places=HERE, options=deploy.DeployOptions(mlxctl=True))
    assert "theirs" in link.read_text() and any("is not a link of mlxops" in note for note in notes)


def test_wheels_make_a_package_index_unnecessary(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setattr(deploy, "requirements", lambda: ["onlyhere==1.0"])
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with pytest.raises(MlxopsError, match="no wheel"):
        deploy.install(open_local(), host(), quiet, places=HERE, options=deploy.DeployOptions(wheels=wheels))
    made = wheels / "onlyhere-1.0-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as wheel:
        wheel.writestr("onlyhere.py", "")
        wheel.writestr("onlyhere-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: onlyhere\nVersion: 1.0\n")
        wheel.writestr("onlyhere-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("onlyhere-1.0.dist-info/RECORD", "")
    done = deploy.install(open_local(), host(), quiet, places=HERE, options=deploy.DeployOptions(wheels=wheels))
    assert done["changed"] is True
    python = home / ".mlxops" / "venv" / "bin" / "python"
    subprocess.run([python, "-I", "-c", "import onlyhere"], check=True)
    assert not (home / ".mlxops" / "agents" / build_id() / "wheels").exists()


# -- looking for an interpreter -----------------------------------------------------------------------------------


def test_missing_python_is_reported_with_folders_and_remedy(home: Path, tmp_path: Path) -> None:
    error = refusal(tmp_path / "empty", "~/.pyenv/versions/*/bin")
    assert error.code == "no_python" and str(tmp_path / "empty") in error.why and f"{home}/.pyenv" in error.why
    assert "astral.sh/uv" in error.hint


def test_python_that_is_too_old_or_broken_is_named(home: Path, tmp_path: Path) -> None:
    old = program(tmp_path / "old" / "python3", "echo old")
    broken = program(tmp_path / "broken" / "python3.12", "exit 1")
    why = refusal(tmp_path / "old", tmp_path / "broken").why
    assert f"older than 3.11: {old}" in why and f"does not start: {broken}" in why


def test_python_without_venv_is_distinguished_from_no_python(home: Path, tmp_path: Path) -> None:
    python = program(tmp_path / "bin" / "python3", "echo bare")
    error = refusal(tmp_path / "bin")
    assert f"without venv or ensurepip: {python}" in error.why and "python3-venv" in error.hint


def found(*places: str) -> list[str]:
    return deploy.find_interpreters(open_local(), places).whole


def test_newest_python_of_the_first_folder_wins(home: Path, tmp_path: Path) -> None:
    for name in ("one/python3", "one/python3.12", "two/python3.13"):
        program(tmp_path / name, "echo whole")
    assert found(str(tmp_path / "one"), str(tmp_path / "two")) == [str(tmp_path / "one" / "python3.12")]


def test_patterns_and_path_are_searched(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = program(home / ".pyenv" / "versions" / "3.12 x" / "bin" / "python3", "echo whole")
    assert found("~/.pyenv/versions/*/bin") == [str(python)]
    on_path = program(tmp_path / "a b" / "python3.11", "echo whole")
    monkeypatch.setenv("PATH", f"{on_path.parent}:/usr/bin:/bin")
    assert found("PATH") == [str(on_path)]


def test_python_that_reads_its_input_does_not_consume_the_script(home: Path, tmp_path: Path) -> None:
    program(tmp_path / "one" / "python3", "cat >/dev/null; exit 1")
    python = program(tmp_path / "two" / "python3", "echo whole")
    assert found(str(tmp_path / "one"), str(tmp_path / "two")) == [str(python)]


def test_shell_syntax_in_folder_names_is_not_executed(home: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    found(f"$(touch {canary})", f"; touch {canary}", f"`touch {canary}`", "-n", "")
    assert not canary.exists()


def test_uv_installs_a_missing_python(home: Path, tmp_path: Path, bare: None) -> None:
    calls = tmp_path / "calls"
    real = Path(sys.base_prefix) / "bin" / "python3"
    program(
        tmp_path / "bin" / "uv",
        f'echo "$@" >>"{calls}"\n'
        f'case "$1 $2" in "python find") echo "{real}";; "python install") ;; esac\n'
        f'case "$1" in venv) for last; do :; done; "{real}" -m venv --without-pip "$last";; esac',
    )
    result = deploy.install(open_local(), host(), quiet, places=[str(tmp_path / "bin")])
    assert result["changed"] is True and build_of(home) == build_id()
    assert [line.split()[1] for line in calls.read_text().splitlines()[:2]] == ["install", "find"]
    assert "venv" in calls.read_text()


def test_error_of_uv_is_quoted(home: Path, tmp_path: Path) -> None:
    program(tmp_path / "bin" / "uv", "echo no network >&2; exit 2")
    error = refusal(tmp_path / "bin")
    assert error.code == "no_python" and "no network" in error.why


# -- what is sent -------------------------------------------------------------------------------------------------


def test_equal_sources_give_equal_archives() -> None:
    first = deploy.archive()
    assert first == deploy.archive()


def test_agents_dependencies_have_the_projects_pins() -> None:
    hub, psutil = deploy.requirements()
    pins = hub.replace("-", "_").removeprefix("huggingface_hub").split(",")
    declared = (PACKAGE.parent / "pyproject.toml").read_text().splitlines()
    line = next(each for each in declared if "huggingface_hub" in each)
    assert len(pins) == 2 and all(pin in line for pin in pins)
    assert "<" in psutil and "darwin" in psutil
