"""One pass of the keeper: plan as `restore` does, and have a worker start what is to be started.

A pass for a dead server also finds out what it died of, and waits for its memory. A pass for all ports first tries each
start as a dry run, so that one which is refused every minute leaves no records.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlxops.agent.boot_restore import carry_out, print_event, restore_request, saved_host
from mlxops.agent.context import RESTORE, Context
from mlxops.agent.host import health, oom
from mlxops.agent.host.system import this_system
from mlxops.agent.operations import restore
from mlxops.agent.state.store import Store, utc_now
from mlxops.common.files import describe_error, is_hosts_fault
from mlxops.core import wire
from mlxops.core.commands.restore import Restore, RestoreResult
from mlxops.core.deaths import Cause, Death, Wedged, cause_of, from_text, memory_deaths
from mlxops.core.doctor.incidents import killed_pids
from mlxops.core.errors import MlxopsError, NotStarted
from mlxops.core.frozen import dataclass
from mlxops.core.hints import split
from mlxops.core.plan_restore import RestorePlan, RestoreStep
from mlxops.core.protocol import Event, Failed, Note
from mlxops.core.records import Run, Silence

ASKER = "keeper"
RETRY_SECONDS = 60.0
"""Until the next pass if a start was refused, for example for lack of memory."""
STUCK_SECONDS = 300.0
"""Until the next pass if only a person can help: it may have been something else that passes."""
BUSY_SECONDS = 10.0
ENDING_SECONDS = 5.0
"""How long the processes and the port of a dead server may take to disappear."""
SEEN_SECONDS = 0.2
REPORT_SECONDS = 120.0
"""A report of macOS that is older than the death by more than this is about another one."""


def run(state: Path, answer: int, about: str = "") -> int:
    """Run a pass: about a dead or a wedged server, else about all ports.

    Write to the descriptor `answer` when the next one is due: `{"again_in": seconds or null}`.
    """
    os.umask(0o077)
    os.set_inheritable(answer, False)
    try:
        again_in = _Host.of(state).look_after(from_text(about) if about else None)
    except MlxopsError as error:
        print_event(Failed(error))
        again_in = RETRY_SECONDS
    except OSError as error:
        if not is_hosts_fault(error):
            raise
        print_event(Note.of(f"the keeper could not look: {error}", "warning"))
        again_in = RETRY_SECONDS
    with contextlib.suppress(BrokenPipeError):  # the keeper has ended
        os.write(answer, json.dumps({"again_in": again_in}).encode())
    return 0


@dataclass(frozen=True)
class _Host:
    ctx: Context
    """Of a dry run: a pass itself holds no lock, and changes nothing but the history."""

    @classmethod
    def of(cls, state: Path) -> _Host:
        paths = saved_host(state)
        request = restore_request(paths, Restore(dry_run=True), ASKER)
        store = Store(paths.state, paths.registry)
        return cls(Context(request.request, paths, store, this_system(), _quiet, dict(os.environ), request.asker))

    def look_after(self, about: Death | Wedged | None) -> float | None:
        """Start what is down. Return when to look again; None: when something changes."""
        steps: tuple[RestoreStep, ...] = ()
        if isinstance(about, Wedged):
            self._after_silence(about)
        elif about is None:
            if self.ctx.store.holder(RESTORE) is not None:  # it starts the others in its own order
                return RETRY_SECONDS
            steps = self._not_refused(self._allowed(self._plan().starts))
        else:
            steps = self._after_death(about)
        if steps:
            _say(f"starting {', '.join(f'{step.model} on {step.port}' for step in steps)}")
            ports = tuple(step.port for step in steps)
            carry_out(self.ctx.store, restore_request(self.ctx.paths, Restore(ports=ports), ASKER))
        return self._again_in()

    def _plan(self) -> RestorePlan:
        return restore.current_plan(self.ctx, Restore(dry_run=True))

    def _allowed(self, steps: Sequence[RestoreStep]) -> tuple[RestoreStep, ...]:
        """Leave out the ports that hosts.yaml takes from the keeper, starts into the same lack of memory, and, while
        starts cannot be counted, all servers that ended in this boot: nothing would ever stop their restarts."""
        if not steps:
            return ()
        needed = memory_deaths(self.ctx.history())
        available = self._available() if needed else None
        uncounted = self._why_uncounted()
        if uncounted:
            _say(f"servers that have ended are not started again: {uncounted}")
        return tuple(
            step
            for step in steps
            if not self._is_off(step.port)
            and not (uncounted and self._died_now(step.port))
            and (available is None or needed.get((step.model, step.port), 0) <= available)
        )

    def _is_off(self, port: int) -> bool:
        """Return whether the keeper leaves the port down. After a reboot its model starts in any case."""
        return self._died_now(port) and self.ctx.paths.settings.keep(port) == "off"

    def _died_now(self, port: int) -> bool:
        run = self._run(port)
        return run is not None and run.boot_id == self.ctx.system.boot_id()

    def _why_uncounted(self) -> str:
        """Return why restarts cannot be counted; empty if they can."""
        try:
            self.ctx.store.require_history()
        except OSError as error:
            return f"the history cannot be used to count their starts: {describe_error(error)}"
        return ""

    def _run(self, port: int) -> Run | None:
        with contextlib.suppress(OSError, ValueError):
            return self.ctx.store.run(port)
        return None

    def _available(self) -> int | None:
        known = [size for size in (self.ctx.system.available(), oom.room_of(os.getpid())) if size is not None]
        return min(known, default=None)

    def _not_refused(self, steps: Sequence[RestoreStep]) -> tuple[RestoreStep, ...]:
        """Return the steps whose start would not be refused now."""
        if not steps:
            return ()
        request = Restore(dry_run=True, ports=tuple(step.port for step in steps))
        try:
            result = restore.run(self.ctx.with_request(request), request)
        except NotStarted as error:
            result = wire.decode(RestoreResult, error.details)
        ports = {row.port for row in result.restored}
        return tuple(step for step in steps if step.port in ports)

    def _again_in(self) -> float | None:
        plan = self._plan()
        pauses = [step.again_in for step in plan.skipped if step.again_in is not None]
        pauses += [RETRY_SECONDS for step in plan.starts if not self._is_off(step.port)]
        pauses += [BUSY_SECONDS for step in plan.skipped if step.in_hand and self._is_busy(step.port)]
        pauses += [STUCK_SECONDS for step in plan.skipped if step.stuck]
        return min(pauses, default=None)

    def _is_busy(self, port: int) -> bool:
        """Return whether an operation has the port. It may be killed, and then changes nothing that can be seen."""
        return self.ctx.store.holder(f"port-{port}") is not None

    # A wedged server

    def _after_silence(self, wedged: Wedged) -> None:
        """Restart a wedged server, or note for `status` that it is wedged and why it stays."""
        run = self._run(wedged.port)
        if run is None or (run.pid, run.start) != (wedged.pid, wedged.start):
            return  # it was stopped
        if run.stopped_by or self._is_busy(wedged.port):
            return  # it is being stopped, or the stop was given up: that is an operator's matter
        known = self.ctx.store.silence(run)
        stays = self._why_it_stays(run)
        self.ctx.store.note_silence(run, Silence(known.since if known else utc_now(), stays))
        if known is None:
            _say(f"{run.model} on {run.port} (pid {run.pid}) completes nothing{f': {stays}' if stays else ''}")
        if known is None or not stays:
            self.ctx.remember(command="wedged", model=run.model, port=run.port, restarted=not stays)
        if not stays:
            request = Restore(ports=(run.port,), wedged=f"{run.pid} {run.start}")
            carry_out(self.ctx.store, restore_request(self.ctx.paths, request, ASKER))

    def _why_it_stays(self, run: Run) -> str:
        """Return why a wedged server is not restarted; empty if it is."""
        if self.ctx.paths.settings.keep(run.port) != "restart":
            return "hosts.yaml does not say `keep: restart` for its slot"
        if run.model not in {model.name for model in self.ctx.registry().on_port(run.port)}:
            return "the registry does not assign it"
        if uncounted := self._why_uncounted():
            return uncounted
        paused = restore.pause_of(self.ctx, RestoreStep(run.model, run.port))
        return split(paused.why)[0] if paused else ""

    # A dead server

    def _after_death(self, death: Death) -> tuple[RestoreStep, ...]:
        """Record the death, wait for the memory, and return what to start now."""
        step, starts = self._settled(death.port)
        run = self._run(death.port)
        if step is None or run is None or run.run_id != death.run_id:
            return ()  # it was stopped, or another server has its port
        self._record(run, step, death)
        if not starts:
            return ()
        if death.held is not None and death.unexplained is not None:
            from mlxops.agent.serving.stranded import wait_for_return

            wait_for_return(self.ctx.system, death.unexplained, death.held, lambda text, _: _say(text))
        return self._allowed((step,))

    def _settled(self, port: int) -> tuple[RestoreStep | None, bool]:
        """Plan until nothing of a dead server or of an operation is on its port. Return its step, and whether it may be
        started now.

        No step: it is not assigned any more, or another operation has the port.
        """
        deadline = time.monotonic() + ENDING_SECONDS
        while True:
            plan = self._plan()
            start = next((step for step in plan.starts if step.port == port), None)
            if start is not None:
                return start, True
            skipped = next((step for step in plan.skipped if step.port == port), None)
            if skipped is None:
                return None, False
            if skipped.again_in is not None or time.monotonic() > deadline:
                return None if skipped.in_hand else skipped, False
            time.sleep(SEEN_SECONDS)

    def _record(self, run: Run, step: RestoreStep, death: Death) -> None:
        """`step`: of the port. The registry may assign another model to it than the one that died."""
        cause = self._cause(death)
        why = f"; {step.why}" if step.why else ""
        self.ctx.remember(
            command="died",
            model=run.model,
            port=run.port,
            cause=cause.cause,
            evidence=cause.evidence,
            held_bytes=death.held,
        )
        _say(f"{run.model} on {run.port} (pid {death.pid}) ended: {cause}{why}")

    def _cause(self, death: Death) -> Cause:
        return cause_of(death, last_words=self._memory_words(death.port), jetsam=_jetsam(death, self.ctx.environ))

    def _memory_words(self, port: int) -> str | None:
        """Return the last words of a server if they say that memory ran out."""
        from mlxops.agent.serving.diagnosis import About, explain
        from mlxops.agent.serving.last_words import last_line
        from mlxops.agent.serving.observe import tail
        from mlxops.core.redaction import redact

        words = redact(last_line(tail(self.ctx.store.log_path(port))))
        cause = explain(words, "", None, About("", "", port, ""))
        return words if cause is not None and cause.code == "out_of_memory" else None


def _jetsam(death: Death, environ: Mapping[str, str]) -> str | None:
    """Return the name of macOS's report that it killed the server."""
    with contextlib.suppress(OSError):
        for path in health.recent_reports(health.report_folders(environ)):
            if path.stat().st_mtime < death.at - REPORT_SECONDS:
                break
            with contextlib.suppress(OSError, ValueError):
                if death.pid in killed_pids(health.read_report(path)):
                    return path.name
    return None


def _quiet(event: Event) -> None:
    """Events of planning are not for the log: it is repeated."""


def _say(text: str) -> None:
    print_event(Note.of(text))
