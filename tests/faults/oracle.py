"""Checks of a host after any fault. Each returns messages; an empty list means success."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from mlxops.core import registry as registries
from tests.faults.arena import Arena, Ended

_PORT = re.compile(r"--port (\d+)")
GATE_SECONDS = 15.0
"""Time for a gate to end after its worker was killed. On a busy machine, it may not run at once."""


def registry_old_or_new(arena: Arena, old: bytes, new: bytes, *, whole: bool) -> list[str]:
    """The registry is the old or the new document.

    Without `whole` (several transactions), each entry is the old or the new one, or has lost its port with its server.
    """
    data = arena.registry()
    if data in (old, new):
        return []
    parsed = registries.parse(data or None)
    if parsed.unwritable:
        return [f"the registry is broken: {parsed.unwritable}"]
    if whole:
        return ["the registry is neither the old nor the new one"]
    before, after = _entries(old), _entries(new)
    strange = [n for n, e in _entries(data).items() if e not in _legal(before.get(n), after.get(n))]
    gone = [name for name in before.keys() & after.keys() if name not in _entries(data)]
    return [f"entries that are neither old nor new: {strange + gone}"] if strange or gone else []


def registry_sound(arena: Arena) -> list[str]:
    """The registry can be parsed, and no port has two models."""
    parsed = registries.parse(arena.registry() or None)
    if parsed.unwritable:
        return [f"the registry is broken: {parsed.unwritable}"]
    ports = [model.port for model in parsed.models.values() if model.port is not None]
    return [f"two models on one port: {ports}"] if len(ports) != len(set(ports)) else []


def locks_free(arena: Arena) -> list[str]:
    """No operation runs, so no lock is held."""
    held = [f"port-{port}" for port in arena.ports if arena.store.holder(f"port-{port}")]
    fd = os.open(arena.hub, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.append("registry")
    finally:
        os.close(fd)
    return [f"locks held without a live process: {held}"] if held else []


def _waits(process: tuple[int, str]) -> bool:
    """Return whether a process waits behind a gate, or imports its modules. It ends there if its worker was killed."""
    pid, words = process
    try:
        return "gate.py" in words or ("mlxops_start.py" in words and os.readlink(f"/proc/{pid}/cwd") == "/")
    except OSError:  # it has ended
        return False


def nothing_hidden(arena: Arena) -> list[str]:
    """Every live server is in its port's row of `status`, and no port has two."""
    deadline = time.monotonic() + GATE_SECONDS
    while any(map(_waits, arena.servers().items())) and time.monotonic() < deadline:
        time.sleep(0.002)
    rows = rows_by_port(arena)
    servers = arena.servers()
    wrong = []
    for pid, words in servers.items():
        found = _PORT.search(words)
        row = rows.get(int(found[1])) if found else None
        if row is None or row["owner"] not in {"mlxops", "hand", "boot"} or row["state"] in {"idle", "foreign"}:
            wrong.append(f"hidden: {pid} {words[:120]}; its row says {row and (row['state'], row['owner'])}")
    ports = [found[1] for words in servers.values() if (found := _PORT.search(words))]
    if len(ports) != len(set(ports)):
        wrong.append(f"two servers for one port: {sorted(servers.values())}")
    return wrong


def rows_by_port(arena: Arena) -> dict[int, Mapping[str, object]]:
    rows = arena.look()["ports"]
    assert isinstance(rows, list)
    return {row["port"]: row for row in rows}


def drift_codes(arena: Arena) -> list[str]:
    drift = arena.look()["drift"]
    assert isinstance(drift, list)
    return [str(row["code"]) for row in drift]


def named(arena: Arena, ended: Ended) -> list[str]:
    """`status` names an operation that was interrupted."""
    drift = arena.look()["drift"]
    assert isinstance(drift, list)
    if any(row["code"] == "interrupted_operation" and ended.journal.id in str(row["message"]) for row in drift):
        return []
    return [f"the interrupted operation {ended.journal.id} is not named: {[row['code'] for row in drift]}"]


def result_is_true(arena: Arena, ended: Ended, new: bytes) -> list[str]:
    """The acknowledged change was made."""
    result = ended.result
    if result is None or ended.exit < 0:
        return []
    if result.get("changed") and arena.registry() != new:
        return ["success was reported and the registry is not the new one"]
    if result.get("state") == "ready" and not arena.servers():
        return ["a ready server was reported and there is none"]
    return []


def no_bug(ended: Ended) -> list[str]:
    """No fault of the system ends in a traceback: each has its own error."""
    if ended.exit == 1 or "Traceback" in ended.words:
        return [f"a bug was reported: {ended}"]
    return []


def empty(arena: Arena) -> list[str]:
    """After unload-all and reconcile nothing is left: no server, assignment, drift, run record, temporary file."""
    wrong = [f"left: {pid} {words[:100]}" for pid, words in arena.servers().items()]
    wrong += [f"row {port}: {row['state']}" for port, row in rows_by_port(arena).items() if row["state"] != "idle"]
    wrong += [f"drift: {code}" for code in drift_codes(arena)]
    wrong += [f"file: {path}" for path in leftovers(arena)]
    wrong += registry_sound(arena) + locks_free(arena)
    history = arena.state / "history.jsonl"
    for line in history.read_text(encoding="utf-8").splitlines() if history.exists() else ():
        if not _is_json(line):
            wrong.append(f"a broken line in the history: {line[:80]!r}")
    return wrong


def leftovers(arena: Arena) -> Iterable[Path]:
    yield from arena.hub.glob(".registry.json*")
    yield from arena.state.rglob("*.tmp")
    yield from (arena.state / "run").glob("*.json")


def _legal(*entries: dict[str, object] | None) -> list[dict[str, object]]:
    known = [each for each in entries if each is not None]
    return known + [{**each, "port": None} for each in known]


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _entries(data: bytes) -> dict[str, dict[str, object]]:
    return dict(json.loads(data)["models"]) if data else {}
