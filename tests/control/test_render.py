"""What comes out: data in one place, talk in another, and nothing that steers a terminal."""

from __future__ import annotations

import io
import json
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlxops.control.client import HostReply
from mlxops.control.output import (
    Console,
    change_lines,
    document,
    error_document,
    harmless,
    list_table,
    memory_table,
    one_line,
    size,
    status_table,
    table,
)
from mlxops.core.errors import Refused, Unreachable, UsageError
from mlxops.core.protocol import Note, Phase, Progress
from tests.properties import PROPERTY, hostile_texts, json_values

DOWN = Unreachable("host_down", "attic does not answer", why="no route", hint="is it on?")
ROW: dict[str, object] = {
    "port": 8100,
    "alias": "jerry-xl",
    "state": "ready",
    "owner": "mlxops",
    "model": "qwen",
    "memory_bytes": 190_000_000_000,
    "detail": "",
}


def status(*rows: object, drift: object = ()) -> dict[str, object]:
    return {"ports": list(rows), "drift": drift}


# -- harmless -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 模型", "plain é 模型"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("a\rb\x08\x7f\0", "a\\rb\\x08\\x7f\\x00"),
        ("abc\u202etxt.exe", "abc\\u202etxt.exe"),
        ("\u200f\u2066\u2069", "\\u200f\\u2066\\u2069"),
        ("\udcff", "\\udcff"),
        ("tab\tand\nline", "tab\tand\nline"),
    ],
)
def test_what_steers_a_terminal_is_escaped_and_the_rest_stays(text: str, shown: str) -> None:
    assert harmless(text) == shown


texts = hostile_texts


@given(texts)
@PROPERTY
def test_harmless_text_has_no_control_or_direction_characters_and_can_be_encoded(text: str) -> None:
    shown = harmless(text)
    shown.encode()
    assert not [c for c in shown if unicodedata.category(c) == "Cc" and c not in "\t\n"]
    assert not [
        c
        for c in shown
        if unicodedata.bidirectional(c) in {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    ]
    assert not set(shown) & set("\u200e\u200f\u061c"), "marks that turn the direction"


@given(texts)
@PROPERTY
def test_one_line_is_one_line(text: str) -> None:
    assert len(one_line(text).splitlines()) <= 1 and one_line(text) == one_line(text).strip()


# -- tables ---------------------------------------------------------------------------------------------------------


def test_columns_begin_at_the_same_place_in_every_line_and_nothing_trails() -> None:
    text = table(["A", "LONG"], [["x", None], ["yyyy", "b c"], ["", 7]])
    assert text == "A     LONG\nx     -\nyyyy  b c\n-     7"


@given(st.lists(st.tuples(texts, st.none() | st.integers() | texts, texts), max_size=4))
@example([("", "\n", "\n")])
@PROPERTY
def test_a_table_has_a_line_for_every_row_whatever_is_in_it(rows: list[tuple[object, ...]]) -> None:
    lines = table(["A", "B", "C"], rows).split("\n")
    assert len(lines) == len(rows) + 1
    assert all(line == line.rstrip() for line in lines)
    start = lines[0].index("B")
    assert all(line[start - 2 : start] == "  " for line in lines)


def test_status_shows_every_port_and_what_does_not_agree() -> None:
    idle = {"port": 8101, "alias": None, "state": "idle", "owner": None, "model": None, "memory_bytes": None}
    drift = [{"message": "qwen is assigned\nto 8101", "hint": "mlxctl reconcile"}]
    assert status_table([HostReply("studio", status(ROW, idle, drift=drift))]).split("\n") == [
        "PORT  ALIAS     STATE  OWNER   MODEL  MEMORY    DETAIL",
        "8100  jerry-xl  ready  mlxops  qwen   190.0 GB  -",
        "8101  -         idle   -       -      -         -",
        "drift: qwen is assigned to 8101; mlxctl reconcile",
    ]


def test_status_of_several_hosts_names_them_and_has_one_row_for_a_dead_one() -> None:
    lines = status_table([HostReply("studio", status(ROW)), HostReply("attic", error=DOWN)]).split("\n")
    assert [line.split()[0] for line in lines] == ["HOST", "studio", "attic"]
    assert "host_down" in lines[2] and "attic does not answer" in lines[2]


def test_list_shows_models_with_a_short_revision_and_their_problems() -> None:
    model = {
        "name": "qwen",
        "repo_id": "org/qwen",
        "revision": "0123456789abcdef",
        "size_bytes": 1_500_000,
        "format": "mlx",
        "port": 8100,
        "flags": [{"key": "engine", "value": "mlx-lm", "origin": "registry"}],
        "problems": ["no cache", "claimed twice"],
    }
    assert list_table([HostReply("studio", {"models": [model]})]).split("\n") == [
        "NAME  REPO      REVISION      SIZE    FORMAT  PORT  FLAGS                     PROBLEMS",
        "qwen  org/qwen  0123456789ab  1.5 MB  mlx     8100  engine=mlx-lm (registry)  no cache; claimed twice",
    ]


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (None, "-"),
        ("x", "-"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_499, "999.5 kB"),
        (1_000_000, "1.0 MB"),
        (999_999_999, "1.0 GB"),
        (190_400_000_000, "190.4 GB"),
        (2 * 10**15, "2000.0 TB"),
    ],
)
def test_a_size_is_told_in_the_unit_that_suits_it(number: object, shown: str) -> None:
    assert size(number) == shown


