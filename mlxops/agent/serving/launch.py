"""Start a server: spawn and record it, wait for the proof or its end, and leave nothing behind after a failure.

The proof is one bounded completion under the alias, answered by a listener in the started process group. Open ports,
health checks and exit statuses prove nothing: engines exit with 0 on failure, report health without a model, and answer
with another model.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from mlxops.agent.engines import ENGINES
from mlxops.agent.engines.base import Engine, EngineCommand, ServerSpec
from mlxops.agent.engines.installation import interpreter_of
from mlxops.agent.host import programs
from mlxops.agent.host.system import System
from mlxops.agent.hub.cache import is_commit
from mlxops.agent.paths import HostPaths
from mlxops.agent.serving import logs, processes
from mlxops.agent.serving.diagnosis import About, explain
from mlxops.agent.serving.ending import Terms, end
from mlxops.agent.serving.last_words import last_line
from mlxops.agent.serving.processes import PendingProcess
from mlxops.agent.serving.stranded import expect_return
from mlxops.agent.state.store import Store, state_unwritable, utc_now
from mlxops.common.http import NoCompletion, request_completion
from mlxops.core.errors import MlxopsError, NotStarted
from mlxops.core.ports import Health
from mlxops.core.protocol import Event, Note, Phase
from mlxops.core.records import Run
from mlxops.core.redaction import command_line, redact
from mlxops.core.text import clean

CONNECT_RETRY_SECONDS = 0.02
"""The interval of connects to a server that does not listen yet. Observing its processes as often would slow its start
down."""
LOG_CHECK_SECONDS = 0.1
"""The interval at which its log is searched for fatal errors."""
LEADER_STAY_SECONDS = 0.5
"""How long the leader must stay alive after the proof if another process of the group listens."""
UNSEEN_SECONDS = 0.5
"""How long a listener without a visible process may belong to a process that is just ending."""
HEALTH_SECONDS = 1.0
"""The interval of health probes of a loading server. Each one adds a line to its log."""
PRELOAD_SECONDS = 120.0
"""How long a load waits for a program's imports before it stops the old server. They take 1 to 10 s."""
COMPLETION_SECONDS = 30.0
"""How long a running server may take for one small completion, unless the load's own deadline is later."""


def deadline_for(size_bytes: int) -> float:
    """Return the default time limit of a load in seconds: three minutes, plus one per 8 GB.

    A model of 190 GB gets 27 minutes.
    """
    return 180.0 + 60.0 * size_bytes / 8e9


def prove(paths: HostPaths, alias: str, run: Run, system: System, timeout: float) -> None:
    """Prove that the recorded group answers a completion under `alias` within `timeout` seconds.

    The engine's health probe must agree: `status` later uses only that, and shows a server that it calls broken as not
    ready. Raises `OSError` without an answer, `NoCompletion` for a wrong answer or one from another process.
    """
    _check_listener(paths, run, system)
    request_completion(paths.connect_host, run.port, alias, timeout)
    engine = ENGINES.get(run.engine)
    if engine is not None and engine.health(paths.connect_host, run.port, HEALTH_SECONDS) is Health.BROKEN:
        raise NoCompletion("it answers, but reports that it is unhealthy (GET /health)")
    _check_listener(paths, run, system)


def _check_listener(paths: HostPaths, run: Run, system: System) -> None:
    """Check that every listener on the port belongs to the run. Raises `NoCompletion`, `ConnectionRefusedError`."""
    deadline = time.monotonic() + UNSEEN_SECONDS
    while True:
        table = system.process_table(frozenset([run.port]))
        listeners = table.on(paths.settings.bind, run.port)
        if all(each.pids for each in listeners) or time.monotonic() > deadline:
            break
        time.sleep(CONNECT_RETRY_SECONDS)
    ours = set(processes.members(system, table, run))
    if not listeners:
        raise ConnectionRefusedError(f"nothing listens on {run.port} yet")
    if not all(each.pids and each.pids <= ours for each in listeners):
        strangers = {pid for each in listeners for pid in each.pids} - ours
        owner = f"pid {', '.join(map(str, sorted(strangers)))}" if strangers else "a process that cannot be seen"
        raise NoCompletion(f"port {run.port} is answered by {owner}, which this load did not start")


