"""Folders that may be created, and those whose absence means that a disk is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mlxops.agent import paths
from mlxops.core.errors import Refused
from tests.lab.homelab import Homelab

QWEN = "tiny-org/tiny-qwen3"


def may_create(folder: Path) -> bool:
    try:
        paths.require_folder(folder)
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


def test_cache_below_the_home_directory_may_be_created(home: Path) -> None:
    assert may_create(home / ".cache" / "huggingface" / "hub")


def test_cache_outside_the_home_directory_needs_its_parent(tmp_path: Path) -> None:
    assert may_create(tmp_path / "hub")
    assert not may_create(tmp_path / "disk" / "hub")
    (tmp_path / "disk").mkdir()
    assert may_create(tmp_path / "disk" / "hub")


def test_cache_on_a_missing_disk_is_not_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount point may exist without its disk."""
    monkeypatch.setattr(paths, "VOLUMES", (str(tmp_path / "Volumes"),))
    (tmp_path / "Volumes" / "X").mkdir(parents=True)
    assert not may_create(tmp_path / "Volumes" / "X" / "hub")
    (tmp_path / "Volumes" / "X" / "hub").mkdir()
    assert may_create(tmp_path / "Volumes" / "X" / "hub")


def test_link_from_the_home_directory_to_a_missing_disk_is_followed(home: Path, tmp_path: Path) -> None:
    (home / "models").symlink_to(tmp_path / "gone" / "models")
    assert not may_create(home / "models" / "hub")


def test_host_without_its_disk_downloads_and_writes_nothing(make_homelab: Callable[..., Homelab]) -> None:
    lab = make_homelab()
    disk = lab.folder / "Volumes" / "X"
    lab.configure(hub=str(disk / "hf" / "hub"), registry=str(disk / "hf" / "hub" / "registry.json"))
    port = str(lab.studio.ports[0])
    for command in (["load", "x", port, "--repo", QWEN], ["pull", "--repo", QWEN], ["init"], ["unload", port]):
        refused = lab.mini.mlxctl(*command, "--json")
        error = refused.json["hosts"][0]["error"]
        assert (refused.exit, error["code"]) == (3, "folder_missing"), str(refused)
        assert "mounted" in error["why"] and f"mkdir -p {disk}/hf/hub" in error["hint"]
    assert lab.mini.mlxctl("status", "--json").ok().json["ok"] is True
    assert not (lab.folder / "Volumes").exists()