# -- changes --------------------------------------------------------------------------------------------------------

LOADED = {
    "model": "qwen",
    "port": 8100,
    "alias": "jerry-xl",
    "url": "http://studio:8100/v1",
    "state": "ready",
    "changed": True,
    "seconds": 4.2,
    "downtime_seconds": None,
}


@pytest.mark.parametrize(
    ("command", "result", "line"),
    [
        ("load", LOADED, "qwen is ready on 8100 as jerry-xl (4.2 s): http://studio:8100/v1"),
        ("load", {**LOADED, "changed": False}, "qwen was ready already on 8100 as jerry-xl"),
        ("load", {**LOADED, "downtime_seconds": 3.14}, "(4.2 s, 3.1 s of downtime)"),
        ("load", {**LOADED, "state": "wedged"}, "qwen is wedged on 8100"),
        (
            "unload",
            {"model": "qwen", "port": 8100, "changed": True, "seconds": 1},
            "port 8100 is idle; qwen is unloaded",
        ),
        ("unload", {"model": None, "port": 8100, "changed": False}, "port 8100 had nothing to unload"),
        ("unload-all", {"ports": []}, "nothing to unload"),
        ("reconcile", {"cleared": [], "stopped": [], "kept": []}, "nothing to reconcile"),
        ("reconcile", {"cleared": [{"model": "a", "port": 8101}]}, "a: assignment to 8101 cleared"),
        ("reconcile", {"cleared": [{"model": "a", "port": 8101}], "dry_run": True}, "8101 would be cleared"),
        ("reconcile", {"kept": ["8102: foreign"]}, "left alone: 8102: foreign"),
        (
            "init",
            {"added": ["org/a"], "existing": [], "skipped": [{"repo_id": "org/b", "why": "w"}]},
            "skipped org/b: w",
        ),
        ("init", {"added": ["org/a"], "dry_run": True}, "would add org/a"),
    ],
)
def test_a_change_is_told_in_a_sentence(command: str, result: dict[str, object], line: str) -> None:
    assert line in change_lines(command, result)


def test_a_dry_run_shows_the_exact_command_as_a_shell_would_take_it() -> None:
    plan = {
        "outcome": "start",
        "download": None,
        "stops": ["old on 8100, pid 7"],
        "clears": ["old"],
        "argv": ["/x", "a b", "$(id)"],
    }
    text = change_lines("load", {**LOADED, "dry_run": True, "plan": plan})
    assert text.split("\n") == [
        "qwen on 8100: start (dry run, nothing changed)",
        "  stop: old on 8100, pid 7",
        "  clear: old",
        "  run: /x 'a b' '$(id)'",
    ]


