"""Interrupted operations: their worker was killed, or the host went down, before they had a result.

An interrupted operation shows in two ways: its record has no final event although no worker is alive, and it did not
release its locks. Repairing a port needs no record of what was interrupted: the next command that takes the port's
lock observes the port and plans from that. The record is for people: `status` names the operation, and the next
command on that port also names it and writes its final event.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mlxops.agent.state.operation_log import OperationLog, find_operation, recent_operations
from mlxops.agent.state.store import Store, state_unreadable
from mlxops.core.drift import Drift, DriftCode
from mlxops.core.errors import Refused
from mlxops.core.frozen import dataclass
from mlxops.core.protocol import Failed
from mlxops.core.records import Operation


@dataclass(frozen=True)
class InterruptedOperation:
    """An operation without a final event whose worker is dead."""

    log: OperationLog
    operation: Operation
    phase: str
    """Its last phase with the progress; empty if it had not reported one."""

    def __str__(self) -> str:
        port = f" on {self.operation.port}" if self.operation.port else ""
        command = f"{self.operation.command} {self.operation.model or ''}".strip() + port
        when = f"while it was at {self.phase}" if self.phase else "before it reported anything"
        return f"{command}, asked by {self.operation.asker} at {self.operation.since}, was interrupted {when}"

    @property
    def with_id(self) -> str:
        return f"{self} ({self.log.id})"


def find_interrupted(store: Store, ports: Iterable[int]) -> Iterator[InterruptedOperation]:
    """Yield all interrupted operations, the newest first.

    `ports`: where to look for abandoned locks. They show the port of a request that does not name one.
    """
    abandoned = [operation for port in ports if (operation := store.abandoned_by(f"port-{port}"))]
    locked_ports = {operation.id: operation.port for operation in abandoned}
    for log in recent_operations(store.state / "ops"):
        if log.ended or log.alive():
            continue
        interrupted = _interrupted_operation(log, locked_ports.get(log.id))
        if interrupted is not None:
            yield interrupted


def _interrupted_operation(log: OperationLog, port: int | None) -> InterruptedOperation | None:
    """Describe the operation of a dead worker; None if it has a final event, or if its request cannot be read."""
    state = log.state()
    if state.final is not None:
        return None
    try:
        envelope = log.request()
    except (OSError, ValueError):
        return None
    subject = envelope.request.subject
    text = subject.port or ""
    operation = Operation(
        log.id,
        envelope.request.name,
        model=subject.model,
        port=port or (int(text) if text.isdecimal() and len(text) <= 5 else None),
        asker=str(envelope.asker),
        since=log.since,
    )
    return InterruptedOperation(log, operation, str(state))


def drift(store: Store, ports: Iterable[int]) -> Iterator[Drift]:
    """Yield a drift for each interrupted operation, or one that says that the records cannot be read."""
    try:
        interrupted = list(find_interrupted(store, ports))
    except (Refused, OSError) as error:
        refused = error if isinstance(error, Refused) else state_unreadable(store.state / "ops", error)
        yield Drift(DriftCode.STATE_UNREADABLE, None, None, f"{refused.message}: {refused.why}", refused.marked_hint)
        return
    for each in interrupted:
        operation = each.operation
        again = f"mlxctl {operation.command} {operation.model or ''}".strip()
        if operation.port is not None:
            again += f" {operation.port}"
        yield Drift.of(DriftCode.INTERRUPTED_OPERATION, operation.port, operation.model, each.with_id, command=again)


def settle(store: Store, operation: str, port: int | None, *, by: str) -> str | None:
    """Write the final event of an interrupted operation and remove its temporary files.

    Return a sentence that names the operation; None if it was not interrupted. `by`: the operation that repairs what
    it left.
    """
    log = find_operation(store.state / "ops", operation)
    interrupted = _interrupted_operation(log, port) if log is not None and not log.alive() else None
    if interrupted is None:
        return None
    _write_final_event(interrupted, by)
    store.remove_leftovers()
    return interrupted.with_id


def settle_all(store: Store, ports: Iterable[int], *, by: str, dry_run: bool) -> list[str]:
    """Write the final event of every interrupted operation, unless it is a dry run. Return a sentence for each."""
    interrupted = list(find_interrupted(store, ports))
    for each in interrupted:
        if not dry_run:
            _write_final_event(each, by)
    return [each.with_id for each in interrupted]


def _write_final_event(interrupted: InterruptedOperation, by: str) -> None:
    error = Refused(
        "operation_interrupted",
        f"{interrupted}",
        why="its worker was killed, or the host went down",
        hint=f"{by} took over what it left",
    )
    interrupted.log.append(Failed(error))
