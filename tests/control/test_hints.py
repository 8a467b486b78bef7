"""Commands in texts of a host, as a user of the control node must type them."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from invoke.parser import Parser

import mlxops
from mlxops.agent.engines.argv import check_model_args
from mlxops.cli.program import with_flags
from mlxops.control.hints import aimed, aimed_error, aimed_event
from mlxops.core import planner
from mlxops.core.command import Hosts, request_type
from mlxops.core.errors import MlxopsError, Refused, error_from_wire
from mlxops.core.hints import HOSTLESS
from mlxops.core.ports import World
from mlxops.core.protocol import Done, Failed, LogLine, Note, Phase
from mlxops.core.registry import Model, parse
from mlxops.core.settings import PortRange, Settings
from mlxops.tasks import collection, command_names

ALL_TASKS = collection(())
OTHER = " --host studio2"


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("`mlxctl unload 8100`", "mlxctl unload{0} 8100"),
        ("first: `mlxctl unload 8100 --force`", "first: mlxctl unload{0} 8100 --force"),
        ("make both sides equal: `inv deploy`", "make both sides equal: inv deploy{0}"),
        ("`mlxctl load a 8100`, or `mlxctl reconcile`", "mlxctl load{0} a 8100, or mlxctl reconcile{0}"),
        ("wait: `mlxctl ops --follow x`; or --cancel x", "wait: mlxctl ops{0} --follow x; or --cancel x"),
        ("`mlxctl status` and `mlxctl status`", "mlxctl status{0} and mlxctl status{0}"),
        ("`mlxctl set --model a --set 'args=--x y'`", "mlxctl set{0} --model a --set 'args=--x y'"),
        ("run `mlxctl restore --local` there", "run mlxctl restore --local there"),
        ("`inv deploy --host studio`", "inv deploy --host studio"),
        ("`mlxctl --list`", "mlxctl --list"),
        ("see `mlxctl help doctor`, or `mlxctl setup studio`", "see mlxctl help doctor, or mlxctl setup studio"),
        ("add `hub` to hosts.yaml", "add `hub` to hosts.yaml"),
        ("mlxctl without backticks", "mlxctl without backticks"),
        ("add --force", "add --force"),
        ("", ""),
    ],
)
def test_command_in_backticks_goes_to_the_host(text: str, typed: str) -> None:
    assert aimed(text, OTHER) == typed.format(OTHER)
    assert aimed(text, "") == typed.format("")


def test_aimed_command_is_understood() -> None:
    values = frozenset({"--host", "--model", "--port"})
    words = aimed("`mlxctl load org/name 8100`", OTHER).split()[1:]
    assert with_flags(words, values) == ["load", "--host", "studio2", "--model", "org/name", "--port", "8100"]
    words = aimed("`mlxctl load org/name 8100`", " --host studio2 --local").split()[1:]
    assert with_flags(words, values) == [
        *("load", "--host", "studio2", "--local"),
        *("--model", "org/name", "--port", "8100"),
    ]


def test_only_commands_of_rows_errors_and_notes_are_aimed() -> None:
    row = {"hint": "mlxctl restore", "message": "mlxctl restore", "port": 8100, "commands": [["mlxctl", "restore"]]}
    bare = {"hint": "mlxctl restore"}
    done = aimed_event(Done({"drift": [row, bare], "url": "x", "none": None}, "status"), OTHER)
    assert isinstance(done, Done) and done.command == "status"
    aimed_row = row | {"hint": f"mlxctl restore{OTHER}", "commands": [["mlxctl", "restore", "--host", "studio2"]]}
    assert done.result == {"drift": [aimed_row, bare], "url": "x", "none": None}
    error = Refused("x", "mlxctl ops", why="mlxctl ops", hint="`mlxctl ops`", details={"rows": [row], "pid": 1})
    failed = aimed_event(Failed(error), OTHER)
    assert isinstance(failed, Failed)
    assert (failed.error.message, failed.error.why) == ("mlxctl ops", "mlxctl ops")
    assert failed.error.hint == f"mlxctl ops{OTHER}" and failed.error.commands == (("mlxctl", "ops", *OTHER.split()),)
    assert failed.error.details == {"rows": [aimed_row], "pid": 1}
    note = aimed_event(Note.of("see `mlxctl ops`", "warning"), OTHER)
    assert note == Note(f"see mlxctl ops{OTHER}", "warning", (("mlxctl", "ops", *OTHER.split()),))
    for event in (LogLine("mlxctl ops"), Phase("start", "mlxctl ops")):
        assert aimed_event(event, OTHER) == event


def test_error_keeps_its_commands_over_the_wire() -> None:
    error = Refused("x", "no", why="so", hint="first: `mlxctl unload 8100`; or `mlxctl status`")
    wire = error.to_wire()
    assert wire["hint"] == "first: mlxctl unload 8100; or mlxctl status"
    assert wire["commands"] == [["mlxctl", "unload", "8100"], ["mlxctl", "status"]]
    again = error_from_wire(wire)
    assert again.to_wire() == wire and again.marked_hint == error.marked_hint


# -- typed as they are ------------------------------------------------------------------------------------------------

_PLACEHOLDER = re.compile(r"\b(?:mlxctl|inv) [^;()]*\b(?:PORT|MODEL|NAME|PATH|REPO)\b")
PACKAGE = Path(mlxops.__file__).parent
OTHERS = {PACKAGE / "core" / "gateway.py", PACKAGE / "core" / "commands" / "list.py"}
"""Where the model is anybody's choice."""