@given(
    st.sampled_from(["init", "load", "unload", "unload-all", "reconcile", "deploy"]),
    st.dictionaries(
        st.sampled_from(
            ["model", "port", "alias", "url", "state", "seconds", "notes", "ports", "added", "plan", "kept"]
        ),
        json_values,
    ),
)
@PROPERTY
def test_whatever_a_host_answers_is_told_without_steering_the_terminal(command: str, result: dict[str, object]) -> None:
    text = change_lines(command, result)
    assert not [c for c in text if unicodedata.category(c) == "Cc" and c != "\n"]


# -- JSON -----------------------------------------------------------------------------------------------------------


def test_the_document_has_a_row_for_every_host_with_its_error() -> None:
    answers = [HostReply("studio", status(ROW)), HostReply("attic", error=DOWN)]
    read = json.loads(document("status", answers, {"studio": {"ports": [ROW]}}))
    assert read == {
        "schema": 1,
        "command": "status",
        "ok": False,
        "hosts": [
            {"host": "studio", "reachable": True, "error": None, "ports": [ROW]},
            {"host": "attic", "reachable": False, "error": DOWN.to_wire()},
        ],
    }
    assert {"code", "exit", "message", "hint"} <= read["hosts"][1]["error"].keys()


def test_a_command_that_came_to_no_host_has_a_document_too() -> None:
    read = json.loads(error_document("load", UsageError("bad_port", "no", why="w", hint="h")))
    assert (read["schema"], read["command"], read["ok"], read["hosts"]) == (1, "load", False, [])
    assert (read["error"]["code"], read["error"]["exit"]) == ("bad_port", 2)


def test_all_is_well_only_if_every_host_is() -> None:
    well = [HostReply("a", {}), HostReply("b", {})]
    assert json.loads(document("list", well, {}))["ok"] is True
    assert json.loads(document("list", [*well, HostReply("c", error=Refused("x", "y"))], {}))["ok"] is False


@given(texts)
@PROPERTY
def test_a_document_is_pure_ascii(text: str) -> None:
    raw = document("list", [HostReply(text, error=Refused("x", text))], {})
    assert raw.isascii() and not [c for c in raw if ord(c) < 0x20 and c != "\n"]
    assert json.loads(raw)["hosts"][0]["host"] == text


# -- talk -----------------------------------------------------------------------------------------------------------


def spoken(*, many: bool = False) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(many=many, stream=stream), stream


def test_talk_in_a_pipe_is_plain_lines() -> None:
    console, stream = spoken()
    console.hear("studio", Note("hello \x1b[31m\nworld"))
    console.hear("studio", Note("careful", "warning"))
    console.hear("studio", Phase("start", "x"))
    console.note("done")
    assert stream.getvalue().split("\n") == ["hello \\x1b[31m world", "warning: careful", "start: x", "done", ""]


def test_of_several_hosts_every_line_names_its_host() -> None:
    console, stream = spoken(many=True)
    console.hear("studio", Note("a"))
    console.error("attic", DOWN)
    console.note("b")
    assert stream.getvalue().splitlines() == [
        "studio: a",
        "attic: error: attic does not answer",
        "attic:   why: no route",
        "attic:   next: is it on?",
        "b",
    ]


def test_an_error_is_what_why_and_what_next_a_line_each() -> None:
    console, stream = spoken()
    console.error("", Refused("x", "no\nway", hint="go"))
    assert stream.getvalue() == "error: no way\n  next: go\n"


def test_progress_in_a_pipe_is_a_line_for_every_tenth() -> None:
    console, stream = spoken()
    for done in range(0, 1001):
        console.hear("studio", Progress("weights", done * 1000, 1_000_000))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0] == "weights: 0 bytes of 1.0 MB, 0%" and lines[-1] == "weights: 1.0 MB of 1.0 MB, 100%"


