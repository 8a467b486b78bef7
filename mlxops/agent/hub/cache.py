"""List the repositories in the host's Hugging Face caches. Reads only, without network and huggingface_hub.

A cache is a folder of `models--org--name`, each with `refs/<branch>` (a file with a commit), `snapshots/<commit>/`
(symlinks) and `blobs/` (their targets; since 2.x often symlinks too, into a `blobs/` of the whole cache).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from mlxops.agent.hub.contents import Damaged, printable, read
from mlxops.agent.hub.snapshot import ModelFacts, completeness, inspect, judge
from mlxops.agent.paths import folder_closed
from mlxops.common.files import dangles, is_folder
from mlxops.core.frozen import dataclass
from mlxops.core.names import is_repo_id, is_revision

__all__ = [
    "ModelFacts",
    "Scan",
    "Skipped",
    "Snapshot",
    "completeness",
    "find",
    "inspect",
    "roots",
    "scan",
]

_PREFIX = "models--"
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_COMMIT_PREFIX = re.compile(r"[0-9a-f]{7,64}")


@dataclass(frozen=True)
class Snapshot:
    """A complete MLX snapshot."""

    repo_id: str
    revision: str
    """The commit, which is also the folder's name."""
    path: Path
    """The path in the cache. Symlinks are not resolved."""
    size_bytes: int


@dataclass(frozen=True)
class Skipped:
    """A repository in a cache that cannot be registered."""

    repo_id: str
    """The folder's name if that is not a repository's."""
    path: Path
    why: str
    incomplete: bool
    whole: Snapshot | None = None
    """The snapshot if it is complete but not in MLX's format. Engines convert such weights while they load them."""


@dataclass(frozen=True)
class Scan:
    snapshots: tuple[Snapshot, ...]
    skipped: tuple[Skipped, ...]


def roots(hub: Path) -> tuple[Path, ...]:
    """Return the existing folders to search for models: the hub, and its parent if that has models too.

    (A download with `cache_dir=$HF_HOME` puts them beside the hub.) Raises `Refused` (folder_closed) if the hub must
    not be read, because that does not mean that it is empty.
    """
    try:
        with os.scandir(hub) as entries:
            next(entries, None)
        folders = [hub]
    except (FileNotFoundError, NotADirectoryError):
        folders = []
    except OSError as error:
        raise folder_closed(error, hub) from None
    if hub.parent != hub and next(_repos(hub.parent), None) is not None:
        folders.append(hub.parent)
    return tuple(folders)


def scan(hub: Path) -> Scan:
    """Return each repository of the roots once: its main branch, else its newest complete snapshot."""
    snapshots: dict[str, Snapshot] = {}
    skipped: dict[str, Skipped] = {}
    for root in roots(hub):
        for folder in sorted(_repos(root)):
            repo_id = _repo_id(folder)
            key = repo_id or f"{root}/{folder}"
            if key in snapshots:
                continue
            match _best_snapshot(root, folder, repo_id):
                case Snapshot() as snapshot:
                    snapshots[key] = snapshot
                    skipped.pop(key, None)
                case Skipped() as skip:
                    skipped.setdefault(key, skip)
    return Scan(tuple(snapshots.values()), tuple(skipped.values()))


def find(hub: Path, repo_id: str, revision: str | None = None) -> Snapshot | Skipped | None:
    """Return what the caches have of a repository or of one of its revisions; None if there is nothing.

    A revision is a commit, an unambiguous prefix of at least 7 digits, a branch or a tag.
    """
    folder = _PREFIX + repo_id.replace("/", "--")
    if _repo_id(folder) != repo_id:
        return None
    fallback: Skipped | None = None
    for root in roots(hub):
        dangling = dangles(root / folder)
        if not _is_folder_or_closed(root / folder) and not dangling:
            continue
        candidate = (
            _best_snapshot(root, folder, repo_id)
            if revision is None or dangling
            else _find_revision(root / folder, repo_id, revision)
        )
        if isinstance(candidate, Snapshot):
            return candidate
        fallback = fallback or candidate
    return fallback


def is_commit(text: str) -> bool:
    """Return whether this is a full commit hash, of git's SHA-1 or SHA-256."""
    return _COMMIT.fullmatch(text) is not None


