"""`doctor`: examine this machine and every host at once, and join what each side found.

What this side sees of a host (its ssh options, its key, its clock, its agent's build) and what the agent found there
are findings of that host. What concerns this machine or the gateway is in the row of the control node.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from mlxops.common.build import build_id
from mlxops.common.checks import Check, make, not_made
from mlxops.common.parallel import within
from mlxops.control import client
from mlxops.control.client import HostTarget, Listen
from mlxops.control.doctor import connection, gateway, node
from mlxops.control.inventory import Gateway, Inventory
from mlxops.control.output import Console
from mlxops.core.commands.doctor import CONTROL_NODE, Doctor, DoctorResult, FindingRow
from mlxops.core.doctor.findings import Finding, FindingCode, Level, worst_first
from mlxops.core.errors import Bug, MlxopsError, Refused, Unreachable
from mlxops.core.frozen import dataclass
from mlxops.core.hints import aim
from mlxops.core.protocol import Phase
from mlxops.core.replies import HostReply

HOST_SECONDS = 60.0
"""The agent has a limit of its own. This one is for a connection that hangs."""
TRIAL_SECONDS = 900.0
LONG_SECONDS = 5.0
"""After this time people want to know what is waited for."""
CLOCK_SECONDS = 30.0
"""A smaller difference does no harm."""
_OWN_CODES = {
    "host_key_unknown": FindingCode.HOST_KEY_UNKNOWN,
    "host_key_changed": FindingCode.HOST_KEY_CHANGED,
    "authentication_failed": FindingCode.LOGIN_REFUSED,
    "host_locked": FindingCode.HOST_LOCKED,
    "bad_ssh_config": FindingCode.SSH_CONFIG_BAD,
    "no_ssh": FindingCode.SSH_MISSING,
    "agent_missing": FindingCode.AGENT_MISSING,
    "no_shell": FindingCode.AGENT_MISSING,
    "agent_not_started": FindingCode.AGENT_MISSING,
    "unknown_command": FindingCode.AGENT_DIFFERS,
}
"""Code of an error -> that of the finding."""


@dataclass(frozen=True)
class Answer:
    """A host's reply, and when (seconds since 1970) it was asked and had answered."""

    reply: HostReply[DoctorResult]
    asked: float
    answered: float


def examine(
    inventory: Inventory | None,
    problem: MlxopsError | None,
    targets: Sequence[HostTarget],
    request: Doctor,
    console: Console,
) -> tuple[HostReply[DoctorResult], ...]:
    """Return the row of the control node, then one for each host.

    `problem`: why hosts.yaml cannot be used; then there are no targets. On the console: what takes long.
    """
    configured = inventory.gateway if inventory else None
    seconds = TRIAL_SECONDS if request.trials else HOST_SECONDS
    found: dict[str, list[Finding]] = {target.name: [] for target in targets}
    calls: dict[str, Callable[[], DoctorResult | Answer]] = {
        CONTROL_NODE: lambda: _control_node(inventory, problem, configured, targets)
    }
    with _naming_late(console, () if request.trials else targets, seconds) as answered:
        calls |= {
            target.name: _examining(target, request, console.hear, answered, found[target.name]) for target in targets
        }
        outcomes = within(seconds, calls)
    return (
        _own_reply(outcomes[CONTROL_NODE]),
        *(_host_reply(target, outcomes[target.name], found[target.name]) for target in targets),
    )


# -- this machine -------------------------------------------------------------------------------------------------


def _control_node(
    inventory: Inventory | None, problem: MlxopsError | None, configured: Gateway | None, targets: Sequence[HostTarget]
) -> DoctorResult:
    checks: dict[str, Check] = dict(node.CHECKS)
    if inventory is not None:
        checks["hosts.yaml"] = lambda: node.hosts_file(inventory.path)
    if configured is not None:
        checks["gateway"] = lambda: gateway.findings(configured, targets)
    findings = [Finding.because(FindingCode.HOSTS_FILE_BAD, problem)] if problem else []
    findings += make(HOST_SECONDS, checks)
    result = _result(findings, (*checks, *(["hosts.yaml"] if problem else [])), node.facts())
    return replace(result, build=build_id(), clock=time.time())


def _own_reply(outcome: DoctorResult | Answer | Exception) -> HostReply[DoctorResult]:
    if isinstance(outcome, Exception):
        outcome = _result([not_made("this machine", outcome)], (), {})
    assert isinstance(outcome, DoctorResult)
    return HostReply(CONTROL_NODE, outcome, command=Doctor.name)


def _result(
    findings: Sequence[Finding], checks: Sequence[str], facts: Mapping[str, str], flags: str = ""
) -> DoctorResult:
    """`flags`: what a suggested command needs to go to the host."""
    rows = tuple(_aimed(FindingRow.of(each), flags) for each in worst_first(findings))
    return DoctorResult(rows, tuple(checks), facts)