def test_suggested_command_has_no_placeholder() -> None:
    """If a value is not known, the text names the command that shows it."""
    sources = {*(PACKAGE / "agent").rglob("*.py"), *(PACKAGE / "core").rglob("*.py")} - OTHERS
    found = [
        f"{path.relative_to(PACKAGE)}: {text}"
        for path in sorted(sources)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if _PLACEHOLDER.search(text := written(node))
    ]
    assert not found, found


_COMMAND = re.compile(r"(?<![\w./`-])(?:mlxctl|inv) (?:" + "|".join([*command_names(), "--list"]) + r")(?![\w-])")
NOT_HINTS = {
    *(PACKAGE / "cli").rglob("*.py"),
    *(PACKAGE / "core" / "commands").rglob("*.py"),
    *(PACKAGE / "agent" / "install.py", PACKAGE / "devtasks.py"),
}


def test_every_command_in_a_text_is_in_backticks() -> None:
    """Otherwise it does not travel as data, and gets no `--host`."""
    sources = {*PACKAGE.rglob("*.py")} - NOT_HINTS
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {text}"
        for path in sorted(sources)
        for tree in [ast.parse(path.read_text(encoding="utf-8"))]
        for ignored in [ignored_strings(tree)]
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant | ast.JoinedStr) and node not in ignored
        if _COMMAND.search(text := re.sub(r"`[^`]*`", "", written(node)))
    ]
    assert not found, "\n".join(found)


def ignored_strings(tree: ast.AST) -> set[ast.AST]:
    """Return docstrings, descriptions of fields, and the parts of f-strings, which are read as a whole."""
    nodes = list(ast.walk(tree))
    documentation = {node.value for node in nodes if isinstance(node, ast.Expr)}
    return documentation | {part for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}


def written(node: ast.AST) -> str:
    """Return the text of a string or f-string as it is in the source."""
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
def test_suggested_command_parses_and_repeats_the_arguments(case: str, flags: str) -> None:
    provoke, said = PROVOKED[case]
    with pytest.raises(MlxopsError) as caught:
        provoke()
    assert all(words in caught.value.hint for words in said), caught.value.hint
    commands = typed(aimed_error(caught.value, flags).hint)
    assert commands
    for words in commands:
        Parser(contexts=ALL_TASKS.to_contexts()).parse_argv(with_flags(words, VALUES))


def typed(hint: str) -> list[list[str]]:
    """Return the commands of a hint, split as by a shell."""
    return [
        shlex.split(part.partition("mlxctl ")[2].split(" (did")[0]) for part in hint.split("; ") if "mlxctl " in part
    ]


def flags_with_values() -> frozenset[str]:
    arguments = [each for task in ALL_TASKS.tasks.values() for each in task.get_arguments()]
    return frozenset(f"--{each.name}" for each in arguments if each.takes_value)


VALUES = flags_with_values()


def test_hostless_commands_are_those_that_declare_it() -> None:
    kinds = [request_type(name) for name in command_names()]
    assert {kind.name for kind in kinds if kind.hosts is Hosts.NONE} == HOSTLESS
