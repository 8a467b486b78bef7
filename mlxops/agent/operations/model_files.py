"""Find a model's files in the cache."""

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
    """A complete snapshot of a model."""

    revision: str
    path: Path
    size_bytes: int


def cached(ctx: Context, target: ModelRef) -> ModelFiles | None:
    """Return the target's files, without using the network. None: they have to be downloaded.

    Raises `Refused` (not_servable) if the files are there but cannot be served.
    """
    from mlxops.agent.hub.cache import Skipped, Snapshot, find
    from mlxops.agent.hub.snapshot import correction_hint, inspect

    if target.entry is not None and not target.repoint:
        files = registered(target.entry)
        if files is not None:
            return files
    copy = find(ctx.paths.hub, target.repo_id, target.revision)
    whole = copy if isinstance(copy, Snapshot) or copy is None else copy.whole
    if whole is not None:
        return ModelFiles(whole.revision, whole.path, whole.size_bytes)
    if isinstance(copy, Skipped) and not copy.incomplete:
        hint = "choose a repository with MLX weights, for example of mlx-community"
        if copy.path.parent.name == "snapshots" and not copy.why.startswith("not MLX"):
            repo = f"{target.repo_id}@{copy.path.name}"
            broken = inspect(copy.path).broken
            hint = f"repair {copy.path}; this downloads what was deleted there: `mlxctl pull --repo {repo}`"
            if broken:
                hint = correction_hint(copy.path / broken[0], target.repo_id, copy.path.name)
        raise Refused("not_servable", f"{target.repo_id} cannot be served", why=copy.why, hint=hint)
    return None


def registered(model: Model) -> ModelFiles | None:
    """Return the files at the entry's cache_path if they are a complete snapshot of the entry's revision."""
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
