"""Judge a host's disks, memory and power settings. Pure: from what was observed to findings.

The formats of macOS are those of pmset(1) and fdesetup(8). Tests have recorded output. They were not run on
macOS.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from mlxops.core.doctor.findings import Finding, FindingCode, Level
from mlxops.core.frozen import dataclass
from mlxops.core.text import amount

TESTED_PYTHONS = ((3, 11), (3, 12), (3, 13))
FULL_BYTES, LOW_BYTES = 500_000_000, 5_000_000_000
FEW_INODES = 10_000
SWAP_SHARE = 0.1
"""Share of RAM in swap from which servers are slow."""
STALLED_PERCENT = 60.0
"""Share of the last seconds in which a process waited for memory (PSI, "some")."""


@dataclass(frozen=True)
class Disk:
    """The file system of one of our folders. `inodes` None: it makes them as needed, as APFS does."""

    what: str
    path: str
    free_bytes: int
    free_inodes: int | None = None


def disk_findings(disk: Disk) -> Iterator[Finding]:
    free = f"{amount(disk.free_bytes)} are free on the disk of {disk.what} ({disk.path})"
    if disk.free_bytes < FULL_BYTES:
        yield Finding.of(FindingCode.DISK_FULL, free)
    elif disk.free_bytes < LOW_BYTES:
        yield Finding.of(FindingCode.DISK_LOW, free)
    if disk.free_inodes is not None and disk.free_inodes < FEW_INODES:
        message = f"{disk.free_inodes} files more fit on the disk of {disk.what} ({disk.path})"
        yield Finding.of(FindingCode.INODES_LOW, message, path=disk.path)


@dataclass(frozen=True)
class Memory:
    """The memory of a host in bytes. None: not known."""

    total: int | None = None
    pressure: Level | None = None
    """WARNING or ERROR; INFO is normal."""
    swapped: int | None = None


def memory_findings(memory: Memory, budget: int, *, configured: bool) -> Iterator[Finding]:
    """`configured`: hosts.yaml sets the budget."""
    total = memory.total
    if configured and total is not None and budget > total:
        message = f"`memory` in hosts.yaml is {amount(budget)}, and the host has {amount(total)}"
        yield Finding.of(FindingCode.BUDGET_HIGH, message)
    if memory.pressure in (Level.WARNING, Level.ERROR):
        message = "the system reports a critical shortage of memory"
        if memory.pressure is Level.WARNING:
            message = "the system reports that memory is short"
        yield Finding.of(FindingCode.MEMORY_PRESSURE, message, level=memory.pressure)
    if memory.swapped and total and memory.swapped > total * SWAP_SHARE:
        yield Finding.of(FindingCode.SWAP_USED, f"{amount(memory.swapped)} are swapped out")


def pressure_level(macos: str | None, stalled_percent: float | None) -> Level | None:
    """`macos`: normal, warning or critical. `stalled_percent`: Linux's share of time lost to a lack of memory."""
    if stalled_percent is not None:
        return Level.WARNING if stalled_percent > STALLED_PERCENT else Level.INFO
    return {"normal": Level.INFO, "warning": Level.WARNING, "critical": Level.ERROR}.get(macos or "")


def power_findings(pmset: str, fdesetup: str, *, unattended: bool) -> Iterator[Finding]:
    """Read `pmset -g` and `fdesetup status`; "" if the system has no such program.

    `unattended`: something is to start at boot, so there may be no person to unlock the disk.
    """
    if re.search(r"^FileVault is On", fdesetup, re.MULTILINE):
        level = FindingCode.FILEVAULT.level if unattended else Level.INFO
        message = "FileVault is on: after a reboot or a power failure the host waits for a password"
        yield Finding.of(FindingCode.FILEVAULT, message, level=level)
    settings = dict(re.findall(r"^ *([a-z]+) +(\d+)", pmset, re.MULTILINE))
    if settings.get("autorestart") == "0":
        yield Finding.of(FindingCode.NO_RESTART, "the host does not start again after a power failure (autorestart 0)")
    if settings.get("sleep", "0") != "0":
        yield Finding.of(FindingCode.SLEEPS, f"the host sleeps after {settings['sleep']} minutes without a user")
