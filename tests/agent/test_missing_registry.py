"""A registry that has disappeared: writers refuse it, readers report it, and it never counts as empty."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlxops.agent import paths
from mlxops.agent.state.store import Store
from mlxops.control.gateway import check
from mlxops.core.commands.gateway import ServedPorts
from mlxops.core.commands.list import ListResult, show
from mlxops.core.errors import Refused
from mlxops.core.registry import Registry
from mlxops.core.replies import ErrorRow, HostReply
from tests.lab.homelab import Homelab, Studio
from tests.steps import REPO, Ask, error_of, register, tree, with_fake

CONTENT = b'{"version": 1, "models": {"a": {"repo_id": "org/a", "port": 8100}}}'


@dataclass(frozen=True)
class Disk:
    """A registry on a disk: its file is `there`, and the store's path to it is `registry`."""

    store: Store
    registry: Path
    there: Path

    def refused(self) -> Refused:
        """Return the error of a change, and check that the attempt creates nothing."""
        before = tree(self.store.state.parent)
        with pytest.raises(Refused) as checked:
            self.store.registry.check_writable()
        with pytest.raises(Refused):
            self.store.registry.update(lambda registry: registry.assign("b", 8101))
        assert tree(self.store.state.parent) == before
        return checked.value


def disk(folder: Path, *, known: bool = True) -> Disk:
    there = folder / "disk" / "mlx" / "registry.json"
    there.parent.mkdir(parents=True)
    there.write_bytes(CONTENT)
    return opened(folder, there, there, known=known)


def opened(folder: Path, registry: Path, there: Path, *, known: bool = True) -> Disk:
    store = Store(folder / "state", registry)
    store.create_folders()
    if known:
        store.registry.update(lambda found: found.assign("a", 8102))
    return Disk(store, registry, there)


def again(on: Disk) -> Disk:
    """Return a new store, which resolves the links again, like the next process."""
    return Disk(Store(on.store.state, on.registry), on.registry, on.there)


def mount_point_stays(on: Disk) -> None:
    shutil.rmtree(on.there.parent)
    on.there.parent.mkdir()