def test_progress_without_a_known_total_is_told_once() -> None:
    console, stream = spoken()
    for done in range(5):
        console.hear("studio", Progress("weights", done, 0))
    assert stream.getvalue().splitlines() == ["weights: 0 bytes"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_what_is_said_beside_a_bar_cannot_steer_it() -> None:
    stream = Terminal()
    with Console(many=False, stream=stream) as console:
        console.hear("studio", Progress("weights", 1, 2))
        console.hear("studio", Note("[red]not markup[/red] \x1b]0;title\x07"))
        console.hear("studio", Progress("weights", 2, 2))
    assert "[red]not markup[/red] \\x1b]0;title\\x07" in stream.getvalue()


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        ({"port": 8102, "model": None, "state": "idle"}, "port 8102 has nothing to unload (dry run, nothing changed)"),
        ({"port": None, "model": "m", "state": "idle"}, "m has nothing to unload (dry run, nothing changed)"),
        ({"port": 8102, "model": "m", "state": "loading"}, "m on 8102: unload (dry run, nothing changed)"),
    ],
)
def test_an_unload_of_nothing_says_so_without_doing_it_too(result: dict[str, object], shown: str) -> None:
    plan: dict[str, list[str]] = {"stops": [], "clears": []}
    assert change_lines("unload", {**result, "dry_run": True, "plan": plan}) == shown


PARENT = "its parent, pid 7: python panel.py, is left alone, and may start it again"
STOPPING = {"port": 8102, "model": "m", "changed": True, "seconds": 1, "notes": [PARENT]}
AT_BOOT = {"port": 8100, "model": None, "changed": False, "state": "ready", "notes": ["8100 is left alone: boot job"]}


@pytest.mark.parametrize(
    ("result", "lines"),
    [
        (STOPPING | {"state": "idle"}, ["port 8102 is idle; m is unloaded (1 s)", PARENT]),
        (STOPPING | {"state": "ready"}, [PARENT]),
        (AT_BOOT, ["8100 is left alone: boot job"]),
        (
            STOPPING | {"dry_run": True, "plan": {"stops": ["m on 8102, pid 8"], "clears": []}},
            ["m on 8102: unload (dry run, nothing changed)", "  stop: m on 8102, pid 8", f"  note: {PARENT}"],
        ),
        (
            AT_BOOT | {"dry_run": True, "plan": {"stops": [], "clears": []}},
            ["8100 is left alone: boot job (dry run, nothing changed)"],
        ),
    ],
)
def test_what_an_unload_leaves_alone_is_told_with_what_it_does(result: dict[str, object], lines: list[str]) -> None:
    assert change_lines("unload", result).splitlines() == lines
    assert change_lines("unload-all", {"ports": [result]}).splitlines() == lines


def test_a_stale_assignment_would_be_cleared() -> None:
    result = {"port": 8102, "model": "m", "state": "idle", "dry_run": True, "plan": {"stops": [], "clears": ["m"]}}
    assert change_lines("unload", result).splitlines() == ["m on 8102: unload (dry run, nothing changed)", "  clear: m"]


def test_an_upper_estimate_is_shown_as_one() -> None:
    need = {"weight_bytes": 10**9, "context_bytes": 5 * 10**8, "context_tokens": 32768, "total_bytes": 2 * 10**9}
    models = [
        {"name": "known", "port": None, "memory": need | {"upper_estimate": False}},
        {"name": "unknown", "port": None, "memory": need | {"upper_estimate": True}},
    ]
    memory = {"budget_bytes": 10**10, "left_bytes": 10**10, "budget_source": "test", "servers": []}
    *_, known, unknown = memory_table([HostReply("studio", {"models": models, "memory": memory})]).splitlines()
    assert known.split() == ["known", "-", "1.0", "GB", "500.0", "MB", "32768", "2.0", "GB", "yes"]
    assert unknown.split() == ["unknown", "-", "1.0", "GB", "up", "to", "500.0", "MB", "32768", "2.0", "GB", "yes"]
