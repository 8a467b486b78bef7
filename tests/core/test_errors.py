"""The error tree: it travels as data, and its exit statuses are a contract."""

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


def test_the_exit_statuses_are_those_that_programs_rely_on() -> None:
    assert {each.name: int(each) for each in Exit} == {
        "DONE": 0,
        "BUG": 1,
        "USAGE": 2,
        "REFUSED": 3,
        "NOT_STARTED": 4,
        "UNREACHABLE": 5,
        "AGENT": 6,
        "OUTCOME_UNKNOWN": 7,
        "DOWNLOAD": 8,
        "OUTPUT": 74,
        "BUSY": 75,
        "INTERRUPTED": 130,
    }


def test_every_failing_exit_status_has_exactly_one_kind_of_error() -> None:
    assert sorted(kind.exit for kind in KINDS) == sorted(set(Exit) - {Exit.DONE})
    assert set(MlxopsError.__subclasses__()) == set(KINDS)


@given(any_error)
@PROPERTY
def test_an_error_comes_back_as_it_went(error: MlxopsError) -> None:
    back = error_from_wire(json.loads(json.dumps(error.to_wire())))
    assert type(back) is type(error)
    assert back.to_wire() == error.to_wire()
    assert str(back) == error.message


@given(st.dictionaries(st.sampled_from(["code", "exit", "message", "why", "hint", "details"]) | st.text(), json_values))
@PROPERTY
def test_whatever_an_agent_calls_an_error_becomes_one(wire: dict[str, object]) -> None:
    error = error_from_wire(wire)
    assert all(isinstance(text, str) for text in (error.code, error.message, error.why, error.hint))
    assert error.exit is not Exit.DONE


@pytest.mark.parametrize("status", [0, 99, -1, "3", None, 3.5, []])
def test_an_unknown_exit_status_is_a_bug(status: object) -> None:
    assert isinstance(error_from_wire({"code": "x", "exit": status, "message": "m"}), Bug)


@pytest.mark.parametrize(
    ("each", "together"),
    [
        ([], Exit.DONE),
        ([Exit.DONE, Exit.REFUSED], Exit.REFUSED),
        ([Exit.UNREACHABLE, Exit.REFUSED], Exit.UNREACHABLE),
        ([Exit.BUSY, Exit.AGENT], Exit.BUSY),
        ([Exit.INTERRUPTED, Exit.BUG, Exit.BUSY], Exit.BUG),
    ],
)
def test_with_several_hosts_the_largest_counts_but_a_bug_wins(each: list[Exit], together: Exit) -> None:
    assert worst(each) is together


PACKAGE = Path(mlxops.__file__).parent
NAMES = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, MlxopsError)}


def says(value: ast.expr | None) -> bool:
    """Whether an argument is there, and in no case an empty text."""
    if isinstance(value, ast.IfExp):
        return says(value.body) and says(value.orelse)
    return value is not None and not (isinstance(value, ast.Constant) and not value.value)


CONSTRUCTED = [
    pytest.param(call, id=f"{name}:{call.lineno}")
    for name, path in sorted((path.relative_to(PACKAGE).as_posix(), path) for path in PACKAGE.rglob("*.py"))
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in NAMES
]


@pytest.mark.parametrize("call", CONSTRUCTED)
def test_every_error_says_why_and_what_to_do_next(call: ast.Call) -> None:
    given = {each.arg: each.value for each in call.keywords}
    assert says(given.get("why")) and says(given.get("hint")), ast.unparse(call)


def test_they_are_all_looked_at() -> None:
    assert len(CONSTRUCTED) > 50
