"""Decide which processes are servers, and which other processes belong to each. Pure: works on one process table.

A server is a process that runs an engine's program, with all its descendants. Words in an argv are not enough: tmux, an
ssh client or a notebook may have them too. A parent that only waits for the server, such as `uv run` or a shell with a
script, belongs to it. Every other parent has work of its own and does not belong to it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

from mlxops.agent.engines import recognise
from mlxops.agent.engines.argv import program_of
from mlxops.agent.engines.base import DetectedServer
from mlxops.agent.host.system import Process, ProcessTable
from mlxops.core.frozen import dataclass

SHELLS = frozenset({"sh", "bash", "dash", "zsh", "ksh", "ash", "busybox", "fish", "nu", "csh", "tcsh"})
PREFIXES = frozenset(
    {
        *("nohup", "caffeinate", "taskpolicy", "arch", "nice", "ionice", "chrt", "taskset", "numactl", "prlimit"),
        *("env", "envdir", "setpriv", "unshare", "setsid", "stdbuf", "time", "gtime", "timeout", "gtimeout"),
        *("dumb-init", "tini", "catatonit", "flock", "softlimit", "chpst", "chronic", "uvx", "dotenv", "direnv"),
        *("doppler", "infisical", "chamber", "aws-vault"),
    }
)
"""Programs that only run the command in their arguments."""
RUNNERS = frozenset(
    {
        *("uv", "poetry", "pdm", "pipenv", "pipx", "hatch", "rye", "pixi", "conda", "mamba", "micromamba"),
        *("mise", "asdf", "pyenv", "devbox", "nix", "op"),
    }
)
"""Programs that do so with one of the subcommands in `_RUN`."""
_RUN = frozenset({"run", "exec", "x", "tool", "shell", "develop"})
_SHELL_OPTIONS_WITH_VALUE = frozenset({"-o", "+o", "-O", "+O", "--rcfile", "--init-file"})
INITS = frozenset({"init", "systemd", "launchd"})
"""Programs that become the parent of processes whose own parent has ended."""


@dataclass(frozen=True)
class ServerProcess:
    """A server in the process table."""

    process: Process
    engine: str
    detected: DetectedServer
    family: tuple[int, ...]
    """Its process and all its descendants, without other servers."""


def find_servers(table: ProcessTable) -> list[ServerProcess]:
    """Return the servers of all users. A fork of a server, which has the same argv, is part of that server."""
    recognised = {p.pid: pair for p in table.processes.values() if not p.zombie and (pair := recognise(p.argv))}
    roots = {pid for pid in recognised if not _is_fork(table, pid)}
    return [
        ServerProcess(table.processes[pid], *recognised[pid], _descendants(table, pid, roots)) for pid in sorted(roots)
    ]


def _is_fork(table: ProcessTable, pid: int) -> bool:
    parent = table.processes.get(table.processes[pid].ppid)
    return parent is not None and not parent.zombie and parent.argv == table.processes[pid].argv


def family(table: ProcessTable, pid: int) -> tuple[int, ...]:
    """Return a process and all its descendants, without other servers."""
    if not recognise(table.processes[pid].argv):
        return _descendants(table, pid, ())  # adopted, and its argv has changed: a server below it is the same server
    others = {p.pid for p in table.processes.values() if recognise(p.argv) and not _is_fork(table, p.pid)}
    return _descendants(table, pid, others)


def _descendants(table: ProcessTable, pid: int, others: Collection[int]) -> tuple[int, ...]:
    pids = [pid]
    for each in pids:
        pids += [child for child in table.children.get(each, ()) if child not in others and child not in pids]
    return tuple(pids)


def wrappers(table: ProcessTable, pid: int) -> tuple[int, ...]:
    """Return the ancestors that only run this process, outermost first.

    Each has the same process group and user, runs a program that does nothing else, and has no other child.
    """
    pids: list[int] = []
    current = table.processes[pid]
    while True:
        parent = table.processes.get(current.ppid)
        if (
            parent is None
            or parent.pid <= 1
            or parent.zombie
            or (parent.pgid, parent.uid) != (current.pgid, current.uid)
            or not is_wrapper(parent.argv)
            or table.children.get(parent.pid, ()) != (current.pid,)
        ):
            return tuple(reversed(pids))
        pids.append(parent.pid)
        current = parent


def starter(table: ProcessTable, pid: int) -> Process | None:
    """Return the parent of a server and its wrappers, which outlives it; None for an init process or an interactive
    shell."""
    top = next(iter(wrappers(table, pid)), pid)
    parent = table.processes.get(table.processes[top].ppid)
    if parent is None or parent.pid <= 1 or parent.zombie or not parent.argv:
        return None
    name = _name(parent.argv)
    interactive = name in SHELLS and not _runs_a_script(parent.argv)
    return None if name in INITS or interactive else parent


def is_wrapper(argv: Sequence[str]) -> bool:
    """Whether a process with this argv does nothing but run a command."""
    runs = program_of(argv)
    if runs is None:
        return False
    name = _name(argv)
    if name in SHELLS:
        return _runs_a_script(argv)
    # Some runners are Python scripts, so compare the program, not the first word.
    return runs.name in PREFIXES or (runs.name in RUNNERS and bool(_RUN & set(runs.arguments[:6])))


def is_shell(argv: Sequence[str]) -> bool:
    return bool(argv) and _name(argv) in SHELLS


def _name(argv: Sequence[str]) -> str:
    """Return the name of a process's own program, without a login shell's hyphen."""
    return os.path.basename(argv[0]).lstrip("-")


def _runs_a_script(argv: Sequence[str]) -> bool:
    """Whether a shell with this argv runs a file or a command string. Without one, it may be interactive."""
    arguments = iter(argv[1:])
    for word in arguments:
        if word in _SHELL_OPTIONS_WITH_VALUE:
            next(arguments, None)
        elif word[:1] not in {"-", "+"} or word == "--command" or (not word.startswith("--") and "c" in word):
            return True
    return False
