"""Server processes: the only code that starts, identifies and signals them.

A server is started behind a gate (`gate.py`): it exists, in a session and group of its own, and waits; its record
is written; then it becomes the engine. A process is signalled only as a group, and only after its identity was
proven: boot, raw start time, group and the tail of its command agree with the record. Where the leader is gone,
each member must carry the run's own mark in its environment, which children inherit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxops.agent.logs import clean
from mlxops.agent.system import Look, Process, System
from mlxops.core.errors import MlxopsError, NotStarted, Refused
from mlxops.core.world import Run

MARK = "MLXOPS_RUN"
"""The variable of a server's environment that names the run it belongs to."""

GATE = Path(__file__).with_name("gate.py")
_KEPT = ("HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "TZ", "HF_HOME", "HF_HUB_CACHE")
_FOLDERS = "/opt/homebrew/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


def environment(environ: Mapping[str, str], extra: Mapping[str, str], run_id: str) -> dict[str, str]:
    """A server's environment: built from these, so that no token and nothing of the asker's shell is in it."""
    built = {key: environ[key] for key in _KEPT if key in environ}
    built |= {"PATH": _FOLDERS, "PYTHONUNBUFFERED": "1"}
    built |= {key: value for key, value in extra.items() if "TOKEN" not in key.upper()}
    return built | {MARK: run_id}


@dataclass
class Gated:
    """A process that waits at the gate. `open` lets it become the engine; `abandon` ends it."""

    child: subprocess.Popen[bytes]
    pipe: int | None
    start: str

    @property
    def pid(self) -> int:
        return self.child.pid

    def open(self) -> None:
        assert self.pipe is not None
        os.write(self.pipe, b"\n")
        self._shut()

    def abandon(self) -> None:
        self._shut()
        self.child.wait()

    def _shut(self) -> None:
        if self.pipe is not None:
            os.close(self.pipe)
            self.pipe = None


def spawn(system: System, argv: Sequence[str], env: Mapping[str, str], folder: Path, log: Path) -> Gated:
    """Start `argv` behind the gate, as leader of a new session, both streams appended to `log`.

    Raises `NotStarted` if the system refuses another process.
    """
    reader, writer = os.pipe()
    try:
        with open(log, "ab", buffering=0) as output:
            os.chmod(log, 0o600)
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", str(GATE), str(reader), *argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=folder,
                env=dict(env),
                start_new_session=True,
                pass_fds=(reader,),
            )
    except OSError as error:
        os.close(writer)
        raise NotStarted(
            "spawn_failed",
            "the server's process could not be started",
            why=error.strerror or str(error),
            hint="see the host's process and file limits, and its disk",
        ) from None
    finally:
        os.close(reader)
    process = system.process(child.pid)
    if process is None:
        os.close(writer)
        child.wait()
        raise NotStarted(
            "spawn_failed",
            "the server's process ended at once",
            why="it was gone before it was seen: killed, most often for want of memory",
            hint="try again; if it stays so, see the host's own log",
        )
    return Gated(child, writer, process.start)


def ask(argv: Sequence[str], env: Mapping[str, str], seconds: float) -> tuple[int | None, str]:
    """Run a program that only prints something and ends: (its status, what it printed), None if it took too long.

    It gets a session of its own, and nothing of it is left in the end.
    """
    try:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env={key: value for key, value in env.items() if key != MARK},
            start_new_session=True,
            text=True,
            errors="replace",
        )
    except OSError as error:
        return 127, error.strerror or str(error)
    try:
        said, _ = child.communicate(timeout=seconds)
        return child.returncode, said
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        if child.returncode is None:
            # Not reaped yet, so its pid is still its own.
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()


def leader(system: System, processes: Mapping[int, Process], run: Run) -> Process | None:
    """The recorded leader, if the process with its pid is proven to be it; else None."""
    process = processes.get(run.pid)
    if process is None or process.zombie or run.boot_id != system.boot_id():
        return None
    tail = run.argv[1:]
    same = process.start == run.start and process.pgid == run.pgid
    # While a process becomes another program, the kernel shows no arguments: for an instant it has none.
    if same and (not tail or not process.argv or process.argv[len(process.argv) - len(tail) :] == tail):
        return process
    return None


def members(system: System, look: Look, run: Run) -> tuple[int, ...]:
    """The living processes of the recorded group that are proven ours."""
    if run.boot_id != system.boot_id():
        return ()
    group = look.group(run.pgid)
    if leader(system, look.processes, run) is not None:
        return tuple(sorted(p.pid for p in group if not run.adopted or _related(look, p.pid, run.pid)))
    return tuple(sorted(p.pid for p in group if system.environment(p.pid, MARK) == run.run_id and run.run_id))


def _related(look: Look, one: int, other: int) -> bool:
    """One is the other's ancestor, or both are the same. A group that we did not make may hold more than the server:
    the script that started it belongs to it, what else that script started does not."""
    return other in {p.pid for p in look.ancestors(one)} or one in {p.pid for p in look.ancestors(other)}


