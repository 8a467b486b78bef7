"""`pull`: download the files of a model, without starting it. All operations that download call `fetch`."""

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
THREAD_END_SECONDS = 2.0
"""Time for the threads of a cancelled download to end."""
T = TypeVar("T")


def run(ctx: Context, request: Pull) -> PullResult:
    """Download the hub's current files into the cache. With `verify`, compare each file's content with its hash."""
    from mlxops.agent.hub.download import verify, warn_of_edits

    began = time.monotonic()
    repo_id, revision = names.repo(request.repo or "")
    before = find(ctx.paths.hub, repo_id, revision)
    if request.dry_run:
        current = before.revision if isinstance(before, Snapshot) else None
        return PullResult(repo_id, current, changed=False, dry_run=True)
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
    """Download a repository. If another operation downloads it, follow that one, then download what is still missing.

    `check` may refuse before the download starts. If the download is cancelled, remove a repository that is new, and
    keep the completed files of one that was in the cache before.

    Raises what `hub.download` raises, and `Refused` (folder_missing).
    """
    from mlxops.agent.hub.download import download

    require_folder(ctx.paths.hub)
    folder = ctx.paths.hub / f"models--{repo_id.replace('/', '--')}"
    with _only_download(ctx, repo_id):
        new, earlier = not os.path.lexists(folder), _incomplete_files(folder)
        cancelled = threading.Event()
        downloading = _start_thread(
            lambda: download(repo_id, revision, ctx.paths.hub, ctx.emit, is_cancelled=cancelled.is_set, check=check)
        )
        try:
            return downloading.result()
        except Interrupted:
            cancelled.set()
            wait([downloading], THREAD_END_SECONDS)
            # A complete snapshot stays: a server may use it already.
            if new and not isinstance(find(ctx.paths.hub, repo_id, revision), Snapshot):
                shutil.rmtree(folder, ignore_errors=True)
                shutil.rmtree(folder.parent / ".locks" / folder.name, ignore_errors=True)
            # Threads that hang on the hub still hold the files' locks, so these files would look like a live download.
            for file in _incomplete_files(folder) - earlier:
                file.unlink(missing_ok=True)
            raise


def _incomplete_files(folder: Path) -> set[Path]:
    return set((folder / "blobs").glob("*.incomplete"))


def _start_thread(work: Callable[[], T]) -> Future[T]:
    """Run `work` in its own thread.

    Waiting for it can be interrupted; a read from an unresponsive hub cannot. Such a thread ends with the worker.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - `result` raises it again
            future.set_exception(error)

    threading.Thread(target=run, name="download", daemon=True).start()
    return future


@contextmanager
def _only_download(ctx: Context, repo_id: str) -> Iterator[None]:
    name = repo_lock(repo_id)
    while isinstance(held := ctx.store.lock(name, ctx.holder()), Operation):
        ctx.note(f"{repo_id} is being downloaded by {held}; following that")
        _relay_progress(ctx, name, held)
    try:
        yield
    finally:
        held.release()


def _relay_progress(ctx: Context, name: str, holder: Operation) -> None:
    """Emit the progress of the operation that downloads, until it releases its lock."""
    journal = find_operation(ctx.store.state / "ops", holder.id)
    reported: Progress | None = None
    while ctx.store.holder(name) == holder:
        progress = journal.state().progress if journal else None
        if progress is not None and progress != reported:
            ctx.emit(progress)
            reported = progress
        time.sleep(FOLLOW_SECONDS)
