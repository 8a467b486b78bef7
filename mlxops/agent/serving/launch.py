"""From an argv to a proven server: start, record, wait for either the proof or the end, and never leave anything.

The proof is one bounded completion under the alias, answered by a listener of the very group that was started.
Open ports, health checks and exit statuses prove nothing: engines exit 0 on failure, are healthy without a model,
and answer with somebody else's model.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from mlxops.agent.engines import ENGINES
from mlxops.agent.engines.base import Engine, EngineCommand, ServerSpec
from mlxops.agent.host import programs
from mlxops.agent.host.system import System
from mlxops.agent.hub.cache import is_commit
from mlxops.agent.paths import HostPaths
from mlxops.agent.serving import logs, processes
from mlxops.agent.serving.diagnosis import About, explain
from mlxops.agent.serving.last_words import last_line
from mlxops.agent.serving.processes import PendingProcess
from mlxops.agent.state.store import Store, state_unwritable, utc_now
from mlxops.common.http import NoCompletion, request_completion
from mlxops.core.errors import MlxopsError, NotStarted
from mlxops.core.ports import Health
from mlxops.core.protocol import Event, Phase
from mlxops.core.records import Run
from mlxops.core.text import clean

TRY_SECONDS = 0.02
"""How often a server that does not listen yet is tried, by a mere connect: what it costs to look at its processes too
would be taken from its own start."""
LOG_SECONDS = 0.1
"""How often its log is read for words that end all hope."""
LEAVE_SECONDS = 0.5
"""How long the leader of a server whose listener is a child's has to stay after the proof."""
UNSEEN_SECONDS = 0.5
"""How long a listener without a process that could be seen may be that of one which is just ending."""
HEALTH_SECONDS = 1.0
"""How often the health of a loading server is asked: it is a line in its log each time."""
COMPLETION_SECONDS = 30.0
"""How long a server that is up may take for one small completion, unless the load's own deadline is later."""


def deadline_for(size_bytes: int) -> float:
    """Seconds that a load may take unless told otherwise: big models need minutes.

    Three minutes, and one more for each 8 GB: the 190 GB of a large model then have 27 minutes.
    """
    return 180.0 + 60.0 * size_bytes / 8e9


def prove(paths: HostPaths, alias: str, run: Run, system: System, timeout: float) -> None:
    """A completion under `alias` from the recorded group, within `timeout` seconds; and the cheap probe does not say
    otherwise: from then on that alone is asked, and a server that it calls broken is never `ready`.

    Raises `OSError` when nobody answers, `NoCompletion` when the answer is another one or not that group's.
    """
    _check_listener(paths, run, system)
    request_completion(paths.connect_host, run.port, alias, timeout)
    engine = ENGINES.get(run.engine)
    if engine is not None and engine.health(paths.connect_host, run.port, HEALTH_SECONDS) is Health.BROKEN:
        raise NoCompletion("it answers, and says of itself that it is unhealthy (GET /health)")
    _check_listener(paths, run, system)


def _check_listener(paths: HostPaths, run: Run, system: System) -> None:
    deadline = time.monotonic() + UNSEEN_SECONDS
    while True:
        look = system.look(frozenset([run.port]))
        listeners = look.on(paths.settings.bind, run.port)
        if all(each.pids for each in listeners) or time.monotonic() > deadline:
            break
        time.sleep(TRY_SECONDS)
    ours = set(processes.members(system, look, run))
    if not listeners:
        raise ConnectionRefusedError(f"nothing listens on {run.port} yet")
    if not all(each.pids and each.pids <= ours for each in listeners):
        strangers = {pid for each in listeners for pid in each.pids} - ours
        who = f"pid {', '.join(map(str, sorted(strangers)))}" if strangers else "a process that cannot be seen"
        raise NoCompletion(f"port {run.port} is answered by {who}, which this load did not start")


