"""Server processes: the only code that starts, identifies and signals them.

A server is started behind a gate (`gate.py`): it exists, in a session and group of its own, and waits; its record
is written; then it becomes the engine. A process is signalled only after its identity was proven: boot, raw start time
and group agree with the record, and the run's mark is in its environment, which children inherit. Where the leader is
gone, each member must carry the mark.
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

from mlxops.agent.host.programs import MARK
from mlxops.agent.host.system import Look, Process, System
from mlxops.agent.serving import servers
from mlxops.core.errors import MlxopsError, NotStarted, Refused
from mlxops.core.records import Run
from mlxops.core.text import clean

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
    return PendingProcess(child, writer, process.start)


def leader(system: System, processes: Mapping[int, Process], run: Run) -> Process | None:
    """Return the recorded leader if the process with its pid is proven to be it; else None.

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

    All of a group that we made is ours. A group that we did not make may hold more than the server, such as other
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


def _elsewhere(system: System, look: Look, run: Run) -> set[int]:
    """Return processes that a server of ours started and that left its group: their environment has the run's mark."""
    if run.adopted or run.boot_id != system.boot_id():
        return set()
    own = {process.pid for process in look.ancestors(os.getpid())}
    others = [p.pid for p in look.processes.values() if p.pgid != run.pgid and p.uid == os.getuid() and not p.zombie]
    return {pid for pid in others if pid not in own and _has_mark(system, pid, run)}


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
    """Stop the recorded server: ask, wait up to `grace` seconds, kill, and prove that nothing of it is left.

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
        """Signal what is proven ours; return False if nothing of it lives.

        A group that we made is signalled as a whole, and only if everything in it is ours. In any other group each
        process is signalled by itself.
        """
        look = self._system.look({self._run.port})
        # Search for them once; later their start times identify them.
        elsewhere = set() if self._known else _elsewhere(self._system, look, self._run)
        ours = {*members(self._system, look, self._run), *elsewhere, *self._living(look)}
        if not ours:
            return False
        group = {process.pid for process in look.group(self._run.pgid)}
        strangers = set() if self._run.adopted else group - ours
        self._known |= {pid: look.processes[pid].start for pid in ours}
        if strangers:
            who = ", ".join(f"{pid} ({_program(look.processes[pid])})" for pid in sorted(strangers))
            raise _not_ours(self._run, f"in it are processes that are not proven ours: {who}", strangers)
        spared = _children_of_the_server(look, self._run.port, ours) if spare_children else set()
        self._asked = ours - spared
        try:
            if self._asked == group and not self._run.adopted:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._run.pgid, number)
            else:
                self._send_each(look, number)
        except PermissionError:
            raise _not_ours(self._run, "the system says that it is another user's", self._asked) from None
        return True

    def _send_each(self, look: Look, number: signal.Signals) -> None:
        """Signal each process, parents first: a shell that runs a server in a loop must not start the next one. Check
        the start time again just before, in case another process has got the pid."""
        for pid in sorted(self._asked, key=lambda pid: (len(list(look.ancestors(pid))), pid)):
            process = self._system.process(pid)
            if process is not None and process.start == self._known[pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

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


def _not_ours(run: Run, why: str, pids: Collection[int]) -> Refused:
    kill = f"kill {' '.join(map(str, sorted(pids)))}"
    return Refused(
        "not_ours",
        f"process group {run.pgid} on port {run.port} may not be signalled",
        why=why,
        hint=f"nothing was signalled; as their owner, on the host: {kill}; then: mlxctl unload {run.port}",
    )
