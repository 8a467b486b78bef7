"""Downloads from the Hugging Face hub into the host's cache, by huggingface_hub, of a commit that is fixed first.

What huggingface_hub leaves to its caller is added here: when to try again and when not, a deadline for a download
that stands still, disk space before the first byte, proof of completeness after the last, and one line of what,
why and what to do for each way in which a hub says no. The token is huggingface_hub's business: it finds and
sends it; nothing here reads it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlxops.agent.cache import Snapshot, find, is_commit
from mlxops.agent.flocks import NoLocks, try_flock
from mlxops.agent.hubline import (
    Asked,
    Bytes,
    Emit,
    Line,
    NoHub,
    Patience,
    as_of_a_hub,
    failure,
    import_quietly,
    open_line,
    persistently,
    plain_etag,
    plain_name,
)
from mlxops.agent.snapshot import NOT_SERVED, completeness, damaged_weights, is_served, is_weight, printable
from mlxops.agent.system import free_on_disk
from mlxops.core.errors import Refused
from mlxops.core.names import is_repo_id, is_revision
from mlxops.core.protocol import Note, Progress
from mlxops.core.units import amount

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo
    from huggingface_hub.hf_api import RepoFile, RepoSibling


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, as the hub describes it."""

    name: str
    size: int
    etag: str
    """The name under which the cache keeps its content in `blobs/`: the SHA-256 of an LFS file, git's of others."""


@dataclass(frozen=True)
class Plan:
    """What a download consists of: a commit, and the files of it that an engine may need."""

    repo_id: str
    commit: str
    files: tuple[HubFile, ...]

    @property
    def total(self) -> int:
        return sum(file.size for file in self.files)


def download(
    repo_id: str,
    revision: str | None,
    hub: Path,
    emit: Emit,
    patience: Patience | None = None,
    given_up: Callable[[], bool] = lambda: False,
) -> Snapshot:
    """Bring `revision` (a branch, a tag, a commit; None: main) of a repository into the cache `hub`.

    `given_up` is asked by the threads that download, whether anybody still wants it.

    Emits notes, and `Progress("download", done, total)` in bytes, which never goes back and ends at the total.
    Raises `Refused` (disk_full, not_mlx) and `DownloadFailed` (repo_not_found, revision_not_found, gated_repo,
    unauthorized, rate_limited, hub_unreachable, hub_error, download_stalled, cache_not_writable,
    incomplete_download).
    """
    asked = Asked(repo_id, revision)
    folder = hub / ("models--" + repo_id.replace("/", "--"))
    _refuse_impossible(asked)
    with open_line(patience or Patience(), given_up) as line:
        plan = persistently(lambda: _plan(line, asked), asked, emit, line)
        _refuse_other_formats(plan)
        persistently(lambda: _prepare(folder, plan, emit), asked, emit, line)
        progress = Bytes(emit, plan.total, line)
        persistently(lambda: _fetch(line, plan, folder, progress, asked), asked, emit, line)
    _prove(folder, plan, asked)
    progress.finish()
    if not plan.commit.startswith(asked.branch):
        _write_ref(folder, asked.branch, plan.commit, asked)
    return _found(hub, plan)


def verify(
    repo_id: str,
    commit: str,
    hub: Path,
    emit: Emit,
    patience: Patience | None = None,
    given_up: Callable[[], bool] = lambda: False,
) -> int:
    """Compare the content of a downloaded commit with the hub's hashes; returns how many files were compared.

    Raises what `download` raises, and `DownloadFailed` (wrong_content) after the wrong files were removed.
    """
    asked = Asked(repo_id, commit)
    folder = hub / ("models--" + repo_id.replace("/", "--"))
    with open_line(patience or Patience(), given_up) as line:
        plan = persistently(lambda: _plan(line, asked), asked, emit, line)
    wrong = []
    done = 0
    for file in plan.files:
        place = folder / "snapshots" / commit / file.name
        if _content_hash(place, file) != file.etag:
            wrong.append(printable(file.name))
            _drop(folder, place)
        done += file.size
        emit(Progress("verify", done, plan.total))
    if wrong:
        raise failure("wrong_content", Asked(repo_id, None), f"removed: {', '.join(wrong)}"[:300])
    return len(plan.files)


def _content_hash(path: Path, file: HubFile) -> str:
    """SHA-256 for what the hub keeps in LFS, git's SHA-1 of the blob for the rest; empty if it cannot be read."""
    digest = hashlib.sha256() if len(file.etag) == 64 else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    try:
        with open(path, "rb") as content:
            while piece := content.read(4 * 1024 * 1024):
                digest.update(piece)
    except OSError:
        return ""
    return digest.hexdigest()


@dataclass(frozen=True)
class Deleted:
    """What became, or would become, of a snapshot that is deleted."""

    freed_bytes: int
    linked_bytes: int
    """Of files that lie elsewhere, and that the cache only has links to: the links go, the files stay."""
    kept: tuple[str, ...]
    """The commits of its repository that stay."""