def instead(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


GONE: dict[str, Callable[[Disk], object]] = {
    "deleted": lambda on: on.there.unlink(),
    "renamed": lambda on: on.there.rename(on.there.with_suffix(".json.bak")),
    "its disk's mount point is left, empty": mount_point_stays,
    "its disk and mount point are gone": lambda on: shutil.rmtree(on.there.parent.parent),
    "evicted by iCloud": lambda on: on.there.rename(on.there.with_name(".registry.json.icloud")),
    "a link to nowhere": lambda on: instead(on.there, lambda path: path.symlink_to("/nowhere/registry.json")),
}


@pytest.mark.parametrize("how", GONE)
def test_registry_that_has_disappeared_is_missing(tmp_path: Path, how: str) -> None:
    on = disk(tmp_path)
    GONE[how](on)
    found = on.store.registry.read()
    assert found.missing and found.unwritable and not found.models
    refused = on.refused()
    assert refused.code in {"registry_missing", "folder_missing"}, refused.code
    assert str(on.there.parent) in refused.message and refused.why and refused.hint


def test_registry_that_was_only_checked_is_missing_later(tmp_path: Path) -> None:
    """Another program wrote it; this host never changed it."""
    on = disk(tmp_path, known=False)
    on.store.registry.check_writable()
    on.there.unlink()
    assert again(on).store.registry.read().missing and on.refused().code == "registry_missing"


@pytest.mark.parametrize("how", GONE)
def test_registry_that_is_back_is_not_missing(tmp_path: Path, how: str) -> None:
    on = disk(tmp_path)
    content = on.there.read_bytes()
    GONE[how](on)
    on.there.unlink(missing_ok=True)
    on.there.parent.mkdir(parents=True, exist_ok=True)
    on.there.write_bytes(content)
    on.store.registry.check_writable()
    assert on.store.registry.update(lambda found: found.assign("a", 8103)).models["a"].port == 8103


LINKS = ("file", "folder", "above", "twice")


@pytest.mark.parametrize("where", LINKS)
@pytest.mark.parametrize("known", [True, False])
def test_dangling_link_is_not_a_fresh_host(tmp_path: Path, where: str, known: bool) -> None:
    """Even the very first command is refused, because links are not created without a target."""
    there = tmp_path / "disk" / "mlx" / "registry.json"
    there.parent.mkdir(parents=True)
    there.write_bytes(CONTENT)
    hub = tmp_path / "hub"
    match where:
        case "file":
            hub.mkdir()
            (hub / "registry.json").symlink_to(there)
        case "folder":
            hub.symlink_to(there.parent)
        case "above":
            (tmp_path / "models").symlink_to(tmp_path / "disk")
            hub = tmp_path / "models" / "mlx"
        case "twice":
            hub.mkdir()
            (hub / "other.json").symlink_to(there)
            (hub / "registry.json").symlink_to("other.json")
    on = opened(tmp_path, hub / "registry.json", there, known=known)
    assert on.store.registry.read().models["a"].port == (8102 if known else 8100)
    shutil.rmtree(tmp_path / "disk")
    on = again(on)
    found = on.store.registry.read()
    assert found.missing and "link" in (found.unwritable or "")
    assert on.refused().code in {"registry_missing", "folder_missing"}
    assert not (tmp_path / "disk").exists()


@pytest.mark.parametrize(
    "name",
    [
        ".registry.json.icloud",
        "registry.json.nextcloud",
        "registry (conflicted copy).json",
        "registry (Jerry's Mac mini's conflicted copy 2026-01-31).json",
        "registry (In Konflikt stehende Kopie von Mini 2026-01-31).json",
        "registry (1).json",
        "registry(1).json",
        "registry (SFConflict jerry@example.org 2026-01-31-12-00-00).json",
        "registry 2.json",
        "registry.sync-conflict-20260131-120000-ABCDEFG.json",
        "registry_conflict-20260131-120000.json",
        "registry.Conflict.json",
        "registry-MINI.json",
    ],
)
def test_files_of_a_sync_service_prove_that_there_was_a_registry(tmp_path: Path, name: str) -> None:
    on = disk(tmp_path, known=False)
    on.there.rename(on.there.with_name(name))
    assert name in (on.store.registry.read().unwritable or "")
    assert on.refused().code == "registry_missing"


@pytest.mark.parametrize("name", ["registry.json.bak", "._registry.json", "registry.yaml", "other (1).json", "2.json"])
def test_other_files_prove_nothing(tmp_path: Path, name: str) -> None:
    on = disk(tmp_path, known=False)
    on.there.rename(on.there.with_name(name))
    on.store.registry.check_writable()
    assert not on.store.registry.read().missing


def test_conflicted_copies_beside_a_registry_are_listed_and_block_nothing(tmp_path: Path) -> None:
    on = disk(tmp_path)
    copy = on.there.with_name("registry (conflicted copy).json")
    copy.write_bytes(CONTENT)
    on.there.with_name("registry-MINI.json").write_bytes(CONTENT)
    assert on.store.registry.conflicted_copies() == [copy]
    on.store.registry.check_writable()


def test_registry_at_another_path_may_be_new(tmp_path: Path) -> None:
    on = disk(tmp_path)
    other = Store(on.store.state, tmp_path / "other.json")
    other.registry.check_writable()
    other.registry.update(lambda found: found.assign("b", 8101))
    for each in (on.there, tmp_path / "other.json"):
        each.unlink()
        assert Store(on.store.state, each).registry.read().missing


@pytest.mark.parametrize(
    ("name", "content", "known"),
    [
        ("registry.previous.json", CONTENT, True),
        ("history.jsonl", b'{"command": "pull"}\n{"command": "load", "model": "a", "port": 8100}\n', True),
        ("history.jsonl", b'{"command": "pull"}\n["load"]\nnonsense\n', False),
        ("host.json", b"{}", False),
    ],
)
def test_state_of_an_older_mlxops_proves_that_there_was_a_registry(
    tmp_path: Path, name: str, content: bytes, known: bool
) -> None:
    on = disk(tmp_path, known=False)
    (on.store.state / name).write_bytes(content)
    on.there.unlink()
    assert on.store.registry.read().missing is known


def run_commands(hint: str, number: int, within: Path) -> None:
    """Run the `number`th command of the hint. It may only change files in `within`."""
    commands = [part.split(": ", 1)[1] for part in hint.replace("; or, ", "; or ").split("; or ") if ": " in part]
    outside = [word for word in shlex.split(commands[number]) if word[0] == "/" and not word.startswith(f"{within}/")]
    assert not outside, outside
    subprocess.run(["/bin/sh", "-c", commands[number]], check=True)


@pytest.mark.parametrize(("way", "models"), [(0, {"a": 8100}), (1, {})])
@pytest.mark.parametrize("how", ["deleted", "its disk's mount point is left, empty"])
def test_suggested_reset_works(tmp_path: Path, how: str, way: int, models: dict[str, int]) -> None:
    folder = tmp_path / "a folder with 'quotes'"
    folder.mkdir()
    on = disk(folder)
    GONE[how](on)
    run_commands(on.refused().hint, way, tmp_path)
    on.store.registry.check_writable()
    assert {name: model.port for name, model in on.store.registry.read().models.items()} == models


@pytest.mark.parametrize(("way", "models"), [(0, {"a": 8100}), (1, {})])
def test_suggested_replacement_of_a_dangling_link_works(tmp_path: Path, way: int, models: dict[str, int]) -> None:
    on = disk(tmp_path, known=False)
    (tmp_path / "hub").mkdir()
    registry = tmp_path / "hub" / "registry.json"
    registry.symlink_to(on.there)
    on = opened(tmp_path, registry, on.there)
    shutil.rmtree(tmp_path / "disk")
    on = again(on)
    run_commands(on.refused().hint, way, tmp_path)
    on = again(on)
    on.store.registry.check_writable()
    assert {name: model.port for name, model in on.store.registry.read().models.items()} == models
    assert not registry.is_symlink()


STRANGE: dict[str, Callable[[Path], object]] = {
    "empty after a crash": lambda path: path.write_bytes(b""),
    "zeros after a crash": lambda path: path.write_bytes(b"\0" * 100),
    "UTF-16": lambda path: path.write_bytes(CONTENT.decode().encode("utf-16")),
    "UTF-16 without a mark": lambda path: path.write_bytes(CONTENT.decode().encode("utf-16-le")),
    "a folder": lambda path: instead(path, Path.mkdir),
    "a pipe": lambda path: instead(path, os.mkfifo),
    "a socket": lambda path: instead(path, bound),
    "a device": lambda path: instead(path, lambda each: each.symlink_to("/dev/null")),
    "a loop": lambda path: instead(path, lambda each: each.symlink_to(each.name)),
}


def bound(path: Path) -> None:
    cwd = os.getcwd()
    os.chdir(path.parent)  # the longest path of a socket is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(cwd)


@pytest.mark.parametrize("what", STRANGE)
def test_other_file_types_are_reported_and_kept(tmp_path: Path, what: str) -> None:
    on = disk(tmp_path)
    STRANGE[what](on.there)
    on = again(on)
    found = on.store.registry.read()
    assert found.unwritable and not found.models
    if "UTF-16" in what:
        assert "UTF-16" in found.unwritable
    if "zeros" in what:
        assert "zero bytes" in found.unwritable
    refused = on.refused()
    assert refused.code == "registry_unusable" and refused.why == found.unwritable
    run_commands(refused.hint, 0, tmp_path)
    on = again(on)
    on.store.registry.check_writable()
    assert on.store.registry.read().models["a"].port == 8100


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf" + CONTENT, CONTENT.replace(b",", b",\r\n")])
def test_changes_by_editors_are_understood(tmp_path: Path, content: bytes) -> None:
    on = disk(tmp_path)
    on.there.write_bytes(content)
    assert on.store.registry.read().models["a"].port == 8100
    on.store.registry.check_writable()


def test_link_into_a_repository_stays_and_its_target_changes(tmp_path: Path) -> None:
    on = disk(tmp_path, known=False)
    (tmp_path / "hub").mkdir()
    registry = tmp_path / "hub" / "registry.json"
    registry.symlink_to(os.path.relpath(on.there, registry.parent))
    opened(tmp_path, registry, on.there)
    assert registry.is_symlink() and b"8102" in on.there.read_bytes()


def stale(path: Path) -> bytes:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))


