"""Check the control node itself: Python, libraries, ssh, hosts.yaml."""

from __future__ import annotations

import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from mlxops.common.build import build_id
from mlxops.core.doctor.engines import parse_version
from mlxops.core.doctor.findings import Finding, FindingCode
from mlxops.core.doctor.host import TESTED_PYTHONS

_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?\s*([^;]*)")
_BOUND = re.compile(r"(>=|<=|==|!=|~=|<|>)\s*([0-9][0-9.]*)")


def facts() -> dict[str, str]:
    return {
        "mlxops": build_id(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _python() -> list[Finding]:
    if sys.version_info[:2] in TESTED_PYTHONS:
        return []
    return [Finding.of(FindingCode.PYTHON_UNTESTED, f"mlxops runs with Python {platform.python_version()}")]


def _libraries() -> list[Finding]:
    lines = [line for line in requires("mlxops") or () if _is_for_this_system(line)]
    return [
        Finding.of(FindingCode.LIBRARY_DIFFERS, problem) for line in lines if (problem := library_problem(line, _found))
    ]


def _is_for_this_system(requirement: str) -> bool:
    """Return whether a requirement is no extra's and for this system. Its only other marker is sys_platform."""
    _, _, marker = requirement.partition(";")
    return "extra" not in marker and (
        "sys_platform" not in marker or re.search(rf"['\"]{sys.platform}['\"]", marker) is not None
    )


def _found(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def library_problem(requirement: str, found: Callable[[str], str | None]) -> str:
    """Return how the installed version breaks a requirement such as `fabric>=3.2.3,<4`; "" if it does not."""
    matched = _REQUIREMENT.match(requirement)
    if matched is None:
        return ""
    name, bounds = matched[1], matched[2].strip()
    installed = found(name)
    if installed is None:
        return f"{name} is not installed"
    have = parse_version(installed)
    for sign, text in _BOUND.findall(bounds):
        limit = parse_version(text)
        fits = {">=": have >= limit, "<=": have[: len(limit)] <= limit, "<": have < limit, ">": have > limit}
        if not fits.get(sign, True):
            return f"{name} is {installed}, and mlxops needs {bounds}"
    return ""


def _ssh() -> list[Finding]:
    return [] if shutil.which("ssh") else [Finding.of(FindingCode.SSH_MISSING, "there is no ssh program on PATH")]


def hosts_file(path: Path) -> list[Finding]:
    """Check who may change hosts.yaml. Raises `OSError`."""
    mode = path.stat().st_mode
    if not path.is_file() or not mode & 0o022:
        return []
    message = f"{path} can be written by other users (mode {mode & 0o777:o})"
    return [Finding.of(FindingCode.HOSTS_FILE_WRITABLE, message, path=shlex.quote(str(path)))]


CHECKS: dict[str, Callable[[], Sequence[Finding]]] = {"python": _python, "libraries": _libraries, "ssh": _ssh}
