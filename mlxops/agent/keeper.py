"""The keeper: a small process that waits for the end of the host's servers, and has them restarted.

It decides nothing. When a server ends, or when the records change, it starts a pass (`keeper_pass`): a process that
plans as `restore` does, and begins one. So the keeper itself stays small, and the servers are not its children.

One keeper acts for each state folder; a second one waits until the first one ends.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import NoReturn

from mlxops import __version__
from mlxops.agent import rounds
from mlxops.agent.host import oom
from mlxops.agent.host.exits import Exits, process_exits
from mlxops.agent.host.system import System, this_system
from mlxops.agent.paths import HostPaths, host_paths
from mlxops.agent.state.store import KEEPER, Lock, Store, utc_now
from mlxops.common.build import PACKAGE
from mlxops.core.deaths import Death, Wedged
from mlxops.core.errors import Exit, MlxopsError
from mlxops.core.frozen import dataclass
from mlxops.core.records import Operation, Run
from mlxops.core.wedged import Answer, failures, is_reported

TICK_SECONDS = 1.0
"""How soon it notices a new run record, which costs one stat(2)."""
LOOK_SECONDS = 30.0
SAMPLE_SECONDS = 300.0
"""How often it measures the memory of the servers."""
LEAST_HELD = 1024**3
"""The memory of a smaller server is not waited for."""
ROUND_SECONDS = 120.0
"""How often each server is asked for a token."""
NEXT_SECONDS = 30.0
"""The same while one of them completes nothing."""
REVIEW_SECONDS = 3600.0
"""How often it plans without a reason: that records which servers have lasted."""
SOON = 2.0
"""Seconds until the next pass after a change: an operation changes several files."""
MAX_ANSWER = 65536

Versions = frozenset[tuple[str, int, int]]


@dataclass(frozen=True)
class Watched:
    """A server that is waited for."""

    run: Run
    counter: Path | None
    kills: int | None
    """The count of kills in `counter` at the last look."""
    held: int | None = None
    unexplained: int | None = None


@dataclass(frozen=True)
class Pass:
    """A running pass. `answer`: the pipe from which its result is read."""

    answer: int
    port: int | None
    """The port of the dead server for which it runs; None: it plans for all ports."""


def run(state: Path) -> int:
    """Run until a signal ends the process. Stopping it ends no server.

    Return if the host does not allow it to run. The system starts it again.
    """
    os.umask(0o077)
    try:
        _run(state)
    except MlxopsError as error:
        _say(f"error: {error.message}; {error.why}; {error.hint}")
        return int(error.exit)
    except OSError as error:  # such as a kernel without pidfd_open, or no descriptors left
        _say(f"error: the keeper cannot run: {error}")
        return int(Exit.REFUSED)


def _run(state: Path) -> NoReturn:
    store = Store(state, state / "no-registry-yet")
    store.create_folders()
    lock = _only_keeper(store)
    _say(f"the keeper {__version__} runs")
    try:
        Keeper(state, this_system(), process_exits(), lock).run()
    finally:
        lock.release()


def _only_keeper(store: Store) -> Lock:
    """Wait until this is the only keeper of the state folder."""
    said = False
    while True:
        holder = Operation(f"pid {os.getpid()}", KEEPER, asker=f"{KEEPER}@{socket.gethostname()}", since=utc_now())
        taken = store.lock(KEEPER, holder)
        if isinstance(taken, Lock):
            return taken
        if not said:
            _say(f"another keeper runs: {taken.id} since {taken.since}; waiting until it ends")
            said = True
        time.sleep(LOOK_SECONDS)


@dataclass
class Keeper:
    state: Path
    system: System
    exits: Exits
    lock: Lock
    servers: dict[int, Watched] = field(default_factory=dict)
    passes: dict[int, Pass] = field(default_factory=dict)
    """The running passes, by pid."""
    gone: dict[int, tuple[int, str]] = field(default_factory=dict)
    """Pid and start of the last server of a port that was found dead."""
    due: float = 0.0
    """When to plan for all ports; a monotonic time."""
    round: rounds.Round | None = None
    """The running round of completions."""
    failures: dict[int, int] = field(default_factory=dict)
    """In how many rounds in a row the server of a port completed nothing."""
    reported: dict[int, int] = field(default_factory=dict)
    """How many rounds that were when it was last acted on."""

    def run(self) -> NoReturn:
        build, folder, versions = build_signs(self.state), 0, Versions()
        look_at = sample_at = 0.0
        round_at = time.monotonic() + ROUND_SECONDS
        self.watch_servers(first=True)
        while True:
            changed = _changed_at(self.state / "run")
            if changed != folder:
                folder = changed
                self.watch_servers()
            now = time.monotonic()
            if now >= look_at:
                look_at = now + LOOK_SECONDS
                self.require_lock()
                self.count_kills()
                self._reap()
                if (signs := build_signs(self.state)) != build:
                    build = signs
                    renew(self.state)
                found = self.versions()
                if found != versions:
                    versions = found
                    self.due = min(self.due, now + SOON)
            if now >= sample_at and self.servers:
                sample_at = now + SAMPLE_SECONDS
                self.sample()
            if self.round is not None and self.round.over:
                self.judge(self.round)
                self.round = None
                round_at = now + (NEXT_SECONDS if any(self.failures.values()) else ROUND_SECONDS)
            if now >= round_at and self.round is None:
                self.round = self.begin_round()
            # A pass for one port may be waiting for memory, and one for all ports would start it at once.
            if now >= self.due and not self.passes:
                self.due = now + REVIEW_SECONDS
                self.begin_pass(None)
            for pid in self.exits.wait(TICK_SECONDS):
                self.ended(pid)

    def require_lock(self) -> None:
        """End if the lock's file is another one, so that another keeper may act. Raises `OSError`."""
        if not self.lock.is_there:
            raise FileNotFoundError(errno.ENOENT, "the state folder was removed or replaced", str(self.state))

    # Completions

    def begin_round(self) -> rounds.Round | None:
        """Ask each server of ours that has completed something before. Servers that a person started are not asked."""
        paths = self.paths()
        if paths is None:
            return None
        runs = [each.run for each in self.servers.values()]
        asked = [run for run in runs if run.proven_at and not run.adopted and not run.stopped_by]
        return rounds.begin(
            self.system, paths.connect_host, [run for run in asked if paths.settings.keep(run.port) != "off"]
        )

    def judge(self, ended: rounds.Round) -> None:
        """Act on wedged servers. What became of one that has ended since, or is being stopped, says nothing."""
        store = self.store()
        answered = {port for port, asked in ended.results.items() if asked.answer is Answer.ANSWERED}
        for port, asked in ended.results.items():
            run = self.servers[port].run if port in self.servers else None
            if run is None or not _is_same(run, ended.runs[port]) or run.stopped_by:
                self.forget_failures(port)
                continue
            failed = failures(self.failures.get(port, 0), asked, another_answered=bool(answered - {port}))
            if failed == 0:
                self.forget_failures(port)
            self.failures[port] = failed
            if is_reported(failed, self.reported.get(port), in_use=asked.in_use):
                self.reported[port] = failed
                self.begin_pass(Wedged(port, run.pid, run.start))
            elif port in answered and store.silence(run):
                with contextlib.suppress(MlxopsError):
                    store.note_silence(run, None)

    def forget_failures(self, port: int) -> None:
        self.failures.pop(port, None)
        self.reported.pop(port, None)

    def ended(self, pid: int) -> None:
        if pid in self.passes:
            self.end_pass(pid)
            return
        port = next((port for port, each in self.servers.items() if each.run.pid == pid), None)
        if port is not None:
            self.bury(self.servers.pop(port))

    def bury(self, watched: Watched) -> None:
        """Have a server restarted that has ended."""
        self.gone[watched.run.port] = watched.run.pid, watched.run.start
        self.begin_pass(self._death(watched))

    def _death(self, watched: Watched) -> Death:
        now = oom.kills(watched.counter)
        killed = now is not None and watched.kills is not None and now > watched.kills
        run = watched.run
        return Death(run.port, run.pid, run.run_id, time.time(), watched.held, watched.unexplained, killed)

    # The servers

    def watch_servers(self, *, first: bool = False) -> None:
        """Wait for the servers of all run records. `first`: the keeper has just begun."""
        store = self.store()
        boot_id = self.system.boot_id()
        for port in _ports(self.state / "run"):
            run = None
            with contextlib.suppress(OSError, ValueError):
                run = store.run(port)
            if run and run.port != port:  # a record that was copied by hand
                run = None
            before = self.servers.get(port)
            if before and run and _is_same(run, before.run):
                self.servers[port] = replace(before, run=run)  # it may be proven now
                continue
            if before:
                self.exits.forget(before.run.pid)
                del self.servers[port]
                before = None
            if run is None or before or run.boot_id != boot_id or self.gone.get(port) == (run.pid, run.start):
                continue
            if not self._watch(run):
                self._found_dead(run, first=first)

    def _found_dead(self, run: Run, *, first: bool) -> None:
        """Look after a server that ended before it was watched. At the start, that is the matter of the first pass."""
        if first:
            self.gone[run.port] = run.pid, run.start
        else:
            self.bury(Watched(run, None, None))

    def _watch(self, run: Run) -> bool:
        """Wait for a server; return False if it has ended already."""
        if not self.exits.watch(run.pid):
            return False
        # Read its start only now: from here on, the pid cannot become another process's unnoticed.
        process = self.system.process(run.pid)
        if process is None or process.zombie or process.start != run.start:
            self.exits.forget(run.pid)
            return False
        counter = oom.counter_of(run.pid)
        self.forget_failures(run.port)
        self.servers[run.port] = Watched(run, counter, oom.kills(counter))
        return True

    def count_kills(self) -> None:
        """Read the counts of kills again. A server may have been moved to another group."""
        for port, watched in self.servers.items():
            counter = oom.counter_of(watched.run.pid)
            self.servers[port] = replace(watched, counter=counter, kills=oom.kills(counter))

    def sample(self) -> None:
        """Measure the memory of the servers. It is waited for after their death."""
        with contextlib.suppress(MlxopsError, OSError):
            table = self.system.process_table(())
            for port, watched in self.servers.items():
                run = watched.run
                pids = [run.pid] if run.adopted else [process.pid for process in table.group(run.pgid)]
                held = self.system.memory(pids)
                unexplained = self.system.unexplained(pids) if held is not None and held >= LEAST_HELD else None
                self.servers[port] = replace(watched, held=held, unexplained=unexplained)

    def versions(self) -> Versions:
        """Return what changes when the registry, a run record or the agreed settings change."""
        paths = self.paths()
        try:
            return Store(paths.state, paths.registry).file_versions() if paths else frozenset()
        except OSError:
            return frozenset()

    def store(self) -> Store:
        """Return the state folder, for what needs no registry."""
        return Store(self.state, self.state / "no-registry-yet")

    def paths(self) -> HostPaths | None:
        """Return the paths of the settings that the host last agreed on; None if there are none."""
        with contextlib.suppress(MlxopsError):
            settings = self.store().agreed_settings()
            return host_paths(settings, os.environ) if settings else None
        return None

    # Passes

    def begin_pass(self, about: Death | Wedged | None) -> None:
        """Start a pass for a dead or a wedged server; for all ports without one."""
        answer, theirs = os.pipe()
        words = ["--keeper-pass", str(self.state), str(theirs), *([about.to_text()] if about else [])]
        argv = [own_python(), "-P", "-m", "mlxops.agent", *words]
        try:
            os.set_inheritable(theirs, True)
            pid = os.posix_spawn(argv[0], argv, os.environ, setpgroup=0)
        except OSError as error:
            os.close(answer)
            _say(f"a pass could not be started: {error}")
            self.due = min(self.due, time.monotonic() + LOOK_SECONDS)
            return
        finally:
            os.close(theirs)
        self.passes[pid] = Pass(answer, about.port if about else None)
        if not self.exits.watch(pid):
            self.end_pass(pid)

    def _reap(self) -> None:
        """Collect the passes of the build before this one, which became this process's children by `renew`."""
        with contextlib.suppress(ChildProcessError):
            while not self.passes and os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass

    def end_pass(self, pid: int) -> None:
        ended = self.passes.pop(pid)
        os.waitpid(pid, 0)
        try:
            again_in = json.loads(os.read(ended.answer, MAX_ANSWER))["again_in"]
        except (ValueError, LookupError, TypeError):
            again_in = LOOK_SECONDS  # it was killed
        finally:
            os.close(ended.answer)
        if isinstance(again_in, int | float):
            self.due = min(self.due, time.monotonic() + again_in)


