"""`ops`: list operations. Also find one by its id, and cancel it."""

from __future__ import annotations

import re
import time

from mlxops.agent.context import Context
from mlxops.agent.host.system import this_system
from mlxops.agent.state.operation_log import OperationLog, recent_operations
from mlxops.agent.state.store import Store
from mlxops.core import wire
from mlxops.core.command import Subject
from mlxops.core.commands.ops import OperationRow, Ops, OpsResult
from mlxops.core.errors import Interrupted, MlxopsError, OutcomeUnknown, Refused
from mlxops.core.protocol import Done, Envelope, Failed

LISTED_ENDED = 20
"""How many ended operations are listed; the newest."""
REPEAT_SECONDS = 2.0
"""Interval at which a request to cancel is repeated, to check that the worker still responds."""
RESPONSE_SECONDS = 10.0
"""Limit for a worker's response to a request to cancel. It checks for one ten times a second."""


def run(ctx: Context, request: Ops) -> OpsResult:
    ended = 0
    rows = []
    for journal in recent_operations(ctx.store.state / "ops"):
        alive = journal.alive()
        ended += not alive
        if alive or ended <= LISTED_ENDED:
            rows.append(_operation_row(journal, alive))
    return OpsResult(tuple(rows))


def row_of(journal: OperationLog) -> Done:
    """Return the result of `ops` for one operation."""
    return Done(wire.encode(OpsResult((_operation_row(journal, journal.alive()),))), Ops.name)


def _operation_row(journal: OperationLog, alive: bool) -> OperationRow:
    progress = journal.state()
    state, detail, error = "running" if alive else "interrupted", str(progress), None
    if isinstance(progress.final, Failed):
        state, detail, error = _failed_state(progress.final.error)
    elif progress.final is not None:
        state, detail = "done", ""
    envelope = _envelope(journal)
    subject = envelope.request.subject if envelope else Subject()
    return OperationRow(
        operation=journal.id,
        command=envelope.request.name if envelope else None,
        model=subject.model,
        repo=subject.repo,
        port=_port(subject.port),
        asker=str(envelope.asker) if envelope else None,
        since=journal.since,
        phase=progress.phase.name if progress.phase else None,
        detail=detail,
        error=error,
        state=state,
        progress=progress.progress,
        seconds=journal.seconds(alive=alive),
    )


def outcome_of(journal: OperationLog) -> str:
    """Return how an operation whose worker has ended came out: a state of `ops`, other than running."""
    final = journal.state().final
    if isinstance(final, Failed):
        return _failed_state(final.error)[0]
    return "interrupted" if final is None else "done"


def _failed_state(error: MlxopsError) -> tuple[str, str, str | None]:
    """Return (state, detail, code) for an operation that ended without a result.

    A cancelled operation has not failed. Nor has one that ended because another operation carried out the same request.
    """
    followed = error.details.get("attach")
    if followed:
        return "followed", f"another one did the same: {followed}", None
    return "cancelled" if isinstance(error, Interrupted) else "failed", error.message, error.code


def _envelope(journal: OperationLog) -> Envelope | None:
    try:
        return journal.request()
    except (OSError, ValueError):
        return None


def _port(text: str | None) -> int | str | None:
    """Return the port as a number if it is one. A request may also hold `auto`, or an invalid port."""
    return int(text) if text and re.fullmatch(r"[0-9]{1,5}", text, re.ASCII) else text


def find(store: Store, text: str) -> OperationLog:
    """Return the operation with this id, or whose id ends with it. Raises `Refused` (unknown_operation)."""
    matches = [journal for journal in recent_operations(store.state / "ops") if text and journal.id.endswith(text)]
    if len(matches) == 1:
        return matches[0]
    raise Refused(
        "unknown_operation",
        f"several operation ids end with {text!r}" if matches else f"there is no operation {text!r} on this host",
        why=", ".join(each.id for each in matches) or "only the latest 200 operations are kept",
        hint="see: `mlxctl ops`",
    )


class CancelRequest:
    """A request to cancel an operation, repeated until the operation ends.

    A worker acknowledges each request, even while it cleans up, which may take minutes. A worker that was stopped, or
    that hangs in the kernel, does not.
    """

    def __init__(self, journal: OperationLog) -> None:
        """Raises `Refused` (operation_ended, not_cancellable)."""
        _refuse_uncancellable(journal)
        self._journal = journal
        self._send()

    def __call__(self) -> None:
        """Repeat the request if it is due. Call this while you wait. Raises `OutcomeUnknown` (worker_silent)."""
        waited = time.monotonic() - self._sent_at
        if not self._journal.cancel_requested and waited > REPEAT_SECONDS:
            self._send()
        elif waited > RESPONSE_SECONDS and self._journal.alive():
            raise self._unresponsive()

    def _send(self) -> None:
        self._journal.cancel()
        self._sent_at = time.monotonic()

    def _unresponsive(self) -> OutcomeUnknown:
        pid = worker_pid(self._journal)
        worker, target = (f"pid {pid}", str(pid)) if pid else ("which cannot be found", "PID")
        return OutcomeUnknown(
            "worker_silent",
            f"operation {self._journal.id} was asked to end, and its worker, {worker}, is not responding",
            why=f"it has not responded for {RESPONSE_SECONDS:.0f} s: it was stopped, or waits for a disk",
            hint=f"on the host: kill -CONT {target}, then it ends; or kill -KILL {target}, then `mlxctl reconcile`",
            details={"operation": self._journal.id, "pid": pid},
        )


def worker_pid(journal: OperationLog) -> int | None:
    """Return the pid of an operation's worker; None if this user can see no such process."""
    mark = ("--worker", str(journal.folder))
    for process in this_system().process_table(()).processes.values():
        if mark in zip(process.argv, process.argv[1:], strict=False) and not process.zombie:
            return process.pid
    return None


def _refuse_uncancellable(journal: OperationLog) -> None:
    envelope = _envelope(journal)
    name = envelope.request.name if envelope else "an unknown command"
    if not journal.alive():
        message = f"operation {journal.id} has ended already"
        raise Refused("operation_ended", message, why=f"its command was: {name}", hint="`mlxctl ops`")
    if envelope is None or not envelope.request.cancellable:
        raise Refused(
            "not_cancellable",
            f"{name} cannot be cancelled",
            why="it takes only seconds, and stopping it halfway would leave the change unfinished",
            hint=f"wait for it: `mlxctl ops --follow {journal.id}`",
        )
