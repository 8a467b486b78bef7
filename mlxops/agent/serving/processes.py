"""Server processes: the only code that starts, identifies and signals them.

A server is started behind a gate (`gate.py`): its process waits in a session and group of its own until its record is
written, then becomes the engine. A process is signalled only if its identity is proven: boot, raw start time and group
match the record, and the run's mark is in its environment, which children inherit. If the leader is gone, each member
must have the mark.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlxops.agent.host.programs import MARK
from mlxops.agent.host.system import Look, Process, System
from mlxops.agent.serving import servers
from mlxops.core.errors import MlxopsError, NotStarted, Refused
from mlxops.core.frozen import dataclass
from mlxops.core.records import Run
from mlxops.core.text import clean

if TYPE_CHECKING:
    import subprocess

GATE = Path(__file__).with_name("gate.py")


@dataclass
class PendingProcess:
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


def spawn(system: System, argv: Sequence[str], env: Mapping[str, str], folder: Path, log: Path) -> PendingProcess:
    """Start `argv` behind the gate, as leader of a new session, both streams appended to `log`.

    Raises `NotStarted` if the system refuses another process.
    """
    import subprocess

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
            why="it was gone before it could be observed; the usual cause is a kill for lack of memory",
            hint="try again; if it fails again, see the host's system log",
        )
    return PendingProcess(child, writer, process.start)


def leader(system: System, processes: Mapping[int, Process], run: Run) -> Process | None:
    """Return the recorded leader if the process with its pid is proven to be the same; else None.

    Its argv proves nothing: a prefix (`nice`, `env`) or a wrapper script may change it. The mark in its environment may
    be hidden, or removed by a wrapper; but the mark of another run proves that it is another process.
    """
    process = processes.get(run.pid)
    if process is None or process.zombie or run.boot_id != system.boot_id():
        return None
    if (process.start, process.pgid) != (run.start, run.pgid):
        return None
    if run.adopted or (system.environment(process.pid, MARK) or run.run_id) == run.run_id:
        return process
    return None


def members(system: System, look: Look, run: Run) -> tuple[int, ...]:
    """Return the living processes of a run that are proven ours.

    In a group that we created, every process is ours. The group of an adopted server may contain more, such as other
    servers of the same script: there only the server is ours, with its descendants and wrappers.
    """
    if run.boot_id != system.boot_id():
        return ()
    proven = leader(system, look.processes, run)
    if run.adopted:
        return (*servers.wrappers(look, run.pid), *servers.family(look, run.pid)) if proven else ()
    group = look.group(run.pgid)
    if proven:
        return tuple(sorted(p.pid for p in group))
    return tuple(sorted(p.pid for p in group if _has_mark(system, p.pid, run)))


def _has_mark(system: System, pid: int, run: Run) -> bool:
    return bool(run.run_id) and system.environment(pid, MARK) == run.run_id


def _marked_outside_group(system: System, look: Look, run: Run) -> set[int]:
    """Return processes that the server started and that left its group: their environment has the run's mark."""
    if run.adopted or run.boot_id != system.boot_id():
        return set()
    own = {process.pid for process in look.ancestors(os.getpid())}
    others = [p.pid for p in look.processes.values() if p.pgid != run.pgid and p.uid == os.getuid() and not p.zombie]
    return {pid for pid in others if pid not in own and _has_mark(system, pid, run)}


@dataclass(frozen=True)
class Stopped:
    seconds: float
    killed: bool
    """It did not end after SIGTERM and was killed."""


LEFTOVER_SECONDS = 2.0
"""How long processes that remain after the server has ended may take to react to SIGTERM."""
KILL_SECONDS = 30.0
"""How long the kernel may take to remove a killed group: returning hundreds of GB of memory takes a while."""


def stop(system: System, run: Run, *, grace: float, reap: Callable[[], object] = lambda: None) -> Stopped:
    """Stop the recorded server: SIGTERM, wait up to `grace` seconds, SIGKILL. Prove that no process is left.

    First signal the listener and the processes above it (a shell, uv). Spare its children, because it needs them to
    finish open requests: the child of mlx-openai-server that holds the weights dies of SIGTERM, and open requests then
    hang. Signal the processes that outlive it next.

    `reap` collects zombies that are this process's own children. Raises `Refused` (not_ours) and signals nothing if the
    group has a process that is not proven ours; `MlxopsError` (will_not_die) if a process survives SIGKILL.
    """
    began = time.monotonic()
    stopping = _Stopping(system, run, reap)
    stopping.send(signal.SIGTERM, spare_children=True)
    drained = stopping.ended(grace, signalled_only=True)
    if drained:
        stopping.send(signal.SIGTERM)
    killed = not (drained and stopping.ended(LEFTOVER_SECONDS)) and stopping.send(signal.SIGKILL)
    if not stopping.ended(KILL_SECONDS):
        raise MlxopsError(
            "will_not_die",
            f"the server's processes are still there {time.monotonic() - began:.0f} s after SIGTERM",
            why="they were killed, but the kernel has not removed them; the usual cause is a disk or driver that hangs",
            hint="check again: `mlxctl status`; if they stay, reboot the host",
        )
    return Stopped(time.monotonic() - began, killed and not drained)


