"""The files of a model in the cache, as much of them as the operations need to know."""

from __future__ import annotations

import os
from pathlib import Path

from mlxops.agent.context import Context
from mlxops.core.errors import Refused
from mlxops.core.frozen import dataclass
from mlxops.core.planner import ModelRef
from mlxops.core.registry import Model


@dataclass(frozen=True)
class ModelFiles:
    """A complete snapshot, as much of it as a load needs to know."""

    revision: str
    path: Path
    size_bytes: int


def cached(ctx: Context, target: ModelRef) -> ModelFiles | None:
    """The target's files, if all of them are here: no network is asked. None: they have to be downloaded."""
    from mlxops.agent.hub.cache import Skipped, Snapshot, find
    from mlxops.agent.hub.snapshot import correction_hint, inspect

    if target.entry is not None and not target.repoint:
        own = registered(target.entry)
        if own is not None:
            return own
    found = find(ctx.paths.hub, target.repo_id, target.revision)
    whole = found if isinstance(found, Snapshot) or found is None else found.whole
    if whole is not None:
        return ModelFiles(whole.revision, whole.path, whole.size_bytes)
    if isinstance(found, Skipped) and not found.incomplete:
        hint = "choose a repository with MLX weights, for example of mlx-community"
        if found.path.parent.name == "snapshots" and not found.why.startswith("not MLX"):
            repo = f"{target.repo_id}@{found.path.name}"
            broken = inspect(found.path).broken
            hint = f"repair {found.path}; this downloads what was deleted there: `mlxctl pull --repo {repo}`"
            if broken:
                hint = correction_hint(found.path / broken[0], target.repo_id, found.path.name)
        raise Refused("not_servable", f"{target.repo_id} cannot be served", why=found.why, hint=hint)
    return None


def registered(model: Model) -> ModelFiles | None:
    """The entry's own cache_path, if it is a complete snapshot of the revision that the entry names."""
    from mlxops.agent.hub.snapshot import completeness

    if model.cache_path is None or not os.path.isabs(model.cache_path):
        return None
    path = Path(model.cache_path)
    if model.revision is not None and not path.name.startswith(model.revision):
        return None
    try:
        if not path.is_dir() or completeness(path) is not None:
            return None
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    except (OSError, ValueError):
        return None
    return ModelFiles(path.name, path, size)