def delete(snapshot: Path, *, dry_run: bool) -> Deleted:
    """Delete one snapshot of a cache, with all that only it uses. What other snapshots or repositories share is kept,
    and so is everything outside of the cache."""
    import_quietly()
    from huggingface_hub import scan_cache_dir

    repo = snapshot.parent.parent
    cache = scan_cache_dir(repo.parent)
    # Copies of a repository have the same commits, and huggingface_hub takes any one that has it; a link to another
    # repository's folder leads to the same files.
    same = [each for each in cache.repos if each.repo_path.samefile(repo)]
    only = [each for each in same if each.repo_path.name == repo.name] or same
    plan = replace(cache, repos=frozenset(only[:1])).delete_revisions(snapshot.name)
    inside = os.path.realpath(repo)
    plan = replace(plan, blobs=frozenset(blob for blob in plan.blobs if _lies_in(blob.parent, inside)))
    linked = sum(_linked(each, snapshot.name) for each in only[:1])
    others = [each.name for each in snapshot.parent.iterdir() if each.name != snapshot.name]
    if not dry_run:
        plan.execute()
        if others:
            (repo / "trees" / f"{snapshot.name}.json").unlink(missing_ok=True)
        else:
            shutil.rmtree(repo, ignore_errors=True)
    return Deleted(plan.expected_freed_size - linked, linked, tuple(sorted(others)))


def _linked(repo: CachedRepoInfo, commit: str) -> int:
    """The bytes of a snapshot that lie neither in its repository nor in the cache's own store: huggingface_hub counts
    them as freed when it removes the links. Nothing lies in a repository of which the folder is a link itself, and of
    which no other snapshot stays: then the link is all that goes."""
    staying = [revision for revision in repo.revisions if revision.commit_hash != commit]
    shared = {file.blob_path for revision in staying for file in revision.files}
    places = [os.path.join(os.path.realpath(repo.repo_path.parent), "blobs")]
    if staying or not repo.repo_path.is_symlink():
        places.append(os.path.realpath(repo.repo_path))
    sizes = {
        file.blob_path: file.size_on_disk
        for revision in repo.revisions
        if revision.commit_hash == commit
        for file in revision.files
    }
    return sum(
        size
        for blob, size in sizes.items()
        if blob not in shared and not any(_lies_in(blob, place) for place in places)
    )


def _lies_in(path: Path, folder: str) -> bool:
    """`folder` is without links."""
    return Path(os.path.realpath(path)).is_relative_to(folder)


def _refuse_impossible(asked: Asked) -> None:
    if not is_repo_id(asked.repo_id):
        raise failure("repo_not_found", asked, "this cannot be the name of a repository")
    if asked.revision is not None and not is_revision(asked.revision):
        raise failure("revision_not_found", asked, "this cannot be the name of a revision")


def _plan(line: Line, asked: Asked) -> Plan:
    with as_of_a_hub(asked, line):
        commit, files = _described(line, asked)
    plan = Plan(asked.repo_id, commit, tuple(file for file in files if is_served(file.name)))
    line.largest = max((file.size for file in plan.files), default=0)
    return plan


def _described(line: Line, asked: Asked) -> tuple[str, list[HubFile]]:
    """(the commit that was asked for, its files), with any of a dozen exceptions for an answer of another form.
    Raises `NoHub` for names that are none."""
    from huggingface_hub.hf_api import RepoFile

    api = line.api()
    info = api.model_info(asked.repo_id, revision=asked.branch, timeout=line.patience.answer, files_metadata=True)
    commit = info.sha or ""
    if not is_commit(commit):
        raise ValueError("no commit")
    if is_commit(asked.branch) and commit != asked.branch:
        raise NoHub(f"asked for that commit, it describes {commit}")
    files: list[RepoSibling | RepoFile] = [*(info.siblings or ())]
    if any(file.size is None for file in files):  # a mirror, perhaps; huggingface.co tells them
        listing = api.list_repo_tree(asked.repo_id, recursive=True, revision=commit)
        files = [entry for entry in listing if isinstance(entry, RepoFile)]
    return commit, [_hub_file(file) for file in files]


def _hub_file(file: RepoSibling | RepoFile) -> HubFile:
    size, etag = (file.size, file.blob_id) if file.lfs is None else (file.lfs.size, file.lfs.sha256)
    if not isinstance(size, int) or size < 0:
        raise NoHub(f"it says that a file has {printable(str(size))} bytes")
    return HubFile(plain_name(file.rfilename), size, plain_etag(etag))


def _refuse_other_formats(plan: Plan) -> None:
    if not any(is_weight(file.name) for file in plan.files):
        raise _not_mlx(plan, f"none of its files at {plan.commit[:12]} is a *.safetensors that an MLX engine loads")


def _not_mlx(plan: Plan, why: str) -> Refused:
    return Refused(
        "not_mlx",
        f"{plan.repo_id} is not a model that an MLX engine can serve",
        why=why,
        hint="choose a repository with MLX weights, for example of https://huggingface.co/mlx-community",
    )


def _prepare(folder: Path, plan: Plan, emit: Emit) -> None:
    _drop_leftovers(folder)
    _drop_wrong_sizes(folder, plan, emit)
    _announce(folder, plan, emit)