def test_stale_network_disk_is_not_an_empty_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on = disk(tmp_path)
    monkeypatch.setattr("mlxops.agent.state.registry_file.read_if_exists", stale)
    assert "Stale" in (on.store.registry.read().unwritable or "")


# -- the commands ----------------------------------------------------------------------------------------------------

WRITERS = (
    ["init"],
    ["load", "mine", "{port}", "--force"],
    ["load", "mine", "{port}", "--dry-run"],
    ["unload", "{port}"],
    ["reconcile"],
    ["restore"],
    ["set", "--model", "mine", "--set", "context_length=4096"],
    ["rollback", "{port}"],
    ["remove", "--model", "mine"],
    ["unload-all", "--yes"],
)


@pytest.fixture
def studio(homelab: Homelab) -> Studio:
    """A Studio whose registry is a link to a disk."""
    studio = homelab.studio
    disk = studio.folder / "disks" / "External" / "mlx"
    disk.mkdir(parents=True)
    studio.registry_path.symlink_to(disk / "registry.json")
    register(studio, "mine")
    with_fake(homelab)
    return studio


@contextmanager
def away(disk: Path) -> Iterator[None]:
    """Unmount the disk and remove its mount point. Fail if anything is written there before it is back."""
    kept = disk.with_name("kept")
    disk.rename(kept)
    try:
        yield
        assert not disk.exists(), "something was written where the disk should be"
    finally:
        kept.rename(disk)


