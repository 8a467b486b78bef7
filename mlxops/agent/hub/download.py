"""Download a repository from a Hugging Face hub into the host's cache, with huggingface_hub.

First the revision is resolved to a commit, then that commit is downloaded. This module adds to huggingface_hub:
retries, a limit for stalls, a check of the disk space before the download, a check of completeness after it, and an
error with reason and hint for each failure. The token is found and sent by huggingface_hub. Nothing here reads it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mlxops.agent.host.system import free_on_disk
from mlxops.agent.hub.cache import Skipped, Snapshot, find, is_commit
from mlxops.agent.hub.client import (
    DownloadProgress,
    DownloadTimeouts,
    Emit,
    HubClient,
    InvalidAnswer,
    RepoRevision,
    check_etag,
    check_name,
    failure,
    open_client,
    report_invalid_answers,
    with_retries,
)
from mlxops.agent.hub.contents import (
    MAX_TEXT,
    Damaged,
    content_hash,
    is_pointer,
    is_text,
    may_be_edit,
    parse,
    printable,
    read,
)
from mlxops.agent.hub.snapshot import (
    broken_link_target,
    completeness,
    correction_hint,
    damaged_weights,
    edit_notice,
    edited,
    inspect,
    is_truncated,
)
from mlxops.agent.hub.weights import NOT_SERVED, is_served, is_weight, wrong_length
from mlxops.agent.state.locks import is_locked
from mlxops.core.errors import DownloadFailed, Refused
from mlxops.core.frozen import dataclass
from mlxops.core.loadable import no_model
from mlxops.core.names import is_repo_id, is_revision
from mlxops.core.protocol import Note, Progress
from mlxops.core.text import amount

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile, RepoSibling


FilesCheck = Callable[[Collection[str], Mapping[str, object]], None]


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, as the hub describes it."""

    name: str
    size: int
    etag: str
    """Its content's name in the cache's `blobs/`: SHA-256 for an LFS file, git's blob id for others."""


@dataclass(frozen=True)
class DownloadPlan:
    """A commit to download, and those of its files that an engine may need."""

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
    timeouts: DownloadTimeouts | None = None,
    is_cancelled: Callable[[], bool] = lambda: False,
    check: FilesCheck | None = None,
) -> Snapshot:
    """Download `revision` (a branch, tag or commit; None: main) of a repository into the cache `hub`.

    The download threads call `is_cancelled` to learn whether the download is cancelled. `check` gets the names of the
    repository's files and its config.json before the download, and may raise `Refused`.

    Emits notes, and `Progress("download", done, total)` in bytes, which only grows and ends at the total.
    Raises `Refused` (disk_full, not_mlx) and `DownloadFailed` (repo_not_found, revision_not_found, gated_repo,
    unauthorized, rate_limited, hub_unreachable, hub_error, download_stalled, cache_not_writable,
    incomplete_download).
    """
    repo = RepoRevision(repo_id, revision)
    folder = hub / ("models--" + repo_id.replace("/", "--"))
    _refuse_impossible(repo)
    with open_client(timeouts or DownloadTimeouts(), is_cancelled) as client:
        plan = with_retries(lambda: _make_plan(client, repo), repo, emit, client)
        _refuse_other_formats(plan)
        if check is not None:
            check({file.name for file in plan.files}, _read_config(client, plan))
        with_retries(lambda: _prepare(client, folder, plan, emit), repo, emit, client)
        progress = DownloadProgress(emit, plan.total, client)
        with_retries(lambda: _fetch(client, plan, folder, progress, repo), repo, emit, client)
    _check_complete(folder, plan, repo)
    progress.finish()
    if not plan.commit.startswith(repo.branch):
        _write_ref(folder, repo.branch, plan.commit, repo)
    return _downloaded_snapshot(hub, plan)


