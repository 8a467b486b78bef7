"""`observe` reads a history once, and then what was appended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxops.agent.operations import observe
from mlxops.agent.operations.observe import _History
from mlxops.agent.state.store import Store


def line(port: int = 8100) -> bytes:
    return json.dumps({"at": "2026-11-27T03:00:00Z", "command": "load", "port": port}).encode() + b"\n"


def loads(history: _History, path: Path) -> int | None:
    totals = history.read(path)
    return totals.of(8100).loads if totals else None


def test_appended_lines_are_added_once(tmp_path: Path) -> None:
    path, history = tmp_path / "history.jsonl", _History()
    assert loads(history, path) == 0, "it does not exist yet"
    for written, expected in [
        (line() * 3, 3),
        (b"", 3),
        (line() + line()[:20], 4),
        (line()[20:], 5),
        (b"nonsense\n\n[]\n" + line(8101), 5),
    ]:
        with path.open("ab") as file:
            file.write(written)
        assert loads(history, path) == expected


def test_other_or_shorter_file_is_read_from_its_start(tmp_path: Path) -> None:
    path, history = tmp_path / "history.jsonl", _History()
    path.write_bytes(line() * 5)
    assert loads(history, path) == 5
    path.write_bytes(line() * 2)
    assert loads(history, path) == 2
    (tmp_path / "new").write_bytes(line() * 9)
    (tmp_path / "new").rename(path)
    assert loads(history, path) == 9


def test_lines_around_one_that_is_longer_than_a_chunk_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_bytes(line() + b"x" * 3_000_000 + b"\n" + line())
    assert loads(_History(), path) == 2


def test_history_that_is_too_long_has_no_totals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "MAX_HISTORY_BYTES", 100)
    path = tmp_path / "history.jsonl"
    path.write_bytes(line() * 9)
    assert loads(_History(), path) is None
    path.unlink()
    path.mkdir()
    assert loads(_History(), path) is None


def test_last_speeds_are_read_from_where_measure_notes_them(tmp_path: Path) -> None:
    store = Store(tmp_path, tmp_path / "registry.json")
    figure = {"prompt": "long", "cache": "cold", "streams": 1, "metric": "decode", "low": 1, "high": 3, "rounds": 5}
    older = {"at": "2026-11-26T23:24:26Z", "command": "measure", "model": "a", "rows": [figure | {"median": 1}]}
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(older | {"port": port}) + "\n" for port in (8100, 8101)))
    store.append_history(command="measure", port=8100, model="b", rows=[figure | {"median": 2}])
    _, measured = observe._read_totals(tmp_path)
    assert {port: each.figures[0].median for port, each in measured.items()} == {8100: 2, 8101: 1}
