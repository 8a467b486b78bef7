"""`observe`: the status, the memory, and the counts of the history and of the operations.

`serve` repeats the request over one connection. So what cannot change again is read once: ended operations, and the
lines of the history.
"""

from __future__ import annotations

import calendar
import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from mlxops.agent.context import Context
from mlxops.agent.operations.list import memory_row
from mlxops.agent.operations.ops import outcome_of
from mlxops.agent.operations.status import look
from mlxops.agent.operations.verdicts import last_verdicts
from mlxops.agent.state.durable_files import parse_object
from mlxops.agent.state.operation_log import OperationLog, recent_operations
from mlxops.common import files
from mlxops.core.commands.observe import EndedOperation, Observe, ObservedPort, ObserveResult
from mlxops.core.commands.status import Status
from mlxops.core.ports import Owner, PortView
from mlxops.core.totals import HistoryTotals, Measured

MAX_HISTORY_BYTES = 64 * 1024 * 1024
"""A longer history is not counted: it would take seconds, and a part of it would give wrong totals."""
_CHUNK = 1024 * 1024


def run(ctx: Context, request: Observe) -> ObserveResult:
    registry, world = ctx.registry_and_world()
    status = look(ctx, Status(), registry, world)
    totals, measured = _read_totals(ctx.store.state)
    views = [world.ports[row.port] for row in status.ports]
    logs = recent_operations(ctx.store.state / "ops")
    ended = _ended(logs)
    return ObserveResult(
        status=status,
        memory=memory_row(ctx, world),
        ports=tuple(_port(ctx, view, totals, measured.get(view.port)) for view in views),
        running=len(logs) - len(ended),
        ended=ended,
    )


def _read_totals(state: Path) -> tuple[HistoryTotals | None, dict[int, Measured]]:
    """Return the counts of the history, and the last run of `measure` on each port. Older builds wrote the runs into
    the history."""
    totals, runs = _history.read(state / "history.jsonl"), _runs.read(state / "measure.jsonl")
    return totals, {**(totals.measured if totals else {}), **(runs.measured if runs else {})}


def _port(ctx: Context, view: PortView, totals: HistoryTotals | None, measured: Measured | None) -> ObservedPort:
    run = view.run if view.owner is Owner.MLXOPS else None
    record = last_verdicts(ctx.store, run) if run else None
    if measured and (measured.model, measured.revision) != (view.model, view.revision):
        measured = None
    return ObservedPort(
        port=view.port,
        started_at=_epoch(view.since),
        checked_at=_epoch(record.at) if record else None,
        verdicts=record.verdicts if record else (),
        measured_at=_epoch(measured.at) if measured else None,
        figures=measured.figures if measured else (),
        totals=totals.of(view.port) if totals else None,
    )


def _epoch(text: str | None) -> float | None:
    """Return a time that `store.utc_now` wrote, in seconds; None for anything else."""
    try:
        return float(calendar.timegm(time.strptime(text or "", "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return None


_outcomes: dict[str, EndedOperation] = {}
"""The recorded operations that have ended, by id: an outcome does not change."""


def _ended(logs: Sequence[OperationLog]) -> tuple[EndedOperation, ...]:
    known = {log.id: _outcomes[log.id] for log in logs if log.id in _outcomes}
    new = [log for log in logs if log.id not in known and not log.alive()]
    _outcomes.clear()
    _outcomes.update(known | {log.id: EndedOperation(log.id, outcome_of(log)) for log in new})
    return tuple(_outcomes.values())


class _History:
    """The totals of a growing history or file of findings. `read` reads what was appended since its last call."""

    def __init__(self) -> None:
        self._start_again(None)

    def _start_again(self, inode: int | None) -> None:
        self._inode = inode
        self._position = 0
        self._totals = HistoryTotals()

    def read(self, path: Path) -> HistoryTotals | None:
        """Return the totals; None if the history is too long or cannot be read. A missing one is empty."""
        try:
            descriptor = files.open_file(path)
        except FileNotFoundError:
            self._start_again(None)
            return self._totals
        except OSError:
            return None
        try:
            return self._read_open(descriptor)
        except OSError:
            return None
        finally:
            os.close(descriptor)

    def _read_open(self, descriptor: int) -> HistoryTotals | None:
        found = os.fstat(descriptor)
        if found.st_ino != self._inode or found.st_size < self._position:
            self._start_again(found.st_ino)
        if found.st_size - self._position > MAX_HISTORY_BYTES:
            return None
        while self._add(os.pread(descriptor, _CHUNK, self._position)):
            pass
        return self._totals

    def _add(self, data: bytes) -> bool:
        """Count the whole lines of a chunk. Return whether there were any: the last line may still be written."""
        whole = data.rfind(b"\n") + 1 or (len(data) if len(data) == _CHUNK else 0)  # mlxops writes no such long line
        for line in data[:whole].splitlines():
            with contextlib.suppress(ValueError):
                self._totals.add(parse_object(line))
        self._position += whole
        return whole > 0


_history, _runs = _History(), _History()
