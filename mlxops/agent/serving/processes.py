"""Server processes: the only code that starts, identifies and signals them.

A server is started behind a gate (`gate.py` or `mlxops_start.py`): its process waits in a session and group of its own
until its record is written, then becomes the engine. A process is signalled only if its identity is proven: boot, raw
start time and group match the record, and the run's mark is in its environment, which children inherit. If the leader
is gone, each member must have the mark.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlxops.agent.engines import ENGINES
from mlxops.agent.engines.argv import START_FILE, is_preloaded
from mlxops.agent.host.programs import MARK
from mlxops.agent.host.system import Process, ProcessTable, System
from mlxops.agent.serving import servers
from mlxops.core.errors import NotStarted, Refused
from mlxops.core.frozen import dataclass
from mlxops.core.records import Run
from mlxops.core.text import clean

if TYPE_CHECKING:
    import socket
    import subprocess

GATE = Path(__file__).with_name("gate.py")
PRELOADING_GATE = Path(__file__).with_name(START_FILE)
WAITING_FOLDER = "/"
"""The working directory of a process behind the gate. It gets the server's when the gate is opened."""


@dataclass
class PendingProcess:
    """A process that waits to become the engine. `open` lets it; `abandon` ends it."""

    child: subprocess.Popen[bytes]
    gate: socket.socket | None
    start: str

    @property
    def pid(self) -> int:
        return self.child.pid

    def ready(self, seconds: float) -> bool:
        """Wait up to `seconds`; return whether it has done what it can do before it is opened, or has ended."""
        import select

        assert self.gate is not None
        return bool(select.select([self.gate], [], [], seconds)[0])

    def open(self, folder: Path) -> None:
        """Let it become the engine, with this working directory."""
        assert self.gate is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has ended; the caller observes that
            self.gate.sendall(os.fsencode(folder) + b"\0")
        self._shut()

    def abandon(self) -> None:
        self._shut()
        self.child.terminate()  # it is not the engine yet, and may be importing
        self.child.wait()

    def _shut(self) -> None:
        if self.gate is not None:
            self.gate.close()
            self.gate = None


