"""Data on standard output, messages on standard error, and nothing that steers a terminal."""

from __future__ import annotations

import io
import json

from hypothesis import given

from mlxops.control.client import HostReply
from mlxops.control.output import Console, document, error_document
from mlxops.core.errors import Refused, Unreachable, UsageError
from mlxops.core.protocol import Note, Phase, Progress
from tests.properties import PROPERTY, hostile_texts

DOWN = Unreachable("host_down", "attic does not answer", why="no route", hint="is it on?")
ROW: dict[str, object] = {"port": 8100, "state": "ready"}


# -- JSON -----------------------------------------------------------------------------------------------------------


def test_document_has_a_row_for_every_host() -> None:
    replies: list[HostReply[object]] = [HostReply("studio"), HostReply("attic", error=DOWN)]
    read = json.loads(document("status", replies, {"studio": {"ports": [ROW]}}))
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


def test_error_without_a_host_has_a_document() -> None:
    read = json.loads(error_document("load", UsageError("bad_port", "no", why="w", hint="h")))
    assert (read["schema"], read["command"], read["ok"], read["hosts"]) == (1, "load", False, [])
    assert (read["error"]["code"], read["error"]["exit"]) == ("bad_port", 2)


def test_document_is_ok_only_if_every_host_is() -> None:
    well: list[HostReply[object]] = [HostReply("a", {}), HostReply("b", {})]
    assert json.loads(document("list", well, {}))["ok"] is True
    assert json.loads(document("list", [*well, HostReply("c", error=Refused("x", "y"))], {}))["ok"] is False


@given(hostile_texts)
@PROPERTY
def test_document_is_pure_ascii(text: str) -> None:
    raw = document("list", [HostReply(text, error=Refused("x", text))], {})
    assert raw.isascii() and not [c for c in raw if ord(c) < 0x20 and c != "\n"]
    assert json.loads(raw)["hosts"][0]["host"] == text


# -- messages -------------------------------------------------------------------------------------------------------


def console_of(*, many: bool = False) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(many=many, stream=stream), stream


def test_messages_in_a_pipe_are_plain_lines() -> None:
    console, stream = console_of()
    console.hear("studio", Note("hello \x1b[31m\nworld"))
    console.hear("studio", Note("careful", "warning"))
    console.hear("studio", Phase("start", "x"))
    console.note("done")
    assert stream.getvalue().split("\n") == ["hello \\x1b[31m world", "warning: careful", "start: x", "done", ""]


def test_messages_of_several_hosts_name_their_host() -> None:
    console, stream = console_of(many=True)
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


def test_error_has_lines_for_message_reason_and_next_step() -> None:
    console, stream = console_of()
    console.error("", Refused("x", "no\nway", hint="go"))
    assert stream.getvalue() == "error: no way\n  next: go\n"


def test_progress_in_a_pipe_has_a_line_for_every_tenth() -> None:
    console, stream = console_of()
    for done in range(0, 1001):
        console.hear("studio", Progress("weights", done * 1000, 1_000_000))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0] == "weights: 0 bytes of 1.0 MB, 0%" and lines[-1] == "weights: 1.0 MB of 1.0 MB, 100%"


def test_progress_without_a_total_is_one_line() -> None:
    console, stream = console_of()
    for done in range(5):
        console.hear("studio", Progress("weights", done, 0))
    assert stream.getvalue().splitlines() == ["weights: 0 bytes"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_message_beside_a_bar_cannot_steer_the_terminal() -> None:
    stream = Terminal()
    with Console(many=False, stream=stream) as console:
        console.hear("studio", Progress("weights", 1, 2))
        console.hear("studio", Note("[red]not markup[/red] \x1b]0;title\x07"))
        console.hear("studio", Progress("weights", 2, 2))
    assert "[red]not markup[/red] \\x1b]0;title\\x07" in stream.getvalue()
