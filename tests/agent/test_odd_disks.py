"""File systems with missing features: supported where possible, else refused before anything is started."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxops.agent.state.store import Store
from mlxops.core.errors import Refused


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "disk").mkdir()
    store = Store(tmp_path / "state", tmp_path / "disk" / "registry.json")
    store.create_folders()
    store.registry.update(lambda registry: registry.assign("a", 8100))
    return store


def refused(store: Store) -> Refused:
    with pytest.raises(Refused) as caught:
        store.registry.check_writable()
    return caught.value


def fails(number: int) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EINVAL])
def test_registry_can_be_on_a_disk_without_modes(store: Store, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """exFAT and SMB."""
    monkeypatch.setattr(os, "fchmod", fails(number))
    monkeypatch.setattr(os, "link", fails(number))
    store.registry.check_writable()
    assert store.registry.update(lambda registry: registry.assign("a", 8101)).models["a"].port == 8101


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_registry_can_be_on_a_disk_that_cannot_flush_folders(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """SMB and some FUSE file systems. A file that cannot be flushed is an error."""
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, os.strerror(number))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    store.registry.check_writable()
    assert store.registry.update(lambda registry: registry.assign("a", 8101)).models["a"].port == 8101


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_disk_errors_are_reported_with_a_remedy(store: Store, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr("mlxops.agent.state.durable_files._write_all", fails(number))
    error = refused(store)
    assert error.code == "registry_unwritable" and error.why == os.strerror(number)
    assert str(store.registry.path) in error.message and error.hint


def test_immutable_registry_is_refused_first(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """`chflags uchg` and `chattr +i`: the folder accepts new files, but a rename over the file fails."""
    path, real = store.registry.path, os.open

    def opened(name: object, flags: int, *more: int, **named: int) -> int:
        if name == path and flags & os.O_WRONLY:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        return real(name, flags, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", opened)
    error = refused(store)
    assert error.code == "registry_unwritable" and "not permitted" in error.why
    assert "lsattr" in error.hint or "chflags" in error.hint


@pytest.mark.skipif(sys.platform != "linux", reason="chattr is Linux's")
def test_really_immutable_registry_is_refused(store: Store) -> None:
    path = store.registry.path
    chattr = shutil.which("chattr")
    if chattr is None or subprocess.run([chattr, "+i", path], check=False, capture_output=True).returncode:
        pytest.skip("this file system, or this user, cannot make a file immutable")
    try:
        assert "not permitted" in refused(store).why
    finally:
        subprocess.run([chattr, "-i", path], check=True)
    store.registry.check_writable()


def test_another_users_registry_in_a_sticky_folder_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in /tmp: all users may create files there, but only the owner may replace a file."""
    store.registry.path.parent.chmod(0o1777)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 4711)
    assert "another user's" in refused(store).why


def test_read_only_file_in_our_folder_is_replaced(store: Store) -> None:
    store.registry.path.chmod(0o444)
    store.registry.check_writable()
    store.registry.update(lambda registry: registry.assign("a", 8101))
    assert stat.S_IMODE(store.registry.path.stat().st_mode) == 0o444


@pytest.mark.parametrize("how", ["its folder is a link", "two links"])
def test_all_paths_of_a_registry_share_one_lock(store: Store, tmp_path: Path, how: str) -> None:
    other = tmp_path / "other"
    if how == "two links":
        other.mkdir()
        (other / "registry.json").symlink_to(store.registry.path)
    else:
        other.symlink_to(store.registry.path.parent)
    second = Store(tmp_path / "state", other / "registry.json")
    second.registry.update(lambda registry: registry.assign("b", 8101))
    store.registry.update(lambda registry: registry.assign("c", 8102))
    assert {model.port for model in second.registry.read().models.values()} == {8100, 8101, 8102}
    assert other.is_symlink() or (other / "registry.json").is_symlink()


def test_companion_files_of_macos_on_smb_are_ignored(store: Store) -> None:
    companion = store.registry.path.with_name("._registry.json")
    companion.write_bytes(b"\0\x05\x16\x07")
    store.registry.update(lambda registry: registry.assign("a", 8101))
    assert companion.exists() and not store.registry.conflicted_copies() and not store.leftovers()
