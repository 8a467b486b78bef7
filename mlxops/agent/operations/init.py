"""`init`: register the models of the cache."""

from __future__ import annotations

from mlxops.agent.context import Context
from mlxops.agent.paths import require_folder
from mlxops.common.files import is_folder
from mlxops.core import planner
from mlxops.core.commands.init import Init, InitResult, SkippedRow
from mlxops.core.registry import Registry


def run(ctx: Context, request: Init) -> InitResult:
    from mlxops.agent.hub.cache import scan

    require_folder(ctx.paths.hub)
    cache_exists = is_folder(ctx.paths.hub)
    registry = ctx.usable_registry()
    if not cache_exists:
        ctx.note(f"there was no cache at {ctx.paths.hub}; is `hub` in hosts.yaml right?", "warning")
    contents = scan(ctx.paths.hub)
    rows = [(snapshot.repo_id, snapshot.revision, str(snapshot.path)) for snapshot in contents.snapshots]
    new = planner.init_entries(registry, rows)

    def add(current: Registry) -> Registry:
        nonlocal new
        new = planner.init_entries(current, rows)
        return current.add(new)

    if new and not request.dry_run:
        ctx.store.registry.update(add)
        ctx.remember(command="init", added=sorted(new))
    return InitResult(
        added=tuple(sorted(new)),
        existing=tuple(sorted(repo_id for repo_id, _, _ in rows if repo_id not in new)),
        skipped=tuple(SkippedRow(skipped.repo_id, str(skipped.path), skipped.why) for skipped in contents.skipped),
        changed=bool(new) and not request.dry_run,
        dry_run=request.dry_run,
        hub=str(ctx.paths.hub),
    )
