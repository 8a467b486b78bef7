"""`restore` without anybody who asks: what the system runs at boot, and by a timer.

It prints lines for people, into the job's log; the settings are those that the host was last agreed on. It looks first,
and makes an operation only of something to do: a timer would else push all others out of the record.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlxops.agent.context import Context
from mlxops.agent.host.system import this_system
from mlxops.agent.operations.restore import look
from mlxops.agent.paths import HostPaths, host_paths
from mlxops.agent.state.store import Store, utc_now
from mlxops.agent.worker import begin
from mlxops.common.build import build_id
from mlxops.core.errors import Exit, MlxopsError, Refused
from mlxops.core.plan_restore import RestoreStep
from mlxops.core.protocol import Done, Event, Failed, Note, Phase, Request, Requester

PATIENCE = 20 * 60.0
"""Seconds for which what may pass is waited for: without a timer nobody tries again. The longest pause between two
starts fits in."""
LOOK_SECONDS = 60.0
PASSING = frozenset(
    {"folder_missing", "registry_missing", "busy", "settings_locked", "registry_locked", "hub_unreachable", "hub_error"}
)
"""What a host that has just booted may well answer: a disk that is mounted late, a network that comes up late."""


@dataclass(frozen=True)
class _Outcome:
    status: int
    again_in: float | None = None
    """Seconds after which another try may do better, if one may."""


def run(state: Path, pause: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic) -> int:
    """Returns the exit status, that of the last try."""
    os.umask(0o077)
    until = clock() + PATIENCE
    told: set[str] = set()
    while True:
        try:
            outcome = _restore(state, told)
        except MlxopsError as error:
            _tell(Failed(error))
            outcome = _Outcome(int(error.exit), LOOK_SECONDS if error.code in PASSING else None)
        if outcome.again_in is None or clock() + outcome.again_in > until:
            return outcome.status
        pause(min(outcome.again_in, LOOK_SECONDS))


def _restore(state: Path, told: set[str]) -> _Outcome:
    """`told`: what was said already, and is not said again at every look."""
    agreed = Store(state, state / "no-registry-yet").agreed_settings()
    if agreed is None:
        raise Refused(
            "never_agreed",
            f"the host was never agreed with: there is no {state / 'host.json'}",
            why="without it nobody knows where its registry and its models are",
            hint="inv deploy, or any change, agrees with it",
        )
    paths = host_paths(agreed, os.environ)
    store = Store(paths.state, paths.registry)
    asker = Requester("boot", socket.gethostname())
    request = Request("restore", {}, agreed, build_id(), asker, agreed=True)
    left = _look(store, paths, request, told)
    if left is not None:
        pauses = (step.again_in for step in left if step.again_in is not None)
        status = Exit.NOT_STARTED if any(step.stuck for step in left) else Exit.DONE
        return _Outcome(int(status), min(pauses, default=None))
    journal, child = begin(store, request)
    final: Event | None = None
    for event in journal.follow():
        if event is not None:
            _tell(event)
            final = event
    if child is not None:
        child.wait()
    if not isinstance(final, Failed):
        return _Outcome(0)
    return _Outcome(int(final.error.exit), LOOK_SECONDS if _may_pass(final.error) else None)


def _look(store: Store, paths: HostPaths, request: Request, told: set[str]) -> tuple[RestoreStep, ...] | None:
    """What is left, if there is nothing to start; None if there is. Raises what `restore` raises before it begins."""
    dry = Request(request.command, {"dry_run": True}, request.settings, request.build, request.asker, agreed=True)
    plan = look(Context(dry, paths, store, this_system(), _tell, dict(os.environ)))
    if plan.starts:
        return None
    lines = [f"{step.model} on {step.port} is left: {step.why}" for step in plan.skipped if step.again_in is None]
    if not os.path.lexists(paths.registry):
        lines.append(f"there is no registry at {paths.registry}: nothing is assigned")
    for line in lines:
        if line not in told:
            _tell(Note(line))
    told.update(lines)
    return plan.skipped


def _may_pass(error: MlxopsError) -> bool:
    rows = error.details.get("failed")
    whys = [str(row.get("why")) for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return any(code.partition(":")[0] in PASSING for code in [error.code, *whys])


def _tell(event: Event) -> None:
    match event:
        case Note(message):
            text = message
        case Phase(name, message):
            text = f"{name}: {message}"
        case Done(result):
            rows = result.get("restored")
            text = f"restored {len(rows) if isinstance(rows, list) else 0}"
        case Failed(error):
            text = f"error: {error.message}; {error.why}; {error.hint}"
        case _:
            return
    sys.stdout.write(f"{utc_now()} {text}\n")
    sys.stdout.flush()