def _repos(root: Path) -> Iterator[str]:
    """Yield the names of the model folders in a root, with dangling links; nothing if the root cannot be read."""
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                if not entry.name.startswith(_PREFIX):
                    continue
                if _is_folder_or_closed(entry) or dangles(entry.path):
                    yield entry.name
    except OSError:
        return


def _is_folder_or_closed(path: Path | os.DirEntry[str]) -> bool:
    """Return whether this is a folder or cannot be examined. Reading the latter raises an error with the reason."""
    try:
        return path.is_dir() if isinstance(path, os.DirEntry) else is_folder(path)
    except OSError:
        return True


def _broken_link_target(path: str) -> str | None:
    """Return the target of a dangling link or a loop; None for any other path."""
    return os.readlink(path) if dangles(path) else None


def _repo_id(folder: str) -> str | None:
    """Return `org/name` for `models--org--name`; None if the name is ambiguous (`models--a--b--c`) or invalid."""
    repo_id = folder.removeprefix(_PREFIX).replace("--", "/")
    return repo_id if is_repo_id(repo_id) else None


def _best_snapshot(root: Path, folder: str, repo_id: str | None) -> Snapshot | Skipped:
    """Return the repository's main snapshot if it is complete, else its newest complete one, else why there is none."""
    repo = f"{root}/{folder}"
    if repo_id is None:
        return Skipped(printable(folder), Path(repo), "its name is not that of a repository org/name", incomplete=False)
    if target := _broken_link_target(repo):
        return Skipped(repo_id, Path(repo), f"a link to {printable(target)}, which does not exist", incomplete=False)
    try:
        commits = _commits(repo)
    except OSError as error:
        return Skipped(repo_id, Path(repo), f"cannot be read: {error.strerror}", incomplete=True)
    main = _ref(repo, "main")
    if main in commits:
        commits.remove(main)
        commits.insert(0, main)
    fallback: Skipped | None = None
    for commit in commits:
        judged = _judge_commit(repo, repo_id, commit)
        if isinstance(judged, Snapshot) or not judged.incomplete:
            return judged
        fallback = fallback or judged
    return fallback or Skipped(repo_id, Path(repo), "incomplete: no snapshot", incomplete=True)


def _find_revision(repo: Path, repo_id: str, revision: str) -> Snapshot | Skipped | None:
    """Return the snapshot of a revision in this repository's folder; None if it has none."""
    try:
        commits = _commits(str(repo))
    except OSError as error:
        return Skipped(repo_id, repo, f"cannot be read: {error.strerror}", incomplete=True)
    commit = _ref(str(repo), revision) if is_revision(revision) else None
    if commit is None and _COMMIT_PREFIX.fullmatch(revision):
        matching = [name for name in commits if name.startswith(revision)]
        commit = matching[0] if len(matching) == 1 else None
    return _judge_commit(str(repo), repo_id, commit) if commit in commits and commit is not None else None


def _judge_commit(repo: str, repo_id: str, commit: str) -> Snapshot | Skipped:
    path = f"{repo}/snapshots/{commit}"
    verdict = judge(path, repo_id.partition("/")[0])
    snapshot = Snapshot(repo_id, commit, Path(path), verdict.size_bytes)
    if verdict.why is None:
        return snapshot
    return Skipped(repo_id, Path(path), verdict.why, verdict.incomplete, snapshot if verdict.whole else None)


def _commits(repo: str) -> list[str]:
    """Return the commits that have a folder, newest first. Raises `OSError` if they cannot be read."""
    try:
        with os.scandir(f"{repo}/snapshots") as entries:
            folders = [entry for entry in entries if is_commit(entry.name) and entry.is_dir()]
    except FileNotFoundError:
        return []
    if len(folders) > 1:
        folders.sort(key=lambda entry: entry.stat().st_mtime_ns, reverse=True)
    return [entry.name for entry in folders]


def _ref(repo: str, name: str) -> str | None:
    """Return the commit of a branch or tag at its last download; None if it is not known."""
    try:
        commit = read(f"{repo}/refs/{name}", 128).decode("ascii").strip()
    except (OSError, Damaged, ValueError):
        return None
    return commit if is_commit(commit) else None