def test_no_command_treats_a_missing_disk_as_an_empty_registry(studio: Studio) -> None:
    port = str(studio.ports[0])
    studio.mlxctl("load", "mine", port).ok()
    registry = studio.registry_path.read_bytes()
    try:
        with away(studio.folder / "disks"):
            for words in WRITERS:
                answer = studio.mlxctl(*(word.format(port=port) for word in words), "--json")
                assert answer.exit == 3, str(answer)
                error = error_of(answer)
                assert error["code"] in {"registry_missing", "folder_missing"} and "link" in str(error), str(answer)
            row, *drift = seen(studio, port)
            assert row["state"] == "ready" and [each["code"] for each in drift] == ["registry_missing"]
            listed = studio.mlxctl("list").ok()
            assert "no models" not in listed.stdout and "registry_missing" in listed.stdout, str(listed)
            document = studio.mlxctl("list", "--json").ok().json["hosts"][0]
            assert document["registry_error"]["code"] == "registry_missing" and document["unusable"]
        assert studio.registry_path.read_bytes() == registry and seen(studio, port)[0]["state"] == "ready"
    finally:
        studio.mlxctl("unload", port).ok()


def seen(studio: Studio, port: str) -> list[dict[str, object]]:
    host = studio.mlxctl("status", "--json").ok().json["hosts"][0]
    return [next(row for row in host["ports"] if row["port"] == int(port)), *host["drift"]]


