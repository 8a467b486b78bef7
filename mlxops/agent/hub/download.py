"""Downloads from the Hugging Face hub into the host's cache, by huggingface_hub, of a commit that is fixed first.

What huggingface_hub leaves to its caller is added here: when to try again and when not, a deadline for a download
that stands still, disk space before the first byte, proof of completeness after the last, and one line of what,
why and what to do for each way in which a hub says no. The token is huggingface_hub's business: it finds and
sends it; nothing here reads it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlxops.agent.host.system import free_on_disk
from mlxops.agent.hub.cache import Skipped, Snapshot, find, is_commit
from mlxops.agent.hub.client import (
    Asked,
    Bytes,
    DownloadTimeouts,
    Emit,
    HubClient,
    NoHub,
    as_of_a_hub,
    failure,
    open_line,
    persistently,
    plain_etag,
    plain_name,
)
from mlxops.agent.hub.contents import (
    MAX_TEXT,
    Damaged,
    can_be_an_edit,
    content_hash,
    is_pointer,
    is_text,
    parse,
    printable,
    read,
)
from mlxops.agent.hub.snapshot import (
    completeness,
    damaged_weights,
    edited,
    inspect,
    is_begun_only,
    kept_as_it_is,
    link_that_leads_nowhere,
    to_correct,
)
from mlxops.agent.hub.weights import NOT_SERVED, is_served, is_weight, wrong_length
from mlxops.agent.state.locks import is_locked
from mlxops.core.errors import DownloadFailed, Refused
from mlxops.core.loadable import no_model
from mlxops.core.names import is_repo_id, is_revision
from mlxops.core.protocol import Note, Progress
from mlxops.core.text import amount

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile, RepoSibling


Check = Callable[[Collection[str], Mapping[str, object]], None]


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, as the hub describes it."""

    name: str
    size: int
    etag: str
    """The name under which the cache keeps its content in `blobs/`: the SHA-256 of an LFS file, git's of others."""


@dataclass(frozen=True)
class DownloadPlan:
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
    patience: DownloadTimeouts | None = None,
    given_up: Callable[[], bool] = lambda: False,
    check: Check | None = None,
) -> Snapshot:
    """Bring `revision` (a branch, a tag, a commit; None: main) of a repository into the cache `hub`.

    `given_up` is asked by the threads that download, whether anybody still wants it. `check` gets the names of the
    repository's files and its config.json before anything is downloaded, and may refuse.

    Emits notes, and `Progress("download", done, total)` in bytes, which never goes back and ends at the total.
    Raises `Refused` (disk_full, not_mlx) and `DownloadFailed` (repo_not_found, revision_not_found, gated_repo,
    unauthorized, rate_limited, hub_unreachable, hub_error, download_stalled, cache_not_writable,
    incomplete_download).
    """
    asked = Asked(repo_id, revision)
    folder = hub / ("models--" + repo_id.replace("/", "--"))
    _refuse_impossible(asked)
    with open_line(patience or DownloadTimeouts(), given_up) as line:
        plan = persistently(lambda: _plan(line, asked), asked, emit, line)
        _refuse_other_formats(plan)
        if check is not None:
            check({file.name for file in plan.files}, _config(line, plan))
        persistently(lambda: _prepare(line, folder, plan, emit), asked, emit, line)
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
    patience: DownloadTimeouts | None = None,
    given_up: Callable[[], bool] = lambda: False,
) -> int:
    """Compare the content of a downloaded commit with the hub's hashes; returns how many files were compared.

    Remove files that end early. Keep complete ones: damage of the right length looks like weights that were fine-tuned
    in place.

    Raises what `download` raises, and `DownloadFailed` (wrong_content) with the commands that bring the hub's files.
    """
    asked = Asked(repo_id, commit)
    folder = hub / ("models--" + repo_id.replace("/", "--"))
    with open_line(patience or DownloadTimeouts(), given_up) as line:
        plan = persistently(lambda: _plan(line, asked), asked, emit, line)
        removed, kept = [], []
        done = 0
        for file in plan.files:
            place = folder / "snapshots" / commit / file.name
            if content_hash(place, file.etag) != file.etag and not _is_somebodys_own(place, file):
                if _is_lost(line, plan, place, file, asked, emit):
                    removed.append(file.name)
                    _drop(folder, place)
                else:
                    kept.append(file.name)
            done += file.size
            emit(Progress("verify", done, plan.total))
    if removed or kept:
        raise _wrong_content(folder / "snapshots" / commit, asked, removed, kept)
    return len(plan.files)


