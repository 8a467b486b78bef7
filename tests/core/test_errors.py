"""The error tree: its wire form, its exit statuses, and a reason and next step for each error."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlxops
from mlxops.core import errors
from mlxops.core.errors import Bug, Exit, MlxopsError, error_from_wire, worst
from tests.properties import PROPERTY, json_values

KINDS = [
    errors.UsageError,
    errors.Refused,
    errors.NotStarted,
    errors.Unreachable,
    errors.AgentProblem,
    errors.OutcomeUnknown,
    errors.DownloadFailed,
    errors.StillRunning,
    errors.OutputFailed,
    errors.Busy,
    errors.Interrupted,
    errors.Bug,
]

any_error = st.builds(
    lambda kind, code, message, why, hint, details: kind(code, message, why=why, hint=hint, details=details),
    st.sampled_from(KINDS),
    st.text(),
    st.text(),
    st.text(),
    st.text(),
    st.dictionaries(st.text(), json_values, max_size=2),
)


def test_exit_statuses_are_fixed() -> None:
    assert {status.name: int(status) for status in Exit} == {
        "DONE": 0,
        "BUG": 1,
        "USAGE": 2,
        "REFUSED": 3,
        "NOT_STARTED": 4,
        "UNREACHABLE": 5,
        "AGENT": 6,
        "OUTCOME_UNKNOWN": 7,
        "DOWNLOAD": 8,
        "STILL_RUNNING": 9,
        "OUTPUT": 74,
        "BUSY": 75,
        "INTERRUPTED": 130,
    }


def test_each_failing_exit_status_has_one_error_class() -> None:
    assert sorted(kind.exit for kind in KINDS) == sorted(set(Exit) - {Exit.DONE})
    assert set(MlxopsError.__subclasses__()) == set(KINDS)


@given(any_error)
@PROPERTY
def test_error_survives_the_wire(error: MlxopsError) -> None:
    back = error_from_wire(json.loads(json.dumps(error.to_wire())))
    assert type(back) is type(error)
    assert back.to_wire() == error.to_wire()
    assert str(back) == error.message


@given(st.dictionaries(st.sampled_from(["code", "exit", "message", "why", "hint", "details"]) | st.text(), json_values))
@PROPERTY
def test_any_wire_object_becomes_an_error(wire: dict[str, object]) -> None:
    error = error_from_wire(wire)
    assert all(isinstance(text, str) for text in (error.code, error.message, error.why, error.hint))
    assert error.exit is not Exit.DONE


@pytest.mark.parametrize("status", [0, 99, -1, "3", None, 3.5, []])
def test_unknown_exit_status_is_a_bug(status: object) -> None:
    assert isinstance(error_from_wire({"code": "x", "exit": status, "message": "m"}), Bug)


@pytest.mark.parametrize(
    ("statuses", "worst_status"),
    [
        ([], Exit.DONE),
        ([Exit.DONE, Exit.REFUSED], Exit.REFUSED),
        ([Exit.UNREACHABLE, Exit.REFUSED], Exit.UNREACHABLE),
        ([Exit.BUSY, Exit.AGENT], Exit.BUSY),
        ([Exit.INTERRUPTED, Exit.BUG, Exit.BUSY], Exit.BUG),
    ],
)
def test_worst_status_is_the_largest_or_a_bug(statuses: list[Exit], worst_status: Exit) -> None:
    assert worst(statuses) is worst_status


PACKAGE = Path(mlxops.__file__).parent
NAMES = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, MlxopsError)}


def has_text(value: ast.expr | None) -> bool:
    """Whether an argument is present and cannot be an empty text."""
    if isinstance(value, ast.IfExp):
        return has_text(value.body) and has_text(value.orelse)
    return value is not None and not (isinstance(value, ast.Constant) and not value.value)


CONSTRUCTED = [
    pytest.param(call, id=f"{name}:{call.lineno}")
    for name, path in sorted((path.relative_to(PACKAGE).as_posix(), path) for path in PACKAGE.rglob("*.py"))
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in NAMES
]


@pytest.mark.parametrize("call", CONSTRUCTED)
def test_error_has_a_reason_and_a_next_step(call: ast.Call) -> None:
    arguments = {keyword.arg: keyword.value for keyword in call.keywords}
    assert has_text(arguments.get("why")) and has_text(arguments.get("hint")), ast.unparse(call)


def test_constructed_errors_are_collected() -> None:
    assert len(CONSTRUCTED) > 50
