"""`pull`, `pull --verify` and `remove`: one download for all, checks by content, and shared files stay."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from mlxops.agent.hub.cache import Snapshot, find
from mlxops.agent.hub.download import download, verify
from mlxops.agent.hub.removal import Deleted
from mlxops.agent.hub.removal import delete as delete_from
from mlxops.core.errors import DownloadFailed
from mlxops.core.protocol import Event, Note, Progress
from tests.agent.test_hub import LLAMA, QUICK, pull
from tests.control.test_attach import operations
from tests.lab import models
from tests.lab.faultyhub import FaultyHub, Lie
from tests.lab.homelab import Homelab
from tests.lab.hub import Hub
from tests.lab.wire import Wire
from tests.lab.wired import client
from tests.lab.world import wait_until

QWEN = "tiny-org/tiny-qwen3"
WAIT = 60.0


def result(lab: Homelab, *words: str) -> dict[str, Any]:
    row: dict[str, Any] = lab.mini.mlxctl(*words, "--json").ok().json["hosts"][0]["result"]
    return row


def disk(folder: Path) -> int:
    """Return the bytes of the regular files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def link_away(file: Path, folder: Path) -> None:
    """Put the content of a file into another folder, with a link where it was."""
    (folder / "weights").write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(folder / "weights")


def delete(snapshot: Path, *, dry_run: bool) -> Deleted:
    return delete_from(snapshot.parent.parent, snapshot.name, dry_run=dry_run)


def worker_of(lab: Homelab) -> int:
    return next(process.pid for process in lab.studio.processes() if "--worker" in process.command)


class TestPull:
    def test_pull_asks_the_hub_of_the_hosts_settings(self, homelab: Homelab, hub: Hub) -> None:
        """The session's own environment names an address on which nothing listens."""
        assert homelab.studio.env["HF_ENDPOINT"] == "http://127.0.0.1:9"
        homelab.configure(env={"HF_ENDPOINT": hub.url})
        assert result(homelab, "pull", "--repo", QWEN)["changed"] is True

    def test_pull_reports_whether_the_files_changed(self, online_homelab: Homelab, hub: Hub, tiny_models: Path) -> None:
        first = hub.add("tiny-org/fresh", tiny_models / models.QWEN)
        assert result(online_homelab, "pull", "--repo", "tiny-org/fresh")["revision"] == first
        again = result(online_homelab, "pull", "--repo", "tiny-org/fresh")
        assert (again["changed"], again["revision"]) == (False, first)
        second = hub.update("tiny-org/fresh", tiny_models / models.QWEN_B)
        newer = result(online_homelab, "pull", "--repo", "tiny-org/fresh", "--verify")
        assert (newer["changed"], newer["revision"]) == (True, second)
        assert newer["verified_files"] == len(models.files_of(tiny_models / models.QWEN_B))

    def test_second_request_follows_the_first_download(self, wired: tuple[Homelab, Wire], slow_hub: Wire) -> None:
        """Start a load of the same repository while a pull runs."""
        lab, _ = wired
        with client(lab, "pull", "--repo", QWEN) as first:
            assert first.stderr is not None
            next(line for line in first.stderr if line.startswith("download: 0"))
            slow_hub.stalled = True
            status = lab.mini.mlxctl("status", "--json").ok().json["hosts"][0]
            assert [row["command"] for row in status["operations"]] == ["pull"]
            with client(lab, "load", QWEN, str(lab.studio.ports[0])) as second:
                assert second.stderr is not None
                next(line for line in second.stderr if "is being downloaded by pull" in line)
                slow_hub.stalled = False
                output = second.stderr.read()
                assert (first.wait(WAIT), second.wait(WAIT)) == (0, 0), output
        assert "277.7 kB of it already here" in output or " of it already here" in output, output
        assert lab.studio.completion(lab.studio.ports[0], "jerry-xl")["model"] == "jerry-xl"

    def test_next_pull_removes_what_a_killed_one_left(
        self,
        wired: tuple[Homelab, Wire],
        slow_hub: Wire,
    ) -> None:
        lab, _ = wired
        with client(lab, "pull", "--repo", QWEN) as process:
            assert process.stderr is not None
            next(line for line in process.stderr if line.startswith("download: 0"))
            wait_until(lambda: list(lab.studio.hub.rglob("*.incomplete")), WAIT, "a file that is half here")
            slow_hub.stalled = True
            os.kill(worker_of(lab), signal.SIGKILL)
            assert process.wait(WAIT) == 3
        assert list(lab.studio.hub.rglob("*.incomplete"))
        slow_hub.stalled = False
        assert result(lab, "pull", "--repo", QWEN, "--verify")["changed"] is True
        assert not list(lab.studio.hub.rglob("*.incomplete"))
        assert operations(lab)[1]["state"] == "interrupted"

    def test_cancelled_pull_ends_at_once_and_leaves_nothing(
        self,
        wired: tuple[Homelab, Wire],
        slow_hub: Wire,
    ) -> None:
        lab, _ = wired
        with client(lab, "pull", "--repo", QWEN) as process:
            assert process.stderr is not None
            next(line for line in process.stderr if line.startswith("download: 0"))
            slow_hub.stalled = True
            done = lab.mini.mlxctl("ops", "--cancel", operations(lab)[0]["operation"], timeout=30).ok()
            assert "nothing half done is left" in done.stdout
            assert process.wait(WAIT) == 130
        assert not [path for path in lab.studio.hub.rglob("*") if QWEN.partition("/")[2] in path.name]

    def test_cancelled_pull_keeps_the_files_of_an_earlier_one(
        self,
        wired: tuple[Homelab, Wire],
        slow_hub: Wire,
    ) -> None:
        lab, _ = wired
        here = lab.studio.install(LLAMA, models.LLAMA)
        shard = here / "model-00002-of-00002.safetensors"
        blob = shard.resolve()
        shard.unlink()
        blob.unlink()
        before = disk(here)
        with client(lab, "pull", "--repo", LLAMA) as process:
            assert process.stderr is not None
            next(line for line in process.stderr if line.startswith("download: "))
            wait_until(lambda: list(lab.studio.hub.rglob("*.incomplete")), WAIT, "a file that is half here")
            slow_hub.stalled = True
            lab.mini.mlxctl("ops", "--cancel", operations(lab)[0]["operation"], timeout=30).ok()
            assert process.wait(WAIT) == 130
        assert not list(lab.studio.hub.rglob("*.incomplete"))
        assert disk(here) == before and not shard.exists()
        slow_hub.stalled = False
        output = lab.mini.mlxctl("pull", "--repo", LLAMA).ok().stderr
        assert "of it already here" in output and blob.is_file()


