"""`restore` as run by launchd or systemd, at boot and by a timer.

It prints text lines into the job's log and uses the settings that the host last agreed on. It plans first and begins an
operation only if there is a server to start; otherwise a timer would push all other operations out of the record.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mlxops.agent.context import Context
from mlxops.agent.host.system import this_system
from mlxops.agent.operations.restore import current_plan
from mlxops.agent.paths import HostPaths, host_paths
from mlxops.agent.state.store import Store, utc_now
from mlxops.agent.worker import begin
from mlxops.common.build import build_id
from mlxops.core import wire
from mlxops.core.commands.restore import Restore, RestoreResult
from mlxops.core.errors import Exit, MlxopsError, Refused
from mlxops.core.frozen import dataclass
from mlxops.core.plan_restore import RestoreStep
from mlxops.core.protocol import Done, Envelope, Event, Failed, Note, Phase, Requester

RETRY_LIMIT_SECONDS = 20 * 60.0
"""How long failures that may pass are retried: without a timer nothing else retries. The longest pause between two
starts of a server is shorter."""
RETRY_SECONDS = 60.0
RETRYABLE_CODES = frozenset(
    {
        *("folder_missing", "registry_missing", "busy", "settings_locked", "registry_locked", "hub_unreachable"),
        *("hub_error", "still_ending"),
    }
)
"""Errors of a host that has just booted: disks are mounted late, and the network comes up late."""


@dataclass(frozen=True)
class _Outcome:
    status: int
    retry_in: float | None = None
    """Seconds after which another try may succeed; None if no retry helps."""


def run(state: Path, pause: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic) -> int:
    """Restore, with retries. Return the exit status of the last try."""
    os.umask(0o077)
    deadline = clock() + RETRY_LIMIT_SECONDS
    printed: set[str] = set()
    while True:
        try:
            outcome = _restore(state, printed)
        except MlxopsError as error:
            print_event(Failed(error))
            outcome = _Outcome(int(error.exit), RETRY_SECONDS if error.code in RETRYABLE_CODES else None)
        if outcome.retry_in is None or clock() + outcome.retry_in > deadline:
            return outcome.status
        pause(min(outcome.retry_in, RETRY_SECONDS))


def _restore(state: Path, printed: set[str]) -> _Outcome:
    """Try once. `printed` collects the lines that are not to be printed again by the next try."""
    paths = saved_host(state)
    store = Store(paths.state, paths.registry)
    request = restore_request(paths, Restore(), "boot")
    skipped = _plan(store, paths, request, printed)
    if skipped is not None:
        pauses = (step.again_in for step in skipped if step.again_in is not None)
        status = Exit.NOT_STARTED if any(step.stuck for step in skipped) else Exit.DONE
        return _Outcome(int(status), min(pauses, default=None))
    error = carry_out(store, request)
    if error is None:
        return _Outcome(0)
    return _Outcome(int(error.exit), RETRY_SECONDS if is_retryable(error) else None)


def saved_host(state: Path) -> HostPaths:
    """Return the paths of the settings that the host last agreed on. Raises `Refused` (never_agreed)."""
    agreed = Store(state, state / "no-registry-yet").agreed_settings()
    if agreed is None:
        raise Refused(
            "never_agreed",
            f"the host has no saved settings: {state / 'host.json'} does not exist",
            why="they say where its registry and its models are",
            hint="save them: `mlxctl deploy`",
        )
    return host_paths(agreed, os.environ)


def restore_request(paths: HostPaths, request: Restore, asker: str) -> Envelope:
    return Envelope(request, paths.settings, build_id(), Requester(asker, socket.gethostname()), agreed=True)


def carry_out(store: Store, request: Envelope) -> MlxopsError | None:
    """Run a restore in a worker, and print its events. Return its error; None if it has none."""
    log, child = begin(store, request)
    final: Event | None = None
    for event in log.follow():
        if event is not None:
            print_event(event)
            final = event
    if child is not None:
        child.wait()
    return final.error if isinstance(final, Failed) else None


def _plan(store: Store, paths: HostPaths, request: Envelope, printed: set[str]) -> tuple[RestoreStep, ...] | None:
    """Plan without starting anything. Return the skipped steps if there is nothing to start; None if there is.

    Print each skipped step once. Raises the errors with which `restore` refuses to plan.
    """
    dry_run = Restore(dry_run=True)
    context = Context(dry_run, paths, store, this_system(), print_event, dict(os.environ), request.asker)
    plan = current_plan(context, dry_run)
    if plan.starts:
        return None
    lines = [f"{step.model} on {step.port} is skipped: {step.why}" for step in plan.skipped if step.again_in is None]
    if not os.path.lexists(paths.registry):
        lines.append(f"there is no registry at {paths.registry}: nothing is assigned")
    for line in lines:
        if line not in printed:
            print_event(Note.of(line))
    printed.update(lines)
    return plan.skipped


def is_retryable(error: MlxopsError) -> bool:
    reasons = [row.why for row in _result(error.details).failed]
    return any(code.partition(":")[0] in RETRYABLE_CODES for code in [error.code, *reasons])


def _result(value: object) -> RestoreResult:
    """Decode the result of a restore, which is in the details of `restore_incomplete`, too. Other details have none."""
    try:
        return wire.decode(RestoreResult, value)
    except wire.DecodeError:
        return RestoreResult((), (), (), changed=False, dry_run=False)


def print_event(event: Event) -> None:
    match event:
        case Note(message):
            text = message
        case Phase(name, message):
            text = f"{name}: {message}"
        case Done(result):
            text = f"restored {len(_result(result).restored)}"
        case Failed(error):
            text = f"error: {error.message}; {error.why}; {error.hint}"
        case _:
            return
    with contextlib.suppress(OSError):  # the log's disk is full
        sys.stdout.write(f"{utc_now()} {text}\n")
        sys.stdout.flush()
