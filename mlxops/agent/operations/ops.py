"""Operations, seen from outside: which run and which ran, how to find one, how to end one."""

from __future__ import annotations

import re
import time

from mlxops.agent.context import Context
from mlxops.agent.host.system import this_system
from mlxops.agent.state.operation_log import OperationLog, recent_operations
from mlxops.agent.state.store import Store
from mlxops.core.command import Subject
from mlxops.core.commands.ops import OperationRow, Ops, OpsResult
from mlxops.core.errors import Interrupted, MlxopsError, OutcomeUnknown, Refused
from mlxops.core.protocol import Envelope, Failed

SHOWN = 20
"""Operations that have ended and are listed, the newest."""
AGAIN_SECONDS = 2.0
"""How often it is made sure that a worker that was asked to end still hears."""
HEARD_SECONDS = 10.0
"""A worker looks ten times a second whether it is to end, and hears it between any two steps of its own."""


def run(ctx: Context, request: Ops) -> OpsResult:
    ended = 0
    rows = []
    for journal in recent_operations(ctx.store.state / "ops"):
        alive = journal.alive()
        ended += not alive
        if alive or ended <= SHOWN:
            rows.append(_row(journal, alive))
    return OpsResult(tuple(rows))


def _row(journal: OperationLog, alive: bool) -> OperationRow:
    stand = journal.state()
    state, detail, error = "running" if alive else "interrupted", str(stand), None
    if isinstance(stand.final, Failed):
        state, detail, error = _failed(stand.final.error)
    elif stand.final is not None:
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
        phase=stand.phase.name if stand.phase else None,
        detail=detail,
        error=error,
        state=state,
        progress=stand.progress,
        seconds=journal.seconds(alive=alive),
    )


def _failed(error: MlxopsError) -> tuple[str, str, str | None]:
    """Return (state, detail, code) for an end without a result.

    A cancelled operation has not failed, and neither has one that found another operation doing the same.
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
    """Return the port as a number, if it is one; it may have been given as `auto`, or wrongly."""
    return int(text) if text and re.fullmatch(r"[0-9]{1,5}", text, re.ASCII) else text


def find(store: Store, text: str) -> OperationLog:
    """The operation of an id, or of the end of one. Raises `Refused` (unknown_operation)."""
    found = [journal for journal in recent_operations(store.state / "ops") if text and journal.id.endswith(text)]
    if len(found) == 1:
        return found[0]
    raise Refused(
        "unknown_operation",
        f"there is no operation {text!r} on this host" if not found else f"{text!r} is the end of several operations",
        why="the records of the latest two hundred are kept" if not found else ", ".join(each.id for each in found),
        hint="see: mlxctl ops",
    )


class Cancelling:
    """Asks an operation to end, and sees to it that this is heard: by a worker that cleans up, which may take minutes,
    it is heard each time; by one that was stopped, or hangs in the kernel, it is not."""

    def __init__(self, journal: OperationLog) -> None:
        """Raises `Refused` (operation_ended, not_cancellable)."""
        _refuse_uncancellable(journal)
        self._journal = journal
        self._ask()

    def __call__(self) -> None:
        """While its end is waited for. Raises `OutcomeUnknown` (worker_silent)."""
        waited = time.monotonic() - self._asked
        if not self._journal.cancel_requested and waited > AGAIN_SECONDS:
            self._ask()
        elif waited > HEARD_SECONDS and self._journal.alive():
            raise self._silent()

    def _ask(self) -> None:
        self._journal.cancel()
        self._asked = time.monotonic()

    def _silent(self) -> OutcomeUnknown:
        pid = worker_pid(self._journal)
        who, target = (f"pid {pid}", str(pid)) if pid else ("which cannot be found", "PID")
        return OutcomeUnknown(
            "worker_silent",
            f"operation {self._journal.id} was asked to end, and its worker, {who}, does not react",
            why=f"it has heard nothing for {HEARD_SECONDS:.0f} s: it was stopped, or waits for a disk",
            hint=f"on the host: kill -CONT {target}, then it ends; or kill -KILL {target}, then mlxctl reconcile",
            details={"operation": self._journal.id, "pid": pid},
        )


def worker_pid(journal: OperationLog) -> int | None:
    """The worker of an operation, as far as this user can see it."""
    mark = ("--worker", str(journal.folder))
    for process in this_system().look(()).processes.values():
        if mark in zip(process.argv, process.argv[1:], strict=False) and not process.zombie:
            return process.pid
    return None


def _refuse_uncancellable(journal: OperationLog) -> None:
    envelope = _envelope(journal)
    name = envelope.request.name if envelope else None
    if not journal.alive():
        what = f"operation {journal.id} has ended already"
        raise Refused("operation_ended", what, why=f"it was: {name}", hint="mlxctl ops")
    if envelope is None or not envelope.request.cancellable:
        raise Refused(
            "not_cancellable",
            f"{name} cannot be cancelled",
            why="it is done in seconds, and half of it would be worse than all of it",
            hint=f"wait for it: mlxctl ops --follow {journal.id}",
        )
