"""Operations that were cut short: their worker was killed, or the host went down, before they had a result.

Such an operation is found in two ways: its record has no end although nobody works on it, and it never gave back the
locks that it held. What it did to a port is seen by looking at the port, so repairing needs no memory of it: whoever
takes the port's lock next does what its own plan says. The record is for people: it is named by `status`, and
by the next command on that port, which then writes its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mlxops.agent.state.operation_log import OperationLog, named, recent
from mlxops.agent.state.store import Store, state_unreadable
from mlxops.core.drift import Drift, DriftCode
from mlxops.core.errors import Refused
from mlxops.core.protocol import Failed
from mlxops.core.records import Operation


@dataclass(frozen=True)
class InterruptedOperation:
    """An operation without an end whose worker is gone."""

    journal: OperationLog
    operation: Operation
    phase: str
    """What it was doing, in a few words; empty if it had not said anything."""

    def __str__(self) -> str:
        where = f" on {self.operation.port}" if self.operation.port else ""
        what = f"{self.operation.command} {self.operation.model or ''}".strip() + where
        when = f"while it was at {self.phase}" if self.phase else "before it told anything"
        return f"{what}, asked by {self.operation.asker} at {self.operation.since}, was interrupted {when}"


def find(store: Store, ports: Iterable[int]) -> Iterator[InterruptedOperation]:
    """All of them, the newest first. `ports`: whose locks are looked at for the port that one was about."""
    held = [left for port in ports if (left := store.left(f"port-{port}"))]
    at = {operation.id: operation.port for operation in held}
    for journal in recent(store.state / "ops"):
        if not journal.ended and not journal.alive() and (cut := _cut(journal, at.get(journal.id))) is not None:
            yield cut


def _cut(journal: OperationLog, port: int | None) -> InterruptedOperation | None:
    """None if it came to an end, or left nothing to be read."""
    stand = journal.stand()
    if stand.final is not None:
        return None
    try:
        request = journal.request()
    except (OSError, ValueError):
        return None
    text = request.text("port") or ""
    operation = Operation(
        journal.id,
        request.command,
        model=request.text("model"),
        port=port or (int(text) if text.isdecimal() and len(text) <= 5 else None),
        asker=str(request.asker),
        since=journal.since,
    )
    return InterruptedOperation(journal, operation, str(stand))


def drift(store: Store, ports: Iterable[int]) -> Iterator[Drift]:
    try:
        found = list(find(store, ports))
    except (Refused, OSError) as error:
        refused = error if isinstance(error, Refused) else state_unreadable(store.state / "ops", error)
        yield Drift(DriftCode.STATE_UNREADABLE, None, None, f"{refused.message}: {refused.why}", refused.hint)
        return
    for cut in found:
        operation = cut.operation
        command = f"mlxctl {operation.command} {operation.model or ''}".strip()
        if operation.port is not None:
            command += f" {operation.port}"
        message = f"{cut} ({cut.journal.id})"
        yield Drift.of(DriftCode.INTERRUPTED_OPERATION, operation.port, operation.model, message, command=command)


def settle(store: Store, operation: str, port: int | None, *, by: str) -> str | None:
    """Write the end of an interrupted operation; return a sentence that names it, None if it was not interrupted.

    `by`: the operation that repairs what it left.
    """
    journal = named(store.state / "ops", operation)
    cut = _cut(journal, port) if journal is not None and not journal.alive() else None
    if cut is None:
        return None
    _write_end(cut, by)
    store.remove_leftovers()
    return f"{cut} ({cut.journal.id})"


def settle_all(store: Store, ports: Iterable[int], *, by: str, dry_run: bool) -> list[str]:
    """Write the end of every interrupted operation, unless it is a dry run; return a sentence for each."""
    found = list(find(store, ports))
    for cut in found:
        if not dry_run:
            _write_end(cut, by)
    return [f"{cut} ({cut.journal.id})" for cut in found]


def _write_end(cut: InterruptedOperation, by: str) -> None:
    error = Refused(
        "operation_interrupted",
        f"{cut}",
        why="its worker was killed, or the host went down",
        hint=f"what it left was taken care of by {by}",
    )
    cut.journal.append(Failed(error))
