"""Folders that may not be entered or read: commands that need them report them, others work."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlxops.agent.hub.cache import Skipped, Snapshot, find, scan
from mlxops.agent.state.store import Store
from mlxops.agent.worker import classify_error
from mlxops.common import files
from mlxops.core.errors import Bug, MlxopsError, Refused
from tests.lab.homelab import Completed, Homelab, run, script
from tests.lab.sshd import missing
from tests.steps import REPO, error_of, register, with_fake


@pytest.fixture
def bound(homelab: Homelab) -> Callable[..., Completed]:
    """Run `mlxctl ... --local` without root's right to ignore permissions."""
    before: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            missing("setpriv (Debian and Ubuntu: util-linux)")
        before = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]

    def mlxctl(*words: object) -> Completed:
        argv = [*before, script("mlxctl"), *map(str, words), "--json", "--local"]
        return run(argv, homelab.studio.home, homelab.studio.environment, None, 60)

    return mlxctl


@contextmanager
def closed(folder: Path, mode: int = 0o000) -> Iterator[None]:
    was = folder.stat().st_mode & 0o777
    folder.chmod(mode)
    try:
        yield
    finally:
        folder.chmod(was)


def test_every_command_names_a_closed_folder(homelab: Homelab, bound: Callable[..., Completed]) -> None:
    """The registry is in it."""
    studio = with_fake(homelab).studio
    register(studio, "mine")
    port = studio.ports[0]
    with closed(studio.hub.parent):
        for words in (
            ["init"],
            ["load", "mine", port],
            ["load", "mine", port, "--dry-run"],
            ["unload", port],
            ["reconcile"],
            ["restore"],
            ["set", "--model", "mine", "--set", "context_length=4096"],
            ["remove", "--model", "mine"],
            ["pull", "--repo", REPO, "--dry-run"],
        ):
            answer = bound(*words)
            error = error_of(answer)
            assert answer.exit == 3 and "Permission denied" in str(error), str(answer)
            assert str(studio.hub) in str(error), str(answer)
        for words in (["status"], ["list"]):
            answer = bound(*words).ok()
            assert "Permission denied" in answer.stdout and "give this account access" in answer.stdout, str(answer)
            assert "empty one" not in answer.stdout + answer.stderr, str(answer)


def test_commands_that_need_no_hub_work_without_it(homelab: Homelab, bound: Callable[..., Completed]) -> None:
    studio = with_fake(homelab).studio
    register(studio, "mine")
    registry = studio.folder / "registry.json"
    studio.registry_path.rename(registry)
    homelab.configure(registry=str(registry))
    port = studio.ports[0]
    bound("load", "mine", port).ok()
    with closed(studio.hub.parent):
        host: Any = bound("status").ok().json["hosts"][0]
        assert next(row for row in host["ports"] if row["port"] == port)["state"] == "ready"
        assert "Permission denied" in str(bound("list").ok().json["hosts"][0]["models"])
        bound("unload", port).ok()
        bound("reconcile").ok()
        bound("restore").ok()
        bound("set", "--model", "mine", "--set", "context_length=").ok()
        error = error_of(bound("init"))
        assert error["code"] == "folder_closed" and "Permission denied" in error["why"]


def refuse(number: int) -> Callable[..., Any]:
    def call(path: Any, *_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number), str(path))

    return call


def test_unreadable_hub_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "scandir", refuse(errno.EACCES))
    for table in (lambda: scan(tmp_path), lambda: find(tmp_path, REPO)):
        with pytest.raises(Refused) as caught:
            table()
        assert caught.value.code == "folder_closed" and str(tmp_path) in caught.value.message


def test_closed_repository_hides_no_other(homelab: Homelab, bound: Callable[..., Completed]) -> None:
    studio = homelab.studio
    studio.install(REPO, "tiny-qwen3")
    shut = studio.hub / "models--tiny-org--shut"
    shut.mkdir()
    behind = studio.folder / "behind" / "models--tiny-org--aside"
    behind.mkdir(parents=True)
    (studio.hub / "models--tiny-org--aside").symlink_to(behind)
    with closed(shut), closed(behind.parent):
        result: Any = bound("init").ok().json["hosts"][0]["result"]
    assert result["added"] == [REPO]
    skipped = {row["repo_id"]: row["why"] for row in result["skipped"]}
    assert set(skipped) == {"tiny-org/shut", "tiny-org/aside"}
    assert all("Permission denied" in why for why in skipped.values())
    assert isinstance(find(studio.hub, REPO), Snapshot) and not isinstance(find(studio.hub, REPO), Skipped)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.EROFS])
def test_disk_and_permission_errors_are_not_bugs(tmp_path: Path, number: int) -> None:
    store = Store(tmp_path / "state", tmp_path / "registry.json")
    error = classify_error(OSError(number, os.strerror(number), "/Volumes/X/hub"), store)
    assert isinstance(error, MlxopsError) and not isinstance(error, Bug)
    assert error.exit == 3 and "/Volumes/X/hub" in error.message and os.strerror(number) in error.why and error.hint


def test_macos_permission_errors_get_their_own_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    hint = files.remedy(OSError(errno.EPERM, "Operation not permitted", "/Volumes/My Models/hub"))
    assert hint is not None and "full disk access" in hint and "chflags nouchg '/Volumes/My Models/hub'" in hint


def test_doctor_names_a_closed_state_folder_and_what_else_is_wrong(
    homelab: Homelab, bound: Callable[..., Completed]
) -> None:
    homelab.studio.state.mkdir(mode=0o700, exist_ok=True)
    for mode, wanted in ((0o311, {"state_open", "state_unwritable"}), (0o000, {"state_unwritable"})):
        with closed(homelab.studio.state, mode):
            rows = bound("doctor").json["hosts"][1]["findings"]
        about = [row for row in rows if row["code"].startswith("state_")]
        assert {row["code"] for row in about} == wanted, rows
        assert any("may not read and change" in row["message"] for row in about)
