"""What the host's Hugging Face caches hold. Reads only, needs no network, imports no huggingface_hub.

A cache is a folder of `models--org--name`, each with `refs/<branch>` (a file with a commit), `snapshots/<commit>/`
(symlinks) and `blobs/` (what they lead to; since 2.x often one more symlink, into the cache's own `blobs/`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlxops.agent.hub.contents import Damaged, printable, read
from mlxops.agent.hub.snapshot import ModelFacts, completeness, inspect, judge
from mlxops.agent.paths import folder_closed
from mlxops.common.files import dangles, is_folder
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
    """The commit: the snapshot folder's name."""
    path: Path
    """As it is called in the cache; symlinks are not resolved."""
    size_bytes: int


@dataclass(frozen=True)
class Skipped:
    """A repository that is there and cannot be registered."""

    repo_id: str
    """Or the folder's name, where that is none of a repository."""
    path: Path
    why: str
    incomplete: bool
    whole: Snapshot | None = None
    """The snapshot, if it is complete and only not in MLX's format: engines convert such weights while they load."""


@dataclass(frozen=True)
class Scan:
    snapshots: tuple[Snapshot, ...]
    skipped: tuple[Skipped, ...]


def roots(hub: Path) -> tuple[Path, ...]:
    """The folders in which models are looked for, those that are there: the hub, and the folder that it lies in if
    that holds models too (a download with `cache_dir=$HF_HOME` puts them beside the hub).

    Raises `Refused` (folder_closed) for a hub that may not be read: that does not mean that it is empty.
    """
    try:
        with os.scandir(hub) as entries:
            next(entries, None)
        found = [hub]
    except (FileNotFoundError, NotADirectoryError):
        found = []
    except OSError as error:
        raise folder_closed(error, hub) from None
    if hub.parent != hub and next(_repos(hub.parent), None) is not None:
        found.append(hub.parent)
    return tuple(found)


def scan(hub: Path) -> Scan:
    """Every repository of both roots, once: as its main branch, else as its newest complete snapshot."""
    snapshots: dict[str, Snapshot] = {}
    skipped: dict[str, Skipped] = {}
    for root in roots(hub):
        for folder in sorted(_repos(root)):
            repo_id = _repo_id(folder)
            key = repo_id or f"{root}/{folder}"
            if key in snapshots:
                continue
            match _best(root, folder, repo_id):
                case Snapshot() as snapshot:
                    snapshots[key] = snapshot
                    skipped.pop(key, None)
                case Skipped() as skip:
                    skipped.setdefault(key, skip)
    return Scan(tuple(snapshots.values()), tuple(skipped.values()))


def find(hub: Path, repo_id: str, revision: str | None = None) -> Snapshot | Skipped | None:
    """What the caches hold of a repository, or of one revision of it: a commit, the beginning of one (7 or more
    digits, if there is only one such), a branch or a tag. None: nothing of it is here."""
    folder = _PREFIX + repo_id.replace("/", "--")
    if _repo_id(folder) != repo_id:
        return None
    fallback: Skipped | None = None
    for root in roots(hub):
        dead = dangles(root / folder)
        if not _is_folder_or_closed(root / folder) and not dead:
            continue
        found = _best(root, folder, repo_id) if revision is None or dead else _at(root / folder, repo_id, revision)
        if isinstance(found, Snapshot):
            return found
        fallback = fallback or found
    return fallback


def is_commit(text: str) -> bool:
    """The full name of a commit, in git's SHA-1 or SHA-256."""
    return _COMMIT.fullmatch(text) is not None


def _repos(root: Path) -> Iterator[str]:
    """Yield the names of the model folders in a root, dangling links to some included; none if it cannot be read."""
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
    """Whether this is a folder. One that may not be examined counts: reading it then raises an error that says why."""
    try:
        return path.is_dir() if isinstance(path, os.DirEntry) else is_folder(path)
    except OSError:
        return True


def _leads_nowhere(path: str) -> str | None:
    """Return the target of a dangling link or a loop; None for any other path."""
    return os.readlink(path) if dangles(path) else None


def _repo_id(folder: str) -> str | None:
    """`models--org--name` -> `org/name`; None where that is not certain (`models--a--b--c`) or not allowed."""
    repo_id = folder.removeprefix(_PREFIX).replace("--", "/")
    return repo_id if is_repo_id(repo_id) else None


def _best(root: Path, folder: str, repo_id: str | None) -> Snapshot | Skipped:
    """The repository's main snapshot if it is complete, else the newest that is; else why there is none."""
    repo = f"{root}/{folder}"
    if repo_id is None:
        return Skipped(printable(folder), Path(repo), "not the folder of a repository org/name", incomplete=False)
    if place := _leads_nowhere(repo):
        return Skipped(repo_id, Path(repo), f"a link to {printable(place)}, which is not there", incomplete=False)
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
        judged = _judged(repo, repo_id, commit)
        if isinstance(judged, Snapshot) or not judged.incomplete:
            return judged
        fallback = fallback or judged
    return fallback or Skipped(repo_id, Path(repo), "incomplete: no snapshot", incomplete=True)


def _at(repo: Path, repo_id: str, revision: str) -> Snapshot | Skipped | None:
    """The snapshot that `revision` means in this repository's folder, if it is there."""
    try:
        commits = _commits(str(repo))
    except OSError as error:
        return Skipped(repo_id, repo, f"cannot be read: {error.strerror}", incomplete=True)
    commit = _ref(str(repo), revision) if is_revision(revision) else None
    if commit is None and _COMMIT_PREFIX.fullmatch(revision):
        matching = [name for name in commits if name.startswith(revision)]
        commit = matching[0] if len(matching) == 1 else None
    return _judged(str(repo), repo_id, commit) if commit in commits and commit is not None else None


def _judged(repo: str, repo_id: str, commit: str) -> Snapshot | Skipped:
    path = f"{repo}/snapshots/{commit}"
    verdict = judge(path, repo_id.partition("/")[0])
    snapshot = Snapshot(repo_id, commit, Path(path), verdict.size_bytes)
    if verdict.why is None:
        return snapshot
    return Skipped(repo_id, Path(path), verdict.why, verdict.incomplete, snapshot if verdict.whole else None)


def _commits(repo: str) -> list[str]:
    """The commits of which there is a folder, the newest first. Raises `OSError` if that cannot be read."""
    try:
        with os.scandir(f"{repo}/snapshots") as entries:
            found = [entry for entry in entries if is_commit(entry.name) and entry.is_dir()]
    except FileNotFoundError:
        return []
    if len(found) > 1:
        found.sort(key=lambda entry: entry.stat().st_mtime_ns, reverse=True)
    return [entry.name for entry in found]


def _ref(repo: str, name: str) -> str | None:
    """The commit that a branch or tag stood for when it was last downloaded."""
    try:
        commit = read(f"{repo}/refs/{name}", 128).decode("ascii").strip()
    except (OSError, Damaged, ValueError):
        return None
    return commit if is_commit(commit) else None
