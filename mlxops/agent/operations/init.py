"""`init`: register what the cache holds."""

from __future__ import annotations

from mlxops.agent.context import Context
from mlxops.agent.paths import require_folder
from mlxops.common.files import is_folder
from mlxops.core import planner
from mlxops.core.registry import Registry


def init(ctx: Context) -> dict[str, object]:
    from mlxops.agent.hub.cache import scan

    require_folder(ctx.paths.hub)
    there = is_folder(ctx.paths.hub)
    registry = ctx.usable_registry()
    if not there:
        ctx.note(f"there was no cache at {ctx.paths.hub}; is `hub` in hosts.yaml right?", "warning")
    found = scan(ctx.paths.hub)
    rows = [(each.repo_id, each.revision, str(each.path)) for each in found.snapshots]
    new = planner.init_entries(registry, rows)

    def add(current: Registry) -> Registry:
        nonlocal new
        new = planner.init_entries(current, rows)
        return current.add(new)

    if new and not ctx.request.dry_run:
        ctx.store.registry.update(add)
        ctx.remember(command="init", added=sorted(new))
    return {
        "added": sorted(new),
        "existing": sorted(repo_id for repo_id, _, _ in rows if repo_id not in new),
        "skipped": [{"repo_id": each.repo_id, "path": str(each.path), "why": each.why} for each in found.skipped],
        "changed": bool(new) and not ctx.request.dry_run,
        "dry_run": ctx.request.dry_run,
        "hub": str(ctx.paths.hub),
    }