class Launch:
    """One server being started. Used once: `launch`, then `wait`; `abort` undoes whatever was done."""

    def __init__(
        self,
        paths: HostPaths,
        store: Store,
        system: System,
        engine: Engine,
        command: EngineCommand,
        serving: ServerSpec,
        *,
        argv: tuple[str, ...] | None = None,
    ) -> None:
        """`argv` is that of a server that is to come back exactly as it was."""
        self.paths = paths
        self.store = store
        self.system = system
        self.engine = engine
        self.command = command
        self.serving = serving
        self.argv = engine.argv(command, serving) if argv is None else argv
        self.log = store.log_path(serving.port)
        self._gated: PendingProcess | None = None
        self._run: Run | None = None
        self._log_from = 0
        self._asked = self._read = 0.0
        """When its health was last asked for, and its log last read."""

    def launch(self, environ: dict[str, str], repo_id: str, revision: str, operation: str) -> Run:
        """Start it behind the gate, record it durably, let it through. Raises `NotStarted`, `Refused`."""
        try:
            return self._launch(environ, repo_id, revision, operation)
        except OSError as error:
            raise state_unwritable(self.store.state, error) from None

    def _launch(self, environ: dict[str, str], repo_id: str, revision: str, operation: str) -> Run:
        run_id = secrets.token_hex(8)
        self.store.new_run_folder(self.serving.port)
        self.engine.prepare_folder(self.serving)
        self._head_log()
        extra = {**self.engine.environment(), **self.paths.settings.env}
        env = programs.environment(environ, extra, run_id)
        self._gated = processes.spawn(self.system, self.argv, env, self.serving.folder, self.log)
        self._run = Run(
            port=self.serving.port,
            model=self.serving.model.name,
            alias=self.serving.alias,
            repo_id=repo_id,
            revision=revision,
            engine=self.engine.name,
            argv=self.argv,
            run_id=run_id,
            pid=self._gated.pid,
            pgid=self._gated.pid,
            start=self._gated.start,
            boot_id=self.system.boot_id(),
            operation=operation,
            log_path=str(self.log),
            started_at=utc_now(),
            engine_version=self.command.version,
        )
        try:
            self.store.save_run(self._run)
        except BaseException:
            self._gated.abandon()
            self._gated = None
            # It may be there all the same, if only the last flush failed.
            with contextlib.suppress(MlxopsError):
                self.store.forget_run(self.serving.port)
            raise
        self._gated.open()
        return self._run

    def wait(self, timeout: float, emit: Callable[[Event], None]) -> Run:
        """Until the proof. Raises `NotStarted`, with the engine's last words: it ended, hung, broke, or differs."""
        run, gated = self._run, self._gated
        assert run is not None and gated is not None
        emit(Phase("proof", f"waiting for an answer as {run.alias} (at most {timeout:.4g} s)"))
        deadline = time.monotonic() + timeout
        attempt = _Attempt(self.paths, run, self.system)
        self._asked = time.monotonic()
        while time.monotonic() < deadline:
            if gated.child.poll() is not None:
                status = gated.child.returncode
                raise self._failed(f"the server ended with {_ending(status)} before it answered", status)
            outcome = attempt.poll(deadline)
            if outcome is None:
                self._see_it_stay(run, gated)
                run = replace(run, proven_at=utc_now())
                return run
            if isinstance(outcome, NoCompletion):
                raise self._failed(str(outcome))
            if self._says_broken():
                raise self._failed("the server could not load the model")
            time.sleep(TRY_SECONDS)
        raise self._failed(f"the server did not answer within {timeout:.4g} s")

    def _see_it_stay(self, run: Run, gated: PendingProcess) -> None:
        """Where another process of the group listens, its leader may be on its way out: it gets a moment for that.
        Raises `NotStarted`."""
        look = self.system.look(frozenset([run.port]))
        if any(run.pid in each.pids for each in look.on(self.paths.settings.bind, run.port)):
            return
        try:
            status = gated.child.wait(LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            return
        raise self._failed(f"the server ended with {_ending(status)}, and left a process that answers", status)

    def _says_broken(self) -> bool:
        if time.monotonic() - self._read < LOG_SECONDS:
            return False
        self._read = time.monotonic()
        if self.engine.fatal_error(self._own_log()) is not None:
            return True
        if time.monotonic() - self._asked < HEALTH_SECONDS:
            return False
        self._asked = time.monotonic()
        return self.engine.health(self.paths.connect_host, self.serving.port, 1.0) is Health.BROKEN

    def abort(self) -> None:
        """Nothing of it stays: no process, no record."""
        run, gated = self._run, self._gated
        if run is None or gated is None:
            return
        child = gated.child
        processes.stop(self.system, run, grace=1.0, reap=child.poll)
        child.wait()
        self.store.forget_run(run.port)

    def detach(self) -> None:
        """It serves, and is on its own: this process will end before it."""
        if self._gated is not None:
            # Popen's own finaliser would warn of a child that still runs: that is what it is for.
            self._gated.child.returncode = 0

    def _head_log(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        logs.rotate(self.log)
        version = self.command.version or "of unknown version"
        with open(self.log, "ab") as file:
            os.chmod(self.log, 0o600)
            file.write(f"--- mlxops {utc_now()} {self.engine.name} {version}: {shlex.join(self.argv)}\n".encode())
            self._log_from = file.tell()

    def _own_log(self) -> str:
        try:
            with open(self.log, "rb") as file:
                file.seek(0, 2)
                file.seek(max(self._log_from, file.tell() - 65536))
                return "\n".join(clean(line) for line in file.read().decode(errors="replace").splitlines())
        except OSError:
            return ""

    def _failed(self, what: str, status: int | None = None) -> NotStarted:
        log = self._own_log()
        words = self.engine.fatal_error(log) or last_line(log)
        last = f"its last words: {words.strip()[:400]}" if words else "it wrote nothing to its log"
        serving = self.serving
        about = About(
            serving.model.name, serving.model.repo_id or "", serving.port, self.command.argv[0], _revision(serving)
        )
        cause = explain(f"{words}\n{what}", log, status, about)
        see = f"read its log on the host: {self.log}"
        if status == 0 and not words:
            stay = f"what starts it ({self.command.source}) must stay until the server ends: no setsid, no & at its end"
            see = f"{stay}; {see}"
        return NotStarted(
            "server_did_not_start",
            f"{serving.model.name} did not start on port {serving.port}: {what}",
            why=f"{cause.reason}; {last}" if cause else last,
            hint=f"{cause.help}; its log on the host: {self.log}" if cause else see,
            details={
                "cause": cause.code if cause else None,
                "port": serving.port,
                "log_path": str(self.log),
                "last_lines": log.splitlines()[-20:],
            },
        )


def _revision(serving: ServerSpec) -> str:
    """Return the commit that is served; for a folder that is no snapshot, the branch for hints."""
    return serving.path.name if is_commit(serving.path.name) else "main"


def _ending(status: int) -> str:
    """How a process ended, for people."""
    if status >= 0:
        return f"status {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"


class _Attempt:
    """The proof, tried in a thread, so that a server that hangs is noticed by the deadline and one that ends at once.

    A completion that is sent while a model loads waits for it, so the answer comes at the first possible moment.
    """

    def __init__(self, paths: HostPaths, run: Run, system: System) -> None:
        self._where = paths
        self._run = run
        self._system = system
        self._thread: threading.Thread | None = None
        self._outcome: BaseException | None = None

    def poll(self, deadline: float) -> BaseException | None:
        """None: proven. Else the latest failure, `OSError` standing for "not yet"."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._try, args=(deadline,), daemon=True)
            self._thread.start()
        self._thread.join(LOG_SECONDS)
        if self._thread.is_alive():
            return OSError("no answer yet")
        self._thread = None
        return self._outcome

    def _try(self, deadline: float) -> None:
        self._outcome = NoCompletion("the proof came to no end")  # whatever ends this thread, it is no proof
        try:
            timeout = max(0.1, deadline - time.monotonic())
            socket.create_connection((self._where.connect_host, self._run.port), timeout).close()
            prove(self._where, self._run.alias, self._run, self._system, timeout)
            self._outcome = None
        except (OSError, NoCompletion, MlxopsError) as error:
            self._outcome = error
