"""The table of drift: every difference between what should be on a host and what is. Pure.

To add a code, add a member to `DriftCode` and make a `Drift` from it where the difference is found.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from mlxops.core.frozen import dataclass


class DriftCode(StrEnum):
    """Members are `NAME = "code", "meaning", "remedy"`.

    The remedy is a `str.format` pattern for the hint. Its fields are `port`, `model` and the values that `Drift.of`
    gets.
    """

    _value_: str
    meaning: str
    remedy: str

    def __new__(cls, value: str, meaning: str = "", remedy: str = "") -> Self:
        member = str.__new__(cls, value)
        member._value_, member.meaning, member.remedy = value, meaning, remedy
        return member

    # The registry and the ports

    ASSIGNED_NOT_SERVED = (
        "assigned_not_served",
        "The registry assigns a model to the port, and no server runs there.",
        "`mlxctl load {model} {load_port}`, or `mlxctl reconcile`",
    )
    UNREGISTERED_SERVER = (
        "unregistered_server",
        "A server that was started by hand serves a model that the registry does not assign to the port.",
        "`mlxctl unload {port} --force`, then load",
    )
    FOREIGN = (
        "foreign",
        "The registry assigns a model to the port, and a process that is neither ours nor an engine holds the port.",
        "mlxops never signals it; stop it yourself on the host{kill}",
    )
    UNKNOWN = (
        "unknown",
        "The state of the port could not be determined.",
        "nothing is changed until it is known; try again",
    )
    REBOOTED = (
        "rebooted",
        "The host was rebooted, and assigned models are not served since.",
        "`mlxctl restore`",
    )

    # Our servers

    ORPHAN = (
        "orphan",
        "Processes of ours are left without their leader, their port or an assignment.",
        "`mlxctl unload {port}`",
    )
    MISMATCH = (
        "mismatch",
        "Our server serves another model than the registry says, or another process listens on its port.",
        "`mlxctl unload {port}`",
    )
    WEDGED = (
        "wedged",
        "Our server does not answer the probe, although no request is running.",
        "`mlxctl unload {port}`",
    )
    FAILED = (
        "failed",
        "Our server says that it is unhealthy.",
        "`mlxctl unload {port}`",
    )
    STILL_ENDING = (
        "still_ending",
        "A stop of the server gave up or was interrupted, and the server has not ended.",
        "when it has ended: `mlxctl reconcile`; or kill it: `mlxctl unload {port} --kill`",
    )
    SETTINGS_CHANGED = (
        "settings_changed",
        "Our server runs with other files or options than a load would give it now.",
        "`mlxctl load {model} {port} --force`",
    )
    ALIAS_CHANGED = (
        "alias_changed",
        "Our server answers to another alias than hosts.yaml gives the port now.",
        "`mlxctl load {model} {port} --force`",
    )
    PROBE_FAILED = (
        "probe_failed",
        "Only with --probe: the server is ready, and returned no completion.",
        "`mlxctl logs --port {port}`{reload}",
    )
    NO_COMPLETION = (
        "no_completion",
        "The keeper got no completion from our server several times in a row, and it was not busy with others.",
        "`mlxctl load {model} {port} --force`, or `keep: restart` for the slot in hosts.yaml",
    )
    CONFORMANCE_LOST = (
        "conformance_lost",
        "A check of the last `probe` got worse than it was for the same model, revision, engine and version.",
        "see: `mlxctl probe --port {port} --last`, and `mlxctl logs --port {port}`",
    )

    DANGEROUS_SETTING = (
        "dangerous_setting",
        "A server runs with a variable in its environment that can take the host down.",
        "take it out of env in hosts.yaml; then `mlxctl unload {port}` and load the model again",
    )

    # Entries of the registry

    ALIAS_ELSEWHERE = (
        "alias_elsewhere",
        "A model has the alias of one port as its name, and is assigned to another port.",
        "`mlxctl unload {port}`, then load it there",
    )
    PORT_OUTSIDE_RANGE = (
        "port_outside_range",
        "A model is assigned to a port outside the host's range.",
        "`mlxctl reconcile`",
    )
    PORT_CLAIMED_TWICE = (
        "port_claimed_twice",
        "Several models are assigned to the same port.",
        "`mlxctl unload {port}`, then load the right one",
    )
    ENTRY_PROBLEM = (
        "entry_problem",
        "An entry of the registry has a field that is missing or cannot be used.",
        "repair the entry in {registry}",
    )

    # The registry file

    REGISTRY_UNUSABLE = (
        "registry_unusable",
        "The registry cannot be read or must not be written, so every change is refused.",
        "repair it by hand, then try again",
    )
    REGISTRY_MISSING = (
        "registry_missing",
        "The registry was there before and is gone.",
        "put it back, or mount its disk",
    )
    REGISTRY_CONFLICT = (
        "registry_conflict",
        "A sync service left a conflicted copy of the registry: another machine wrote it too.",
        "compare it with {registry}, then move it away; no sync service should have a registry",
    )

    # hosts.yaml

    SETTINGS_DIFFER = (
        "settings_differ",
        "hosts.yaml differs from the settings that the host has saved, so every change is refused.",
        "correct hosts.yaml; or, if it is right, save its settings on the host: `mlxctl deploy`",
    )

    # Boot jobs and servers started by hand

    BOOT_PORT_ASSIGNED = (
        "boot_port_assigned",
        "A boot job serves the port, and the registry assigns another model to it.",
        "load it elsewhere, for example: `mlxctl load {assigned} {idle_port}`; or make its port null in the registry",
    )
    BOOT_JOB_MISSING = (
        "boot_job_missing",
        "hosts.yaml names a boot job that is not installed, so its port is not reserved.",
        "comment out its line (boot:) in hosts.yaml; or install the job",
    )
    BOOT_JOB_DISABLED = (
        "boot_job_disabled",
        "hosts.yaml names a boot job that is disabled, so its port is not reserved.",
        "comment out its line (boot:) in hosts.yaml; or enable it: {enable}",
    )
    PORTLESS_SERVER = (
        "portless_server",
        "A server that was started by hand for the port does not listen, and may hold a model in memory.",
        "stop it on the host: kill {pid}",
    )

    # What was left behind

    INTERRUPTED_OPERATION = (
        "interrupted_operation",
        "The worker of an operation was killed, or the host went down, before the operation had a result.",
        "run it again: `{command}`; or clean up what it left: `mlxctl reconcile`",
    )
    LEFTOVER = (
        "leftover",
        "A run record or a temporary file belongs to nothing that runs.",
        "`mlxctl reconcile`",
    )
    LOG_TOO_BIG = (
        "log_too_big",
        "A server's log is larger than its limit.",
        "the next change on the host cuts it, for example: `mlxctl reconcile`",
    )
    MEMORY_STRANDED = (
        "memory_stranded",
        "Memory that a stopped server held did not return, and no process has it.",
        "only a reboot returns it; what is left: `mlxctl list --memory`",
    )
    STATE_UNREADABLE = (
        "state_unreadable",
        "The records in the state folder cannot be read.",
        "repair it on the host, or move it away, then try again",
    )


@dataclass(frozen=True)
class Drift:
    """One difference. `port` and `model` are None if it is not about one."""

    code: DriftCode
    port: int | None
    model: str | None
    message: str
    hint: str
    """What to do. It follows the code's remedy, or says more where more is known."""

    @classmethod
    def of(cls, code: DriftCode, port: int | None, model: str | None, message: str, **values: object) -> Drift:
        """Return the drift with the code's remedy as its hint. `values` are the remedy's further fields."""
        return cls(code, port, model, message, code.remedy.format(port=port, model=model, **values))
