"""The table of drift codes, and the one-sentence meanings from which the manual is made."""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlxops
from mlxops.core.drift import Drift, DriftCode
from mlxops.core.errors import Exit
from mlxops.core.ports import Owner, State

PACKAGE = Path(mlxops.__file__).parent
TABLE = PACKAGE / "core" / "drift.py"
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py")) if path != TABLE}


@pytest.mark.parametrize("member", [*DriftCode, *State, *Owner, *Exit], ids=lambda member: f"{member!r}")
def test_member_has_a_one_sentence_meaning(member: DriftCode | State | Owner | Exit) -> None:
    assert re.fullmatch(r"[A-Za-z][^\n]{15,110}\.", member.meaning), member.meaning
    assert ". " not in member.meaning


def test_described_members_keep_their_values() -> None:
    assert (State("ready"), State.READY.value, f"{State.READY}") == (State.READY, "ready", "ready")
    assert (DriftCode("orphan"), type(DriftCode.ORPHAN.value)) == (DriftCode.ORPHAN, str)
    assert (Exit(75), Exit.BUSY + 0, type(Exit.BUSY.value)) == (Exit.BUSY, 75, int)


@pytest.mark.parametrize("code", DriftCode)
def test_remedy_becomes_the_hint(code: DriftCode) -> None:
    fields = {name for _, name, _, _ in string.Formatter().parse(code.remedy) if name}
    drift = Drift.of(code, 8100, "a", "message", **dict.fromkeys(fields - {"port", "model"}, "{x}"))
    assert drift.hint == code.remedy.format_map(dict.fromkeys(fields, "{x}") | {"port": 8100, "model": "a"})
    assert (drift.code, drift.port, drift.model, drift.message) == (code, 8100, "a", "message")


def _drifts() -> Iterator[tuple[str, ast.expr]]:
    """Yield (place, first argument) of each call that makes a `Drift`."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"Drift", "Drift.of"}:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node.args[0]


def test_no_module_writes_a_drift_code_as_a_literal() -> None:
    literal = [place for place, code in _drifts() if any(isinstance(node, ast.Constant) for node in ast.walk(code))]
    assert literal == []
    rows = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "code" and isinstance(value, ast.Constant)
    ]
    assert rows == []


def test_every_drift_code_is_used() -> None:
    used = {
        node.attr
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "DriftCode"
    }
    assert used == set(DriftCode.__members__)