def _is_lost(line: HubClient, plan: DownloadPlan, place: Path, file: HubFile, asked: Asked, emit: Emit) -> bool:
    size = _size(place)
    return size is None or persistently(lambda: _is_begun_only(line, plan, place, file, size), asked, emit, line)


def _wrong_content(snapshot: Path, asked: Asked, removed: list[str], kept: list[str]) -> DownloadFailed:
    said = {"removed, because it ends early": removed, "kept, because somebody may have made it": kept}
    why = "; ".join(f"{what}: {', '.join(map(printable, names))}" for what, names in said.items() if names)
    error = failure("wrong_content", asked, why[:400])
    if kept:
        files = dict.fromkeys(os.path.realpath(snapshot / name) for name in kept)
        error.hint = f"to have the hub's again: rm {shlex.join(files)}; mlxctl pull --repo {asked}"
    return error


def _is_somebodys_own(place: Path, file: HubFile) -> bool:
    """Whether a file that differs from the hub's may be an edit: text that does not end early, or weights of another
    size that fit their own header."""
    size = _size(place)
    if size is None:
        return False
    try:
        if is_weight(file.name):
            return size != file.size and wrong_length(str(place), size) is None
        return can_be_an_edit(str(place), file.name, size, file.size)
    except (OSError, Damaged):
        return False


def tell_edits(snapshot: Snapshot, emit: Emit) -> None:
    """Warn of edited files in a snapshot, with the commands that restore the hub's."""
    for each in edited(snapshot.path):
        kept = kept_as_it_is(snapshot.path / each.name, snapshot.repo_id, snapshot.revision)
        emit(Note(f"{each}: {kept}", "warning"))


def _refuse_impossible(asked: Asked) -> None:
    if not is_repo_id(asked.repo_id):
        raise failure("repo_not_found", asked, "this cannot be the name of a repository")
    if asked.revision is not None and not is_revision(asked.revision):
        raise failure("revision_not_found", asked, "this cannot be the name of a revision")


def _plan(line: HubClient, asked: Asked) -> DownloadPlan:
    with as_of_a_hub(asked, line):
        commit, files = _described(line, asked)
    plan = DownloadPlan(asked.repo_id, commit, tuple(file for file in files if is_served(file.name)))
    line.largest = max((file.size for file in plan.files), default=0)
    return plan


def _described(line: HubClient, asked: Asked) -> tuple[str, list[HubFile]]:
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


def _config(line: HubClient, plan: DownloadPlan) -> Mapping[str, object]:
    """Read the repository's config.json, without keeping it; empty if that fails: the download reports errors of the
    hub."""
    try:
        return parse(_content(line, plan, "config.json"), "config.json")
    except Exception:  # noqa: BLE001 - of a dozen kinds, and the download will meet it again
        return {}


def _content(line: HubClient, plan: DownloadPlan, name: str) -> bytes:
    """A small file of the repository, which is not kept. Raises what huggingface_hub and its HTTP raise."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import get_session, hf_raise_for_status

    url = hf_hub_url(plan.repo_id, name, revision=plan.commit, endpoint=line.endpoint)
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


def _prepare(line: HubClient, folder: Path, plan: DownloadPlan, emit: Emit) -> None:
    _refuse_dead_links(folder, plan)
    _drop_leftovers(folder)
    _drop_begun(line, folder, plan, emit)
    _announce(folder, plan, emit)


def _drop_leftovers(folder: Path) -> None:
    """What a killed download has begun is never taken up again: the next one gives its file another name
    (huggingface_hub 2.4, `file_download.py`, `<etag>.<8 hex>.incomplete`). Files of a download that runs, by whatever
    program, are told by their lock."""
    for leftover in (folder / "blobs").glob("*.incomplete"):
        etag = leftover.name.partition(".")[0]
        if not is_locked(folder.parent / ".locks" / folder.name / f"{etag}.lock"):
            leftover.unlink(missing_ok=True)


def _refuse_dead_links(folder: Path, plan: DownloadPlan) -> None:
    """Raises `Refused` (link_broken) if the download would replace a link that a person made to a disk that is away."""
    snapshot = folder / "snapshots" / plan.commit
    found = {snapshot / file.name: link_that_leads_nowhere(str(snapshot), file.name) for file in plan.files}
    if folder.is_symlink() and not os.path.exists(folder):  # a target that cannot be seen counts as away
        found = {folder: os.readlink(folder)}
    for link, place in found.items():
        if place:
            raise Refused(
                "link_broken",
                f"{plan.repo_id} is not downloaded over a link that a person made",
                why=f"{printable(link.name)} is a link to {printable(place)}, which is not there",
                hint=f"mount what it leads to, or delete the link: rm {shlex.quote(str(link))}",
            )


def _drop_begun(line: HubClient, folder: Path, plan: DownloadPlan, emit: Emit) -> None:
    """Delete truncated files: huggingface_hub takes any file of the right name for the right one. A complete file that
    differs from the hub's is an edit, and stays."""
    for file in plan.files:
        for place in _places(folder, plan, file):
            actual = _size(place)
            if actual is None or actual == file.size or not _is_begun_only(line, plan, place, file, actual):
                continue
            what = f"{printable(file.name)} has {actual} of {file.size} bytes in the cache"
            emit(Note(f"{what}: downloading it again", "warning"))
            _drop(folder, place)


