"""`pull`: download the files of a model, without its server. Every operation that downloads calls `fetch`."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mlxops.agent.context import Context, repo_lock
from mlxops.agent.hub.cache import Snapshot, find
from mlxops.agent.paths import require_folder
from mlxops.agent.state.operation_log import find_operation
from mlxops.core import names
from mlxops.core.commands.pull import Pull, PullResult
from mlxops.core.errors import Interrupted
from mlxops.core.protocol import Phase, Progress
from mlxops.core.records import Operation

if TYPE_CHECKING:
    from mlxops.agent.hub.download import FilesCheck

FOLLOW_SECONDS = 0.2
LET_GO_SECONDS = 2.0
"""How long the threads of a download that nobody wants any more get to end."""
T = TypeVar("T")


def run(ctx: Context, request: Pull) -> PullResult:
    """Bring what the hub has now into the cache; with `verify`, compare every file's content with the hub's hashes."""
    from mlxops.agent.hub.download import verify, warn_of_edits

    began = time.monotonic()
    repo_id, revision = names.repo(request.repo or "")
    before = find(ctx.paths.hub, repo_id, revision)
    if request.dry_run:
        here = before.revision if isinstance(before, Snapshot) else None
        return PullResult(repo_id, here, changed=False, dry_run=True)
    snapshot = fetch(ctx, repo_id, revision)
    verified = None
    if request.verify:
        ctx.emit(Phase("verify", f"{repo_id} at {snapshot.revision[:12]}: the content of every file"))
        verified = verify(repo_id, snapshot.revision, ctx.paths.hub, ctx.emit)
    warn_of_edits(snapshot, ctx.emit)
    changed = not (isinstance(before, Snapshot) and before.revision == snapshot.revision)
    if changed:
        ctx.remember(command="pull", repo_id=repo_id, revision=snapshot.revision)
    return PullResult(
        repo_id=repo_id,
        revision=snapshot.revision,
        path=str(snapshot.path),
        size_bytes=snapshot.size_bytes,
        verified_files=verified,
        changed=changed,
        seconds=round(time.monotonic() - began, 3),
    )


def fetch(ctx: Context, repo_id: str, revision: str | None, check: FilesCheck | None = None) -> Snapshot:
    """Download a repository, or follow the operation that does, and see then what is left to do: mostly nothing.
    `check` may refuse before anything is downloaded.

    Raises what `hub.download` raises, and `Refused` (folder_missing). A download that is cancelled leaves nothing of a
    repository that was not there before, and of one that was what it had completed.
    """
    from mlxops.agent.hub.download import download

    require_folder(ctx.paths.hub)
    folder = ctx.paths.hub / f"models--{repo_id.replace('/', '--')}"
    with _only_download(ctx, repo_id):
        new, begun = not os.path.lexists(folder), _half_files(folder)
        given_up = threading.Event()
        downloading = _beside(
            lambda: download(repo_id, revision, ctx.paths.hub, ctx.emit, is_cancelled=given_up.is_set, check=check)
        )
        try:
            return downloading.result()
        except Interrupted:
            given_up.set()
            wait([downloading], LET_GO_SECONDS)
            # Whole, it may be served by now.
            if new and not isinstance(find(ctx.paths.hub, repo_id, revision), Snapshot):
                shutil.rmtree(folder, ignore_errors=True)
                shutil.rmtree(folder.parent / ".locks" / folder.name, ignore_errors=True)
            # Its threads may still hang on the hub, and hold the locks by which a download that runs is told.
            for half in _half_files(folder) - begun:
                half.unlink(missing_ok=True)
            raise


def _half_files(folder: Path) -> set[Path]:
    return set((folder / "blobs").glob("*.incomplete"))


def _beside(work: Callable[[], T]) -> Future[T]:
    """Do it in a thread of its own: a wait can be interrupted, a read from a hub that stands still cannot. Such a
    thread ends with the worker."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
            future.set_exception(error)

    threading.Thread(target=run, name="download", daemon=True).start()
    return future


@contextmanager
def _only_download(ctx: Context, repo_id: str) -> Iterator[None]:
    name = repo_lock(repo_id)
    while isinstance(held := ctx.store.lock(name, ctx.holder()), Operation):
        ctx.note(f"{repo_id} is being downloaded by {held}; following that")
        _follow(ctx, name, held)
    try:
        yield
    finally:
        held.release()


def _follow(ctx: Context, name: str, holder: Operation) -> None:
    """Pass on the progress of whoever downloads, until it lets go."""
    journal = find_operation(ctx.store.state / "ops", holder.id)
    told: Progress | None = None
    while ctx.store.holder(name) == holder:
        progress = journal.state().progress if journal else None
        if progress is not None and progress != told:
            ctx.emit(progress)
            told = progress
        time.sleep(FOLLOW_SECONDS)
