"""macOS: the layouts of the kernel's structures, recorded values, and the calls.

No Mac ran these. The structures are built here member by member; a C compiler confirms their offsets; and the calls go
to a library with the same functions, which answers as a Mac does.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from mlxops.agent.host import darwin
from tests.lab.sshd import missing

GIB = 1024**3
MIB = 1024**2
PAGE = 16384
"""Of Macs with Apple's own processors."""

RUSAGE_INFO_V4 = (
    *("user_time", "system_time", "pkg_idle_wkups", "interrupt_wkups", "pageins", "wired_size", "resident_size"),
    *("phys_footprint", "proc_start_abstime", "proc_exit_abstime", "child_user_time", "child_system_time"),
    *("child_pkg_idle_wkups", "child_interrupt_wkups", "child_pageins", "child_elapsed_abstime"),
    *("diskio_bytesread", "diskio_byteswritten", "cpu_time_qos_default", "cpu_time_qos_maintenance"),
    *("cpu_time_qos_background", "cpu_time_qos_utility", "cpu_time_qos_legacy", "cpu_time_qos_user_initiated"),
    *("cpu_time_qos_user_interactive", "billed_system_time", "serviced_system_time", "logical_writes"),
    *("lifetime_max_phys_footprint", "instructions", "cycles", "billed_energy", "serviced_energy"),
    *("interval_max_phys_footprint", "runnable_time"),
)
"""The members of struct rusage_info_v4 after the 16 bytes of its UUID, each with 8 bytes (xnu, bsd/sys/resource.h)."""

VM_STATISTICS64 = (
    *(("free", 4), ("active", 4), ("inactive", 4), ("wire", 4), ("zero_fill", 8), ("reactivations", 8)),
    *(("pageins", 8), ("pageouts", 8), ("faults", 8), ("cow_faults", 8), ("lookups", 8), ("hits", 8), ("purges", 8)),
    *(("purgeable", 4), ("speculative", 4), ("decompressions", 8), ("compressions", 8), ("swapins", 8)),
    *(("swapouts", 8), ("compressor_page", 4), ("throttled", 4), ("external_page", 4), ("internal_page", 4)),
    ("total_uncompressed_pages_in_compressor", 8),
)
"""The members of struct vm_statistics64 with their bytes (xnu, osfmk/mach/vm_statistics.h)."""


def usage(**members: int) -> bytes:
    """Build a rusage_info_v4. A member that is not given has its own number."""
    numbers = [members.pop(name, index + 1) for index, name in enumerate(RUSAGE_INFO_V4)]
    assert not members
    return bytes(range(16)) + b"".join(number.to_bytes(8, "little") for number in numbers)


def statistics(**members: int) -> bytes:
    """Build a vm_statistics64; counts of pages."""
    sizes = dict(VM_STATISTICS64)
    assert members.keys() <= sizes.keys()
    return b"".join(members.get(name, 7).to_bytes(size, "little") for name, size in VM_STATISTICS64)


