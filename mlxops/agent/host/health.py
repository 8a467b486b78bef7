"""Look at the system's health: power settings, reports of panics. Changes nothing.

A program or file that this system does not have is no fault: on Linux there is no pmset.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from mlxops.agent.host.programs import run_program
from mlxops.common import files

PROGRAM_SECONDS = 5.0
REPORT_DAYS = 7
MAX_REPORTS = 50
MAX_REPORT_BYTES = 16 * 1024 * 1024
"""A jetsam report has one row a process: some 300 kB."""
SYSTEM_FOLDERS = ("/usr/bin", "/bin", "/usr/sbin", "/sbin")


def output_of(environ: Mapping[str, str], program: str, *arguments: str) -> str:
    """Return what a program of the system prints; "" if there is none. Raises `TimeoutError`, `OSError`."""
    import shutil

    path = shutil.which(program, path=os.pathsep.join((environ.get("PATH", ""), *SYSTEM_FOLDERS)))
    if path is None:
        return ""
    status, output = run_program([path, *arguments], environ, PROGRAM_SECONDS)
    if status is None:
        raise TimeoutError(f"{program} did not answer within {PROGRAM_SECONDS:.0f} s")
    if status != 0:
        raise OSError(f"{program} ended with {status}: {output.strip()[-200:]}")
    return output


def recent_reports(folders: tuple[Path, ...]) -> Iterator[Path]:
    """Yield the newest reports of the last days in macOS's folders. Raises `OSError` for one that must not be read."""
    since = time.time() - REPORT_DAYS * 86400
    found: list[tuple[float, Path]] = []
    for folder in folders:
        try:
            names = os.listdir(folder)
        except (FileNotFoundError, NotADirectoryError):
            continue
        for name in names:
            if re.match(r"(?:panic-|JetsamEvent-|Kernel).*\.(?:ips|panic)$", name):
                changed = os.stat(folder / name).st_mtime
                found += [(changed, folder / name)] if changed > since else []
    yield from (path for _, path in sorted(found, reverse=True)[:MAX_REPORTS])


def report_folders(environ: Mapping[str, str]) -> tuple[Path, ...]:
    home = environ.get("HOME")
    own = (Path(home, "Library/Logs/DiagnosticReports"),) if home else ()
    return (Path("/Library/Logs/DiagnosticReports"), *own)


def read_report(path: Path) -> str:
    """Raises `OSError`."""
    return files.read(path, MAX_REPORT_BYTES).decode(errors="replace")


def system_name() -> str:
    """Return system, version and processor, such as `macOS 26.4 arm64`."""
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]} {platform.machine()}"
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def is_translated() -> bool:
    """Return whether this process runs on Rosetta."""
    if sys.platform != "darwin":
        return False
    from mlxops.agent.host import darwin

    return darwin.number(darwin.sysctl("sysctl.proc_translated")) == 1


def macos_version() -> tuple[int, ...]:
    """Return macOS's version; () on another system."""
    return tuple(int(part) for part in platform.mac_ver()[0].split(".") if part.isdecimal())