def test_every_reader_prints_the_registrys_error() -> None:
    error = ErrorRow("registry_missing", 3, "the registry /x is not there", "it is gone", "cp")
    shown = show([_listed(error)])
    assert "no models" not in shown and "registry_missing" in shown and "it is gone" in shown
    (finding,) = check._registry_findings(HostReply("studio", ServedPorts((), error)))
    assert (finding.code, finding.hint, finding.host) == ("registry_missing", "cp", "studio")
    assert "it is gone" in finding.message
    assert "no models" in show([_listed(None)])


def _listed(error: ErrorRow | None) -> HostReply[ListResult]:
    return HostReply("studio", ListResult((), "/x", error.message if error else None, error))


def test_registry_is_created_by_the_first_init_and_missing_later(homelab: Homelab) -> None:
    ask = Ask(homelab, "local")
    homelab.studio.install(REPO, "tiny-qwen3")
    assert ask.document("init")["result"]["added"] == [REPO]
    kept = homelab.studio.registry_path.read_bytes()
    homelab.studio.registry_path.unlink()
    error = ask.error(3, "init")
    assert error["code"] == "registry_missing"
    (begin,) = (part for part in error["hint"].split("; or ") if "echo" in part)
    subprocess.run(["/bin/sh", "-c", begin.split(": ", 1)[1]], check=True)
    assert ask.document("init")["result"]["added"] == [REPO]
    assert json.loads(homelab.studio.registry_path.read_bytes()) == json.loads(kept)


def test_status_names_conflicted_copies(homelab: Homelab) -> None:
    register(homelab.studio, "mine")
    copy = homelab.studio.registry_path.with_name("registry (conflicted copy).json")
    copy.write_bytes(CONTENT)
    (drift,) = Ask(homelab, "local").document("status")["drift"]
    assert drift["code"] == "registry_conflict" and str(copy) in drift["message"]


def test_registry_on_an_unmounted_disk_is_missing_for_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "VOLUMES", (str(tmp_path / "Volumes"),))
    store = Store(tmp_path / "state", tmp_path / "Volumes" / "X" / "registry.json")
    found: Registry = store.registry.read()
    assert found.missing and "mounted" in (found.unwritable or "")


def test_hints_are_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "My Models"
    folder.mkdir()
    on = disk(folder)
    on.there.unlink()
    assert shlex.quote(str(on.there)) in on.refused().hint


SPOILED = {"edited by hand": CONTENT[:-1], "UTF-16": CONTENT.decode().encode("utf-16"), "empty": b""}


@pytest.mark.parametrize("content", SPOILED.values(), ids=SPOILED)
@pytest.mark.parametrize("way", ["begin with an empty one: ", "go back to the version before its last change: "])
def test_every_hint_keeps_a_repairable_registry(tmp_path: Path, content: bytes, way: str) -> None:
    on = disk(tmp_path)
    on.there.write_bytes(content)
    command = on.refused().hint.partition(way)[2].partition("; or ")[0]
    subprocess.run(command, shell=True, check=True)
    assert on.there.with_name("registry.json.away").read_bytes() == content
    assert on.store.registry.read().unwritable is None


def test_hint_restores_a_conflicted_copy(tmp_path: Path) -> None:
    on = disk(tmp_path)
    on.there.rename(on.there.with_name("registry (Mini's conflicted copy 2026-01-31).json"))
    command = again(on).refused().hint.partition("put the right copy back: ")[2].partition("; or ")[0]
    subprocess.run(command, shell=True, check=True)
    assert on.store.registry.read().models.keys() == {"a"}


def test_placeholder_gets_a_hint_about_its_sync_service(tmp_path: Path) -> None:
    on = disk(tmp_path)
    on.there.rename(on.there.with_name(".registry.json.icloud"))
    assert again(on).refused().hint.startswith("have its sync service bring it back")


def test_drift_names_a_missing_registry(homelab: Homelab) -> None:
    register(homelab.studio, "mine")
    homelab.studio.registry_path.write_bytes(b"")
    (drift,) = Ask(homelab, "local").document("status")["drift"]
    assert drift["message"].endswith("cannot be changed: it is empty")
    assert str(homelab.studio.registry_path) in drift["message"]