class Launch:
    """One server being started. Use it once: `launch`, then `wait`. `abort` undoes everything.

    `preload` may come first, while another server still has the port.
    """

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
        budget: tuple[str, ...] = (),
    ) -> None:
        """`argv`: the whole command, such as that of a previous server that is to be started again unchanged.
        `budget`: its last words, which set the limits that the budget gave."""
        self.paths = paths
        self.store = store
        self.system = system
        self.engine = engine
        self.command = command
        self.serving = serving
        self.argv = engine.argv(command, serving) if argv is None else argv
        self.budget = budget
        self.log = store.log_path(serving.port)
        self._log = self.log.with_suffix(".starting")
        """Where it writes until it has the port: `log` may still be another server's."""
        self._run_id = ""
        self._process: PendingProcess | None = None
        self._run: Run | None = None
        self._log_from = 0
        self._health_checked = self._log_checked = 0.0
        """When its health was last probed, and its log last read (monotonic)."""

    def preload(self, environ: Mapping[str, str], check: Callable[[], None], emit: Callable[[Event], None]) -> None:
        """Start its process behind the gate, and wait while it imports its modules. Nothing of the port changes.

        It does nothing if the Python of the program is not known. `check` is called often, and may raise. Raises
        `NotStarted` if the process ends: then the program cannot run.
        """
        if not self._preloading(self._environment(environ)):
            return
        emit(Phase("warm", f"importing {self.engine.name}"))
        try:
            self._spawn(environ)
        except OSError as error:
            raise state_unwritable(self.store.state, error) from None
        process = self._process
        assert process is not None
        deadline = time.monotonic() + PRELOAD_SECONDS
        while not process.ready(LOG_CHECK_SECONDS) and time.monotonic() < deadline:
            check()
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.child.wait(0)
            raise self._error(f"the server ended with {_exit_text(status)} before it loaded the model", status)

    def _preloading(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """Return the Python that runs the program, and the modules to import; nothing if it is not known."""
        known = self.engine.preload and self.command.version
        python = interpreter_of(self.argv, env["PATH"]) if known else None
        return (python, *self.engine.preload) if python else ()

    def _environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        return programs.environment(environ, {**self.engine.environment(), **self.paths.settings.env}, self._run_id)

    def _spawn(self, environ: Mapping[str, str]) -> None:
        self._run_id = secrets.token_hex(8)
        self._write_first_line()
        env = self._environment(environ)
        self._process = processes.spawn(self.system, self.argv, env, self._log, self._preloading(env))

    def launch(self, environ: Mapping[str, str], repo_id: str, revision: str, operation: str) -> Run:
        """Start it behind the gate, record it durably, open the gate. Raises `NotStarted`, `Refused`."""
        try:
            return self._launch(environ, repo_id, revision, operation)
        except OSError as error:
            raise state_unwritable(self.store.state, error) from None

    def _launch(self, environ: Mapping[str, str], repo_id: str, revision: str, operation: str) -> Run:
        if self._process is None:
            self._spawn(environ)
        assert self._process is not None
        self.store.new_run_folder(self.serving.port)
        self.engine.prepare_folder(self.serving)
        logs.make_current(self._log, self.log)
        self._log = self.log
        self._run = Run(
            port=self.serving.port,
            model=self.serving.model.name,
            alias=self.serving.alias,
            repo_id=repo_id,
            revision=revision,
            engine=self.engine.name,
            argv=self.argv,
            run_id=self._run_id,
            pid=self._process.pid,
            pgid=self._process.pid,
            start=self._process.start,
            boot_id=self.system.boot_id(),
            operation=operation,
            log_path=str(self.log),
            started_at=utc_now(),
            engine_version=self.command.version,
            budget=self.budget,
        )
        try:
            self.store.save_run(self._run)
        except BaseException:
            self._process.abandon()
            self._process = None
            # If only the last flush failed, the record exists.
            with contextlib.suppress(MlxopsError):
                self.store.forget_run(self.serving.port)
            raise
        self._process.open(self.serving.folder)
        return self._run

    def wait(self, timeout: float, emit: Callable[[Event], None]) -> Run:
        """Wait for the proof and return the proven run. Raises `NotStarted` with the engine's last words."""
        run, process = self._run, self._process
        assert run is not None and process is not None
        emit(Phase("proof", f"waiting for an answer as {run.alias} (at most {timeout:.4g} s)"))
        deadline = time.monotonic() + timeout
        attempt = _Attempt(self.paths, run, self.system)
        self._health_checked = time.monotonic()
        while time.monotonic() < deadline:
            if process.child.poll() is not None:
                status = process.child.returncode
                raise self._error(f"the server ended with {_exit_text(status)} before it answered", status)
            outcome = attempt.poll(deadline)
            if outcome is None:
                self._check_leader_stays(run, process)
                run = replace(run, proven_at=utc_now())
                return run
            if isinstance(outcome, NoCompletion):
                raise self._error(str(outcome))
            if self._has_fatal_error():
                raise self._error("the server could not load the model")
            time.sleep(CONNECT_RETRY_SECONDS)
        raise self._error(f"the server did not answer within {timeout:.4g} s")

    def _check_leader_stays(self, run: Run, process: PendingProcess) -> None:
        """If another process of the group listens, give the leader a moment to end. Raises `NotStarted` if it does."""
        table = self.system.process_table(frozenset([run.port]))
        if any(run.pid in each.pids for each in table.on(self.paths.settings.bind, run.port)):
            return
        try:
            status = process.child.wait(LEADER_STAY_SECONDS)
        except subprocess.TimeoutExpired:
            return
        raise self._error(f"the server ended with {_exit_text(status)}, and left a process that answers", status)

    def _has_fatal_error(self) -> bool:
        if time.monotonic() - self._log_checked < LOG_CHECK_SECONDS:
            return False
        self._log_checked = time.monotonic()
        if self.engine.fatal_error(self._read_own_log()) is not None:
            return True
        if time.monotonic() - self._health_checked < HEALTH_SECONDS:
            return False
        self._health_checked = time.monotonic()
        return self.engine.health(self.paths.connect_host, self.serving.port, 1.0) is Health.BROKEN

    def abort(self, terms: Terms, emit: Callable[[Event], object] = lambda event: None) -> None:
        """Stop it and remove its record. Raises what `end` raises; then its record stays."""
        run, process = self._run, self._process
        if process is not None and run is None:
            if process.child.poll() is None:
                self._log.unlink(missing_ok=True)
            process.abandon()
            self._process = None
        if run is None or process is None:
            return
        child = process.child

        def note(text: str, level: str) -> None:
            emit(Note.of(text, level))

        with expect_return(self.store, self.system, run, note) as seen:
            end(self.system, seen, terms, store=self.store, emit=emit, reap=child.poll)
            child.wait()
            self.store.forget_run(run.port)

    def detach(self) -> None:
        """Let the server outlive this process."""
        if self._process is not None:
            # Popen warns in its finaliser if the child is still running.
            self._process.child.returncode = 0

    def _write_first_line(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log.unlink(missing_ok=True)  # of a load that was killed
        version = self.command.version or "of unknown version"
        with open(self._log, "ab") as file:
            os.chmod(self._log, 0o600)
            file.write(f"--- mlxops {utc_now()} {self.engine.name} {version}: {command_line(self.argv)}\n".encode())
            self._log_from = file.seek(0, os.SEEK_END)

    def _read_own_log(self) -> str:
        try:
            with open(self._log, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self._log_from, size - 65536))
                return "\n".join(clean(line) for line in file.read().decode(errors="replace").splitlines())
        except OSError:
            return ""

    def _error(self, problem: str, status: int | None = None) -> NotStarted:
        log = self._read_own_log()
        last_words = self.engine.fatal_error(log) or last_line(log)
        last = f"its last words: {redact(last_words.strip())[:400]}" if last_words else "it wrote nothing to its log"
        serving = self.serving
        about = About(
            serving.model.name, serving.model.repo_id or "", serving.port, self.command.argv[0], _revision(serving)
        )
        cause = explain(f"{last_words}\n{problem}", log, status, about)
        see = f"read its log on the host: {self._log}"
        if status == 0 and not last_words:
            stay = f"its launcher ({self.command.source}) must run until the server ends: no setsid, no & at the end"
            see = f"{stay}; {see}"
        return NotStarted(
            "server_did_not_start",
            f"{serving.model.name} did not start on port {serving.port}: {problem}",
            why=f"{cause.reason}; {last}" if cause else last,
            hint=f"{cause.help}; its log on the host: {self._log}" if cause else see,
            details={
                "cause": cause.code if cause else None,
                "port": serving.port,
                "log_path": str(self._log),
                "last_lines": log.splitlines()[-20:],
            },
        )


def _revision(serving: ServerSpec) -> str:
    """Return the served commit; for a folder that is not a snapshot, the branch to name in hints."""
    return serving.path.name if is_commit(serving.path.name) else "main"


def _exit_text(status: int) -> str:
    """Format an exit status for display."""
    if status >= 0:
        return f"status {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"


class _Attempt:
    """Tries the proof in a thread. So the caller notices at once when the server ends, and keeps the deadline if it
    hangs.

    A completion that is sent while a model loads waits for the model, so the answer comes as early as possible.
    """

    def __init__(self, paths: HostPaths, run: Run, system: System) -> None:
        self._paths = paths
        self._run = run
        self._system = system
        self._thread: threading.Thread | None = None
        self._outcome: BaseException | None = None

    def poll(self, deadline: float) -> BaseException | None:
        """Return None when proven, else the latest failure. `OSError` means "not yet"."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._try, args=(deadline,), daemon=True)
            self._thread.start()
        self._thread.join(LOG_CHECK_SECONDS)
        if self._thread.is_alive():
            return OSError("no answer yet")
        self._thread = None
        return self._outcome

    def _try(self, deadline: float) -> None:
        self._outcome = NoCompletion("the proof did not finish")  # kept if an unexpected exception ends this thread
        try:
            timeout = max(0.1, deadline - time.monotonic())
            socket.create_connection((self._paths.connect_host, self._run.port), timeout).close()
            prove(self._paths, self._run.alias, self._run, self._system, timeout)
            self._outcome = None
        except (OSError, NoCompletion, MlxopsError) as error:
            self._outcome = error
