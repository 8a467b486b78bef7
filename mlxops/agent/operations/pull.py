"""`pull` and `remove`: the files of a model, without its server. And the one way in which operations download."""

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

from mlxops.agent.context import Context, model_lock, repo_lock
from mlxops.agent.hub.cache import Snapshot, find, roots
from mlxops.agent.operations.model_files import ModelFiles
from mlxops.agent.paths import require
from mlxops.agent.state.operation_log import named
from mlxops.agent.state.store import Lock
from mlxops.core import names
from mlxops.core.errors import Busy, Interrupted, Refused
from mlxops.core.planner import unknown_model, unknown_port
from mlxops.core.ports import State, World
from mlxops.core.protocol import Phase, Progress
from mlxops.core.records import Operation
from mlxops.core.registry import Model, Registry
from mlxops.core.text import amount

if TYPE_CHECKING:
    from mlxops.agent.hub.download import Check

FOLLOW_SECONDS = 0.2
LET_GO_SECONDS = 2.0
"""How long the threads of a download that nobody wants any more get to end."""
T = TypeVar("T")


def pull(ctx: Context) -> dict[str, object]:
    """Bring what the hub has now into the cache; with `verify`, compare every file's content with the hub's hashes."""
    from mlxops.agent.hub.download import tell_edits, verify

    began = time.monotonic()
    repo_id, revision = names.repo(ctx.request.text("repo") or "")
    before = find(ctx.paths.hub, repo_id, revision)
    if ctx.request.dry_run:
        here = before.revision if isinstance(before, Snapshot) else None
        return {"repo_id": repo_id, "revision": here, "changed": False, "dry_run": True}
    snapshot = fetch(ctx, repo_id, revision)
    verified = None
    if ctx.request.flag("verify"):
        ctx.emit(Phase("verify", f"{repo_id} at {snapshot.revision[:12]}: the content of every file"))
        verified = verify(repo_id, snapshot.revision, ctx.paths.hub, ctx.emit)
    tell_edits(snapshot, ctx.emit)
    changed = not (isinstance(before, Snapshot) and before.revision == snapshot.revision)
    if changed:
        ctx.remember(command="pull", repo_id=repo_id, revision=snapshot.revision)
    return {
        "repo_id": repo_id,
        "revision": snapshot.revision,
        "path": str(snapshot.path),
        "size_bytes": snapshot.size_bytes,
        "verified_files": verified,
        "changed": changed,
        "seconds": round(time.monotonic() - began, 3),
    }


