"""The kernel's count of the processes that it killed for memory in a control group (cgroup).

Sources: cgroups(7); Documentation/admin-guide/cgroup-v2.rst (memory.events) and cgroup-v1/memory.rst
(memory.oom_control).
"""

from __future__ import annotations

import os
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
_UNLIMITED = 1 << 60
"""Version 1 writes no limit as a number near 2**63."""


def counter_of(pid: int, groups: Path = GROUPS, processes: Path = Path("/proc")) -> Path | None:
    """Return the file with the count of a process's group; None if there is none, as on macOS."""
    try:
        text = (processes / str(pid) / "cgroup").read_text(errors="replace")
    except OSError:
        return None
    paths = [path for line in text.splitlines() if (path := _counter(line, groups)) and os.access(path, os.R_OK)]
    return paths[0] if paths else None


def _counter(line: str, groups: Path) -> Path | None:
    """`line`: `0::/path` in version 2, `N:memory:/path` in version 1."""
    number, _, rest = line.partition(":")
    controllers, _, path = rest.partition(":")
    if (number, controllers) == ("0", ""):
        return groups / path.lstrip("/") / "memory.events"
    if "memory" in controllers.split(","):
        return groups / "memory" / path.lstrip("/") / "memory.oom_control"
    return None


def kills(counter: Path | None) -> int | None:
    """Return how many processes of the group were killed for memory; None if that is not known."""
    try:
        lines = counter.read_text().splitlines() if counter else []
    except OSError:  # the group was removed
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def room_of(pid: int, groups: Path = GROUPS, processes: Path = Path("/proc")) -> int | None:
    """Return the bytes that the group of a process may still take; None if it has no limit, or none that is seen."""
    counter = counter_of(pid, groups, processes)
    if counter is None:
        return None
    names = ("memory.max", "memory.current") if counter.name == "memory.events" else _VERSION_1
    try:
        limit, used = (int((counter.parent / name).read_text()) for name in names)
    except (OSError, ValueError):  # ValueError: the limit is `max`
        return None
    return max(0, limit - used) if limit < _UNLIMITED else None
