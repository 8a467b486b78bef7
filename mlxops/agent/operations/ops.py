"""Operations, seen from outside: which run and which ran, how to find one, how to end one."""

from __future__ import annotations

import contextlib
import re
import time

from mlxops.agent.context import Context
from mlxops.agent.host.system import this_system
from mlxops.agent.state.locks import NoLocks
from mlxops.agent.state.operation_log import OperationLog, recent
from mlxops.agent.state.store import Store, named
from mlxops.common.files import Unfit
from mlxops.core.errors import Interrupted, MlxopsError, OutcomeUnknown, Refused
from mlxops.core.protocol import CANCELLABLE, Failed
from mlxops.core.records import Operation

SHOWN = 20
"""Operations that have ended and are listed, the newest."""
AGAIN_SECONDS = 2.0
"""How often it is made sure that a worker that was asked to end still hears."""
HEARD_SECONDS = 10.0
"""A worker looks ten times a second whether it is to end, and hears it between any two steps of its own."""


def ops(ctx: Context) -> dict[str, object]:
    ended = 0
    rows = []
    for journal in recent(ctx.store.state / "ops"):
        alive = journal.alive()
        ended += not alive
        if alive or ended <= SHOWN:
            rows.append(_row(journal, alive))
    return {"operations": rows}


def downloads(ctx: Context) -> list[Operation]:
    """The operations that download now."""
    found = []
    for path in named(ctx.store.state / "locks", "repo-"):
        # Neither what is no file, nor a file system without locks, has a lock that an operation could hold.
        with contextlib.suppress(Unfit, NoLocks):
            found.append(ctx.store.holder(path.name))
    return [operation for operation in found if operation is not None]


def _row(journal: OperationLog, alive: bool) -> dict[str, object]:
    stand = journal.stand()
    row: dict[str, object] = {"operation": journal.id, **_asked(journal), "since": journal.since}
    row |= {"phase": stand.phase.name if stand.phase else None, "detail": str(stand), "error": None}
    if stand.progress is not None:
        row["progress"] = stand.progress.to_wire()
    if isinstance(stand.final, Failed):
        return row | _failed(stand.final.error)
    if stand.final is not None:
        return row | {"state": "done", "detail": ""}
    return row | {"state": "running" if alive else "interrupted"}


def _failed(error: MlxopsError) -> dict[str, object]:
    """An end without a result; that somebody wanted it, or that another operation did the same, is no failure."""
    followed = error.details.get("attach")
    if followed:
        return {"state": "followed", "detail": f"another one did the same: {followed}", "error": None}
    state = "cancelled" if isinstance(error, Interrupted) else "failed"
    return {"state": state, "detail": error.message, "error": error.code}


def _asked(journal: OperationLog) -> dict[str, object]:
    try:
        request = journal.request()
    except (OSError, ValueError):
        return {"command": None, "model": None, "repo": None, "port": None, "asker": None}
    port = request.text("port")
    return {
        "command": request.command,
        "model": request.text("model"),
        "repo": request.text("repo"),
        # As it was asked for, which may have been `auto`, or nothing that is a port.
        "port": int(port) if port and re.fullmatch(r"[0-9]{1,5}", port, re.ASCII) else port,
        "asker": str(request.asker),
    }


def find(store: Store, text: str) -> OperationLog:
    """The operation of an id, or of the end of one. Raises `Refused` (unknown_operation)."""
    found = [journal for journal in recent(store.state / "ops") if text and journal.id.endswith(text)]
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
        if not self._journal.cancelled and waited > AGAIN_SECONDS:
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
    asked = _asked(journal)["command"]
    if not journal.alive():
        what = f"operation {journal.id} has ended already"
        raise Refused("operation_ended", what, why=f"what was asked: {asked}", hint="mlxctl ops")
    if asked not in CANCELLABLE:
        raise Refused(
            "not_cancellable",
            f"{asked} cannot be cancelled",
            why="it is done in seconds, and half of it would be worse than all of it",
            hint=f"wait for it: mlxctl ops --follow {journal.id}",
        )
