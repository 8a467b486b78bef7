"""A host that was rebooted comes back; a server that crashes does so a few times, and then no more."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.lab import models
from tests.lab.homelab import Homelab, Studio
from tests.lab.quick import HeldEngine
from tests.lab.wired import client
from tests.lab.world import end, wait_until
from tests.steps import quiet

EARLIER = "00000000-0000-0000-0000-000000000000"
QWEN, LLAMA = "tiny-org/tiny-qwen3", "tiny-org/tiny-llama"


def reboot(studio: Studio) -> None:
    """Kill everything that runs, and let the records be of an earlier boot."""
    studio.sweep()
    for record in (studio.state / "run").glob("*.json"):
        run = json.loads(record.read_text())
        record.write_text(json.dumps(run | {"boot_id": EARLIER}))
    history = studio.state / "history.jsonl"
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    earlier = [line | ({"boot_id": EARLIER} if "boot_id" in line else {}) for line in lines]
    history.write_text("".join(json.dumps(line) + "\n" for line in earlier))


def age_history(studio: Studio, seconds: int) -> None:
    """Make the recorded times older by that much."""
    history = studio.state / "history.jsonl"
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    older = [line | ({"wall": line["wall"] - seconds} if "wall" in line else {}) for line in lines]
    history.write_text("".join(json.dumps(line) + "\n" for line in older))


def history_of(lab: Homelab, command: str) -> list[dict[str, Any]]:
    lines = (lab.studio.state / "history.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["command"] == command]


def run_restore_job(lab: Homelab) -> subprocess.CompletedProcess[str]:
    """Run the restore job as the system does at boot: without a request, with the agreed settings."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "mlxops.agent", "--restore", str(lab.studio.state)],
        env=lab.studio.env | {"PATH": os.defpath},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def status(lab: Homelab) -> dict[str, Any]:
    host: dict[str, Any] = lab.mini.mlxctl("status", "--json").ok().json["hosts"][0]
    return host


def assigned(lab: Homelab) -> dict[str, int | None]:
    return {name: entry["port"] for name, entry in lab.studio.registry()["models"].items()}


def two_loaded(lab: Homelab) -> tuple[int, int]:
    first, second = lab.studio.ports[0], lab.studio.ports[1]
    lab.studio.install(QWEN, models.QWEN)
    lab.studio.install(LLAMA, models.LLAMA)
    lab.mini.mlxctl("load", LLAMA, str(second)).ok()
    lab.mini.mlxctl("load", QWEN, str(first)).ok()
    return first, second


