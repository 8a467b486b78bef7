"""The commands in what a host tells, as they are typed where it is read."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from invoke.parser import Parser

import mlxops
from mlxops.agent.engines.argv import check_model_args
from mlxops.cli.program import with_flags
from mlxops.control.hints import TASKS, aimed, aimed_error, aimed_event
from mlxops.core import planner
from mlxops.core.errors import MlxopsError, Refused
from mlxops.core.ports import World
from mlxops.core.protocol import Done, Failed, LogLine, Note, Phase
from mlxops.core.registry import Model, parse
from mlxops.core.settings import PortRange, Settings
from mlxops.tasks import namespace
from tests.properties import PROPERTY

OTHER = " --host studio2"


@pytest.mark.parametrize(
    ("told", "typed"),
    [
        ("mlxctl unload 8100", "mlxctl unload --host studio2 8100"),
        ("first: mlxctl unload 8100 --force", "first: mlxctl unload --host studio2 8100 --force"),
        ("mlxctl unload-all", "mlxctl unload-all --host studio2"),
        ("agree anew: inv deploy", "agree anew: inv deploy --host studio2"),
        ("mlxctl load a 8100, or mlxctl reconcile", "mlxctl load{0} a 8100, or mlxctl reconcile{0}"),
        ("wait: mlxctl ops --follow x; or --cancel x", "wait: mlxctl ops --host studio2 --follow x; or --cancel x"),
        ("paste what `inv gateway --print` shows", "paste what `inv gateway{0} --print` shows"),
        ("see `mlxctl status`", "see `mlxctl status{0}`"),
        ("mlxctl ops", "mlxctl ops{0}"),
        ("(sizes: mlxctl list)", "(sizes: mlxctl list{0})"),
        # It says itself where it goes.
        ("run `mlxctl restore --local` there", "run `mlxctl restore --local` there"),
        ("inv deploy --host studio", "inv deploy --host studio"),
        ("inv ops --follow x --host studio; then inv deploy", "inv ops --follow x --host studio; then inv deploy{0}"),
        ("mlxctl status and mlxctl ops --host a", "mlxctl status{0} and mlxctl ops --host a"),
        # No command, or none that knows a host.
        ("inv --list; inv demo; inv test; inv bench", "inv --list; inv demo; inv test; inv bench"),
        ("inv faults --only KIND --at 1", "inv faults --only KIND --at 1"),
        ("mlxctl loads; mlxctl set-up", "mlxctl loads; mlxctl set-up"),
        ("my-mlxctl load; /x/inv load", "my-mlxctl load; /x/inv load"),
        ("add --force", "add --force"),
        ("", ""),
    ],
)
def test_a_command_goes_to_the_host_that_told_it(told: str, typed: str) -> None:
    assert aimed(told, OTHER) == typed.format(OTHER)
    assert aimed(told, "") == told


def test_what_is_aimed_is_understood() -> None:
    values = frozenset({"--host", "--model", "--port"})
    words = aimed("mlxctl load org/name 8100", OTHER).split()[1:]
    assert with_flags(words, values) == ["load", "--host", "studio2", "--model", "org/name", "--port", "8100"]
    words = aimed("mlxctl load org/name 8100", " --host studio2 --local").split()[1:]
    assert with_flags(words, values) == [
        "load",
        "--host",
        "studio2",
        "--local",
        "--model",
        "org/name",
        "--port",
        "8100",
    ]


def test_the_tasks_are_those_that_know_a_host() -> None:
    knowing = {
        name for name, task in namespace.tasks.items() if any(each.name == "host" for each in task.get_arguments())
    }
    assert set(TASKS) == knowing


def test_hints_are_aimed_wherever_they_stand_and_nothing_else_is() -> None:
    rows = [{"hint": "mlxctl restore", "message": "mlxctl restore", "port": 8100}]
    result = {"drift": rows, "skipped": [{"why": "or now: mlxctl load"}], "url": "x", "none": None}
    done = aimed_event(Done(result), OTHER)
    assert isinstance(done, Done)
    assert done.result["drift"] == [rows[0] | {"hint": "mlxctl restore --host studio2"}]
    assert done.result["skipped"] == [{"why": "or now: mlxctl load --host studio2"}]
    assert (done.result["url"], done.result["none"]) == ("x", None)
    error = Refused("x", "mlxctl ops", why="mlxctl ops", hint="mlxctl ops", details={"rows": rows, "pid": 1})
    failed = aimed_event(Failed(error), OTHER)
    assert isinstance(failed, Failed)
    assert (failed.error.message, failed.error.why) == ("mlxctl ops", "mlxctl ops")
    assert failed.error.hint == "mlxctl ops --host studio2" and failed.error.details["pid"] == 1
    assert aimed_event(Note("mlxctl ops", "warning"), OTHER) == Note("mlxctl ops --host studio2", "warning")
    for event in (LogLine("mlxctl ops"), Phase("start", "mlxctl ops")):
        assert aimed_event(event, OTHER) == event


@given(
    st.lists(
        st.sampled_from(["mlxctl", "inv", "--host", "--local", "a", "8100", ";", "`", ", or", *TASKS]), max_size=9
    ),
    st.sampled_from([" --host studio2", " --local", " --host studio2 --local"]),
)
@PROPERTY
def test_what_is_aimed_stays_so(words: list[str], flags: str) -> None:
    once = aimed(" ".join(words), flags)
    assert aimed(once, flags) == once
    assert once.replace(flags, "") == " ".join(words).replace(flags, "")


# -- typed as they are ------------------------------------------------------------------------------------------------

_PLACEHOLDER = re.compile(r"\b(?:mlxctl|inv) [^;()]*\b(?:PORT|MODEL|NAME|PATH|REPO)\b")
PACKAGE = Path(mlxops.__file__).parent
OTHERS = {PACKAGE / "core" / "gateway.py"}
"""Where the model is anybody's choice."""