def _is_begun_only(line: HubClient, plan: DownloadPlan, place: Path, file: HubFile, size: int) -> bool:
    """Whether it is the beginning of the hub's file. Text that may only lack a brace is compared with the hub's text.

    Raises what a request to the hub raises; `persistently` handles that.
    """
    try:
        begun = is_begun_only(str(place), file.name, size, file.size)
        if not begun or not size or not is_text(file.name) or max(size, file.size) > MAX_TEXT:
            return begun
        content = read(str(place), MAX_TEXT)
    except (OSError, Damaged):
        return False
    return is_pointer(content) or _content(line, plan, file.name).startswith(content.rstrip(b"\0"))


def _drop(folder: Path, pointer: Path) -> None:
    """Remove a file of a snapshot and what it leads to in the repository's own `blobs/`, and nothing else.

    Raises `NoHub` for one that is not in the folder, though no name of a hub's comes that far."""
    if not Path(os.path.normpath(pointer)).is_relative_to(os.path.normpath(folder)):
        raise NoHub(f"{printable(str(pointer))} is no file of its repository")
    blob = pointer.parent / pointer.readlink() if pointer.is_symlink() else pointer
    pointer.unlink(missing_ok=True)
    if blob.parent.resolve() == (folder / "blobs").resolve():
        blob.unlink(missing_ok=True)


def _announce(folder: Path, plan: DownloadPlan, emit: Emit) -> None:
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


def _present(folder: Path, plan: DownloadPlan) -> int:
    """Return the bytes of the plan that need no download: the files are in this snapshot, the hub's or edited, or with
    the same content in another snapshot of the repository."""
    here = [file for file in plan.files if any(_size(place) is not None for place in _places(folder, plan, file))]
    return sum(file.size for file in here)


def _places(folder: Path, plan: DownloadPlan, file: HubFile) -> tuple[Path, Path]:
    """Where a file of the plan is looked for before it is downloaded."""
    return folder / "snapshots" / plan.commit / file.name, folder / "blobs" / file.etag


def _fetch(line: HubClient, plan: DownloadPlan, folder: Path, progress: Bytes, asked: Asked) -> None:
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


def _prove(folder: Path, plan: DownloadPlan, asked: Asked) -> None:
    """Raises `DownloadFailed` unless all of it is there. Damaged weights are removed, or they would be taken for
    downloaded the next time."""
    snapshot = folder / "snapshots" / plan.commit
    why = completeness(snapshot)
    if why is None:
        return
    for name in {file.name for file in plan.files} & set(damaged_weights(snapshot)):
        _drop(folder, snapshot / name)
    _refuse_edits(snapshot, plan, why)
    raise failure("incomplete_download", asked, why)


def _refuse_edits(snapshot: Path, plan: DownloadPlan, why: str) -> None:
    """Raises `Refused` (not_servable) if engines cannot use a file because of an edit."""
    broken = inspect(snapshot).broken
    for file in plan.files:
        place = snapshot / file.name
        if file.name not in broken and not (is_text(file.name) and _looks_begun(place, file)):
            continue
        if content_hash(place, file.etag) == file.etag:
            continue  # the hub's is no better
        hint = to_correct(place, plan.repo_id, plan.commit)
        raise Refused("not_servable", f"{plan.repo_id} cannot be served", why=why, hint=hint)


def _looks_begun(place: Path, file: HubFile) -> bool:
    size = _size(place)
    try:
        return size not in (None, file.size) and is_begun_only(str(place), file.name, size or 0, file.size)
    except (OSError, Damaged):
        return False


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


def _found(hub: Path, plan: DownloadPlan) -> Snapshot:
    """The cache's own view of what was downloaded. Raises `Refused` (not_mlx)."""
    found = find(hub, plan.repo_id, plan.commit)
    whole = found if isinstance(found, Snapshot) or found is None else found.whole
    if whole is not None:
        return whole
    if isinstance(found, Skipped):
        _refuse_edits(found.path, plan, found.why)
    raise _not_mlx(plan, found.why if isinstance(found, Skipped) else "it is not in the cache after its download")


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
