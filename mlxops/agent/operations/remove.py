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
    """Delete the files of a model's revision, registered or only pulled. Its entry stays, and so do other revisions."""
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
    with _nobody_works_with(ctx, entry, sharing):
        registry = ctx.registry()
        sharing = _sharing(ctx, registry, entry, files)
        world = ctx.observe(registry)
        _refuse_loading(world, entry)
        _refuse_in_use(registry, world, sharing)
        mine = [printable(each.name) for each in edited(files.path)] if files.revision else []
        repo, commit = (files.path.parent.parent, files.revision) if files.revision else (files.path, None)
        deleted = delete(repo, commit, dry_run=request.dry_run)
    if not request.dry_run:
        ctx.remember(command="remove", model=entry.name, repo_id=entry.repo_id, revision=files.revision)
    for other in sharing:
        if other.name != entry.name:
            ctx.note(f"{other.name} has the same files", "warning")
    if deleted.linked_bytes:
        left = f"{amount(deleted.linked_bytes)} of {files.path} lie behind links, outside of its folder"
        ctx.note(f"{left}: the links are removed, the files are left", "warning")
    if mine:
        goes = "would go with them" if request.dry_run else "went with them"
        ctx.note(f"what somebody edited there {goes}: {', '.join(mine)}"[:1000], "warning")
    if deleted.own:
        ctx.note(f"kept, because no download put it there: {', '.join(deleted.own)}"[:1000], "warning")
    _tell_copies(ctx, entry, files)
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
        hint=f"`mlxctl unload {port}`; then remove it",
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
                    hint=f"wait for it: `mlxctl ops --follow {held.id}`",
                    details={"operation": held.id},
                )
            locks.append(held)
        yield
    finally:
        for lock in locks:
            lock.release()
