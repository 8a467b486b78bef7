"""The table of findings: everything that `doctor` can report. Pure.

To add a finding, add a member to `FindingCode` and make a `Finding` from it where the fault is found.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Self

from mlxops.core.described import DescribedText
from mlxops.core.errors import MlxopsError
from mlxops.core.frozen import dataclass


class Level(DescribedText):
    """How bad a finding is. Members are in order, the worst first."""

    ERROR = "error", "Something does not work, or will not; `--strict` exits with 3."
    WARNING = "warning", "It works now, and may fail, or may be used by others."
    UNKNOWN = "unknown", "The check could not be made; the message says why."
    INFO = "info", "Worth knowing; nothing has to be done."

    @property
    def rank(self) -> int:
        return list(Level).index(self)

    @classmethod
    def rank_of(cls, text: str) -> int:
        """Return the rank of a level as sent. One that only another build knows comes last."""
        return next((each.rank for each in cls if each == text), len(cls))


class FindingCode(StrEnum):
    """Members are `NAME = "code", level, "meaning", "remedy"`.

    The remedy is a `str.format` pattern for the hint. Its fields are the values that `Finding.of` gets.
    """

    _value_: str
    level: Level
    meaning: str
    remedy: str

    def __new__(cls, value: str, level: Level = Level.ERROR, meaning: str = "", remedy: str = "") -> Self:
        member = str.__new__(cls, value)
        member._value_, member.level, member.meaning, member.remedy = value, level, meaning, remedy
        return member

    # The control node

    HOSTS_FILE_BAD = (
        "hosts_file_bad",
        Level.ERROR,
        "There is no hosts.yaml, or it cannot be used. No host was asked.",
        "correct hosts.yaml",
    )
    HOSTS_FILE_WRITABLE = (
        "hosts_file_writable",
        Level.WARNING,
        "Other users can change hosts.yaml, and so which programs your commands run on the hosts.",
        "chmod go-w {path}",
    )
    PYTHON_UNTESTED = (
        "python_untested",
        Level.WARNING,
        "This mlxops runs with a version of Python with which it was not tested.",
        "install it with Python 3.11, 3.12 or 3.13",
    )
    LIBRARY_DIFFERS = (
        "library_differs",
        Level.ERROR,
        "A library that mlxops needs is missing or has a version that it does not work with.",
        "install mlxops again as its README says, in its own virtual environment",
    )
    SSH_MISSING = (
        "ssh_missing",
        Level.ERROR,
        "There is no ssh program on PATH, so the ssh configuration cannot be read.",
        "install the OpenSSH client",
    )

    # SSH and the agent

    SSH_CONFIG_BAD = (
        "ssh_config_bad",
        Level.ERROR,
        "ssh cannot resolve the host, because its configuration is wrong.",
        "correct the ssh configuration",
    )
    SSH_OPTION_IGNORED = (
        "ssh_option_ignored",
        Level.INFO,
        "The ssh configuration sets an option that mlxops does not follow.",
        "nothing to do while the host is reached; {instead}",
    )
    HOST_UNREACHABLE = (
        "host_unreachable",
        Level.ERROR,
        "The host cannot be reached.",
        "switch it on, or correct `ssh` in hosts.yaml",
    )
    HOST_KEY_UNKNOWN = (
        "host_key_unknown",
        Level.ERROR,
        "The host's key was never accepted on this machine.",
        "compare the fingerprint, then accept it once with ssh",
    )
    HOST_KEY_CHANGED = (
        "host_key_changed",
        Level.ERROR,
        "The host shows another key than the known one.",
        "find out why, then replace the key in known_hosts",
    )
    LOGIN_REFUSED = (
        "login_refused",
        Level.ERROR,
        "The host refuses the login.",
        "put this user's public key into authorized_keys on the host",
    )
    HOST_LOCKED = (
        "host_locked",
        Level.ERROR,
        "The Mac waits until its disk is unlocked (FileVault).",
        "unlock it",
    )
    CLOCK_DIFFERS = (
        "clock_differs",
        Level.WARNING,
        "The clocks of the host and of this machine differ: times in logs cannot be compared, certificates may fail.",
        "switch on network time on both; on a Mac: sudo sntp -sS time.apple.com; on Linux: timedatectl set-ntp true",
    )
    AGENT_MISSING = (
        "agent_missing",
        Level.ERROR,
        "There is no mlxops agent on the host, or it cannot be started.",
        "`mlxctl deploy`",
    )
    AGENT_DIFFERS = (
        "agent_differs",
        Level.ERROR,
        "The agent is another build than this mlxops, so changes are refused.",
        "make both sides equal: `mlxctl deploy`",
    )
    AGENT_FAILED = (
        "agent_failed",
        Level.ERROR,
        "The agent was asked, and failed or was not understood.",
        "make both sides equal: `mlxctl deploy`",
    )
    SETTINGS_DIFFER = (
        "settings_differ",
        Level.ERROR,
        "The host agreed on other settings than hosts.yaml has, so changes are refused.",
        "correct hosts.yaml, or make its settings the agreed ones: `mlxctl deploy`",
    )
    AGREEMENT_UNUSABLE = (
        "agreement_unusable",
        Level.ERROR,
        "The settings that the host agreed on (host.json) cannot be read.",
        "`mlxctl deploy`",
    )
    NOT_AGREED = (
        "not_agreed",
        Level.INFO,
        "The host has not agreed on settings yet: another control node could choose others.",
        "`mlxctl deploy`, or the first change, agrees",
    )

    # The system and the engines

    INTERPRETER_TRANSLATED = (
        "interpreter_translated",
        Level.WARNING,
        "The agent's Python is built for Intel and runs translated (Rosetta).",
        "install a Python for arm64, then `mlxctl deploy`",
    )
    MACOS_OLD = (
        "macos_old",
        Level.WARNING,
        "This macOS has no limit for the GPU's memory that can be read (before 14).",
        "update macOS",
    )
    ENGINE_MISSING = (
        "engine_missing",
        Level.ERROR,
        "An engine that hosts.yaml or the registry names is not on the host.",
        "install it there, or correct `launch` or `engine` in hosts.yaml",
    )
    ENGINE_VERSION_UNKNOWN = (
        "engine_version_unknown",
        Level.INFO,
        "The version of an engine cannot be read, so known faults of its version cannot be named.",
        "nothing to do; with a plain installation (uv tool install {engine}) it can be read",
    )
    ENGINE_RUNS_CODE = (
        "engine_runs_code",
        Level.INFO,
        "The engine has CVE-2026-5843: it runs a repository's `model_file` unasked. mlxops refuses such models.",
        "update it when you can: mlx-lm 0.32.2 asks first",
    )
    ENGINE_DROPS_LAYERS = (
        "engine_drops_layers",
        Level.INFO,
        "The engine can lose layers if a model is split unevenly over hosts (mlx-lm #1688). mlxops splits none.",
        "do not split a model with it; mlx-lm 0.32.2 is repaired",
    )
    ENGINE_FAILS = (
        "engine_fails",
        Level.ERROR,
        "The engine starts, and fails at every completion, because of the library that it was installed with.",
        "update the engine, or install transformers<5 beside it",
    )
    METAL_FAST_SYNCH = (
        "metal_fast_synch",
        Level.WARNING,
        "MLX_METAL_FAST_SYNCH is set for the servers: it can wedge the GPU until the host is rebooted (mlx #3142).",
        "take it out of `env` in hosts.yaml, or of what starts the server; then unload and load each model",
    )

    # Files and disks

    HUB_MISSING = (
        "hub_missing",
        Level.ERROR,
        "The folder of the models is not there.",
        "mount its disk, or correct `hub` in hosts.yaml",
    )
    HUB_CLOSED = (
        "hub_closed",
        Level.ERROR,
        "The folder of the models cannot be read.",
        "give this account access to it",
    )
    HUB_READ_ONLY = (
        "hub_read_only",
        Level.WARNING,
        "This account may not write to the folder of the models, so nothing can be downloaded.",
        "give it access: look at {path} with ls -ld",
    )
    REGISTRY_UNUSABLE = (
        "registry_unusable",
        Level.ERROR,
        "The registry is gone, cannot be read, or must not be written, so every change is refused.",
        "repair it by hand",
    )
    STATE_UNWRITABLE = (
        "state_unwritable",
        Level.ERROR,
        "The agent cannot write to its state folder, so every change is refused.",
        "give this account access to {path}, or correct `state` in hosts.yaml",
    )
    STATE_OPEN = (
        "state_open",
        Level.WARNING,
        "Other users can read the state folder, or change it.",
        "chmod 700 {path}",
    )
    NO_LOCKS = (
        "no_locks",
        Level.ERROR,
        "The file system of the state folder, or of the registry, has no locks, so every change is refused.",
        "put `state` and `registry` on a local disk (hosts.yaml)",
    )
    DISK_FULL = (
        "disk_full",
        Level.ERROR,
        "A disk has no room for the next change.",
        "free space on it; the models and their sizes: `mlxctl list`",
    )
    DISK_LOW = (
        "disk_low",
        Level.WARNING,
        "A disk is nearly full.",
        "free space on it; the models and their sizes: `mlxctl list`",
    )
    INODES_LOW = (
        "inodes_low",
        Level.WARNING,
        "A file system has nearly no inodes left: it can hold few more files, however much space is free.",
        "delete small files on it; df -i {path} shows the number",
    )
    CACHE_LITTER = (
        "cache_litter",
        Level.WARNING,
        "Interrupted downloads left parts in the cache, which nothing uses.",
        "finish it: `mlxctl pull --repo {repo}`; or delete the parts: rm {files}",
    )
    CACHE_INCOMPLETE = (
        "cache_incomplete",
        Level.INFO,
        "A repository in the cache is not complete, and cannot be loaded.",
        "finish it: `mlxctl pull --repo {repo}`; or delete it: rm -r {path}",
    )

    # Memory

    BUDGET_HIGH = (
        "budget_high",
        Level.INFO,
        "`memory` in hosts.yaml is more than the host has.",
        "leave `memory` out for the host's own limit",
    )
    WIRED_LIMIT_HIGH = (
        "wired_limit_high",
        Level.WARNING,
        "The GPU's wired limit is raised above Apple's default: little is left for the system, and Macs have panicked.",
        "lower it (sudo sysctl iogpu.wired_limit_mb=0 is the default), or set a smaller `memory` in hosts.yaml",
    )
    OVERCOMMITTED = (
        "overcommitted",
        Level.WARNING,
        "The running servers need more memory than the budget.",
        "stop one: `mlxctl unload {port} --force`",
    )
    UNBOUNDED_SERVERS = (
        "unbounded_servers",
        Level.WARNING,
        "Two servers have no limit of the contexts that they keep: together they can exhaust the memory.",
        "a load sets the limits that the installed engine has",
    )
    LIMITS_OVER_BUDGET = (
        "limits_over_budget",
        Level.WARNING,
        "The limits of the servers allow more memory together than the budget.",
        "a load chooses new limits from what is left",
    )
    MEMORY_PRESSURE = (
        "memory_pressure",
        Level.WARNING,
        "The system is short of memory.",
        "stop a server, or another program; see what each server holds: `mlxctl list --memory`",
    )
    SWAP_USED = (
        "swap_used",
        Level.WARNING,
        "Much memory is swapped out: servers will be slow.",
        "stop a server, or another program; see what each server holds: `mlxctl list --memory`",
    )
    MEMORY_STRANDED = (
        "memory_stranded",
        Level.ERROR,
        "A server ended, and the system did not get its memory back.",
        "only a reboot returns it",
    )
    PANICKED = (
        "panicked",
        Level.WARNING,
        "The system panicked in the last days, in the GPU's memory or in a Python process.",
        "update macOS and the engine; fewer servers at once, and a smaller `memory` in hosts.yaml, make it rarer",
    )
    KILLED_FOR_MEMORY = (
        "killed_for_memory",
        Level.WARNING,
        "The system killed a Python process in the last days because memory was short; it may have been a server.",
        "load less at once, or set a smaller `memory` in hosts.yaml; the budget: `mlxctl list --memory`",
    )

    # Boot and power

    RESTORE_JOB_OFF = (
        "restore_job_off",
        Level.WARNING,
        "The job that starts the models at boot is installed, and the system does not run it.",
        "`mlxctl boot --install`",
    )
    RESTORE_JOB_BROKEN = (
        "restore_job_broken",
        Level.ERROR,
        "The job that starts the models at boot runs a program that is gone.",
        "`mlxctl boot --install`",
    )
    KEEPER_NOT_RUNNING = (
        "keeper_not_running",
        Level.WARNING,
        "The keeper is installed, and does not run: servers that end stay down.",
        "`mlxctl boot --install --keep`; its log on the host: {log}",
    )
    RESTORE_TIMER = (
        "restore_timer",
        Level.INFO,
        "A timer starts servers again that have ended, minutes later.",
        "a keeper does that in seconds: `mlxctl boot --install --keep`",
    )
    RESTORE_NEEDS_LOGIN = (
        "restore_needs_login",
        Level.WARNING,
        "The models start when this user logs in at the screen, and not at boot.",
        "install it as a LaunchDaemon; the commands: `mlxctl boot --install`",
    )
    NO_LINGERING = (
        "no_lingering",
        Level.WARNING,
        "The models start when this user logs in, and end with the last session.",
        "sudo loginctl enable-linger {user}",
    )
    FILEVAULT = (
        "filevault",
        Level.WARNING,
        "FileVault is on: after a reboot, nothing starts until a person unlocks the disk.",
        "for a planned reboot: sudo fdesetup authrestart; for unattended reboots: sudo fdesetup disable",
    )
    NO_RESTART = (
        "no_restart",
        Level.WARNING,
        "The Mac stays off after a power failure.",
        "sudo pmset -a autorestart 1",
    )
    SLEEPS = (
        "sleeps",
        Level.WARNING,
        "The Mac goes to sleep when it is not used, with its servers.",
        "sudo pmset -a sleep 0",
    )

    # Exposure

    EXPOSED = (
        "exposed",
        Level.WARNING,
        "Servers answer without a key on an address that other machines may reach.",
        "set `bind` to 127.0.0.1 or to an address in a private network or VPN (of a server that a person started, its "
        "`--host`), and let the firewall admit only the gateway (`mlxctl help doctor`); if that is done: "
        "`exposure: accepted` in hosts.yaml",
    )
    BIND_OPEN = (
        "bind_open",
        Level.INFO,
        "hosts.yaml has the servers listen on an address that other machines may reach.",
        "let the firewall admit only the gateway (`mlxctl help doctor`), then set `exposure: accepted`",
    )

    # The gateway

    GATEWAY_ABSENT = (
        "gateway_absent",
        Level.INFO,
        "The gateway's files, which hosts.yaml names, are not on this machine, so nothing of it was checked.",
        "run doctor where the gateway runs, or correct `gateway` in hosts.yaml",
    )
    GATEWAY_UNUSABLE = (
        "gateway_unusable",
        Level.ERROR,
        "The gateway's files cannot be read as LiteLLM reads them.",
        "correct them",
    )
    GATEWAY_DOWN = (
        "gateway_down",
        Level.ERROR,
        "The gateway does not answer at the URL of hosts.yaml.",
        "start it, or correct `gateway.url` in hosts.yaml",
    )
    GATEWAY_KEY_MISSING = (
        "gateway_key_missing",
        Level.WARNING,
        "The variable of the gateway's key has no value here, so nothing can be asked through the gateway.",
        "set {name} in the gateway's env file, or in this environment",
    )
    GATEWAY_FAULT = (
        "gateway_fault",
        Level.ERROR,
        "A request by an alias fails, or the wrong server answers it.",
        "`mlxctl gateway`",
    )
    GATEWAY_DOUBT = (
        "gateway_doubt",
        Level.INFO,
        "Something between the gateway and its servers is worth a look.",
        "`mlxctl gateway`",
    )
    GATEWAY_HEALTH_CHECKS = (
        "gateway_health_checks",
        Level.WARNING,
        "LiteLLM's background health checks send real requests to the servers; a wrong name makes mlx-lm drop its "
        "model.",
        "in {config}: general_settings: {{background_health_checks: false}}; then restart the gateway, once. Monitors "
        "should ask /health/liveliness, never /health",
    )
    GATEWAY_RETRIES = (
        "gateway_retries",
        Level.WARNING,
        "The gateway gives up before a swap is over, so requests are lost.",
        "give the port a hold in hosts.yaml, and paste what `mlxctl gateway --print` shows; then restart the gateway, "
        "once",
    )

    # Both sides

    DRIFT = (
        "drift",
        Level.WARNING,
        "The registry, hosts.yaml and what runs differ; `status` names the same.",
        "`mlxctl status`",
    )
    NOT_CHECKED = (
        "not_checked",
        Level.UNKNOWN,
        "A check could not be made.",
        "repair what the message names, then run doctor again",
    )


@dataclass(frozen=True)
class Finding:
    """One fault. `port` is None if it is not about one."""

    code: FindingCode
    level: Level
    message: str
    hint: str
    """What to do. It follows the code's remedy, or says more where more is known. Its commands are in backticks."""
    port: int | None = None

    @classmethod
    def of(
        cls, code: FindingCode, message: str, *, port: int | None = None, level: Level | None = None, **values: object
    ) -> Finding:
        """Return the finding with the code's remedy as its hint. `values` are the remedy's fields."""
        return cls(code, level or code.level, message, code.remedy.format(port=port, **values), port)

    @classmethod
    def because(cls, code: FindingCode, error: MlxopsError) -> Self:
        """Return the finding for an error that a command would be refused with."""
        why = f": {error.why}" if error.why else ""
        return cls(code, code.level, f"{error.message}{why}", error.marked_hint or code.remedy)


def worst_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return the findings by level, each level in the order of the table, each finding once."""
    order = list(FindingCode)
    found = dict.fromkeys(findings)
    return tuple(sorted(found, key=lambda each: (each.level.rank, order.index(each.code), each.port or 0)))
