"""The memory of the host, and how Linux reports it and the memory of its processes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from mlxops.core.frozen import dataclass


@dataclass(frozen=True)
class HostMemory:
    """The host's memory in bytes. None: not known, or this system has no such thing."""

    total: int
    in_use: int | None = None
    """What cannot be had without swapping or ending a process."""
    wired: int | None = None
    """macOS: memory that cannot be swapped. The GPU's buffers are part of it."""
    unexplained_wired: int | None = None
    """macOS: how much more is wired than all visible processes hold."""
    gpu_limit: int | None = None
    """macOS: the most that the GPU may wire."""
    gpu_limit_set: bool = False
    """An administrator set the limit. It is forgotten at a reboot."""
    pressure: str | None = None
    """macOS: normal, warning or critical."""
    stalled_percent: float | None = None
    """Linux: the share of the last 10 s in which a process waited for memory."""
    swap_total: int | None = None
    swap_used: int | None = None


def linux_memory(root: Path) -> HostMemory:
    """Read /proc/meminfo and /proc/pressure/memory (proc(5)). `root`: /proc. Raises `OSError`."""
    fields = kilobytes((root / "meminfo").read_text())
    total, available = fields["MemTotal"], fields.get("MemAvailable")
    swap, swap_free = fields.get("SwapTotal"), fields.get("SwapFree")
    stalled = None
    with contextlib.suppress(OSError, ValueError):  # a kernel without PSI, or with it turned off
        stalled = _stalled_percent((root / "pressure" / "memory").read_text())
    return HostMemory(
        total,
        in_use=None if available is None else total - available,
        stalled_percent=stalled,
        swap_total=swap,
        swap_used=None if swap is None or swap_free is None else swap - swap_free,
    )


def kilobytes(text: str) -> Mapping[str, int]:
    """Return the bytes of each `Name:  123 kB` line."""
    lines = (line.split() for line in text.splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[2:] == ["kB"]}


def _stalled_percent(text: str) -> float:
    """Return avg10 of the line `some` (Documentation/accounting/psi.rst)."""
    some = next(line for line in text.splitlines() if line.startswith("some "))
    return float(some.split()[1].removeprefix("avg10="))
