"""`remove` deletes what its dry run says, also after interrupted downloads and on disks without links."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxops.agent.hub.cache import Snapshot, find
from mlxops.agent.hub.removal import delete
from mlxops.core.errors import Busy, Refused
from tests.lab import models

REPO, OTHER = "tiny-org/one", "tiny-org/two"
NEW = "d" * 40


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def snapshot(hub: Path, tiny_models: Path) -> Path:
    return models.install_snapshot(hub, REPO, tiny_models / models.QWEN, trees=True)


def bytes_below(folder: Path) -> int:
    """Return the bytes of the regular files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def repo_of(snapshot: Path) -> Path:
    return snapshot.parent.parent


def an_interrupted_update(snapshot: Path) -> None:
    """Let `refs/main` name a commit that has no files yet."""
    (repo_of(snapshot) / "refs" / "main").write_text(NEW)


def a_half_written_blob(snapshot: Path) -> None:
    (repo_of(snapshot) / "blobs" / f"{'e' * 64}.0123abcd.incomplete").write_bytes(bytes(5000))


def a_file_of_exfat(snapshot: Path) -> None:
    for folder in (snapshot.parent, snapshot, repo_of(snapshot), repo_of(snapshot) / "refs"):
        (folder / f"._{snapshot.name}").write_bytes(b"\0\5\26\7")
        (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")


def a_pull_request(snapshot: Path) -> None:
    ref = repo_of(snapshot) / "refs" / "refs" / "pr" / "7"
    ref.parent.mkdir(parents=True)
    ref.write_text(snapshot.name)


def a_lost_blob(snapshot: Path) -> None:
    (snapshot / "tokenizer.json").resolve().unlink()


def a_record_of_a_missing_file(snapshot: Path) -> None:
    mark = repo_of(snapshot) / ".no_exist" / snapshot.name / "adapter_config.json"
    mark.parent.mkdir(parents=True)
    mark.touch()


def an_edit_in_the_place_of_a_link(snapshot: Path) -> None:
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_text("{}")


def no_links_at_all(snapshot: Path) -> None:
    """Replace the snapshot's links by files, as on exFAT."""
    for path in list(snapshot.iterdir()):
        blob = path.resolve()
        path.unlink()
        blob.rename(path)


def stale_locks(snapshot: Path) -> None:
    lock = snapshot.parents[2] / ".locks" / repo_of(snapshot).name / "x.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()


STATES: list[Callable[[Path], None]] = [
    an_interrupted_update,
    a_half_written_blob,
    a_file_of_exfat,
    a_pull_request,
    a_lost_blob,
    a_record_of_a_missing_file,
    an_edit_in_the_place_of_a_link,
    no_links_at_all,
    stale_locks,
]


@pytest.mark.parametrize("state", STATES)
def test_last_snapshot_is_deleted_with_its_repository(hub: Path, snapshot: Path, state: Callable[[Path], None]) -> None:
    state(snapshot)
    before = bytes_below(hub)
    planned = delete(repo_of(snapshot), snapshot.name, dry_run=True)
    assert bytes_below(hub) == before and planned.freed_bytes > 100_000
    done = delete(repo_of(snapshot), snapshot.name, dry_run=False)
    assert done == planned and (before - bytes_below(hub), done.kept, done.own) == (done.freed_bytes, (), ())
    assert not repo_of(snapshot).exists() and not (hub / ".locks" / repo_of(snapshot).name).exists()


@pytest.mark.parametrize("state", STATES)
def test_snapshot_is_deleted_with_files_that_only_it_uses(
    hub: Path, snapshot: Path, tiny_models: Path, state: Callable[[Path], None]
) -> None:
    """The other snapshot is an interrupted download: its link leads to a missing blob."""
    half = models.install_snapshot(hub, REPO, tiny_models / models.QWEN_B, sha=NEW, ref=None)
    (half / "model.safetensors").resolve().unlink()
    state(snapshot)
    if state is not a_lost_blob:  # both snapshots use that blob
        assert (half / "tokenizer.json").exists() or state is no_links_at_all
    before, shared = bytes_below(hub), {path.name for path in half.iterdir() if path.exists()}
    planned = delete(repo_of(snapshot), snapshot.name, dry_run=True)
    assert bytes_below(hub) == before and planned.freed_bytes > 50_000, "no other snapshot shares its weights"
    done = delete(repo_of(snapshot), snapshot.name, dry_run=False)
    assert done == planned and (before - bytes_below(hub), done.kept) == (done.freed_bytes, (NEW,))
    assert not snapshot.exists() and {path.name for path in half.iterdir() if path.exists()} == shared


def test_interrupted_update_is_deleted_and_older_snapshot_stays(hub: Path, snapshot: Path, tiny_models: Path) -> None:
    half = models.install_snapshot(hub, REPO, tiny_models / models.QWEN_B, sha=NEW)
    (half / "model.safetensors").resolve().unlink()
    assert delete(repo_of(snapshot), NEW, dry_run=False).kept == (snapshot.name,)
    assert isinstance(find(hub, REPO), Snapshot) and not (repo_of(snapshot) / "refs" / "main").exists()


def test_folder_without_snapshot_is_deleted(hub: Path) -> None:
    blob = models.repo_folder(hub, REPO) / "blobs" / f"{'e' * 64}.0123abcd.incomplete"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(bytes(7000))
    assert delete(models.repo_folder(hub, REPO), None, dry_run=False).freed_bytes == 7000
    assert not models.repo_folder(hub, REPO).exists()


@pytest.mark.parametrize("trees", [True, False])
@pytest.mark.parametrize("rest", [True, False], ids=["beside another revision", "alone"])
def test_files_of_a_person_stay_and_are_named(hub: Path, tiny_models: Path, trees: bool, rest: bool) -> None:
    snapshot = models.install_snapshot(hub, REPO, tiny_models / models.QWEN, trees=trees)
    if rest:
        models.install_snapshot(hub, REPO, tiny_models / models.QWEN_B, sha=NEW, ref=None)
    mine = {snapshot / "config.json.bak", snapshot / "adapters" / "adapters.safetensors"}
    if not rest:
        mine.add(repo_of(snapshot) / "notes.txt")
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    before = bytes_below(hub)
    planned = delete(repo_of(snapshot), snapshot.name, dry_run=True)
    done = delete(repo_of(snapshot), snapshot.name, dry_run=False)
    assert done == planned and set(done.own) == set(map(str, mine)) and before - bytes_below(hub) == done.freed_bytes
    assert all(path.read_text() == "mine" for path in mine)
    with pytest.raises(Refused) as caught:
        delete(repo_of(snapshot), snapshot.name, dry_run=False)
    assert caught.value.code == "nothing_to_remove" and "config.json.bak" in caught.value.why


@pytest.mark.parametrize("xet", [True, False])
def test_files_shared_with_another_repository_stay(hub: Path, tiny_models: Path, xet: bool) -> None:
    one, two = (models.install_snapshot(hub, repo, tiny_models / models.QWEN, xet=xet) for repo in (REPO, OTHER))
    for snapshot in (one, two):
        before = bytes_below(hub)
        planned = delete(repo_of(snapshot), snapshot.name, dry_run=True)
        done = delete(repo_of(snapshot), snapshot.name, dry_run=False)
        rewritten = 200  # the store lists the users of a file
        assert done == planned and abs(before - bytes_below(hub) - done.freed_bytes) < rewritten
        assert isinstance(find(hub, OTHER), Snapshot) == (snapshot is one)
    assert bytes_below(hub) < 1000


def test_file_with_another_hard_link_is_not_counted(tmp_path: Path, hub: Path, snapshot: Path) -> None:
    os.link((snapshot / "model.safetensors").resolve(), tmp_path / "mine")
    size = (tmp_path / "mine").stat().st_size
    before = bytes_below(hub)
    assert delete(repo_of(snapshot), snapshot.name, dry_run=False).freed_bytes == before - size
    assert (tmp_path / "mine").stat().st_size == size


def test_download_of_another_program_makes_delete_busy(hub: Path, snapshot: Path) -> None:
    a_half_written_blob(snapshot)
    lock = hub / ".locks" / repo_of(snapshot).name / f"{'e' * 64}.lock"
    lock.parent.mkdir(parents=True)
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Busy):
            delete(repo_of(snapshot), snapshot.name, dry_run=False)
    assert isinstance(find(hub, REPO), Snapshot)
