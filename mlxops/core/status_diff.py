"""Compare two successive `status` results of one host. Pure: two results in, sentences out.

Ignore fluctuation: the memory of a running server, and progress within the same tenth of a download.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Row = Mapping[str, object]

REPORTED_FIELDS = ("alias", "owner", "model", "revision", "pid")
"""Fields of a port, besides state and detail, whose change is reported while the state stays the same."""


@dataclass(frozen=True)
class Change:
    """One change. `what`: port, operation, drift or host. `port` is None if it is about no port."""

    what: str
    port: int | None
    text: str

    def to_wire(self) -> dict[str, object]:
        return {"what": self.what, "port": self.port, "text": self.text}


def changes(before: Row, after: Row) -> tuple[Change, ...]:
    """Return what changed from one `status` result to the next: ports first, then downloads, then drift."""
    return (*_port_changes(before, after), *_download_changes(before, after), *_drift_changes(before, after))


def rows(result: Row | None, key: str) -> list[Row]:
    """Return the rows of a list in a result. It came from a host, so skip what is not a row."""
    found = (result or {}).get(key)
    return [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []


def differ_beyond_memory(before: Row, after: Row) -> bool:
    """Return whether two results differ in anything but memory. Programs want every byte of a download."""
    return _without_memory(before) != _without_memory(after)


def _without_memory(result: Row) -> dict[str, object]:
    ports = [{key: value for key, value in row.items() if key != "memory_bytes"} for row in rows(result, "ports")]
    return {**result, "ports": ports}


def _port_changes(before: Row, after: Row) -> Iterator[Change]:
    old = {_port_number(row): row for row in rows(before, "ports")}
    new = {_port_number(row): row for row in rows(after, "ports")}
    for port, row in new.items():
        if port not in old:
            yield Change("port", port, f"{_state_text(row)} (new in the host's range)")
        elif text := _port_change(old[port], row):
            yield Change("port", port, text)
    for port in old:
        if port not in new:
            yield Change("port", port, "no longer in the host's range")


def _port_change(old: Row, new: Row) -> str:
    """Return what changed on a port; empty if nothing worth a line did."""
    if old.get("state") != new.get("state"):
        return f"{old.get('state')} -> {_state_text(new)}"
    changed = [
        f"{key} {_field_text(old, key)} -> {_field_text(new, key)}"
        for key in REPORTED_FIELDS
        if old.get(key) != new.get(key)
    ]
    if _detail_changed(old, new):
        changed.append(_field_text(new, "detail"))
    return f"{new.get('state')}: {'; '.join(changed)}" if changed else ""


def _state_text(row: Row) -> str:
    """Return `ready jerry-xl: busy`, without the parts that the row does not have."""
    text = f"{row.get('state')} {row.get('model') or ''}".strip()
    return f"{text}: {row.get('detail')}" if row.get("detail") else text


def _field_text(row: Row, key: str) -> str:
    value = row.get(key)
    return "none" if value in (None, "") else str(value)


def _detail_changed(old: Row, new: Row) -> bool:
    """Return whether the detail differs. For the same download, only a new tenth counts."""
    if old.get("detail") == new.get("detail"):
        return False
    tenths = [_progress_tenth(row.get("progress")) for row in (old, new)]
    return tenths[0] is None or tenths[0] != tenths[1]


def _progress_tenth(progress: object) -> tuple[object, object, int] | None:
    """Return name, total and completed tenths of a progress; None if there is no progress."""
    if not isinstance(progress, Mapping):
        return None
    done, total = progress.get("done"), progress.get("total")
    tenth = done * 10 // total if isinstance(done, int) and isinstance(total, int) and total > 0 else 0
    return progress.get("name"), total, tenth


def _download_changes(before: Row, after: Row) -> Iterator[Change]:
    """Report the downloads that no port's row shows."""
    old, new = _downloads(before), _downloads(after)
    for key, row in new.items():
        if key not in old or _detail_changed(old[key], row):
            yield Change("operation", None, f"{row.get('command')} {key}: {row.get('detail') or 'running'}")
    for key, row in old.items():
        if key not in new:
            yield Change("operation", None, f"{row.get('command')} {key}: downloads no more")


def _downloads(result: Row) -> dict[str, Row]:
    on_ports = {row.get("operation") for row in rows(result, "ports")}
    return {
        str(row.get("operation")): row for row in rows(result, "operations") if row.get("operation") not in on_ports
    }


def _drift_changes(before: Row, after: Row) -> Iterator[Change]:
    old, new = ({_drift_key(row): row for row in rows(result, "drift")} for result in (before, after))
    for key, row in new.items():
        if key not in old:
            hint = f"; {row.get('hint')}" if row.get("hint") else ""
            yield Change("drift", _port_number(row), f"drift: {row.get('message')}{hint}")
    for key, row in old.items():
        if key not in new:
            yield Change("drift", _port_number(row), f"no more drift: {row.get('message')}")


def _drift_key(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(key)) for key in ("code", "port", "model", "message"))


def _port_number(row: Row) -> int | None:
    port = row.get("port")
    return port if isinstance(port, int) else None
