"""Make the checks of `doctor`, on either side: all at once, each within a time limit, none able to end the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from mlxops.common.parallel import reason, within
from mlxops.core.doctor.findings import Finding, FindingCode
from mlxops.core.errors import MlxopsError

Check = Callable[[], Iterable[Finding]]


def make(seconds: float, checks: Mapping[str, Check]) -> list[Finding]:
    """Return what the checks find. One that fails, or takes too long, is a finding beside those that it had made."""
    found: dict[str, list[Finding]] = {name: [] for name in checks}
    outcomes = within(seconds, {name: _collecting(check, found[name]) for name, check in checks.items()})
    findings: list[Finding] = []
    for name, outcome in outcomes.items():
        findings += found[name]
        if isinstance(outcome, Exception):
            findings.append(not_made(name, outcome))
    return findings


def _collecting(check: Check, found: list[Finding]) -> Callable[[], None]:
    return lambda: found.extend(check())


def not_made(name: str, error: Exception) -> Finding:
    code = FindingCode.NOT_CHECKED
    hint = error.marked_hint if isinstance(error, MlxopsError) else ""
    return Finding(code, code.level, f"{name} could not be checked: {reason(error)}", hint or code.remedy)
