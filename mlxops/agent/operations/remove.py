"""`remove`: delete the files of a model from the cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlxops.agent.context import Context, model_lock, repo_lock
from mlxops.agent.hub.cache import find, roots
from mlxops.agent.operations.model_files import ModelFiles
from mlxops.agent.state.store import Lock
from mlxops.core import names
from mlxops.core.commands.remove import Remove, RemoveResult
from mlxops.core.errors import Busy, Refused
from mlxops.core.ports import State, World
from mlxops.core.records import Operation
from mlxops.core.refusals import unknown_model, unknown_port
from mlxops.core.registry import Model, Registry
from mlxops.core.text import amount


def run(ctx: Context, request: Remove) -> RemoveResult:
    """Delete the files of a model's revision, registered or only pulled. Keep its entry and other revisions."""
    from mlxops.agent.hub.contents import printable
    from mlxops.agent.hub.removal import delete
    from mlxops.agent.hub.snapshot import edited

    name = names.model_name(request.model or "")
    registry = ctx.usable_registry()
    entry = registry.named(name) or _only_pulled(ctx, name)
    if entry is None:
        raise unknown_model(name, registry)
    files = _files(ctx, entry)
    if files is None:
        return RemoveResult(entry.name, changed=False, freed_bytes=0, dry_run=request.dry_run)
    sharing = _sharing(ctx, registry, entry, files)
    with _hold_files(ctx, entry, sharing):
        registry = ctx.registry()
        sharing = _sharing(ctx, registry, entry, files)
        world = ctx.observe(registry)
        _refuse_loading(world, entry)
        _refuse_in_use(registry, world, sharing)
        edited_names = [printable(file.name) for file in edited(files.path)] if files.revision else []
        repo, commit = (files.path.parent.parent, files.revision) if files.revision else (files.path, None)
        deleted = delete(repo, commit, dry_run=request.dry_run)
    if not request.dry_run:
        ctx.remember(command="remove", model=entry.name, repo_id=entry.repo_id, revision=files.revision)
    for other in sharing:
        if other.name != entry.name:
            ctx.note(f"{other.name} has the same files", "warning")
    if deleted.linked_bytes:
        linked = f"{amount(deleted.linked_bytes)} of {files.path} lie behind links, outside of its folder"
        ctx.note(f"{linked}: the links are removed, the files are left", "warning")
    if edited_names:
        verb = "would be" if request.dry_run else "were"
        ctx.note(
            f"files that were edited by hand {verb} deleted with them: {', '.join(edited_names)}"[:1000], "warning"
        )
    if deleted.own:
        ctx.note(f"kept, because no download put it there: {', '.join(deleted.own)}"[:1000], "warning")
    _warn_of_copies(ctx, entry, files)
    return RemoveResult(
        model=entry.name,
        repo_id=entry.repo_id,
        revision=files.revision or None,
        path=str(files.path),
        freed_bytes=deleted.freed_bytes,
        linked_bytes=deleted.linked_bytes,
        kept=tuple(deleted.kept),
        kept_files=tuple(deleted.own),
        changed=not request.dry_run,
        dry_run=request.dry_run,
    )


def _warn_of_copies(ctx: Context, entry: Model, files: ModelFiles) -> None:
    """Warn of copies of the model in other roots of the cache."""
    for root in roots(ctx.paths.hub):
        copy = root / f"models--{(entry.repo_id or '').replace('/', '--')}"
        if copy.is_dir() and not files.path.is_relative_to(copy):
            ctx.note(f"another copy of it stays: {copy}", "warning")


def _only_pulled(ctx: Context, name: str) -> Model | None:
    """Return an entry for a repository that is in the cache but not in the registry."""
    cached = names.is_repo_id(name) and find(ctx.paths.hub, name, None) is not None
    return Model(name, repo_id=name) if cached else None


def _sharing(ctx: Context, registry: Registry, entry: Model, files: ModelFiles) -> list[Model]:
    """Return every model that uses these files."""
    others = (model for model in registry.models.values() if model.name != entry.name)
    return [entry, *(model for model in others if _uses(ctx, model, files))]


def _files(ctx: Context, entry: Model) -> ModelFiles | None:
    """Return the entry's snapshot, complete or not.

    If its repository has no snapshot, return the repository's folder, with an empty revision. If neither is in one of
    our caches, return None.
    """
    path = Path(entry.cache_path) if entry.cache_path and os.path.isabs(entry.cache_path) else None
    if path is None or not path.is_dir() or not path.name.startswith(entry.revision or ""):
        copy = find(ctx.paths.hub, entry.repo_id, entry.revision) if entry.repo_id else None
        path = copy.path if copy else None
    if path is None:
        return None
    caches = roots(ctx.paths.hub)
    if path.parent.name == "snapshots" and path.parent.parent.parent in caches:
        return ModelFiles(path.name, path, 0)
    return ModelFiles("", path, 0) if path.parent in caches and path.name.startswith("models--") else None


def _uses(ctx: Context, model: Model, files: ModelFiles) -> bool:
    theirs = _files(ctx, model)
    return theirs is not None and theirs.path.resolve() == files.path.resolve()


def _refuse_in_use(registry: Registry, world: World, models: list[Model]) -> None:
    """Refuse to remove files that a model uses, is about to use, or uses after the next restore.

    Raises `Refused`: in_use; unknown_port if a port's state could not be determined.
    """
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
    """Refuse to remove files that a load is about to serve under a new name. Raises `Refused` (in_use).

    Such a load holds no lock of the models that share the files. But its operation names its repository.
    """
    for view in world.ports.values():
        repo = (view.operation.repo or "").partition("@")[0] if view.operation else ""
        if repo and repo == entry.repo_id:
            raise _in_use(entry, view.port, f"{view.operation} works with them")


def _in_use(model: Model, port: int, why: str) -> Refused:
    return Refused(
        "in_use",
        f"the files of {model.name} are in use on port {port}",
        why=why,
        hint=f"`mlxctl unload {port}`; then remove it",
    )


@contextmanager
def _hold_files(ctx: Context, entry: Model, sharing: list[Model]) -> Iterator[None]:
    """Hold the locks of the repository and of all models that share its files. Raises `Busy`."""
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
                    why="its files cannot be removed at the same time",
                    hint=f"wait for it: `mlxctl ops --follow {held.id}`",
                    details={"operation": held.id},
                )
            locks.append(held)
        yield
    finally:
        for lock in locks:
            lock.release()
