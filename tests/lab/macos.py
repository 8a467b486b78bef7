"""What macOS prints and writes, as its owners published it. Names and ids are replaced."""

from __future__ import annotations

import json
import time

PMSET = """\
System-wide power settings:
Currently in use:
 standby              0
 Sleep On Power Button 1
 hibernatefile        /var/vm/sleepimage
 powernap             1
 networkoversleep     0
 disksleep            10
 sleep                10 (sleep prevented by sharingd, powerd, bluetoothd)
 hibernatemode        0
 ttyskeepawake        1
 displaysleep         10
 tcpkeepalive         1
 autorestart          0
 womp                 1
"""
PMSET_SERVER = PMSET.replace("autorestart          0", "autorestart          1").replace(
    "sleep                10 (sleep prevented by sharingd, powerd, bluetoothd)", "sleep                0"
)
FILEVAULT_ON, FILEVAULT_OFF = "FileVault is On.\n", "FileVault is Off.\n"
PANIC = """\
panic(cpu 10 caller 0xfffffe00448ba69c): "completeMemory() prepare count underflow" @IOGPUMemory.cpp:550
Debugger message: panic
Memory ID: 0x6
OS release type: User
OS version: 25E246
Kernel version: Darwin Kernel Version 25.4.0: Thu Mar 19 19:31:09 PDT 2026; root:xnu-12377.101.15~1/RELEASE_ARM64_T6031
Panicked task 0xfffffe2b4ba0a1a0: 4116 pages, 31 threads: pid 49042: python3.13
Panicked thread: 0xfffffe25331ec4f0, backtrace: 0xfffffe4a1f0c7340, tid: 57613
      Kernel Extensions in backtrace:
         com.apple.iokit.IOGPUFamily(129.3.2)[087C1713]@0xfffffe00448a0000->0xfffffe00448effff
"""
WATCHDOG = """\
panic(cpu 0 caller 0xfffffe0026a5c0d4): watchdog timeout: no checkins from watchdogd in 93 seconds
Debugger message: panic
Panicked task 0xfffffe2ef2a0c4d8: 0 pages, 951 threads: pid 0: kernel_task
"""


def panic_report(text: str = PANIC, day: str = "2026-11-25") -> str:
    """A file such as panic-full-2026-11-25-094312.0002.panic."""
    head = {
        "bug_type": "210",
        "timestamp": f"{day} 09:43:12.00 +0900",
        "os_version": "macOS 26.4 (25E246)",
        "roots_installed": 0,
        "incident_id": "00000000-0000-0000-0000-000000000000",
    }
    body = {"build": "macOS 26.4 (25E246)", "product": "Mac15,14", "panicString": text, "panicFlags": "0x902"}
    return json.dumps(head) + "\n" + json.dumps(body, indent=2)


def jetsam_report(victim: str = "python3.12", reason: str = "vm-compressor-space-shortage") -> str:
    """A file such as JetsamEvent-2026-11-25-220357.ips."""
    head = {
        "bug_type": "298",
        "timestamp": "2026-11-25 22:03:57.00 +0800",
        "os_version": "macOS 15.5 (24F74)",
        "roots_installed": 0,
        "incident_id": "00000000-0000-0000-0000-000000000000",
    }
    body = {
        "build": "macOS 15.5 (24F74)",
        "product": "Mac14,13",
        "bug_type": "298",
        "memoryStatus": {"compressorSize": 541951, "pageSize": 16384, "memoryPages": {"free": 4275, "wired": 154002}},
        "largestProcess": victim,
        "processes": [
            {"name": "python3.11", "pid": 300, "states": ["daemon"], "rpages": 900},
            {"name": "WindowServer", "pid": 151, "states": ["daemon"], "rpages": 51200},
            {"name": victim, "pid": 9021, "states": ["frontmost"], "rpages": 1572864, "reason": reason},
        ],
    }
    return json.dumps(head) + "\n" + json.dumps(body, indent=2)


def long_ago() -> tuple[float, float]:
    """Times for `os.utime`, a month before now."""
    month = time.time() - 30 * 86400
    return month, month
