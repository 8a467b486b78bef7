"""Delete one snapshot of a Hugging Face cache with all files that only it uses, and count the freed bytes.

huggingface_hub cannot do this. Its scan skips a whole repository if anything in it is irregular (an interrupted
download of a branch, a link to a missing blob, a `._` file of a disk without extended attributes), and then deletes
nothing. Three kinds of files stay: those shared with other snapshots or repositories, those that no download created,
and the targets of links that lead out of the repository.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from mlxops.agent.hub.cache import is_commit
from mlxops.agent.hub.snapshot import is_downloaded
from mlxops.agent.state.locks import is_locked
from mlxops.core.errors import Busy, Refused
from mlxops.core.frozen import dataclass

_SHARED_STORE = "blobs"
"""The folder beside the repositories for shared files, since huggingface_hub 2 (`utils/_shared_blobs.py`)."""
_HUB_FOLDERS = ("snapshots", "blobs", "refs", "trees", ".no_exist")
"""The folders of huggingface_hub in a repository's folder."""


@dataclass(frozen=True)
class Deleted:
    """The result of deleting a snapshot, or of its dry run."""

    freed_bytes: int
    linked_bytes: int
    """Bytes of files outside of the cache to which its links lead. The links are deleted, the files stay."""
    kept: tuple[str, ...]
    """The repository's commits that stay."""
    own: tuple[str, ...] = ()
    """Files that no download created. They stay."""


def delete(repo: Path, commit: str | None, *, dry_run: bool) -> Deleted:
    """Delete a snapshot. If no other snapshot is left, or with `commit` None, delete the repository's whole folder.

    Raises `Busy` while another program downloads it, `Refused` (cache_not_writable, nothing_to_remove).
    """
    others = tuple(sorted(set(_commits(repo)) - {commit}))
    if busy := next(_running_downloads(repo), None):
        raise Busy(
            "busy",
            f"another program is downloading into {repo}",
            why=f"it holds the lock of {busy.name}",
            hint="wait until it ends, or stop it; then try again",
        )
    if repo.is_symlink() and not others:
        linked = _bytes_behind(repo, _links(repo, commit))
        if not dry_run:
            _delete_paths(repo, [repo], [])
        return Deleted(0, linked, ())
    files = list(_files_of(repo, commit, others))
    own = tuple(str(path) for path in files if _is_own_file(repo, path))
    doomed = [path for path in files if str(path) not in own]
    if not doomed:
        folder = repo / "snapshots" / commit if commit else repo
        names = ", ".join(os.path.relpath(path, folder) for path in own)
        raise Refused(
            "nothing_to_remove",
            f"there are no downloaded files in {folder}",
            why=f"no download created the files that are left: {names}"[:300] if own else "it is empty",
            hint=f"delete it by hand if you do not need it: rm -r {shlex.quote(str(folder))}",
        )
    linked = _bytes_behind(repo, doomed)
    shared = _SharedBlobs(repo, doomed)
    freed = _freed(doomed) + shared.size
    if not dry_run:
        _delete_paths(repo, doomed, [] if others else [repo.parent / ".locks" / repo.name])
        shared.sweep()
    return Deleted(freed, linked, others, own)


def _commits(repo: Path) -> list[str]:
    try:
        return [path.name for path in (repo / "snapshots").iterdir() if is_commit(path.name) and path.is_dir()]
    except OSError:
        return []


def _running_downloads(repo: Path) -> Iterator[Path]:
    for half in (repo / "blobs").glob("*.incomplete"):
        if is_locked(repo.parent / ".locks" / repo.name / f"{half.name.partition('.')[0]}.lock"):
            yield half


def _files_of(repo: Path, commit: str | None, others: tuple[str, ...]) -> Iterator[Path]:
    """Yield all files to delete, links first, so that an interruption leaves no link to a deleted blob."""
    if not others:
        for part in _HUB_FOLDERS:
            yield from _below(repo / part)
        yield from (path for path in _entries(repo) if path.name not in _HUB_FOLDERS)
        return
    assert commit is not None
    mine = list(_links(repo, commit))
    yield from mine
    yield from (ref for ref in _below(repo / "refs") if _names_commit(ref, commit))
    yield from _below(repo / ".no_exist" / commit)
    if (tree := repo / "trees" / f"{commit}.json").exists():
        yield tree
    kept_blobs = {_first_hop(path) for other in others for path in _links(repo, other)}
    used = {_first_hop(path) for path in mine} - kept_blobs
    yield from (blob for blob in _entries(repo / "blobs") if blob in used or blob.suffix == ".incomplete")


