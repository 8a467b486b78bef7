"""What has changed on a host between two looks at it. Pure: two results of `status` in, sentences out.

What only wanders is no change: the memory of a server that serves, and bytes within the same tenth of a download.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Row = Mapping[str, object]

TOLD = ("alias", "owner", "model", "revision", "pid")
"""Beside state and detail: what of a port is told when it changes while the state stays."""


@dataclass(frozen=True)
class Change:
    """One thing that changed. `what`: port, operation or drift; `port` None where it concerns none."""

    what: str
    port: int | None
    text: str

    def to_wire(self) -> dict[str, object]:
        return {"what": self.what, "port": self.port, "text": self.text}


def changes(before: Row, after: Row) -> tuple[Change, ...]:
    """From one result of `status` to the next one of the same host: ports first, then downloads, then drift."""
    return (*_ports(before, after), *_operations(before, after), *_drift(before, after))


def rows(result: Row | None, key: str) -> list[Row]:
    """The rows of a list in a result; it came over a wire, so anything else in it is left out."""
    found = (result or {}).get(key)
    return [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []


def told_apart(before: Row, after: Row) -> bool:
    """Whether two results differ in anything but memory: for programs, which can follow every byte of a download."""
    return _without_memory(before) != _without_memory(after)


def _without_memory(result: Row) -> dict[str, object]:
    ports = [{key: value for key, value in row.items() if key != "memory_bytes"} for row in rows(result, "ports")]
    return {**result, "ports": ports}


def _ports(before: Row, after: Row) -> Iterator[Change]:
    old = {_number(row): row for row in rows(before, "ports")}
    new = {_number(row): row for row in rows(after, "ports")}
    for port, row in new.items():
        if port not in old:
            yield Change("port", port, f"{_standing(row)} (new in the host's range)")
        elif text := _of_port(old[port], row):
            yield Change("port", port, text)
    for port in old:
        if port not in new:
            yield Change("port", port, "no longer in the host's range")


def _of_port(old: Row, new: Row) -> str:
    """What changed on a port; empty if nothing worth a line did."""
    if old.get("state") != new.get("state"):
        return f"{old.get('state')} -> {_standing(new)}"
    changed = [f"{key} {_shown(old, key)} -> {_shown(new, key)}" for key in TOLD if old.get(key) != new.get(key)]
    if _moved(old, new):
        changed.append(_shown(new, "detail"))
    return f"{new.get('state')}: {'; '.join(changed)}" if changed else ""


def _standing(row: Row) -> str:
    """`ready jerry-xl: busy`, as much of it as there is."""
    words = f"{row.get('state')} {row.get('model') or ''}".strip()
    return f"{words}: {row.get('detail')}" if row.get("detail") else words


def _shown(row: Row, key: str) -> str:
    value = row.get(key)
    return "none" if value in (None, "") else str(value)


def _moved(old: Row, new: Row) -> bool:
    """Whether what is told in words differs; of the same download, only a further tenth counts."""
    if old.get("detail") == new.get("detail"):
        return False
    stands = [_tenth(row.get("progress")) for row in (old, new)]
    return stands[0] is None or stands[0] != stands[1]


def _tenth(progress: object) -> tuple[object, object, int] | None:
    """Name, total and tenth of a progress; None where there is none."""
    if not isinstance(progress, Mapping):
        return None
    done, total = progress.get("done"), progress.get("total")
    tenth = done * 10 // total if isinstance(done, int) and isinstance(total, int) and total > 0 else 0
    return progress.get("name"), total, tenth


def _operations(before: Row, after: Row) -> Iterator[Change]:
    """Downloads that no port's row tells of."""
    old, new = _downloads(before), _downloads(after)
    for key, row in new.items():
        if key not in old or _moved(old[key], row):
            yield Change("operation", None, f"{row.get('command')} {key}: {row.get('detail') or 'running'}")
    for key, row in old.items():
        if key not in new:
            yield Change("operation", None, f"{row.get('command')} {key}: downloads no more")


def _downloads(result: Row) -> dict[str, Row]:
    on_ports = {row.get("operation") for row in rows(result, "ports")}
    return {
        str(row.get("operation")): row for row in rows(result, "operations") if row.get("operation") not in on_ports
    }


def _drift(before: Row, after: Row) -> Iterator[Change]:
    old, new = ({_words(row): row for row in rows(result, "drift")} for result in (before, after))
    for words, row in new.items():
        if words not in old:
            hint = f"; {row.get('hint')}" if row.get("hint") else ""
            yield Change("drift", _number(row), f"drift: {row.get('message')}{hint}")
    for words, row in old.items():
        if words not in new:
            yield Change("drift", _number(row), f"no more drift: {row.get('message')}")


def _words(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(key)) for key in ("code", "port", "model", "message"))


def _number(row: Row) -> int | None:
    port = row.get("port")
    return port if isinstance(port, int) else None