def _is_same(one: Run, other: Run) -> bool:
    return (one.pid, one.start) == (other.pid, other.start)


def own_python() -> str:
    """Return this build's interpreter by its real path: `<state>/venv` may be another build soon."""
    if sys.prefix == sys.base_prefix:
        return sys.executable
    return str(Path(sys.prefix).resolve() / "bin" / Path(sys.executable).name)


def build_signs(state: Path) -> tuple[object, ...]:
    """Return what changes when another build is installed: by `deploy`, or over this one."""
    link: str | None = None
    with contextlib.suppress(OSError):
        link = os.readlink(state / "venv")
    try:
        status = os.stat(PACKAGE / "__init__.py")
    except OSError:
        return (link, None)
    return (link, status.st_ino, status.st_mtime_ns)


def renew(state: Path) -> None:
    """Become the keeper of the build that is installed now. Stay what this is if that build has none."""
    linked = state / "venv" / "bin" / "python"
    was_linked = os.path.realpath(sys.prefix).startswith(os.path.realpath(state / "agents") + os.sep)
    python = str(linked) if was_linked and linked.exists() else sys.executable
    if not _has_keeper(python):
        _say("the build that is installed now has no keeper: this one goes on")
        return
    _say("another build is installed: starting again with it")
    sys.stdout.flush()
    os.execv(python, [python, "-P", "-m", "mlxops.agent", "--keeper", str(state)])


def _has_keeper(python: str) -> bool:
    module = "import importlib.util, sys; sys.exit(importlib.util.find_spec('mlxops.agent.keeper') is None)"
    try:
        pid = os.posix_spawn(python, [python, "-P", "-c", module], os.environ)
    except OSError:
        return False
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _ports(folder: Path) -> Sequence[int]:
    try:
        names = os.listdir(folder)
    except OSError:
        return ()
    stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
    return [int(stem) for stem in stems if stem.isdecimal()]


def _changed_at(folder: Path) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return 0


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the log's disk is full
        sys.stdout.write(f"{utc_now()} {text}\n")
        sys.stdout.flush()
