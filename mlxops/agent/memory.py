"""Does a model fit in memory beside what serves already? An estimate, with its numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mlxops.agent.place import Place
from mlxops.agent.snapshot import inspect
from mlxops.core.errors import Refused
from mlxops.core.planner import LoadPlan
from mlxops.core.registry import Registry
from mlxops.core.world import World

OVERHEAD = 1.1
"""Weights plus a tenth for the engine itself and a short context."""
GPU_SHARE = 0.75
"""What macOS lets the GPU wire by default: about three quarters of RAM."""


def budget(where: Place) -> int:
    """Bytes that all servers together may take."""
    if where.settings.memory is not None:
        return where.settings.memory
    if sys.platform == "darwin":
        wired = _sysctl("iogpu.wired_limit_mb") * 1024 * 1024
        return wired or int(_sysctl("hw.memsize") * GPU_SHARE)
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 0.9)


def _sysctl(name: str) -> int:
    command = ["/usr/sbin/sysctl", "-n", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return int(done.stdout.strip() or 0) if done.returncode == 0 else 0


def check_fits(where: Place, registry: Registry, world: World, plan: LoadPlan, weight_bytes: int) -> None:
    """Raises `Refused` (does_not_fit) with the numbers and what would make room."""
    need = int(weight_bytes * OVERHEAD)
    leaving = {view.port for view in plan.stops}
    serving: dict[str, tuple[int, int]] = {}
    for view in world.ports.values():
        entry = registry.models.get(view.model or "")
        if view.owner is not None and view.port not in leaving and entry is not None and entry.cache_path:
            weights = inspect(Path(entry.cache_path)).weight_bytes
            serving[entry.name] = (view.port, max(int(weights * OVERHEAD), view.memory_bytes or 0))
    used = sum(size for _, size in serving.values())
    limit = budget(where)
    if used + need <= limit:
        return
    listed = ", ".join(f"{name} on {port} {_gb(size)}" for name, (port, size) in serving.items()) or "nothing"
    room = _smallest_room(serving, used + need - limit)
    raise Refused(
        "does_not_fit",
        f"{plan.target.name} does not fit in memory: it needs about {_gb(need)} of {_gb(limit)}",
        why=f"already serving: {listed}",
        hint=("make room: " + "; ".join(f"mlxctl unload {port}" for port in room) if room else "choose a smaller model")
        + "; or take the risk: --overcommit",
        details={"need_bytes": need, "used_bytes": used, "budget_bytes": limit},
    )


def _smallest_room(serving: dict[str, tuple[int, int]], missing: int) -> list[int]:
    """The ports whose unloading makes room, as few as possible; empty if nothing does."""
    room, freed = [], 0
    for port, size in sorted(serving.values(), key=lambda row: -row[1]):
        if freed >= missing:
            break
        room.append(port)
        freed += size
    return room if freed >= missing else []


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