STUDIO_256: Mapping[str, bytes] = {
    "hw.memsize": (256 * GIB).to_bytes(8, "little"),
    "hw.pagesize": PAGE.to_bytes(8, "little"),
    "iogpu.wired_limit_mb": (241_644).to_bytes(4, "little"),
    "kern.memorystatus_vm_pressure_level": (1).to_bytes(4, "little"),
    "vm.swapusage": struct.pack("<QQQIi", 2048 * MIB, 1028 * MIB, 1020 * MIB, PAGE, 1),
}
"""A Mac Studio with 256 GB and a raised limit."""
SERVING = statistics(wire=160 * GIB // PAGE, internal_page=20 * GIB // PAGE, total_uncompressed_pages_in_compressor=64)


def test_footprint_is_read_and_not_the_resident_size() -> None:
    """15 GiB were resident of a server that held 148 GiB."""
    assert darwin.decode_footprint(usage(resident_size=15 * GIB, phys_footprint=148 * GIB)) == 148 * GIB
    assert darwin.decode_footprint(usage()) == RUSAGE_INFO_V4.index("phys_footprint") + 1


def test_host_memory_is_read_from_the_kernels_structures() -> None:
    memory = darwin.decode_host_memory(STUDIO_256.get, SERVING, held=148 * GIB)
    assert (memory.total, memory.gpu_limit, memory.gpu_limit_set) == (256 * GIB, 241_644 * MIB, True)
    assert memory.wired == 160 * GIB and memory.unexplained_wired == 12 * GIB
    assert memory.in_use == 180 * GIB + 64 * PAGE
    assert (memory.pressure, memory.swap_total, memory.swap_used) == ("normal", 2048 * MIB, 1020 * MIB)


def test_missing_values_are_none() -> None:
    memory = darwin.decode_host_memory({"hw.memsize": STUDIO_256["hw.memsize"]}.get, None, held=0)
    assert (memory.in_use, memory.wired, memory.unexplained_wired, memory.swap_used) == (None, None, None, None)
    assert memory.pressure is None and memory.gpu_limit == 192 * GIB and not memory.gpu_limit_set


@pytest.mark.parametrize(("level", "name"), [(1, "normal"), (2, "warning"), (4, "critical"), (3, None)])
def test_pressure_has_the_names_of_its_levels(level: int, name: str | None) -> None:
    values = {**STUDIO_256, "kern.memorystatus_vm_pressure_level": level.to_bytes(4, "little")}
    assert darwin.decode_host_memory(values.get, None, held=0).pressure == name


@pytest.mark.parametrize(("total", "limit"), [(16, 10_922), (32, 21_845), (36, 27_648), (64, 49_152), (128, 98_304)])
def test_default_gpu_limit_is_what_metal_reports(total: int, limit: int) -> None:
    """Recorded values of recommendedMaxWorkingSetSize, in MiB."""
    assert darwin.default_gpu_limit(total * GIB) // MIB == limit


# -- the calls --------------------------------------------------------------------------------------------------------


def c_array(data: bytes) -> str:
    return f"{{{', '.join(map(str, data))}}}"


def c_source() -> str:
    """Return a library with the functions of libSystem: pid 1 is root's, 2 is ours, all others have ended."""
    variables = "\n".join(
        f'    if (!strcmp(name, "{name}")) {{ static const unsigned char v[] = {c_array(value)}; found = v; '
        f"length = sizeof v; }}"
        for name, value in STUDIO_256.items()
    )
    members = "\n".join(f"    uint64_t {name};" for name in RUSAGE_INFO_V4)
    counts = "\n".join(f"    uint{size * 8}_t {name};" for name, size in VM_STATISTICS64)
    return f"""
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
struct rusage_info_v4 {{
    uint8_t uuid[16];
{members}
}};
struct vm_statistics64 {{
{counts}
}} __attribute__((aligned(8)));
struct xsw_usage {{ uint64_t total, avail, used; uint32_t pagesize; int encrypted; }};
_Static_assert(sizeof(struct rusage_info_v4) == {darwin.RUSAGE.size}, "rusage_info_v4");
_Static_assert(sizeof(struct vm_statistics64) == {darwin.VM_STATISTICS.size}, "vm_statistics64");
_Static_assert(sizeof(struct xsw_usage) == {darwin.SWAP.size}, "xsw_usage");

int proc_pid_rusage(int pid, int flavor, void *buffer) {{
    if (flavor != 4) {{ errno = EINVAL; return -1; }}
    if (pid != 2) {{ errno = pid == 1 ? EPERM : ESRCH; return -1; }}
    struct rusage_info_v4 made = {{ .resident_size = 15, .phys_footprint = 148ULL << 30, .runnable_time = 9 }};
    memcpy(buffer, &made, sizeof made);
    return 0;
}}
int sysctlbyname(const char *name, void *value, size_t *size, void *set, size_t set_size) {{
    const unsigned char *found = 0; size_t length = 0;
    if (set || set_size) {{ errno = EPERM; return -1; }}
{variables}
    if (!found || *size < length) {{ errno = found ? ENOMEM : ENOENT; return -1; }}
    memcpy(value, found, length);
    *size = length;
    return 0;
}}
unsigned mach_host_self(void) {{ return 0x80000007u; }}
int host_statistics64(unsigned host, int flavor, int *info, unsigned *count) {{
    if (host != 0x80000007u || flavor != 4 || *count != sizeof(struct vm_statistics64) / 4) return 5;
    struct vm_statistics64 made = {{ .wire = {160 * GIB // PAGE}, .internal_page = {20 * GIB // PAGE},
                                    .total_uncompressed_pages_in_compressor = 64 }};
    memcpy(info, &made, sizeof made);
    return 0;
}}
"""


@pytest.fixture
def libsystem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if sys.platform == "darwin":
        pytest.skip("there is a real one")
    compiler = shutil.which("cc") or missing("a C compiler (cc)")
    source, library = tmp_path / "system.c", tmp_path / "libSystem.so"
    source.write_text(c_source())
    subprocess.run([compiler, "-std=c11", "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
    monkeypatch.setattr(darwin, "LIBRARY", str(library))
    darwin._library.cache_clear()
    yield
    darwin._library.cache_clear()


@pytest.mark.usefixtures("libsystem")
def test_footprint_is_none_for_hidden_and_0_for_ended_processes() -> None:
    assert [darwin.footprint(pid) for pid in (1, 2, 3)] == [None, 148 * GIB, 0]


@pytest.mark.usefixtures("libsystem")
def test_host_memory_is_read_by_the_calls() -> None:
    assert darwin.host_memory([1, 2, 3]) == darwin.decode_host_memory(STUDIO_256.get, SERVING, held=148 * GIB)
    assert darwin.unexplained([1, 2, 3]) == 32 * GIB + 64 * PAGE
    assert darwin.sysctl("no.such.variable") is None


@pytest.mark.skipif(sys.platform != "darwin", reason="needs a Mac")
def test_a_real_mac_answers() -> None:
    held, memory = darwin.footprint(os.getpid()), darwin.host_memory([os.getpid()])
    assert held and held > 5 * MIB and darwin.footprint(1) is None
    assert memory.in_use and memory.wired and 0 < memory.wired < memory.in_use < 4 * memory.total
    assert memory.pressure and memory.gpu_limit