def _aimed(row: FindingRow, flags: str) -> FindingRow:
    hint, commands = aim(row.hint, row.commands, flags.split())
    return replace(row, hint=hint, commands=commands)


# -- a host -------------------------------------------------------------------------------------------------------


@contextmanager
def _naming_late(console: Console, targets: Sequence[HostTarget], seconds: float) -> Iterator[Callable[[str], None]]:
    """Say after a while which hosts have not answered. Yield what is called with the name of one that has.

    `targets`: the hosts that say nothing themselves.
    """
    waiting = {target.name for target in targets}

    def note() -> None:
        if waiting:
            console.note(f"waiting for {', '.join(sorted(waiting))}, at most {seconds:.0f} s")

    timer = threading.Timer(LONG_SECONDS, note)
    timer.daemon = True
    timer.start()
    try:
        yield waiting.discard
    finally:
        timer.cancel()


def _only_phases(hear: Listen) -> Listen:
    """The agent's warnings are findings, too: they are not shown twice."""
    return lambda host, event: hear(host, event) if isinstance(event, Phase) else None


def _examining(
    target: HostTarget, request: Doctor, hear: Listen, answered: Callable[[str], None], found: list[Finding]
) -> Callable[[], Answer]:
    """`found`: gets what this side finds before the host answers, if it does."""

    def examining() -> Answer:
        checks: dict[str, Check] = {}
        if target.ssh is not None:
            name = target.ssh
            checks["ssh options"] = lambda: connection.option_findings(name)
        found.extend(make(HOST_SECONDS, checks))
        asked = time.time()
        reply = client.ask(target, request, _only_phases(hear))
        answered(target.name)
        return Answer(reply, asked, time.time())

    return examining


def _host_reply(
    target: HostTarget, answer: DoctorResult | Answer | Exception, found: Sequence[Finding]
) -> HostReply[DoctorResult]:
    """Join both sides. An unreachable host keeps its error, which also decides the exit status.

    `found`: what this side found.
    """
    findings = list(found)
    if isinstance(answer, Exception):
        findings.append(not_made(target.name, answer))
        return HostReply(target.name, _result(findings, (), {}), None, Doctor.name, target.flags)
    assert isinstance(answer, Answer)
    error, result = answer.reply.error, answer.reply.result
    seen = ["connection", *(["ssh options"] if target.ssh is not None else [])]
    if error is not None:
        findings.append(Finding.because(_code_of(error), error))
    own = _result([*findings, *_compared(answer)], seen, {}, target.flags)
    if result is not None:
        rows = sorted((*own.findings, *result.findings), key=lambda row: Level.rank_of(row.severity))
        own = replace(result, findings=tuple(rows), checks=(*seen, *result.checks))
    fatal = error if isinstance(error, Unreachable) or (isinstance(error, Bug) and _is_bug(error)) else None
    return HostReply(target.name, own, fatal, Doctor.name, target.flags)


def _is_bug(error: Bug) -> bool:
    """An older agent's answer to a command that it does not know has this class, too."""
    return error.code == "bug"


def _code_of(error: MlxopsError) -> FindingCode:
    other = FindingCode.HOST_UNREACHABLE if isinstance(error, Unreachable) else FindingCode.AGENT_FAILED
    return _OWN_CODES.get(error.code, other)


def _compared(answer: Answer) -> list[Finding]:
    """Compare build and clock of the agent with those of this machine."""
    result, findings = answer.reply.result, list[Finding]()
    if result is None:
        return findings
    if result.build != build_id():
        message = f"the host has {result.build}, and this is {build_id()}"
        findings.append(Finding.of(FindingCode.AGENT_DIFFERS, message))
    if result.clock is not None:
        # The agent read its clock between these two moments.
        seconds = max(answer.asked - result.clock, result.clock - answer.answered)
        if seconds > CLOCK_SECONDS:
            order = "behind" if result.clock < answer.asked else "ahead of"
            message = f"the host's clock is {seconds:.0f} s {order} this machine's"
            findings.append(Finding.of(FindingCode.CLOCK_DIFFERS, message))
    return findings


def refuse_errors(reply: HostReply[DoctorResult]) -> HostReply[DoctorResult]:
    """Return the reply with an error if any finding is one (`--strict`)."""
    rows = reply.result.findings if reply.result else ()
    codes = [row.code for row in rows if row.severity == Level.ERROR]
    if reply.error is not None or not codes:
        return reply
    error = Refused(
        "doctor_errors",
        f"{len(codes)} of the findings {'is an error' if len(codes) == 1 else 'are errors'}",
        why=", ".join(dict.fromkeys(codes)),
        hint="each is listed, with its fix",
    )
    return replace(reply, error=error)