@dataclass(frozen=True)
class Stopped:
    seconds: float
    killed: bool
    """It did not end when asked and was killed."""


LEFT_SECONDS = 2.0
"""For what a server leaves when it has ended, to end when it is asked."""
KILL_SECONDS = 30.0
"""How long the kernel may take to remove a killed group: returning hundreds of GB of memory takes a while."""


def stop(system: System, run: Run, *, grace: float, reap: Callable[[], object] = lambda: None) -> Stopped:
    """Stop the recorded group: ask, wait up to `grace` seconds, kill, and prove that nothing of it is left.

    Asked is first what listens on the port, with what it runs under (a shell, uv): what it has started itself it needs
    to answer its open requests. (The child of mlx-openai-server that holds the weights dies of TERM, and the requests
    under way then hang.) What outlives it is asked next.

    `reap` collects zombies that are this process's own children. Raises `Refused` (not_ours) if what lives in the
    group is not proven ours: it is then not signalled; `MlxopsError` (will_not_die) if it survives being killed.
    """
    began = time.monotonic()
    stopping = _Stopping(system, run, reap)
    stopping.send(signal.SIGTERM, spare_children=True)
    drained = stopping.ended(grace, asked_only=True)
    if drained:
        stopping.send(signal.SIGTERM)
    killed = not (drained and stopping.ended(LEFT_SECONDS)) and stopping.send(signal.SIGKILL)
    if not stopping.ended(KILL_SECONDS):
        raise MlxopsError(
            "will_not_die",
            f"the server's processes are still there {time.monotonic() - began:.0f} s after they were asked to end",
            why="they were killed and the kernel keeps them, most often for a disk or a driver that does not answer",
            hint="mlxctl status; if it stays so, the host needs a reboot",
        )
    return Stopped(time.monotonic() - began, killed and not drained)


class _Stopping:
    """The signals to one recorded group, and who got them.

    A process on its way out loses its arguments and its environment, which prove it, before its memory and its
    sockets: it is waited for by what it was known as when it was proven ours (pid -> start).
    """

    def __init__(self, system: System, run: Run, reap: Callable[[], object]) -> None:
        self._system = system
        self._run = run
        self._reap = reap
        self._known: dict[int, str] = {}
        self._asked: set[int] = set()

    def send(self, number: signal.Signals, *, spare_children: bool = False) -> bool:
        """Signal the group if it is proven ours; False if nothing of it lives."""
        look = self._system.look({self._run.port})
        ours = members(self._system, look, self._run)
        if not ours:
            return False
        strangers = {process.pid for process in look.group(self._run.pgid)} - set(ours) - self._living(look)
        self._known |= {pid: look.processes[pid].start for pid in ours}
        if strangers:
            who = ", ".join(f"{pid} ({_program(look.processes[pid])})" for pid in sorted(strangers))
            raise _not_ours(self._run, f"in it are processes that are not proven ours: {who}")
        spared = _children_of_the_server(look, self._run.port, ours) if spare_children else set()
        self._asked = set(ours) - spared
        try:
            with contextlib.suppress(ProcessLookupError):
                if not spared:
                    os.killpg(self._run.pgid, number)
            for pid in self._asked if spared else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        except PermissionError:
            raise _not_ours(self._run, "the system says that it is another user's") from None
        return True

    def ended(self, seconds: float, *, asked_only: bool = False) -> bool:
        """Whether nothing of the group, or nothing of what was signalled, lives, or soon does no more."""
        deadline = time.monotonic() + seconds
        pause = 0.01
        while True:
            self._reap()
            # What cannot be seen for a moment is looked for again: half way is no place to stop.
            with contextlib.suppress(Refused):
                look = self._system.look(())
                left = self._living(look)
                if not (left & self._asked if asked_only else left or members(self._system, look, self._run)):
                    return True
            if time.monotonic() > deadline:
                return False
            # Most end at once; for one that drains, a look at every process four times a second is enough.
            time.sleep(pause)
            pause = min(pause * 1.5, 0.25)

    def _living(self, look: Look) -> set[int]:
        found = ((pid, look.processes.get(pid)) for pid in self._known)
        return {pid for pid, process in found if process and process.start == self._known[pid] and not process.zombie}


def _children_of_the_server(look: Look, port: int, ours: Collection[int]) -> set[int]:
    """Those of `ours` that the listeners among them started, as far as they do not listen too."""
    listening = {pid for each in look.listeners if each.port == port for pid in each.pids} & set(ours)
    return {pid for pid in set(ours) - listening if any(up.pid in listening for up in look.ancestors(pid))}


def _program(process: Process) -> str:
    """What a process runs, in a few words."""
    return clean(" ".join(Path(word).name if word.startswith("/") else word for word in process.argv[:4]))[:60] or "?"


def _not_ours(run: Run, why: str) -> Refused:
    return Refused(
        "not_ours",
        f"process group {run.pgid} on port {run.port} may not be signalled",
        why=why,
        hint="nothing was signalled; look at it on the host, and stop it yourself",
    )
