"""A short part of the fault campaign, always the same one; `inv faults` is the long one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import campaign, reuse
from tests.lab.homelab import CHECKOUT, run, script
from tests.lab.sshd import missing

pytestmark = pytest.mark.lab

SEED = 7
NEEDS_STRACE = {"kills", "errors", "power"}


def batch(kind: str, count: int, first: int = 0) -> Iterator[dict[str, object]]:
    argv = campaign.batch_argv(kind, first, count, SEED)
    done = subprocess.run(argv, cwd=CHECKOUT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    yield from map(json.loads, done.stdout.splitlines())


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("kills", 5),
        ("errors", 3),
        ("power", 3),
        ("races", 3),
        ("broken", 11),
        ("gone", 4),
        ("hostile", 20),
        ("reuse", 4),
        ("bystanders", 14),
        ("names", 10),
        ("healthy", 110),
        ("keeper", 6),
        ("cuts", 2),
        ("hostile over SSH", 4),
    ],
)
def test_few_faults_of_each_kind_are_survived(kind: str, count: int) -> None:
    if kind in NEEDS_STRACE and shutil.which("strace") is None:
        missing("strace (Debian and Ubuntu: apt-get install strace)")
    if kind == "reuse" and (why := reuse.available()):
        pytest.skip(f"pids cannot be chosen here: {why}")
    if kind not in {"broken", "gone", "hostile", "cuts", "hostile over SSH"} and sys.platform != "linux":
        pytest.skip("strace, /proc and namespaces are Linux's")
    rows = list(batch(kind, count))
    assert len(rows) == count
    assert [row for row in rows if row["wrong"]] == []


def test_same_faults_catch_simpler_implementations() -> None:
    if shutil.which("strace") is None:
        missing("strace (Debian and Ubuntu: apt-get install strace)")
    argv = [sys.executable, "-m", "tests.faults.controls"]
    done = subprocess.run(argv, cwd=CHECKOUT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    verdicts = dict(line.split("\t") for line in done.stdout.splitlines())
    assert len(verdicts) >= 3 and set(verdicts.values()) == {"caught"}, verdicts


def test_campaign_continues_where_it_stopped(tmp_path: Path) -> None:
    state = campaign.State(tmp_path / "state.json")
    for _ in range(2):
        campaign._batch(state, campaign.Kind("broken", 1, 2, ""), SEED, deadline=float("inf"))
    row = state.read()["broken"]
    assert (row["claimed"], row["tried"]) == (4, 4), row
    assert f"mlxops {campaign.code()}" in campaign.table(state)


def test_trials_of_other_code_are_kept_but_not_counted(tmp_path: Path) -> None:
    old, new = (campaign.State(tmp_path / "state.json", code) for code in ("old", "new"))
    with old.changed() as rows:
        rows["kills"] = {"tried": 7, "lost": 1}
    campaign._counted(new, campaign.KINDS[0], SEED, {"number": 0, "name": "x", "cases": 1, "wrong": []})
    assert campaign.count(new.read()["kills"], "tried") == 1 and not campaign.count(new.read()["kills"], "lost")
    assert old.read() == {"kills": {"tried": 7, "lost": 1}}


IN_A_SMALL_PLACE = ("unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=32m none "$1" && shift && exec "$@"', "sh")


@pytest.mark.parametrize("what", ["full", "read-only"])
def test_full_disk_is_reported_and_leaves_nothing(what: str, tmp_path: Path) -> None:
    try:
        probe = subprocess.run([*IN_A_SMALL_PLACE, str(tmp_path), "true"], capture_output=True, check=False)
    except OSError:
        probe = None
    if probe is None or probe.returncode != 0:
        pytest.skip("no mount namespace for this user")
    argv = [*IN_A_SMALL_PLACE, str(tmp_path), sys.executable, "-m", "tests.faults.smalldisk", what, str(tmp_path)]
    done = subprocess.run(argv, cwd=CHECKOUT, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout == "survived\n", done.stderr


@pytest.mark.parametrize("only", ["nope", "kills,nope", ","])
def test_unknown_kind_is_a_usage_error_that_lists_the_kinds(only: str, tmp_path: Path) -> None:
    done = run([script("inv"), "faults", "--only", only, "--state", str(tmp_path / "x.json")], CHECKOUT, os.environ)
    assert done.exit == 2 and "kills" in done.stderr, str(done)
    assert not list(tmp_path.iterdir())