def fetch(ctx: Context, repo_id: str, revision: str | None, check: Check | None = None) -> Snapshot:
    """Download a repository, or follow the operation that does, and see then what is left to do: mostly nothing.
    `check` may refuse before anything is downloaded.

    Raises what `hub.download` raises, and `Refused` (folder_missing). A download that is cancelled leaves nothing of a
    repository that was not there before, and of one that was what it had completed.
    """
    from mlxops.agent.hub.download import download

    require(ctx.paths.hub)
    folder = ctx.paths.hub / f"models--{repo_id.replace('/', '--')}"
    with _only_download(ctx, repo_id):
        new, begun = not os.path.lexists(folder), _half_files(folder)
        given_up = threading.Event()
        downloading = _beside(
            lambda: download(repo_id, revision, ctx.paths.hub, ctx.emit, given_up=given_up.is_set, check=check)
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
    journal = named(ctx.store.state / "ops", holder.id)
    told: Progress | None = None
    while ctx.store.holder(name) == holder:
        progress = journal.stand().progress if journal else None
        if progress is not None and progress != told:
            ctx.emit(progress)
            told = progress
        time.sleep(FOLLOW_SECONDS)


def remove(ctx: Context) -> dict[str, object]:
    """Delete the files of a model's revision, registered or only pulled. Its entry stays, and so do other revisions."""
    from mlxops.agent.hub.contents import printable
    from mlxops.agent.hub.removal import delete
    from mlxops.agent.hub.snapshot import edited

    name = names.model_name(ctx.request.text("model") or "")
    registry = ctx.usable_registry()
    entry = registry.named(name) or _only_pulled(ctx, name)
    if entry is None:
        raise unknown_model(name, registry)
    files = _files(ctx, entry)
    if files is None:
        return {"model": entry.name, "changed": False, "freed_bytes": 0, "kept": [], "dry_run": ctx.request.dry_run}
    sharing = _sharing(ctx, registry, entry, files)
    with _nobody_works_with(ctx, entry, sharing):
        registry = ctx.registry()
        sharing = _sharing(ctx, registry, entry, files)
        world = ctx.observe(registry)
        _refuse_loading(world, entry)
        _refuse_in_use(registry, world, sharing)
        mine = [printable(each.name) for each in edited(files.path)] if files.revision else []
        repo, commit = (files.path.parent.parent, files.revision) if files.revision else (files.path, None)
        deleted = delete(repo, commit, dry_run=ctx.request.dry_run)
    if not ctx.request.dry_run:
        ctx.remember(command="remove", model=entry.name, repo_id=entry.repo_id, revision=files.revision)
    for other in sharing:
        if other.name != entry.name:
            ctx.note(f"{other.name} has the same files", "warning")
    if deleted.linked_bytes:
        left = f"{amount(deleted.linked_bytes)} of {files.path} lie behind links, outside of its folder"
        ctx.note(f"{left}: the links are removed, the files are left", "warning")
    if mine:
        goes = "would go with them" if ctx.request.dry_run else "went with them"
        ctx.note(f"what somebody edited there {goes}: {', '.join(mine)}"[:1000], "warning")
    if deleted.own:
        ctx.note(f"kept, because no download put it there: {', '.join(deleted.own)}"[:1000], "warning")
    _tell_copies(ctx, entry, files)
    return {
        "model": entry.name,
        "repo_id": entry.repo_id,
        "revision": files.revision or None,
        "path": str(files.path),
        "freed_bytes": deleted.freed_bytes,
        "linked_bytes": deleted.linked_bytes,
        "kept": list(deleted.kept),
        "kept_files": list(deleted.own),
        "changed": not ctx.request.dry_run,
        "dry_run": ctx.request.dry_run,
    }


def _tell_copies(ctx: Context, entry: Model, files: ModelFiles) -> None:
    """Warn of copies of the model in other roots of the cache."""
    for root in roots(ctx.paths.hub):
        copy = root / f"models--{(entry.repo_id or '').replace('/', '--')}"
        if copy.is_dir() and not files.path.is_relative_to(copy):
            ctx.note(f"another copy of it stays: {copy}", "warning")


def _only_pulled(ctx: Context, name: str) -> Model | None:
    """A repository of the cache that the registry does not know."""
    here = names.is_repo_id(name) and find(ctx.paths.hub, name, None) is not None
    return Model(name, repo_id=name) if here else None


def _sharing(ctx: Context, registry: Registry, entry: Model, files: ModelFiles) -> list[Model]:
    """Every model that these files are of."""
    return [entry, *(each for each in registry.models.values() if each.name != entry.name and _uses(ctx, each, files))]


def _files(ctx: Context, entry: Model) -> ModelFiles | None:
    """Return the entry's snapshot, complete or not; its repository's folder, with an empty revision, if that has no
    snapshot; None if nothing of it lies in a cache of ours."""
    own = Path(entry.cache_path) if entry.cache_path and os.path.isabs(entry.cache_path) else None
    if own is None or not own.is_dir() or not own.name.startswith(entry.revision or ""):
        found = find(ctx.paths.hub, entry.repo_id, entry.revision) if entry.repo_id else None
        own = found.path if found else None
    if own is None:
        return None
    inside = roots(ctx.paths.hub)
    if own.parent.name == "snapshots" and own.parent.parent.parent in inside:
        return ModelFiles(own.name, own, 0)
    return ModelFiles("", own, 0) if own.parent in inside and own.name.startswith("models--") else None


def _uses(ctx: Context, model: Model, files: ModelFiles) -> bool:
    own = _files(ctx, model)
    return own is not None and own.path.resolve() == files.path.resolve()


def _refuse_in_use(registry: Registry, world: World, models: list[Model]) -> None:
    """Raises `Refused` (in_use) if one of the models serves, is about to, or is to come back; (unknown_port) if what
    serves could not be determined."""
    for view in world.ports.values():
        if view.state is State.UNKNOWN:
            raise unknown_port(view)
    for model in models:
        for view in world.ports.values():
            if view.owner is not None and view.model in {model.name, model.repo_id}:
                raise _in_use(model, view.port, f"it is {view.state} there, owner {view.owner}")
        if model.port is not None:
            raise _in_use(model, model.port, "the registry assigns it to that port, and restore would start it")


def _refuse_loading(world: World, entry: Model) -> None:
    """A load under a name that is not registered yet holds none of the models that share the files, but tells its
    repository. Raises `Refused` (in_use)."""
    for view in world.ports.values():
        repo = (view.operation.repo or "").partition("@")[0] if view.operation else ""
        if repo and repo == entry.repo_id:
            raise _in_use(entry, view.port, f"{view.operation} works with them")


def _in_use(model: Model, port: int, why: str) -> Refused:
    return Refused(
        "in_use",
        f"the files of {model.name} are in use on port {port}",
        why=why,
        hint=f"mlxctl unload {port}; then remove it",
    )


@contextmanager
def _nobody_works_with(ctx: Context, entry: Model, sharing: list[Model]) -> Iterator[None]:
    """Nobody downloads the repository, or starts or stops one of the models that share its files. Raises `Busy`."""
    if ctx.request.dry_run:
        yield
        return
    locks: list[Lock] = []
    try:
        for name in (repo_lock(entry.repo_id or ""), *(model_lock(model.name) for model in sharing)):
            held = ctx.store.lock(name, ctx.holder())
            if isinstance(held, Operation):
                raise Busy(
                    "busy",
                    f"another operation works with {entry.name}: {held}",
                    why="its files cannot be removed meanwhile",
                    hint=f"wait for it: mlxctl ops --follow {held.id}",
                    details={"operation": held.id},
                )
            locks.append(held)
        yield
    finally:
        for lock in locks:
            lock.release()
