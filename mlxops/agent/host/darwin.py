"""Read memory figures of macOS: the footprint of a process, and the host's memory.

The kernel copies C structures into a buffer. Their layouts are those of Apple's published headers (XNU), named at each.
This was not run on a Mac: tests build the structures byte by byte and decode recorded values.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Callable, Iterable
from functools import cache

from mlxops.agent.host.memory import HostMemory

LIBRARY = "/usr/lib/libSystem.B.dylib"
MIB = 1024 * 1024

RUSAGE_INFO_V4 = 4
RUSAGE = struct.Struct("=16s35Q")
"""struct rusage_info_v4 of bsd/sys/resource.h: a UUID, then 35 numbers."""
_PHYS_FOOTPRINT = 8
"""ri_phys_footprint is the eighth number. The first eight are the same in all versions."""

HOST_VM_INFO64 = 4
VM_STATISTICS = struct.Struct("=4I9Q2I4Q4IQ")
"""struct vm_statistics64 of osfmk/mach/vm_statistics.h. Counts are pages."""
_WIRED, _INTERNAL, _COMPRESSED = 3, 22, 23
"""The places of wire_count, internal_page_count and total_uncompressed_pages_in_compressor."""

SWAP = struct.Struct("=3QIi")
"""struct xsw_usage of bsd/sys/sysctl.h: total, available, used, page size, encrypted."""

PRESSURE = {1: "normal", 2: "warning", 4: "critical"}
"""kern.memorystatus_vm_pressure_level: dispatch's levels (bsd/kern/kern_memorystatus_notify.c)."""

SMALL_MAC = 32 * 1024 * MIB
"""Up to this size, a third of RAM is kept from the GPU by default; above it, a quarter."""

Sysctl = Callable[[str], bytes | None]
"""Return the value of a kernel variable; None if there is none, or it may not be read."""


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(LIBRARY, use_errno=True)


def footprint(pid: int) -> int | None:
    """Return the bytes that a process holds: 0 if it has ended, None if it is another user's.

    It is the number that macOS compares when memory is short. The GPU's buffers are part of it.
    """
    buffer = ctypes.create_string_buffer(RUSAGE.size)
    if _library().proc_pid_rusage(ctypes.c_int(pid), ctypes.c_int(RUSAGE_INFO_V4), buffer) == 0:
        return decode_footprint(buffer.raw)
    return 0 if ctypes.get_errno() == errno.ESRCH else None


def decode_footprint(usage: bytes) -> int:
    """`usage`: a rusage_info_v4."""
    return int(RUSAGE.unpack(usage)[_PHYS_FOOTPRINT])


def host_memory(pids: Iterable[int]) -> HostMemory:
    """`pids`: all processes."""
    return decode_host_memory(sysctl, vm_statistics(), _held(pids))


def unexplained(pids: Iterable[int]) -> int | None:
    """Return how much more is in use than `pids`, all processes, hold; None if not known."""
    in_use = decode_host_memory(sysctl, vm_statistics(), 0).in_use
    return None if in_use is None else in_use - _held(pids)


def _held(pids: Iterable[int]) -> int:
    """Return what processes hold together. Those of other users count as nothing."""
    return sum(footprint(pid) or 0 for pid in pids)


def decode_host_memory(sysctl: Sysctl, statistics: bytes | None, held: int) -> HostMemory:
    """`statistics`: a vm_statistics64; None if the kernel did not return one. `held`: by all visible processes."""
    total, page = number(sysctl("hw.memsize")) or 0, number(sysctl("hw.pagesize")) or 0
    wired, internal, compressed = page_bytes(statistics, page) if statistics else (None, 0, 0)
    limit = (number(sysctl("iogpu.wired_limit_mb")) or 0) * MIB
    swap_total, swap_used = _swap(sysctl("vm.swapusage"))
    return HostMemory(
        total,
        # Compressed memory counts with its full size, as in the footprints of its processes.
        in_use=None if wired is None else wired + internal + compressed,
        wired=wired,
        unexplained_wired=None if wired is None else max(0, wired - held),
        gpu_limit=limit or default_gpu_limit(total),
        gpu_limit_default=default_gpu_limit(total),
        gpu_limit_set=limit > 0,
        pressure=PRESSURE.get(number(sysctl("kern.memorystatus_vm_pressure_level")) or 0),
        swap_total=swap_total,
        swap_used=swap_used,
    )


def page_bytes(statistics: bytes, page: int) -> tuple[int, int, int]:
    """Return the wired, internal and compressed bytes of a vm_statistics64. `page`: the size of a page."""
    pages = VM_STATISTICS.unpack(statistics)
    return pages[_WIRED] * page, pages[_INTERNAL] * page, pages[_COMPRESSED] * page


def default_gpu_limit(total: int) -> int:
    """Return how much of `total` bytes of RAM the GPU may wire if iogpu.wired_limit_mb is 0 or does not exist.

    Apple does not document it. Metal reports it as recommendedMaxWorkingSetSize: 10,923 MiB on Macs with 16 GB, 21,845
    with 32, 49,152 with 64 and 98,304 with 128 (logs in llama.cpp's issues, such as #1870). macOS 26 allows more: 107.5
    GiB of 128 were reported (antirez/ds4 #893). This returns the older, smaller share.
    """
    return total * 2 // 3 if total <= SMALL_MAC else total * 3 // 4


def number(value: bytes | None) -> int | None:
    return int.from_bytes(value, "little") if value else None


def _swap(value: bytes | None) -> tuple[int | None, int | None]:
    if value is None or len(value) != SWAP.size:
        return None, None
    total, _, used, *_ = SWAP.unpack(value)
    return total, used


def sysctl(name: str) -> bytes | None:
    """Read a kernel variable (sysctlbyname(3)) of up to 64 bytes."""
    buffer, size = ctypes.create_string_buffer(64), ctypes.c_size_t(64)
    failed = _library().sysctlbyname(name.encode(), buffer, ctypes.byref(size), None, ctypes.c_size_t(0))
    return None if failed else buffer.raw[: size.value]


def vm_statistics() -> bytes | None:
    """Return the kernel's vm_statistics64 (host_statistics64; sizes are counted in 32-bit words)."""
    library = _library()
    library.mach_host_self.restype = ctypes.c_uint
    buffer, words = ctypes.create_string_buffer(VM_STATISTICS.size), ctypes.c_uint(VM_STATISTICS.size // 4)
    host = ctypes.c_uint(library.mach_host_self())
    failed = library.host_statistics64(host, ctypes.c_int(HOST_VM_INFO64), buffer, ctypes.byref(words))
    return None if failed else buffer.raw