class TestVerify:
    def test_wrong_content_is_found_with_the_commands_that_repair_it(
        self,
        faulty: FaultyHub,
        cache: Path,
    ) -> None:
        snapshot = download(LLAMA, None, cache, lambda _: None, QUICK)
        events: list[Event] = []
        count = verify(LLAMA, snapshot.revision, cache, events.append, QUICK)
        assert count == len(list(snapshot.path.iterdir()))
        last = events[-1]
        assert isinstance(last, Progress) and last.done == last.total
        weights = (snapshot.path / "model-00001-of-00002.safetensors").resolve()
        config = (snapshot.path / "config.json").resolve()
        weights.chmod(0o644)
        weights.write_bytes(trained := weights.read_bytes()[:-1] + b"\x00")
        config.write_bytes(bytes(config.stat().st_size))
        with pytest.raises(DownloadFailed) as caught:
            verify(LLAMA, snapshot.revision, cache, events.append, QUICK)
        assert caught.value.code == "wrong_content"
        assert "truncated: config.json" in caught.value.why and not config.exists()
        assert "kept" in caught.value.why and "model-00001" in caught.value.why
        assert weights.read_bytes() == trained, "they may be weights that a person trained further"
        repo = f"{LLAMA}@{snapshot.revision}"
        assert caught.value.hint.endswith(f": rm {weights}; mlxctl pull --repo {repo}"), caught.value.hint
        weights.unlink()
        download(LLAMA, snapshot.revision, cache, lambda _: None, QUICK)
        assert verify(LLAMA, snapshot.revision, cache, events.append, QUICK) == count

    def test_damaged_weights_that_the_hub_does_not_have_are_kept(
        self,
        faulty: FaultyHub,
        cache: Path,
    ) -> None:
        mine = download(LLAMA, None, cache, lambda _: None, QUICK).path / "model-mine.safetensors"
        mine.write_bytes(b"half of a copy")
        with pytest.raises(DownloadFailed, match="not complete"):
            download(LLAMA, None, cache, lambda _: None, QUICK)
        assert mine.read_bytes() == b"half of a copy"

    def test_incomplete_files_of_a_running_download_are_kept(
        self,
        faulty: FaultyHub,
        cache: Path,
    ) -> None:
        import fcntl

        pull(cache)
        blobs = models.repo_folder(cache, LLAMA) / "blobs"
        (blobs / f"{'a' * 40}.01234567.incomplete").touch()
        (blobs / f"{'b' * 40}.01234567.incomplete").touch()
        locks = cache / ".locks" / blobs.parent.name
        with open(locks / f"{'a' * 40}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            pull(cache)
        assert [path.name[0] for path in blobs.glob("*.incomplete")] == ["a"]


class TestRemove:
    def test_copy_with_the_same_commits_is_removed_alone(self, tmp_path: Path, tiny_models: Path) -> None:
        """A repository that was duplicated on the hub has the same commits as the original."""
        hub = tmp_path / "hub"
        names = [f"tiny-org/copy-{number}" for number in range(6)]
        snapshots = [models.install_snapshot(hub, name, tiny_models / models.QWEN, xet=True) for name in names]
        assert len({snapshot.name for snapshot in snapshots}) == 1
        deleted = delete(snapshots[3], dry_run=False)
        assert deleted.freed_bytes > 0 and deleted.kept == ()
        assert [isinstance(find(hub, name), Snapshot) for name in names] == [number != 3 for number in range(6)]

    def test_dry_run_reports_the_bytes_that_a_removal_frees(self, homelab: Homelab) -> None:
        studio = homelab.studio
        studio.install(QWEN, models.QWEN, trees=True, xet=True)
        studio.install("tiny-org/copy", models.QWEN, trees=True, xet=True)  # its weights are in the shared store, too
        kept = studio.install("tiny-org/two", models.LLAMA)
        studio.install("tiny-org/two", models.QWEN_B, sha="c" * 40, ref=None)
        homelab.mini.mlxctl("init").ok()
        before = disk(studio.hub)
        planned = result(homelab, "remove", "--model", "tiny-org/two", "--dry-run")
        assert disk(studio.hub) == before and planned["changed"] is False
        done = result(homelab, "remove", "--model", "tiny-org/two")
        assert (done["freed_bytes"], done["kept"]) == (planned["freed_bytes"], ["c" * 40])
        registry = studio.registry_path.stat().st_size
        assert abs(before - disk(studio.hub) - done["freed_bytes"]) <= 64, registry
        assert not kept.exists() and (kept.parent / ("c" * 40) / "model.safetensors").is_file()
        homelab.mini.mlxctl("remove", "--model", QWEN).ok()
        assert not models.repo_folder(studio.hub, QWEN).exists()
        homelab.mini.mlxctl("load", "tiny-org/copy", str(studio.ports[0])).ok()
        listed = homelab.mini.mlxctl("list", "--json").ok().json["hosts"][0]["models"]
        gone = next(row for row in listed if row["name"] == QWEN)
        assert gone["problems"] == ["its files are not in the cache; load downloads them"]
        assert result(homelab, "remove", "--model", QWEN)["changed"] is False

    @pytest.mark.parametrize("kept", [False, True], ids=["the only one", "one of two"])
    @pytest.mark.parametrize("what", ["repository", "blobs", "files"])
    def test_linked_files_outside_the_cache_are_kept_and_counted(
        self, tmp_path: Path, tiny_models: Path, what: str, kept: bool
    ) -> None:
        hub, elsewhere = tmp_path / "hub", tmp_path / "elsewhere"
        snapshot = models.install_snapshot(hub, QWEN, tiny_models / models.QWEN)
        if kept:
            models.install_snapshot(hub, QWEN, tiny_models / models.QWEN_B, sha="c" * 40, ref=None)
        elsewhere.mkdir()
        repo = snapshot.parent.parent
        weights = snapshot / "model.safetensors"
        match what:
            case "repository":
                repo.rename(elsewhere / repo.name)
                repo.symlink_to(elsewhere / repo.name)
            case "blobs":
                link_away(weights.resolve(), elsewhere)
            case "files":
                blob = weights.resolve()
                link_away(weights, elsewhere)
                blob.unlink()
        before = disk(hub) + disk(elsewhere)
        planned = delete(snapshot, dry_run=True)
        assert disk(hub) + disk(elsewhere) == before and snapshot.exists()
        done = delete(snapshot, dry_run=False)
        freed = before - disk(hub) - disk(elsewhere)
        assert done == planned and 0 <= freed - done.freed_bytes <= len(snapshot.name), "a branch's file is not counted"
        assert not snapshot.exists()
        if what != "repository":
            assert done.linked_bytes == (elsewhere / "weights").stat().st_size, "it is not ours to delete"
        elif not kept:
            assert (done.freed_bytes, freed) == (0, 0) and done.linked_bytes > 0
        else:
            assert done.linked_bytes == 0 and freed > 0

    def test_link_to_another_repository_is_removed_alone(self, tmp_path: Path, tiny_models: Path) -> None:
        hub = tmp_path / "hub"
        for number in range(6):
            snapshot = models.install_snapshot(hub, f"tiny-org/model-{number}", tiny_models / models.QWEN)
            link = models.repo_folder(hub, f"tiny-org/alias-{number}")
            link.symlink_to(snapshot.parent.parent.name)
            done = delete(link / "snapshots" / snapshot.name, dry_run=False)
            assert done.freed_bytes == 0 and done.linked_bytes > 0
            assert not link.is_symlink() and isinstance(find(hub, f"tiny-org/model-{number}"), Snapshot)

    def test_kept_files_behind_links_are_reported(self, homelab: Homelab, tmp_path: Path) -> None:
        studio = homelab.studio
        repo = studio.install(QWEN, models.QWEN).parent.parent
        homelab.mini.mlxctl("init").ok()
        repo.rename(tmp_path / repo.name)
        repo.symlink_to(tmp_path / repo.name)
        done = homelab.mini.mlxctl("remove", "--model", QWEN).ok()
        assert "freed 0 B" in done.stdout and "behind links" in done.stderr and "are left" in done.stderr
        assert not repo.is_symlink() and disk(tmp_path / repo.name) > 0

    def test_unregistered_repository_can_be_removed(self, homelab: Homelab) -> None:
        repo = homelab.studio.install(QWEN, models.QWEN).parent.parent
        planned = result(homelab, "remove", "--model", QWEN, "--dry-run")
        assert planned["freed_bytes"] > 0 and repo.exists()
        assert result(homelab, "remove", "--model", QWEN)["freed_bytes"] == planned["freed_bytes"]
        assert not repo.exists() and not homelab.studio.registry_path.exists()
        assert homelab.mini.mlxctl("remove", "--model", QWEN).exit == 3, "it is not in the cache any more"

    def test_interrupted_update_is_removed_except_for_own_files(self, homelab: Homelab) -> None:
        studio = homelab.studio
        snapshot = studio.install(QWEN, models.QWEN, trees=True)
        repo = snapshot.parent.parent
        (repo / "refs" / "main").write_text("d" * 40)
        (snapshot.parent / f"._{snapshot.name}").touch()
        (snapshot / "notes.txt").write_text("mine")
        planned = result(homelab, "remove", "--model", QWEN, "--dry-run")
        done = homelab.mini.mlxctl("remove", "--model", QWEN).ok()
        assert planned["freed_bytes"] > 100_000 and planned["kept"] == []
        assert "freed 0 B" not in done.stdout and f"no download put it there: {snapshot / 'notes.txt'}" in done.stderr
        assert [path for path in repo.rglob("*") if path.is_file()] == [snapshot / "notes.txt"]
        assert homelab.mini.mlxctl("remove", "--model", QWEN).exit == 3, "there is nothing left that it could free"

    def test_other_entries_of_the_same_files_are_named(self, homelab: Homelab) -> None:
        homelab.studio.install(QWEN, models.QWEN)
        for name in ("one", "two"):
            homelab.mini.mlxctl("load", name, str(homelab.studio.ports[0]), "--repo", QWEN, "--force").ok()
        homelab.mini.mlxctl("unload", "--model", "two").ok()
        for words in (["--dry-run"], []):
            done = homelab.mini.mlxctl("remove", "--model", "one", *words).ok()
            assert "two has the same files" in done.stderr

    def test_files_in_use_are_not_removed(self, homelab: Homelab) -> None:
        studio = homelab.studio
        studio.install(QWEN, models.QWEN)
        homelab.mini.mlxctl("load", QWEN, str(studio.ports[0])).ok()
        # A second name for the same files.
        document = studio.registry()
        document["models"]["other"] = {**document["models"][QWEN], "port": None}
        studio.registry_path.write_text(json.dumps(document))
        for name in (QWEN, "other"):
            refused = homelab.mini.mlxctl("remove", "--model", name, "--json")
            error = refused.json["hosts"][0]["error"]
            assert (refused.exit, error["code"]) == (3, "in_use")
            assert f"mlxctl unload {studio.ports[0]}" in error["hint"]
        assert homelab.mini.mlxctl("remove", "--model", "no-such", "--json").exit == 3
        assert studio.completion(studio.ports[0], "jerry-xl")["model"] == "jerry-xl"


def test_verify_finds_content_that_the_hub_changed(faulty: FaultyHub, cache: Path) -> None:
    """Wrong content of a file without a structure, such as a template, is found only by its hash."""
    faulty.fail(Lie(), method="GET", part="chat_template", times=1)
    snapshot = download(LLAMA, None, cache, lambda _: None, QUICK)
    notes: list[Event] = []
    with pytest.raises(DownloadFailed, match="differ from the hub's"):
        verify(LLAMA, snapshot.revision, cache, notes.append, QUICK)
    assert not any(isinstance(event, Note) for event in notes)