def _links(repo: Path, commit: str | None) -> Iterator[Path]:
    if commit is not None:
        yield from _below(repo / "snapshots" / commit)


def _below(folder: Path) -> Iterator[Path]:
    """Yield all files and links below a folder, without following links."""
    for entry in _entries(folder):
        if entry.is_dir() and not entry.is_symlink():
            yield from _below(entry)
        else:
            yield entry


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _names_commit(ref: Path, commit: str) -> bool:
    try:
        return ref.read_bytes()[:128].strip() == commit.encode()
    except OSError:
        return False


def _first_hop(path: Path) -> Path | None:
    """Return the blob to which a file of a snapshot links, even if it is missing. The blob may itself be a link."""
    if not path.is_symlink():
        return None
    return Path(os.path.normpath(path.parent / os.readlink(path)))


def _is_own_file(repo: Path, path: Path) -> bool:
    """Return whether a person created a file: outside of huggingface_hub's folders, or a plain file among links."""
    parts = path.relative_to(repo).parts
    if path.name == ".DS_Store" or path.name.startswith("._"):
        return False  # macOS creates these in every folder
    if parts[0] not in _HUB_FOLDERS:
        return True
    if parts[0] != "snapshots" or len(parts) < 3 or path.is_symlink():
        return False
    folder = repo / "snapshots" / parts[1]
    beside = list(_below(folder))
    # On a disk without links, downloads create plain files.
    plain = not any(other.is_symlink() for other in beside) and any(_is_downloaded(folder, other) for other in beside)
    return not plain and not _is_downloaded(folder, path)


def _is_downloaded(folder: Path, path: Path) -> bool:
    return is_downloaded(str(folder), path.relative_to(folder).as_posix())


def _bytes_behind(repo: Path, paths: list[Path] | Iterator[Path]) -> int:
    """Return the bytes of the files outside of the repository and the cache's store to which links in `paths` lead.

    If the repository itself is a link, all its files are outside."""
    inside = [os.path.join(os.path.realpath(repo.parent), _SHARED_STORE)]
    if not repo.is_symlink() or _commits(repo)[1:]:
        inside.append(os.path.realpath(repo))
    sizes: dict[str, int] = {}
    for path in paths:
        real = os.path.realpath(path)
        if (path.is_symlink() or repo.is_symlink()) and not any(real.startswith(f"{place}/") for place in inside):
            with contextlib.suppress(OSError):
                sizes[real] = os.stat(real).st_size
    return sum(sizes.values())


def _freed(paths: list[Path]) -> int:
    """Return the bytes of the regular files in `paths`, without those that have a hard link elsewhere."""
    seen: dict[tuple[int, int], tuple[int, int, int]] = {}
    for path in paths:
        with contextlib.suppress(OSError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                key = status.st_dev, status.st_ino
                seen[key] = seen.get(key, (0, 0, 0))[0] + 1, status.st_nlink, status.st_size
    return sum(size for count, links, size in seen.values() if count >= links)


def _delete_paths(repo: Path, paths: list[Path], folders: list[Path]) -> None:
    """Delete these paths and folders, then all empty folders. Raises `Refused` (cache_not_writable)."""
    try:
        for path in paths:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise Refused(
            "cache_not_writable",
            f"{repo} could not be deleted completely",
            why=f"{error.filename}: {error.strerror}",
            hint="repair the permissions of that folder on the host, then try again",
        ) from None
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    for emptied, _, _ in os.walk(repo, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(emptied)  # fails if it is not empty


class _SharedBlobs:
    """The files of the cache's shared store to which only the deleted blobs link."""

    def __init__(self, repo: Path, doomed: list[Path]) -> None:
        self._cache = repo.parent
        self.size = 0
        self._paths: set[Path] = set()
        blobs = {path for path in doomed if path.is_symlink() and path.parent.name == _SHARED_STORE}
        if not blobs or not (self._cache / _SHARED_STORE).is_dir():
            return
        from mlxops.agent.hub.client import import_quietly

        import_quietly()
        try:
            from huggingface_hub.utils import _shared_blobs as store
        except ImportError:  # a version without a shared store
            return
        self._paths = {path for blob in blobs if (path := store.shared_blob_target(blob, self._cache))}
        self.size = sum(
            store.expected_shared_blob_freed_size(path, blob_paths_to_delete=blobs, cache_dir=self._cache)
            for path in self._paths
        )

    def sweep(self) -> None:
        if self._paths:
            from huggingface_hub.utils import _shared_blobs as store

            for path in self._paths:
                store.sweep_shared_blob(path, cache_dir=self._cache)
