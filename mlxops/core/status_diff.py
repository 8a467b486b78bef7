"""Compare two successive `status` results of one host. Pure: two results in, sentences out.

Ignore fluctuation: the memory of a running server, and progress within the same tenth of a download.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mlxops.core.commands.status import DriftRow, PortRow, RunningRow, StatusResult
from mlxops.core.frozen import dataclass
from mlxops.core.protocol import Progress


@dataclass(frozen=True)
class Change:
    """One change. `what`: port, operation, drift or host. `port` is None if it is about no port."""

    what: str
    port: int | None
    text: str


def changes(before: StatusResult, after: StatusResult) -> tuple[Change, ...]:
    """Return what changed from one result to the next: ports first, then downloads, then drift."""
    return (*_port_changes(before, after), *_download_changes(before, after), *_drift_changes(before, after))


def differ_beyond_memory(before: StatusResult, after: StatusResult) -> bool:
    """Return whether two results differ in anything but memory. Programs want every byte of a download."""
    return _without_memory(before) != _without_memory(after)


def _without_memory(result: StatusResult) -> StatusResult:
    return replace(result, ports=tuple(replace(row, memory_bytes=None) for row in result.ports))


def _port_changes(before: StatusResult, after: StatusResult) -> Iterator[Change]:
    old = {row.port: row for row in before.ports}
    new = {row.port: row for row in after.ports}
    for port, row in new.items():
        if port not in old:
            yield Change("port", port, f"{_state_text(row)} (new in the host's range)")
        elif text := _port_change(old[port], row):
            yield Change("port", port, text)
    for port in old:
        if port not in new:
            yield Change("port", port, "no longer in the host's range")


def _port_change(old: PortRow, new: PortRow) -> str:
    """Return what changed on a port; empty if nothing worth a line did."""
    if old.state != new.state:
        return f"{old.state} -> {_state_text(new)}"
    before, after = _reported_fields(old), _reported_fields(new)
    changed = [
        f"{name} {_text(value)} -> {_text(after[name])}" for name, value in before.items() if value != after[name]
    ]
    if _detail_changed(old, new):
        changed.append(_text(new.detail))
    return f"{new.state}: {'; '.join(changed)}" if changed else ""


def _reported_fields(row: PortRow) -> dict[str, object]:
    """Return the fields, besides state and detail, whose change is reported while the state stays the same."""
    return {"alias": row.alias, "owner": row.owner, "model": row.model, "revision": row.revision, "pid": row.pid}


def _state_text(row: PortRow) -> str:
    """Return `ready jerry-xl: busy`, without the parts that the row does not have."""
    text = f"{row.state} {row.model or ''}".strip()
    return f"{text}: {row.detail}" if row.detail else text


def _text(value: object) -> str:
    return "none" if value in (None, "") else str(value)


def _detail_changed(old: PortRow | RunningRow, new: PortRow | RunningRow) -> bool:
    """Return whether the detail differs. For the same download, only a new tenth counts."""
    if old.detail == new.detail:
        return False
    tenths = [_progress_tenth(row.progress) for row in (old, new)]
    return tenths[0] is None or tenths[0] != tenths[1]


def _progress_tenth(progress: Progress | None) -> tuple[str, int, int] | None:
    """Return name, total and completed tenths of a progress; None if there is no progress."""
    if progress is None:
        return None
    tenth = progress.done * 10 // progress.total if progress.total > 0 else 0
    return progress.name, progress.total, tenth


def _download_changes(before: StatusResult, after: StatusResult) -> Iterator[Change]:
    """Report the downloads that no port's row shows."""
    old, new = _downloads(before), _downloads(after)
    for operation, row in new.items():
        if operation not in old or _detail_changed(old[operation], row):
            yield Change("operation", None, f"{row.command} {operation}: {row.detail or 'running'}")
    for operation, row in old.items():
        if operation not in new:
            yield Change("operation", None, f"{row.command} {operation}: downloads no more")


def _downloads(result: StatusResult) -> dict[str, RunningRow]:
    on_ports = {row.operation for row in result.ports}
    return {row.operation: row for row in result.operations if row.operation not in on_ports}


def _drift_changes(before: StatusResult, after: StatusResult) -> Iterator[Change]:
    old, new = ({_drift_key(row): row for row in result.drift} for result in (before, after))
    for key, row in new.items():
        if key not in old:
            hint = f"; {row.hint}" if row.hint else ""
            yield Change("drift", row.port, f"drift: {row.message}{hint}")
    for key, row in old.items():
        if key not in new:
            yield Change("drift", row.port, f"no more drift: {row.message}")


def _drift_key(row: DriftRow) -> tuple[object, ...]:
    return row.code, row.port, row.model, row.message