def spawn(
    system: System, argv: Sequence[str], env: Mapping[str, str], log: Path, preload: Sequence[str] = ()
) -> PendingProcess:
    """Start `argv` behind the gate, as leader of a new session, both streams appended to `log`.

    `preload`: the Python that runs the program `argv[0]`, and the modules to import before the gate is opened.
    Raises `NotStarted` if the system refuses another process.
    """
    import socket
    import subprocess

    ours, theirs = socket.socketpair()
    fd = str(theirs.fileno())
    python, *modules = preload or (sys.executable,)
    gate = [python, str(PRELOADING_GATE), fd, ",".join(modules)] if preload else [python, "-I", "-S", str(GATE), fd]
    try:
        with open(log, "ab", buffering=0) as output:
            os.chmod(log, 0o600)
            child = subprocess.Popen(
                [*gate, *argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=WAITING_FOLDER,
                env=dict(env),
                start_new_session=True,
                pass_fds=(theirs.fileno(),),
            )
    except OSError as error:
        ours.close()
        raise NotStarted(
            "spawn_failed",
            "the server's process could not be started",
            why=error.strerror or str(error),
            hint="see the host's process and file limits, and its disk",
        ) from None
    finally:
        theirs.close()
    process = system.process(child.pid)
    if process is None:
        ours.close()
        child.wait()
        raise NotStarted(
            "spawn_failed",
            "the server's process ended at once",
            why="it was gone before it could be observed; the usual cause is a kill for lack of memory",
            hint="try again; if it fails again, see the host's system log",
        )
    return PendingProcess(child, ours, process.start)


def waits(system: System, process: Process) -> bool:
    """Return whether a process waits behind the start file's gate, whose command is already that of the server.

    It becomes a server later, or ends by itself.
    """
    return is_preloaded(process.argv) and system.folder(process.pid) == WAITING_FOLDER


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


def members(system: System, table: ProcessTable, run: Run) -> tuple[int, ...]:
    """Return the living processes of a run that are proven ours.

    In a group that we created, every process is ours. The group of an adopted server may contain more, such as other
    servers of the same script: there only the server is ours, with its descendants and wrappers. Once it is being
    stopped, the processes that were ours then stay ours, also after their leader has ended.
    """
    if run.boot_id != system.boot_id():
        return ()
    return tuple(sorted({*_proven(system, table, run), *_alive(table, run.stopping)}))


def _proven(system: System, table: ProcessTable, run: Run) -> Iterable[int]:
    """Return the living processes that the leader or the mark of the run proves ours."""
    proven = leader(system, table.processes, run)
    if run.adopted:
        return (*servers.wrappers(table, run.pid), *servers.family(table, run.pid)) if proven else ()
    group = table.group(run.pgid)
    return [p.pid for p in group if proven or _has_mark(system, p.pid, run)]


def _alive(table: ProcessTable, known: Iterable[tuple[int, str]]) -> set[int]:
    """Return the pids of the processes (pid and start) that are still alive."""
    processes = ((pid, start, table.processes.get(pid)) for pid, start in known)
    return {pid for pid, start, process in processes if process and process.start == start and not process.zombie}


def _has_mark(system: System, pid: int, run: Run) -> bool:
    return bool(run.run_id) and system.environment(pid, MARK) == run.run_id


def _marked_outside_group(system: System, table: ProcessTable, run: Run) -> set[int]:
    """Return processes that the server started and that left its group: their environment has the run's mark."""
    if run.adopted or run.boot_id != system.boot_id():
        return set()
    own = {process.pid for process in table.ancestors(os.getpid())}
    others = [p.pid for p in table.processes.values() if p.pgid != run.pgid and p.uid == os.getuid() and not p.zombie]
    return {pid for pid in others if pid not in own and _has_mark(system, pid, run)}


class Signaller:
    """Signals one recorded group and remembers which processes it signalled.

    `reap` collects zombies that are this process's own children.

    An exiting process loses its arguments and its environment, which prove its identity, before its memory and its
    sockets. It is therefore waited for by the pid and start time at which it was proven ours.
    """

    def __init__(self, system: System, run: Run, reap: Callable[[], object] = lambda: None) -> None:
        self._system = system
        self._run = run
        self._reap = reap
        self._known: dict[int, str] = {}
        self._signalled: set[int] = set()

    @property
    def alive(self) -> tuple[int, ...]:
        """The living processes that are proven ours, and those that were when they were first signalled."""
        table = self._system.process_table(())
        return tuple(sorted({*members(self._system, table, self._run), *self._living(table)}))

    def prove(self) -> tuple[tuple[int, str], ...]:
        """Return pid and start of each process that may be signalled. Raises `Refused` (not_ours) as `send` does."""
        table, ours = self._prove()
        return tuple((pid, table.processes[pid].start) for pid in sorted(ours))

    def send(self, number: signal.Signals) -> bool:
        """Signal every process that is proven ours; return False if none is alive.

        Signal a group that we created as a whole, and only if every process in it is ours. In any other group, signal
        each process by itself. Raises `Refused` (not_ours), and signals nothing, if the group has a process that is not
        proven ours.
        """
        table, ours = self._prove()
        self._send(table, dict.fromkeys(ours, number))
        return bool(ours)

    def ask(self, number: signal.Signals) -> bool:
        """Ask the server itself to end; return False if no process is alive.

        Spare its children, because it needs them to finish open requests and to clean up. The processes above it, such
        as a shell or uv, end with it: only SIGTERM also goes to them, because uv passes SIGINT on, and two of these
        interrupt the cleanup. A shell gets SIGTERM in any case: its script may start the server again.

        Raises `Refused` (not_ours) as `send` does.
        """
        table, ours = self._prove()
        server = _server(table, self._run, ours)
        above = {up.pid for pid in server for up in table.ancestors(pid)} & ours - server
        shells = {pid for pid in above if servers.is_shell(table.processes[pid].argv)}
        above_too = above if number is signal.SIGTERM else shells
        self._send(table, dict.fromkeys(above_too, signal.SIGTERM) | dict.fromkeys(server, number))
        return bool(server)

    def ignores(self, number: signal.Signals) -> bool:
        """Return whether the server itself ignores the signal, as one that a shell started with `&` ignores SIGINT."""
        table = self._system.process_table({self._run.port})
        server = _server(table, self._run, members(self._system, table, self._run))
        return bool(server) and all(self._system.ignores(pid, number) for pid in server)

    def _prove(self) -> tuple[ProcessTable, set[int]]:
        """Return the processes that may be signalled. Raises `Refused` (not_ours)."""
        table = self._system.process_table({self._run.port})
        # Search for them once; later their start times identify them.
        outside = set() if self._known else _marked_outside_group(self._system, table, self._run)
        ours = {*members(self._system, table, self._run), *outside, *self._living(table)}
        group = {process.pid for process in table.group(self._run.pgid)}
        strangers = set() if self._run.adopted or not ours else group - ours
        self._known |= {pid: table.processes[pid].start for pid in ours}
        if strangers:
            names = ", ".join(f"{pid} ({_program(table.processes[pid])})" for pid in sorted(strangers))
            raise _not_ours(self._run, f"in it are processes that are not proven ours: {names}", strangers)
        return table, ours

    def _send(self, table: ProcessTable, numbers: Mapping[int, signal.Signals]) -> None:
        self._signalled = set(numbers)
        group = {process.pid for process in table.group(self._run.pgid)}
        try:
            if self._signalled == group and not self._run.adopted and len({*numbers.values()}) == 1:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._run.pgid, next(iter(numbers.values())))
            else:
                self._send_each(table, numbers)
        except PermissionError:
            raise _not_ours(self._run, "the system reports that it is another user's", self._signalled) from None

    def _send_each(self, table: ProcessTable, numbers: Mapping[int, signal.Signals]) -> None:
        """Signal each process, parents first: a shell that runs a server in a loop must not start the next one. Check
        the start time again just before, in case another process has got the pid."""
        for pid in sorted(numbers, key=lambda pid: (len(list(table.ancestors(pid))), pid)):
            process = self._system.process(pid)
            if process is not None and process.start == self._known[pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, numbers[pid])

    def ended(self, seconds: float, *, signalled_only: bool = False, tick: Callable[[], object] = lambda: None) -> bool:
        """Wait up to `seconds`; return whether no process of the group, or no signalled one, is alive.

        `tick` is called while it waits.
        """
        deadline = time.monotonic() + seconds
        pause = 0.01
        while True:
            self._reap()
            # If the processes cannot be observed for a moment, try again: do not stop half way.
            with contextlib.suppress(Refused):
                table = self._system.process_table(())
                alive = self._living(table)
                if not (
                    alive & self._signalled if signalled_only else alive or members(self._system, table, self._run)
                ):
                    return True
            if time.monotonic() > deadline:
                return False
            tick()
            # Most processes end at once. For one that drains, observing four times a second is enough.
            time.sleep(pause)
            pause = min(pause * 1.5, 0.25)

    def _living(self, table: ProcessTable) -> set[int]:
        return _alive(table, self._known.items())