def test_no_command_that_a_host_or_a_plan_tells_has_a_placeholder_in_it() -> None:
    """Where a value is not known, the command that shows it is told instead."""
    sources = {*(PACKAGE / "agent").rglob("*.py"), *(PACKAGE / "core").rglob("*.py")} - OTHERS
    found = [
        f"{path.relative_to(PACKAGE)}: {text}"
        for path in sorted(sources)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if _PLACEHOLDER.search(text := written(node))
    ]
    assert not found, found


def written(node: ast.AST) -> str:
    """What a string, or one with values in it, says in the source."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(written, node.values))
    if isinstance(node, ast.FormattedValue):
        return "value"
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


SETTINGS = Settings(ports=PortRange(8100, 8104), slots={8100: "jerry-xl"})
TWO = parse(b'{"version": 1, "models": {"a": {"repo_id": "org/a", "port": null}, "b": {"repo_id": "org/a"}, "c": {}}}')
OWN = Model("a", "org/a", args=("--max-tokens", "7", "--model", "x y", "--seed"))
PROVOKED: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "unknown, with its port": (lambda: planner.resolve(TWO, "d", None, None, "8100"), ("load d 8100",)),
    "unknown, without a port": (lambda: planner.resolve(TWO, "d", None, None), ("load d --port auto",)),
    "two repositories": (
        lambda: planner.resolve(TWO, "org/x", "org/y", None, "8101"),
        ("load x 8101 --repo org/y",),
    ),
    "several of one repository": (lambda: planner.resolve(TWO, "org/a", None, None, "8101"), ("load a 8101",)),
    "an entry that says nothing": (lambda: planner.resolve(TWO, "c", None, None, "8101"), ("load c 8101",)),
    "no port": (lambda: planner.choose_port(SETTINGS, TWO, World(), "a", None), ("load a --port auto",)),
    "reserved, with its value": (
        lambda: check_model_args("mlx-lm", OWN, frozenset({"--model"}), None),
        ("--set 'args=--max-tokens 7 --seed'",),
    ),
    "unknown argument": (
        lambda: check_model_args("mlx-lm", OWN, frozenset(), "--max-tokens --model"),
        ("--set 'args=--max-tokens 7 --model '\"'\"'x y'\"'\"''",),
    ),
}


@pytest.mark.parametrize("case", PROVOKED)
@pytest.mark.parametrize("flags", ["", OTHER, " --local"])
def test_what_an_error_tells_to_type_is_understood_and_has_what_was_typed(case: str, flags: str) -> None:
    provoke, said = PROVOKED[case]
    with pytest.raises(MlxopsError) as caught:
        provoke()
    assert all(words in caught.value.hint for words in said), caught.value.hint
    commands = typed(aimed_error(caught.value, flags).hint)
    assert commands
    for words in commands:
        Parser(contexts=namespace.to_contexts()).parse_argv(with_flags(words, VALUES))


def typed(hint: str) -> list[list[str]]:
    """The commands of a hint, as a shell splits them."""
    return [
        shlex.split(part.partition("mlxctl ")[2].split(" (did")[0]) for part in hint.split("; ") if "mlxctl " in part
    ]


def flags_with_values() -> frozenset[str]:
    arguments = [each for task in namespace.tasks.values() for each in task.get_arguments()]
    return frozenset(f"--{each.name}" for each in arguments if each.takes_value)


VALUES = flags_with_values()
