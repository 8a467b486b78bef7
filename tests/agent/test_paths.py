"""Folders that may be made, and those whose absence means that a disk is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mlxops.agent import paths
from mlxops.core.errors import Refused
from tests.lab.homelab import Homelab

QWEN = "tiny-org/tiny-qwen3"


def allowed(folder: Path) -> bool:
    try:
        paths.require(folder)
    except Refused as refused:
        assert refused.code == "folder_missing" and str(folder) in refused.hint
        return False
    return True


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


def test_a_fresh_machine_gets_its_cache_below_the_home_directory(home: Path) -> None:
    assert allowed(home / ".cache" / "huggingface" / "hub")


def test_elsewhere_only_the_last_folder_may_be_missing(tmp_path: Path) -> None:
    assert allowed(tmp_path / "hub")
    assert not allowed(tmp_path / "disk" / "hub")
    (tmp_path / "disk").mkdir()
    assert allowed(tmp_path / "disk" / "hub")


def test_where_disks_are_mounted_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a mount point may be there without its disk."""
    monkeypatch.setattr(paths, "VOLUMES", (str(tmp_path / "Volumes"),))
    (tmp_path / "Volumes" / "X").mkdir(parents=True)
    assert not allowed(tmp_path / "Volumes" / "X" / "hub")
    (tmp_path / "Volumes" / "X" / "hub").mkdir()
    assert allowed(tmp_path / "Volumes" / "X" / "hub")


def test_a_link_of_the_home_directory_to_a_missing_disk_is_seen_through(home: Path, tmp_path: Path) -> None:
    (home / "models").symlink_to(tmp_path / "gone" / "models")
    assert not allowed(home / "models" / "hub")


def test_without_its_disk_a_host_downloads_and_writes_nothing(make_homelab: Callable[..., Homelab]) -> None:
    lab = make_homelab()
    disk = lab.folder / "Volumes" / "X"
    lab.configure(hub=str(disk / "hf" / "hub"), registry=str(disk / "hf" / "hub" / "registry.json"))
    port = str(lab.studio.ports[0])
    for words in (["load", "x", port, "--repo", QWEN], ["pull", "--repo", QWEN], ["init"], ["unload", port]):
        refused = lab.mini.mlxctl(*words, "--json")
        error = refused.json["hosts"][0]["error"]
        assert (refused.exit, error["code"]) == (3, "folder_missing"), str(refused)
        assert "mounted" in error["why"] and f"mkdir -p {disk}/hf/hub" in error["hint"]
    assert lab.mini.mlxctl("status", "--json").ok().json["ok"] is True
    assert not (lab.folder / "Volumes").exists()