def _server(table: ProcessTable, run: Run, ours: Collection[int]) -> set[int]:
    """Return the processes of `ours` that are the server itself: the listeners, else the engine's program, else the
    leader. If it is gone, all are left over."""
    listening = {pid for each in table.listeners if each.port == run.port for pid in each.pids}
    engines = {each.process.pid for each in servers.find_servers(table)}
    candidates = (found & set(ours) for found in (listening, engines, {run.pid}))
    return next(filter(None, candidates), set(ours))


def finishes_requests(system: System, run: Run) -> bool:
    """Return whether the server finishes its open requests after its engine's first stop signal."""
    engine = ENGINES.get(run.engine)
    table = system.process_table(())
    argvs = [table.processes[pid].argv for pid in members(system, table, run)]
    return engine is None or any(map(engine.finishes_requests, argvs))


def _program(process: Process) -> str:
    """Return a short form of a process's command."""
    from mlxops.core.redaction import redact_argv

    words = redact_argv(process.argv)[:4]
    return clean(" ".join(Path(word).name if word.startswith("/") else word for word in words))[:60] or "?"


def _not_ours(run: Run, why: str, pids: Collection[int]) -> Refused:
    kill = f"kill {' '.join(map(str, sorted(pids)))}"
    return Refused(
        "not_ours",
        f"process group {run.pgid} on port {run.port} may not be signalled",
        why=why,
        hint=f"nothing was signalled; on the host, as their owner: {kill}; then: `mlxctl unload {run.port}`",
    )
