"""The memory of the host, and how Linux reports it and the memory of its processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
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
    gpu_limit_default: int | None = None
    """macOS: the limit that holds while none is set."""
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


def linux_unexplained(root: Path, pids: Iterable[int]) -> int | None:
    """Return the bytes in use that are neither private memory of a process nor shared memory of `pids`.

    The kernel counts private memory for all processes together (AnonPages), so a process that starts or ends during
    this changes nothing. None if the kernel does not say. Raises `OSError`.
    """
    fields = kilobytes((root / "meminfo").read_text())
    available, private = fields.get("MemAvailable"), fields.get("AnonPages")
    if available is None or private is None:
        return None
    shared = max((_shared(root, pid) for pid in pids), default=0)
    return fields["MemTotal"] - available - _free_in_lists(root) - private - shared


def _free_in_lists(root: Path) -> int:
    """Return the free bytes in the processors' own lists (/proc/zoneinfo, `count` of the pagesets).

    They may be hundreds of megabytes just after a process has ended, and are not part of MemAvailable.
    """
    try:
        lines = (line.split() for line in (root / "zoneinfo").read_text().splitlines())
    except OSError:
        return 0
    return sum(int(words[1]) for words in lines if words[:1] == ["count:"]) * os.sysconf("SC_PAGE_SIZE")


def _shared(root: Path, pid: int) -> int:
    """Return the shared memory that a process uses, without files; 0 if it has ended."""
    with contextlib.suppress(OSError):
        return kilobytes((root / str(pid) / "status").read_text(errors="replace")).get("RssShmem", 0)
    return 0


def kilobytes(text: str) -> Mapping[str, int]:
    """Return the bytes of each `Name:  123 kB` line."""
    lines = (line.split() for line in text.splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[2:] == ["kB"]}


def _stalled_percent(text: str) -> float:
    """Return avg10 of the line `some` (Documentation/accounting/psi.rst)."""
    some = next(line for line in text.splitlines() if line.startswith("some "))
    return float(some.split()[1].removeprefix("avg10="))