class _Stopping:
    """Signals one recorded group and remembers which processes it signalled.

    An exiting process loses its arguments and its environment, which prove its identity, before its memory and its
    sockets. It is therefore waited for by the pid and start time at which it was proven ours.
    """

    def __init__(self, system: System, run: Run, reap: Callable[[], object]) -> None:
        self._system = system
        self._run = run
        self._reap = reap
        self._known: dict[int, str] = {}
        self._signalled: set[int] = set()

    def send(self, number: signal.Signals, *, spare_children: bool = False) -> bool:
        """Signal the processes that are proven ours; return False if none is alive.

        Signal a group that we created as a whole, and only if every process in it is ours. In any other group, signal
        each process by itself.
        """
        look = self._system.look({self._run.port})
        # Search for them once; later their start times identify them.
        outside = set() if self._known else _marked_outside_group(self._system, look, self._run)
        ours = {*members(self._system, look, self._run), *outside, *self._living(look)}
        if not ours:
            return False
        group = {process.pid for process in look.group(self._run.pgid)}
        strangers = set() if self._run.adopted else group - ours
        self._known |= {pid: look.processes[pid].start for pid in ours}
        if strangers:
            names = ", ".join(f"{pid} ({_program(look.processes[pid])})" for pid in sorted(strangers))
            raise _not_ours(self._run, f"in it are processes that are not proven ours: {names}", strangers)
        spared = _children_of_the_server(look, self._run.port, ours) if spare_children else set()
        self._signalled = ours - spared
        try:
            if self._signalled == group and not self._run.adopted:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._run.pgid, number)
            else:
                self._send_each(look, number)
        except PermissionError:
            raise _not_ours(self._run, "the system reports that it is another user's", self._signalled) from None
        return True

    def _send_each(self, look: Look, number: signal.Signals) -> None:
        """Signal each process, parents first: a shell that runs a server in a loop must not start the next one. Check
        the start time again just before, in case another process has got the pid."""
        for pid in sorted(self._signalled, key=lambda pid: (len(list(look.ancestors(pid))), pid)):
            process = self._system.process(pid)
            if process is not None and process.start == self._known[pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def ended(self, seconds: float, *, signalled_only: bool = False) -> bool:
        """Wait up to `seconds`; return whether no process of the group, or no signalled one, is alive."""
        deadline = time.monotonic() + seconds
        pause = 0.01
        while True:
            self._reap()
            # If the processes cannot be observed for a moment, try again: do not stop half way.
            with contextlib.suppress(Refused):
                look = self._system.look(())
                alive = self._living(look)
                if not (alive & self._signalled if signalled_only else alive or members(self._system, look, self._run)):
                    return True
            if time.monotonic() > deadline:
                return False
            # Most processes end at once. For one that drains, observing four times a second is enough.
            time.sleep(pause)
            pause = min(pause * 1.5, 0.25)

    def _living(self, look: Look) -> set[int]:
        known = ((pid, look.processes.get(pid)) for pid in self._known)
        return {pid for pid, process in known if process and process.start == self._known[pid] and not process.zombie}


def _children_of_the_server(look: Look, port: int, ours: Collection[int]) -> set[int]:
    """Return the descendants of the listeners in `ours` that do not listen themselves."""
    listening = {pid for each in look.listeners if each.port == port for pid in each.pids} & set(ours)
    return {pid for pid in set(ours) - listening if any(up.pid in listening for up in look.ancestors(pid))}


def _program(process: Process) -> str:
    """Return a short form of a process's command."""
    return clean(" ".join(Path(word).name if word.startswith("/") else word for word in process.argv[:4]))[:60] or "?"


def _not_ours(run: Run, why: str, pids: Collection[int]) -> Refused:
    kill = f"kill {' '.join(map(str, sorted(pids)))}"
    return Refused(
        "not_ours",
        f"process group {run.pgid} on port {run.port} may not be signalled",
        why=why,
        hint=f"nothing was signalled; on the host, as their owner: {kill}; then: `mlxctl unload {run.port}`",
    )