def kill_server(lab: Homelab, port: int) -> None:
    pid = json.loads((lab.studio.state / "run" / f"{port}.json").read_text())["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not lab.studio.listening(port), 30, "the port's end")


@pytest.mark.usefixtures("quick_engine")
def test_reboot_is_reported_and_restore_starts_all_models(homelab: Homelab) -> None:
    first, second = two_loaded(homelab)
    reboot(homelab.studio)
    host = status(homelab)
    assert [row["state"] for row in host["ports"]][:2] == ["failed", "failed"]
    assert host["ports"][0]["detail"] == "it went down with the host"
    row = next(row for row in host["drift"] if row["code"] == "rebooted")
    assert row["message"].startswith("rebooted 20") and row["message"].endswith("; 2 assignments down")
    assert row["hint"] == "mlxctl restore"

    plan = homelab.mini.mlxctl("restore", "--dry-run", "--json").ok().json["hosts"][0]["result"]
    assert [row["port"] for row in plan["restored"]] == [first, second] and plan["changed"] is False
    quiet(homelab.studio)
    assert not history_of(homelab, "restore")
    argvs = [row["argv"] for row in plan["restored"]]
    dry_run = homelab.mini.mlxctl("restore", "--dry-run").ok()
    assert f"{QWEN} on {first}: {shlex.join(argvs[0])}\n" in dry_run.stderr

    done = homelab.mini.mlxctl("restore").ok()
    assert done.stdout == f"started {QWEN} on {first}, {LLAMA} on {second}\n"
    assert status(homelab)["drift"] == []
    records = [json.loads((homelab.studio.state / "run" / f"{port}.json").read_text()) for port in (first, second)]
    assert argvs == [record["argv"] for record in records], "what was announced is what was started"
    for port, alias in ((first, "jerry-xl"), (second, "jerry-l")):
        assert homelab.studio.completion(port, alias)["model"] == alias
    assert homelab.mini.mlxctl("restore").ok().stdout == "started nothing\n"


@pytest.mark.usefixtures("quick_engine")
def test_cleared_models_are_restored_by_the_hosts_own_job(homelab: Homelab) -> None:
    first, second = two_loaded(homelab)
    reboot(homelab.studio)
    homelab.mini.mlxctl("reconcile").ok()
    assert set(assigned(homelab).values()) == {None}
    assert homelab.mini.mlxctl("restore").ok().stdout == "started nothing\n"
    homelab.mini.mlxctl("restore", "--cleared").ok()
    assert assigned(homelab) == {QWEN: first, LLAMA: second}
    assert homelab.mini.mlxctl("restore", "--cleared").ok().stdout == "started nothing\n"

    reboot(homelab.studio)
    job = run_restore_job(homelab)
    assert job.returncode == 0, job.stdout + job.stderr
    assert job.stdout.endswith(" restored 2\n")
    assert [row["state"] for row in status(homelab)["ports"]][:2] == ["ready", "ready"]
    rows = homelab.mini.mlxctl("ops", "--json").ok().json["hosts"][0]["operations"]
    assert rows[0]["command"] == "restore" and rows[0]["asker"].startswith("boot@")
    idle = run_restore_job(homelab)
    assert (idle.returncode, idle.stdout) == (0, "")
    assert homelab.mini.mlxctl("ops", "--json").ok().json["hosts"][0]["operations"] == rows, "no record of nothing"


@pytest.mark.usefixtures("quick_engine")
def test_failed_start_does_not_stop_the_others(homelab: Homelab) -> None:
    first, second = two_loaded(homelab)
    reboot(homelab.studio)
    path = homelab.studio.registry_path
    registry = json.loads(path.read_text())
    registry["models"][QWEN]["args"] = ["--fake-exit", "1"]
    path.write_text(json.dumps(registry))
    job = run_restore_job(homelab)
    assert job.returncode == 4 and f"1 of 2 did not start: {QWEN} on {first}" in job.stdout, job.stdout + job.stderr
    homelab.mini.mlxctl("unload", str(second)).ok()
    homelab.mini.mlxctl("load", LLAMA, str(second)).ok()
    reboot(homelab.studio)
    age_history(homelab.studio, 3600)
    done = homelab.mini.mlxctl("restore", "--json")
    error = done.json["hosts"][0]["error"]
    assert (done.exit, error["code"]) == (4, "restore_incomplete")
    assert [row["port"] for row in error["details"]["restored"]] == [second]
    assert [row["port"] for row in error["details"]["failed"]] == [first]
    assert not homelab.studio.listening(first)
    assert homelab.studio.completion(second, "jerry-l")["model"] == "jerry-l"


@pytest.mark.usefixtures("quick_engine")
def test_memory_budget_is_kept(homelab: Homelab) -> None:
    """The estimate is so large that other servers of this machine make no difference."""
    first, second = two_loaded(homelab)
    reboot(homelab.studio)
    config = next(homelab.studio.hub.glob("models--tiny-org--tiny-qwen3/snapshots/*/config.json")).resolve()
    config.write_text(json.dumps(json.loads(config.read_text()) | {"head_dim": 10**8}))
    homelab.configure(memory="1TB")
    done = homelab.mini.mlxctl("restore", "--json")
    details = done.json["hosts"][0]["error"]["details"]
    assert done.exit == 4
    assert [(row["port"], row["why"].partition(":")[0]) for row in details["failed"]] == [(first, "does_not_fit")]
    assert [row["port"] for row in details["restored"]] == [second]
    assert not homelab.studio.listening(first)
    tried = homelab.mini.mlxctl("restore", "--dry-run", "--json")
    error = tried.json["hosts"][0]["error"]
    assert (tried.exit, error["message"]) == (4, f"1 of 1 would not start: {QWEN} on {first}")
    again = homelab.mini.mlxctl("restore", "--json").json["hosts"][0]["error"]["details"]
    assert [row["port"] for row in again["failed"]] == [first], "what was refused was no start: there is no pause"
    assert [line["port"] for line in history_of(homelab, "restore")] == [second]


@pytest.mark.usefixtures("quick_engine")
def test_crashing_server_is_restarted_with_back_off(homelab: Homelab) -> None:
    homelab.studio.install(QWEN, models.QWEN)
    port = homelab.studio.ports[0]
    homelab.mini.mlxctl("load", QWEN, str(port)).ok()
    kill_server(homelab, port)
    row = status(homelab)["ports"][0]
    assert (
        row["state"] == "failed" and "its server ended: " in row["detail"] and "last sign of life 20" in row["detail"]
    )
    homelab.mini.mlxctl("restore").ok()
    kill_server(homelab, port)
    left = homelab.mini.mlxctl("restore").ok()
    assert left.stdout == f"started nothing; left: {QWEN} on {port}\n"
    assert f"the next try may be in 2 min; or now: mlxctl load {QWEN} {port}\n" in left.stderr
    homelab.mini.mlxctl("load", QWEN, str(port)).ok()
    kill_server(homelab, port)
    homelab.mini.mlxctl("restore").ok()
    assert homelab.studio.completion(port, "jerry-xl")["model"] == "jerry-xl", "a load by a person resets the back-off"
    end(homelab.studio.processes())


@pytest.mark.usefixtures("quick_engine")
def test_only_installed_boot_jobs_reserve_their_ports(homelab: Homelab) -> None:
    port = homelab.studio.ports[0]
    homelab.studio.install(QWEN, models.QWEN)
    homelab.mini.mlxctl("load", QWEN, str(port)).ok()
    reboot(homelab.studio)
    unit = homelab.studio.home / ".config" / "systemd" / "user" / "mlx-launch.service"
    unit.parent.mkdir(parents=True)
    unit.write_text("[Service]\nExecStart=/opt/mlx-launch/bin/start.sh\n")
    homelab.configure(boot={"port": port, "label": "mlx-launch", "script": "/opt/mlx-launch/bin/start.sh"})
    done = homelab.mini.mlxctl("restore").ok()
    assert done.stdout.startswith("started nothing; left: ") and f"boot job mlx-launch: {unit} exists" in done.stderr
    quiet(homelab.studio)
    assert f"boot job mlx-launch: {unit} exists" in run_restore_job(homelab).stdout
    unit.unlink()
    done = homelab.mini.mlxctl("restore").ok()
    assert done.stdout == f"started {QWEN} on {port}\n" and "mlx-launch of port" in done.stderr


@contextmanager
def restoring(lab: Homelab, *flags: str) -> Iterator[tuple[subprocess.Popen[str], HeldEngine]]:
    """Run a restore of two models on the Mini, whose servers are held."""
    engine = HeldEngine(lab)
    engine.let(*lab.studio.ports)
    two_loaded(lab)
    reboot(lab.studio)
    if "--cleared" in flags:
        lab.mini.mlxctl("reconcile").ok()
    engine.hold(*lab.studio.ports)
    with client(lab, "restore", *flags) as process:
        next_proof(process)
        yield process, engine


def next_proof(process: subprocess.Popen[str]) -> None:
    """Wait until the restore waits for a server."""
    assert process.stderr is not None
    next(line for line in process.stderr if line.startswith("proof: "))


@pytest.mark.parametrize("which", [0, 1], ids=["the port that it is at", "a port that is yet to come"])
def test_unload_during_restore_skips_only_its_port(homelab: Homelab, which: int) -> None:
    ports, models_there = homelab.studio.ports[:2], (QWEN, LLAMA)
    with restoring(homelab) as (process, engine):
        unloaded = homelab.mini.mlxctl("unload", str(ports[which])).ok()
        engine.let(*homelab.studio.ports)
        stdout, stderr = process.communicate(timeout=60)
    assert f"port {ports[which]} is excluded from restore, started by " in unloaded.stderr
    other = 1 - which
    assert (process.returncode, stdout) == (
        0,
        f"started {models_there[other]} on {ports[other]}; left: {models_there[which]} on {ports[which]}\n",
    ), stderr
    assert f"{models_there[which]} on {ports[which]} is skipped: it was unloaded during the restore" in stderr
    assert assigned(homelab) == {models_there[other]: ports[other], models_there[which]: None}
    assert [row["state"] for row in status(homelab)["ports"]][:2] == ["idle", "ready"][:: 1 - 2 * which]
    assert not homelab.studio.listening(ports[which])


def test_cleared_model_that_is_unloaded_does_not_come_back(homelab: Homelab) -> None:
    first, second = homelab.studio.ports[:2]
    with restoring(homelab, "--cleared") as (process, engine):
        homelab.mini.mlxctl("unload", str(second)).ok()
        engine.let(*homelab.studio.ports)
        assert process.wait(60) == 0
    assert assigned(homelab) == {QWEN: first, LLAMA: None}


def test_second_restore_follows_the_first(homelab: Homelab) -> None:
    """A load on one of its ports is another request, and gets the error `busy`, which names the restore."""
    first, second = homelab.studio.ports[:2]
    with restoring(homelab) as (process, engine):
        load = homelab.mini.mlxctl("load", QWEN, str(first), "--json")
        with client(homelab, "restore") as again:
            assert again.stderr is not None
            heard = next(line for line in again.stderr if "is running already" in line)
            engine.let(*homelab.studio.ports)
            followed, _ = again.communicate(timeout=60)
        stdout, _ = process.communicate(timeout=60)
    error = load.json["hosts"][0]["error"]
    assert (load.exit, error["code"]) == (75, "busy") and f"load {QWEN}, started by" in error["message"]
    assert heard and again.returncode == 0
    assert followed == stdout == f"started {QWEN} on {first}, {LLAMA} on {second}\n"
    rows = homelab.mini.mlxctl("ops", "--json").ok().json["hosts"][0]["operations"]
    assert [row["state"] for row in rows if row["command"] == "restore"] == ["followed", "done"]


def test_cancelled_restore_keeps_the_servers_it_started(homelab: Homelab) -> None:
    first, second = homelab.studio.ports[:2]
    with restoring(homelab) as (process, engine):
        engine.let(first)
        next_proof(process)
        running = homelab.mini.mlxctl("ops", "--json").ok().json["hosts"][0]["operations"][0]
        homelab.mini.mlxctl("ops", "--cancel", running["operation"]).ok()
        assert process.wait(60) == 130
    assert assigned(homelab) == {QWEN: first, LLAMA: second}
    assert homelab.studio.listening(first) and not homelab.studio.listening(second)
