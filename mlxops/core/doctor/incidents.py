"""Read macOS's reports of panics and of processes that it killed for memory. Pure.

A report has two JSON documents: a line with its kind and time, then the report itself. Kind 210 is a panic (files
`panic-full-*.panic`), 298 a jetsam event (files `JetsamEvent-*.ips`). Tests have recorded ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from mlxops.core.doctor.findings import Finding, FindingCode

PANIC, JETSAM = "210", "298"
_GPU = re.compile(r"IOGPU|AGXG|completeMemory|GPUMemory|AppleGraphics", re.IGNORECASE)
_SERVER = re.compile(r"(?:^|[^\w])(python[0-9.]*|mlx[\w.-]*|uv)$", re.IGNORECASE)
"""Names of processes that may be a server: the kernel knows only the program's name."""
_REASON = re.compile(r"panic\(cpu \d+ caller [^)]*\): (.*)")
_TASK = re.compile(r"Panicked task [^:]*:.*?pid (\d+): (\S+)|Panicked task: pid (\d+): (\S+)")


def incident(name: str, text: str) -> Finding | None:
    """Return the finding of a report; None if it names neither the GPU's memory nor a program that may be a server.

    Raises `ValueError` for a file that is no report.
    """
    head, _, body = text.partition("\n")
    header = _object(head)
    kind, when = str(header.get("bug_type", "")), str(header.get("timestamp", ""))[:19]
    if kind == PANIC:
        return _panic(name, when, str(_object(body).get("panicString", "")))
    return _killed(name, when, _object(body)) if kind == JETSAM else None


def _panic(name: str, when: str, text: str) -> Finding | None:
    task = _TASK.search(text)
    program = (task[2] or task[4]) if task else ""
    if not _GPU.search(text) and not _SERVER.search(program):
        return None
    found = _REASON.search(text)
    why = (found[1] if found else text.partition("\n")[0])[:160]
    during = f", while {program} ran" if program else ""
    return Finding.of(FindingCode.PANICKED, f"the system panicked at {when}{during}: {why} ({name})")


def _killed(name: str, when: str, body: Mapping[str, object]) -> Finding | None:
    processes = body.get("processes")
    rows = [row for row in processes if isinstance(row, dict)] if isinstance(processes, list) else []
    victim = next((row for row in rows if "reason" in row and _SERVER.search(str(row.get("name")))), None)
    if victim is None:
        return None
    what = f"{victim.get('name')} (pid {victim.get('pid')})"
    message = f"the system killed {what} at {when}: {victim.get('reason')} ({name})"
    return Finding.of(FindingCode.KILLED_FOR_MEMORY, message)


def killed_pids(text: str) -> frozenset[int]:
    """Return the processes that a jetsam report names as killed. Raises `ValueError` for a file that is no report."""
    head, _, body = text.partition("\n")
    if str(_object(head).get("bug_type", "")) != JETSAM:
        return frozenset()
    processes = _object(body).get("processes")
    rows = [row for row in processes if isinstance(row, dict)] if isinstance(processes, list) else []
    return frozenset(row["pid"] for row in rows if "reason" in row and type(row.get("pid")) is int)


def _object(text: str) -> Mapping[str, object]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("it is not a report")
    return value
