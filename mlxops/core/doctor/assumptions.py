"""The table of what the code assumes about the system, which `doctor --report` tries on a real Mac. Pure.

To add one, add a member to `Assumption` and a trial in `mlxops.agent.operations.assumptions`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum

from mlxops.core.described import DescribedText
from mlxops.core.frozen import dataclass
from mlxops.core.tables import one_line


class Verdict(StrEnum):
    PASS = "PASS"
    FAIL = "FAIL"
    UNTRIED = "UNTRIED"


class Assumption(DescribedText):
    """Members are `NAME = "id", "what the code assumes"`."""

    PROCESS_SEEN = "process.seen", "A child is in the process table with its parent, group and user."
    PROCESS_ARGV = "process.argv", "The arguments of a process are read exactly, with spaces and accents."
    PROCESS_START = (
        "process.start",
        "The raw start time of a process does not change, and differs between two processes.",
    )
    PROCESS_ENVIRONMENT = "process.environment", "A variable of another process of this user can be read."
    PROCESS_FOLDER = "process.folder", "The working directory of a process can be read."
    PROCESS_GROUP = "process.group", "A process in a session of its own leads its group; its child is in it."
    PROCESS_ZOMBIE = "process.zombie", "A process that ended and was not waited for counts as a zombie."
    PROCESS_GONE = "process.gone", "A process that ended is not found any more."
    BOOT_ID = "boot.id", "The id of this boot is not empty, and stays the same."
    BOOT_TIME = "boot.time", "The time of the boot is in the past."
    LISTENER_SEEN = "listener.seen", "A listener is seen, with the process that owns it."
    LISTENER_PORTS = "listener.ports", "The ports on which a process listens can be read."
    LISTENER_GONE = "listener.gone", "A listener is not seen any more once its process ended."
    CONNECTION_SEEN = "connection.seen", "A client that is connected to a port is seen."
    MEMORY_RESIDENT = "memory.resident", "The resident memory of a process grows by what it touches."
    MEMORY_FOOTPRINT = "memory.footprint", "The physical footprint of a process grows by what it touches."
    MEMORY_AVAILABLE = "memory.available", "The memory that is available to new programs is known."
    MEMORY_STATISTICS = "memory.statistics", "host_statistics64 counts wired, internal and compressed pages."
    MEMORY_IN_USE = "memory.in_use", "The memory that the host has in use grows by what a process touches."
    MEMORY_WIRED = "memory.wired", "The wired memory is read, and is less than the host has."
    MEMORY_UNEXPLAINED_WIRED = "memory.unexplained_wired", "How much is wired that no process holds is known."
    MEMORY_UNEXPLAINED = (
        "memory.unexplained",
        "The memory in use that no process explains is the same before, during and after a process with 1 GB.",
    )
    GPU_DEFAULT = (
        "gpu.default_limit",
        "Apple's default limit for the GPU is at least what the code takes it for (Metal).",
    )
    SYSCTL_MEMSIZE = "sysctl.memsize", "The size of the memory is read (hw.memsize)."
    SYSCTL_WIRED_LIMIT = "sysctl.wired_limit", "The GPU's limit is read (iogpu.wired_limit_mb)."
    SYSCTL_PRESSURE = "sysctl.pressure", "The memory pressure is read (kern.memorystatus_vm_pressure_level)."
    SYSCTL_SWAP = "sysctl.swap", "The used swap is read (vm.swapusage)."
    LAUNCHCTL_ABSENT = "launchctl.absent", "launchctl print ends with 113 for a job that does not exist."
    LAUNCHCTL_PRINT = "launchctl.print", "launchctl print shows state and path of a job of the system."
    LAUNCHCTL_DISABLED = "launchctl.disabled", "launchctl print-disabled lists labels as enabled or disabled."
    LAUNCHCTL_GUI = "launchctl.gui", "launchctl print gui/UID says whether a user is logged in at the screen."
    STOP_INT = "stop.int", "A Python program ends at SIGINT."
    STOP_BACKGROUND = "stop.background", "A program that a shell started with & ignores SIGINT, and ends at SIGTERM."
    STOP_IGNORED = (
        "stop.ignored",
        "Whether a process ignores a signal is seen on Linux, and not on macOS, where a stop waits before SIGTERM.",
    )
    STOP_SERVER_INT = "stop.server_int", "A server with 1 GB, threads and an open connection ends at SIGINT."
    STOP_SERVER_TERM = "stop.server_term", "The same server ends at SIGTERM."
    STOP_KILL = "stop.kill", "After SIGKILL to its group, a process with 1 GB is gone within seconds."
    MEMORY_RETURNED = "memory.returned", "The memory of an ended process is available again within seconds."
    FILES_FLUSH = "files.flush", "F_FULLFSYNC works, and takes this long."
    FILES_LOCK = "files.lock", "A lock (flock) on a file keeps another process out, and ends with its holder."
    FILES_RENAME = "files.rename", "A file can be replaced in one step, and its folder flushed."
    POWER_PMSET = "power.pmset", "pmset -g shows sleep and autorestart."
    POWER_FILEVAULT = "power.filevault", "fdesetup status says whether FileVault is on."
    REPORTS_READABLE = "reports.readable", "The folders with the system's reports can be read, and each report parsed."
    DEMO = "demo", "`inv demo` works: a tiny model is loaded, swapped and unloaded with a real engine."


@dataclass(frozen=True)
class Trial:
    """The outcome of one assumption. `detail` has figures; nothing in it names a person or a machine."""

    id: str
    verdict: str
    detail: str = ""


def report_text(facts: Mapping[str, str], trials: Iterable[Trial], findings: Iterable[str]) -> str:
    """Return the file of `doctor --report`. `findings`: code and level of each."""
    rows = {trial.id: trial for trial in trials}
    untried = Trial("", Verdict.UNTRIED, "no trial")
    lines = ["mlxops doctor --report", "", *(f"{key}: {one_line(value)}" for key, value in facts.items()), ""]
    width = max(len(each.value) for each in Assumption)
    for each in Assumption:
        row = rows.get(each.value, untried)
        lines.append(f"{row.verdict:7}  {each.value:{width}}  {one_line(row.detail) or '-'}")
    return "\n".join([*lines, "", "findings:", *(sorted(findings) or ["none"]), ""])
