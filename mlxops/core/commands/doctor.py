"""`doctor`: what is wrong on the control node and on each host, each with its fix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field

from mlxops.core.command import Group, Hosts, Request, option, switch
from mlxops.core.doctor.assumptions import Trial
from mlxops.core.doctor.findings import Finding, Level
from mlxops.core.frozen import dataclass
from mlxops.core.hints import Commands, split
from mlxops.core.replies import HostReply
from mlxops.core.tables import one_line
from mlxops.core.wire import omitted

CONTROL_NODE = "control node"
"""What the row of this machine is called. No host of hosts.yaml can have a name with a space."""


@dataclass(frozen=True)
class FindingRow:
    """Something that is wrong, or worth knowing, and what to do about it."""

    code: str
    """Stable: the table of findings in the manual has them all."""
    severity: str
    """error, warning, unknown or info."""
    port: int | None
    """None if it concerns no port."""
    message: str
    hint: str
    """What to do: a command, or a setting."""
    commands: Commands = omitted(())
    """The commands of mlxops that the hint names."""

    @classmethod
    def of(cls, finding: Finding) -> FindingRow:
        hint, commands = split(finding.hint)
        return cls(finding.code.value, finding.level.value, finding.port, finding.message, hint, commands)


@dataclass(frozen=True)
class DoctorResult:
    findings: tuple[FindingRow, ...]
    """The worst first."""
    checks: tuple[str, ...]
    """What was checked."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Versions and figures, for people."""
    build: str = ""
    """The build of mlxops there."""
    clock: float | None = None
    """The time there, in seconds since 1970."""
    trials: tuple[Trial, ...] = omitted(())
    """With `--report`: what the code assumes about the system, and what was found."""


@dataclass(frozen=True)
class Doctor(
    Request[DoctorResult],
    group=Group.LOOK,
    example="mlxctl doctor",
    hosts=Hosts.ALL,
):
    """Find what is wrong on this machine and on each host."""

    strict: bool = switch("exit 3 if any finding is an error", sent=False)
    report: str | None = option(
        "for owners of Macs: also try what the code assumes about macOS; write FILE, without names",
        sent=False,
    )
    trials: bool = False


def show(replies: Sequence[HostReply[DoctorResult]]) -> str:
    lines: list[str] = []
    for reply in replies:
        if reply.result is not None:
            facts = ", ".join(f"{key} {value}" for key, value in reply.result.facts.items())
            lines.append(one_line(f"{reply.host}: {facts}" if facts else reply.host))
            lines += [line for row in reply.result.findings for line in _lines(row)]
    return "\n".join([*lines, _summary(replies)])


def _lines(row: FindingRow) -> list[str]:
    port = f"{row.port}: " if row.port is not None else ""
    return [
        one_line(f"{row.severity}: {row.code}: {port}{row.message}"),
        f"  fix: {one_line(row.hint)}" if row.severity != Level.INFO else f"  note: {one_line(row.hint)}",
    ]


def _summary(replies: Sequence[HostReply[DoctorResult]]) -> str:
    results = [reply.result for reply in replies if reply.result is not None]
    counts = [sum(row.severity == level for result in results for row in result.findings) for level in Level]
    checks = sum(len(result.checks) for result in results)
    parts = [_counted(count, level) for level, count in zip(Level, counts, strict=True) if count]
    return f"{checks} checks: {', '.join(parts) or 'nothing found'}"


def _counted(count: int, level: Level) -> str:
    word = "note" if level is Level.INFO else level.value
    return f"{count} {word}{'s' if count > 1 and level is not Level.UNKNOWN else ''}"