def _drop_leftovers(folder: Path) -> None:
    """What a killed download has begun is never taken up again: the next one gives its file another name
    (huggingface_hub 2.4, `file_download.py`, `<etag>.<8 hex>.incomplete`). Files of a download that runs, by whatever
    program, are told by their lock."""
    for leftover in (folder / "blobs").glob("*.incomplete"):
        etag = leftover.name.partition(".")[0]
        if not _is_locked(folder.parent / ".locks" / folder.name / f"{etag}.lock"):
            leftover.unlink(missing_ok=True)


def _is_locked(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not try_flock(fd)
    except NoLocks:
        return True  # nobody can tell
    finally:
        os.close(fd)


def _drop_wrong_sizes(folder: Path, plan: Plan, emit: Emit) -> None:
    """huggingface_hub takes whatever lies under the right name for the right file: what was cut off would stay so."""
    for file in plan.files:
        for place in _places(folder, plan, file):
            actual = _size(place)
            if actual is not None and actual != file.size:
                what = f"{printable(file.name)} has {actual} of {file.size} bytes in the cache"
                emit(Note(f"{what}: downloading it anew", "warning"))
                _drop(folder, place)


def _drop(folder: Path, pointer: Path) -> None:
    """Remove a file of a snapshot and what it leads to in the repository's own `blobs/`, and nothing else.

    Raises `NoHub` for one that is not in the folder, though no name of a hub's comes that far."""
    if not Path(os.path.normpath(pointer)).is_relative_to(os.path.normpath(folder)):
        raise NoHub(f"{printable(str(pointer))} is no file of its repository")
    blob = pointer.parent / pointer.readlink() if pointer.is_symlink() else pointer
    pointer.unlink(missing_ok=True)
    if blob.parent.resolve() == (folder / "blobs").resolve():
        blob.unlink(missing_ok=True)


def _announce(folder: Path, plan: Plan, emit: Emit) -> None:
    """Say what will be downloaded; refuse what the disk cannot hold."""
    missing = plan.total - _present(folder, plan)
    here = f", {amount(plan.total - missing)} of it already here" if missing < plan.total else ""
    what = f"{amount(plan.total)} in {len(plan.files)} files{here}"
    emit(Note(f"downloading {plan.repo_id} at {plan.commit[:12]}: {what}"))
    free = free_on_disk(folder)
    if missing > free:
        raise Refused(
            "disk_full",
            f"{plan.repo_id} does not fit on the disk: {amount(missing)} to download, {amount(free)} free",
            why=f"the disk of {folder.parent} has {amount(missing - free)} too little",
            hint="make room: mlxctl list shows the sizes; then remove what you do not need",
            details={"needed_bytes": missing, "free_bytes": free},
        )


def _present(folder: Path, plan: Plan) -> int:
    """Bytes of the plan that the cache holds: in this snapshot or, by content, in another one of the repository."""
    return sum(file.size for file in plan.files if file.size in map(_size, _places(folder, plan, file)))


def _places(folder: Path, plan: Plan, file: HubFile) -> tuple[Path, Path]:
    """Where a file of the plan is looked for before it is downloaded."""
    return folder / "snapshots" / plan.commit / file.name, folder / "blobs" / file.etag


def _fetch(line: Line, plan: Plan, folder: Path, progress: Bytes, asked: Asked) -> None:
    from huggingface_hub import snapshot_download

    bars = progress.bars(_present(folder, plan))
    with as_of_a_hub(asked, line):
        snapshot_download(
            plan.repo_id,
            revision=plan.commit,
            cache_dir=folder.parent,
            ignore_patterns=list(NOT_SERVED),
            endpoint=line.endpoint,
            tqdm_class=bars,  # as much of tqdm as it calls
        )


def _prove(folder: Path, plan: Plan, asked: Asked) -> None:
    """Raises `DownloadFailed` unless all of it is there. Damaged weights are removed, or they would be taken for
    downloaded the next time."""
    snapshot = folder / "snapshots" / plan.commit
    why = completeness(snapshot)
    if why is None:
        return
    for name in damaged_weights(snapshot):
        _drop(folder, snapshot / name)
    raise failure("incomplete_download", asked, why)


def _write_ref(folder: Path, name: str, commit: str, asked: Asked) -> None:
    """`refs/<branch>`, as huggingface_hub writes it for a branch (`file_download.py`), whole or not at all. It comes
    after the download, so that an interrupted one leaves the branch where it was."""
    ref = folder / "refs" / name
    try:
        if ref.is_file() and ref.read_bytes() == commit.encode():
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        temporary = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
        temporary.write_text(commit)
        temporary.replace(ref)
    except OSError as error:
        raise failure("cache_not_writable", asked, f"{ref}: {error.strerror}") from error


def _found(hub: Path, plan: Plan) -> Snapshot:
    """The cache's own view of what was downloaded. Raises `Refused` (not_mlx)."""
    found = find(hub, plan.repo_id, plan.commit)
    if isinstance(found, Snapshot):
        return found
    raise _not_mlx(plan, found.why if found is not None else "it is not in the cache after its download")


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