def verify(
    repo_id: str,
    commit: str,
    hub: Path,
    emit: Emit,
    timeouts: DownloadTimeouts | None = None,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> int:
    """Compare a downloaded commit with the hub's hashes. Return the number of compared files.

    Remove truncated files. Keep complete files that differ: damage that keeps the length cannot be distinguished from
    weights that were fine-tuned in place.

    Raises what `download` raises, and `DownloadFailed` (wrong_content) with the commands that restore the hub's files.
    """
    repo = RepoRevision(repo_id, commit)
    folder = hub / ("models--" + repo_id.replace("/", "--"))
    with open_client(timeouts or DownloadTimeouts(), is_cancelled) as client:
        plan = with_retries(lambda: _make_plan(client, repo), repo, emit, client)
        removed, kept = [], []
        done = 0
        for file in plan.files:
            path = folder / "snapshots" / commit / file.name
            if content_hash(path, file.etag) != file.etag and not _may_be_edit(path, file):
                if _is_lost(client, plan, path, file, repo, emit):
                    removed.append(file.name)
                    _remove_file(folder, path)
                else:
                    kept.append(file.name)
            done += file.size
            emit(Progress("verify", done, plan.total))
    if removed or kept:
        raise _wrong_content(folder / "snapshots" / commit, repo, removed, kept)
    return len(plan.files)


def _is_lost(client: HubClient, plan: DownloadPlan, path: Path, file: HubFile, repo: RepoRevision, emit: Emit) -> bool:
    size = _size(path)
    return size is None or with_retries(lambda: _is_truncated(client, plan, path, file, size), repo, emit, client)


def _wrong_content(snapshot: Path, repo: RepoRevision, removed: list[str], kept: list[str]) -> DownloadFailed:
    groups = {"removed, because truncated": removed, "kept, because it may be an edit": kept}
    why = "; ".join(f"{what}: {', '.join(map(printable, names))}" for what, names in groups.items() if names)
    error = failure("wrong_content", repo, why[:400])
    if kept:
        files = dict.fromkeys(os.path.realpath(snapshot / name) for name in kept)
        error.set_hint(f"to restore the hub's files: rm {shlex.join(files)}; `mlxctl pull --repo {repo}`")
    return error


def _may_be_edit(path: Path, file: HubFile) -> bool:
    """Return whether a file that differs from the hub's may be an edit.

    An edit is complete text, or weights of another size that fit their own header."""
    size = _size(path)
    if size is None:
        return False
    try:
        if is_weight(file.name):
            return size != file.size and wrong_length(str(path), size) is None
        return may_be_edit(str(path), file.name, size, file.size)
    except (OSError, Damaged):
        return False


def warn_of_edits(snapshot: Snapshot, emit: Emit) -> None:
    """Warn of edited files in a snapshot, with the commands that restore the hub's."""
    for edit in edited(snapshot.path):
        kept = edit_notice(snapshot.path / edit.name, snapshot.repo_id, snapshot.revision)
        emit(Note.of(f"{edit}: {kept}", "warning"))


def _refuse_impossible(repo: RepoRevision) -> None:
    if not is_repo_id(repo.repo_id):
        raise failure("repo_not_found", repo, "this is not a valid repository name")
    if repo.revision is not None and not is_revision(repo.revision):
        raise failure("revision_not_found", repo, "this is not a valid revision name")


def _make_plan(client: HubClient, repo: RepoRevision) -> DownloadPlan:
    with report_invalid_answers(repo, client):
        commit, files = _list_files(client, repo)
    plan = DownloadPlan(repo.repo_id, commit, tuple(file for file in files if is_served(file.name)))
    client.largest = max((file.size for file in plan.files), default=0)
    return plan


def _list_files(client: HubClient, repo: RepoRevision) -> tuple[str, list[HubFile]]:
    """Return the requested commit and its files.

    Raises `InvalidAnswer` for invalid names, and a dozen kinds of exceptions for an answer of an unexpected form."""
    from huggingface_hub.hf_api import RepoFile

    api = client.api()
    info = api.model_info(repo.repo_id, revision=repo.branch, timeout=client.timeouts.answer, files_metadata=True)
    commit = info.sha or ""
    if not is_commit(commit):
        raise ValueError("no commit")
    if is_commit(repo.branch) and commit != repo.branch:
        raise InvalidAnswer(f"it was asked for that commit and describes {commit}")
    files: list[RepoSibling | RepoFile] = [*(info.siblings or ())]
    if any(file.size is None for file in files):  # perhaps a mirror; huggingface.co gives the sizes
        listing = api.list_repo_tree(repo.repo_id, recursive=True, revision=commit)
        files = [entry for entry in listing if isinstance(entry, RepoFile)]
    return commit, [_hub_file(file) for file in files]


def _hub_file(file: RepoSibling | RepoFile) -> HubFile:
    size, etag = (file.size, file.blob_id) if file.lfs is None else (file.lfs.size, file.lfs.sha256)
    if not isinstance(size, int) or size < 0:
        raise InvalidAnswer(f"it gives a file a size of {printable(str(size))} bytes")
    return HubFile(check_name(file.rfilename), size, check_etag(etag))


def _read_config(client: HubClient, plan: DownloadPlan) -> Mapping[str, object]:
    """Read the repository's config.json without storing it; empty if that fails. The download reports errors of the
    hub."""
    try:
        return parse(_read_file(client, plan, "config.json"), "config.json")
    except Exception:  # noqa: BLE001 - a dozen kinds; the download reports it
        return {}


def _read_file(client: HubClient, plan: DownloadPlan, name: str) -> bytes:
    """Read a small file of the repository without storing it. Raises what huggingface_hub and its HTTP client raise."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import get_session, hf_raise_for_status

    url = hf_hub_url(plan.repo_id, name, revision=plan.commit, endpoint=client.endpoint)
    answer = get_session().get(url, headers=build_hf_headers(), follow_redirects=True)
    hf_raise_for_status(answer)
    return answer.content


def _refuse_other_formats(plan: DownloadPlan) -> None:
    names = {file.name for file in plan.files}
    if why := no_model(names):
        raise _not_mlx(plan, f"{why}, at {plan.commit[:12]}")
    if not any(is_weight(file.name) for file in plan.files):
        raise _not_mlx(plan, f"none of its files at {plan.commit[:12]} is a *.safetensors that an MLX engine loads")


def _not_mlx(plan: DownloadPlan, why: str) -> Refused:
    return Refused(
        "not_mlx",
        f"{plan.repo_id} is not a model that an MLX engine can serve",
        why=why,
        hint="choose a repository with MLX weights, for example of https://huggingface.co/mlx-community",
    )


def _prepare(client: HubClient, folder: Path, plan: DownloadPlan, emit: Emit) -> None:
    _refuse_broken_links(folder, plan)
    _drop_leftovers(folder)
    _drop_truncated(client, folder, plan, emit)
    _announce(folder, plan, emit)


def _drop_leftovers(folder: Path) -> None:
    """Delete partial files of killed downloads. huggingface_hub never resumes them: each try uses a new name
    (2.4, `file_download.py`, `<etag>.<8 hex>.incomplete`).

    Partial files of a running download, also by another program, are locked and stay."""
    for leftover in (folder / "blobs").glob("*.incomplete"):
        etag = leftover.name.partition(".")[0]
        if not is_locked(folder.parent / ".locks" / folder.name / f"{etag}.lock"):
            leftover.unlink(missing_ok=True)


def _refuse_broken_links(folder: Path, plan: DownloadPlan) -> None:
    """Raise `Refused` (link_broken) if the download would replace a person's link to a disk that is not mounted."""
    snapshot = folder / "snapshots" / plan.commit
    targets = {snapshot / file.name: broken_link_target(str(snapshot), file.name) for file in plan.files}
    if folder.is_symlink() and not os.path.exists(folder):  # an unreadable target counts as missing
        targets = {folder: os.readlink(folder)}
    for link, target in targets.items():
        if target:
            raise Refused(
                "link_broken",
                f"{plan.repo_id} is not downloaded, because that would replace a link that somebody created by hand",
                why=f"{printable(link.name)} is a link to {printable(target)}, which does not exist",
                hint=f"mount the disk that it points to, or delete the link: rm {shlex.quote(str(link))}",
            )


def _drop_truncated(client: HubClient, folder: Path, plan: DownloadPlan, emit: Emit) -> None:
    """Delete truncated files, because huggingface_hub accepts any file of the right name. A complete file that differs
    from the hub's is an edit and stays."""
    for file in plan.files:
        for path in _possible_paths(folder, plan, file):
            actual = _size(path)
            if actual is None or actual == file.size or not _is_truncated(client, plan, path, file, actual):
                continue
            what = f"{printable(file.name)} has {actual} of {file.size} bytes in the cache"
            emit(Note.of(f"{what}: downloading it again", "warning"))
            _remove_file(folder, path)


def _is_truncated(client: HubClient, plan: DownloadPlan, path: Path, file: HubFile, size: int) -> bool:
    """Return whether a file is a truncated copy of the hub's. Text is compared with the hub's, because an edit may just
    lack a closing brace.

    Raises what a request to the hub raises. `with_retries` handles that.
    """
    try:
        truncated = is_truncated(str(path), file.name, size, file.size)
        if not truncated or not size or not is_text(file.name) or max(size, file.size) > MAX_TEXT:
            return truncated
        content = read(str(path), MAX_TEXT)
    except (OSError, Damaged):
        return False
    return is_pointer(content) or _read_file(client, plan, file.name).startswith(content.rstrip(b"\0"))


def _remove_file(folder: Path, pointer: Path) -> None:
    """Remove a file of a snapshot, and its content if that is in the repository's own `blobs/`.

    Raises `InvalidAnswer` for a path outside of the folder. That is a second check: `check_name` refuses such names."""
    if not Path(os.path.normpath(pointer)).is_relative_to(os.path.normpath(folder)):
        raise InvalidAnswer(f"{printable(str(pointer))} is outside of its repository")
    blob = pointer.parent / pointer.readlink() if pointer.is_symlink() else pointer
    pointer.unlink(missing_ok=True)
    if blob.parent.resolve() == (folder / "blobs").resolve():
        blob.unlink(missing_ok=True)


def _announce(folder: Path, plan: DownloadPlan, emit: Emit) -> None:
    """Announce the download. Raise `Refused` (disk_full) if the disk has too little space."""
    missing = plan.total - _present(folder, plan)
    here = f", {amount(plan.total - missing)} of it already here" if missing < plan.total else ""
    what = f"{amount(plan.total)} in {len(plan.files)} files{here}"
    emit(Note.of(f"downloading {plan.repo_id} at {plan.commit[:12]}: {what}"))
    free = free_on_disk(folder)
    if missing > free:
        raise Refused(
            "disk_full",
            f"{plan.repo_id} does not fit on the disk: {amount(missing)} to download, {amount(free)} free",
            why=f"the disk of {folder.parent} is {amount(missing - free)} short",
            hint="free disk space: `mlxctl list` shows the sizes; then delete models that you do not need",
            details={"needed_bytes": missing, "free_bytes": free},
        )


def _present(folder: Path, plan: DownloadPlan) -> int:
    """Return the bytes of the plan that need no download.

    Such a file is in this snapshot, edited or not, or another snapshot of the repository has the same content."""
    here = [file for file in plan.files if any(_size(path) is not None for path in _possible_paths(folder, plan, file))]
    return sum(file.size for file in here)


def _possible_paths(folder: Path, plan: DownloadPlan, file: HubFile) -> tuple[Path, Path]:
    """Return the paths at which a file of the plan may be already: in the snapshot and in `blobs/`."""
    return folder / "snapshots" / plan.commit / file.name, folder / "blobs" / file.etag


def _fetch(client: HubClient, plan: DownloadPlan, folder: Path, progress: DownloadProgress, repo: RepoRevision) -> None:
    from huggingface_hub import snapshot_download

    bars = progress.bars(_present(folder, plan))
    with report_invalid_answers(repo, client):
        snapshot_download(
            plan.repo_id,
            revision=plan.commit,
            cache_dir=folder.parent,
            ignore_patterns=list(NOT_SERVED),
            endpoint=client.endpoint,
            tqdm_class=bars,
        )


def _check_complete(folder: Path, plan: DownloadPlan, repo: RepoRevision) -> None:
    """Raise `DownloadFailed` if a file is missing or damaged. Remove damaged weights, or the next download would keep
    them."""
    snapshot = folder / "snapshots" / plan.commit
    why = completeness(snapshot)
    if why is None:
        return
    for name in {file.name for file in plan.files} & set(damaged_weights(snapshot)):
        _remove_file(folder, snapshot / name)
    _refuse_edits(snapshot, plan, why)
    raise failure("incomplete_download", repo, why)


def _refuse_edits(snapshot: Path, plan: DownloadPlan, why: str) -> None:
    """Raise `Refused` (not_servable) if engines cannot use a file because of an edit."""
    broken = inspect(snapshot).broken
    for file in plan.files:
        path = snapshot / file.name
        if file.name not in broken and not (is_text(file.name) and _looks_truncated(path, file)):
            continue
        if content_hash(path, file.etag) == file.etag:
            continue  # the hub's file has the same problem
        hint = correction_hint(path, plan.repo_id, plan.commit)
        raise Refused("not_servable", f"{plan.repo_id} cannot be served", why=why, hint=hint)


def _looks_truncated(path: Path, file: HubFile) -> bool:
    size = _size(path)
    try:
        return size not in (None, file.size) and is_truncated(str(path), file.name, size or 0, file.size)
    except (OSError, Damaged):
        return False


def _write_ref(folder: Path, name: str, commit: str, repo: RepoRevision) -> None:
    """Write `refs/<branch>` atomically, in huggingface_hub's form (`file_download.py`).

    Done after the download, so that an interrupted download leaves the branch at its old commit."""
    ref = folder / "refs" / name
    try:
        if ref.is_file() and ref.read_bytes() == commit.encode():
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        temporary = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
        temporary.write_text(commit)
        temporary.replace(ref)
    except OSError as error:
        raise failure("cache_not_writable", repo, f"{ref}: {error.strerror}") from error


def _downloaded_snapshot(hub: Path, plan: DownloadPlan) -> Snapshot:
    """Return the downloaded snapshot as the cache shows it. Raises `Refused` (not_mlx)."""
    result = find(hub, plan.repo_id, plan.commit)
    whole = result if isinstance(result, Snapshot) or result is None else result.whole
    if whole is not None:
        return whole
    if isinstance(result, Skipped):
        _refuse_edits(result.path, plan, result.why)
    raise _not_mlx(plan, result.why if isinstance(result, Skipped) else "it is not in the cache after its download")


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
