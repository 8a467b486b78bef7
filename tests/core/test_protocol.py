"""Requests and events survive the wire; noise is no event."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlxops.core.command import Request, UnknownCommandError, request_type
from mlxops.core.commands.boot import Boot
from mlxops.core.commands.load import Load
from mlxops.core.commands.logs import Logs
from mlxops.core.commands.set import Set
from mlxops.core.commands.status import Status
from mlxops.core.protocol import (
    MARKER,
    TICKET,
    Done,
    Envelope,
    Event,
    Failed,
    Hello,
    Note,
    Phase,
    Progress,
    Requester,
    decode_envelope,
    decode_event,
    encode_event,
)
from mlxops.core.settings import Settings
from mlxops.core.wire import DecodeError
from mlxops.tasks import command_names
from tests.core.test_errors import any_error
from tests.core.test_settings import settings
from tests.lab.envelopes import envelope
from tests.properties import PROPERTY, hostile_texts, json_values

texts = hostile_texts
events: st.SearchStrategy[Event] = st.one_of(
    st.builds(Hello, texts, texts),
    st.builds(Note, texts, texts),
    st.builds(Phase, texts, texts),
    st.builds(Progress, texts, st.integers(), st.integers()),
    st.builds(Done, st.dictionaries(texts, json_values, max_size=3)),
    st.builds(Failed, any_error),
)
FIELDS: Mapping[type[Request[Any]], Mapping[str, st.SearchStrategy[Any]]] = {
    Load: {
        "model": st.none() | texts,
        "port": st.none() | texts,
        "force": st.booleans(),
        "drain": st.none() | st.floats(0, 3600),
        "sent": st.dictionaries(texts, st.lists(texts, max_size=2).map(tuple), max_size=2),
        "promised": st.dictionaries(texts, st.integers(), max_size=2),
    },
    Boot: {"every": st.none() | st.integers(), "action": texts, "dry_run": st.booleans()},
    Set: {"model": st.none() | texts, "set": st.lists(texts, max_size=3).map(tuple)},
    Logs: {"port": st.none() | texts, "lines": st.integers(), "follow": st.booleans(), "after": st.none() | texts},
    Status: {"probe": st.booleans()},
}
requests = st.builds(
    Envelope,
    request=st.one_of(*(st.builds(kind, **parts) for kind, parts in FIELDS.items())),
    settings=settings,
    build=texts,
    asker=st.builds(Requester, texts, texts),
    agreed=st.booleans(),
    ticket=st.just("") | st.from_regex(TICKET, fullmatch=True),
    heard=st.integers(0, 10**6),
)


def comparable(event: Event | None) -> object:
    """Errors are compared by their wire form."""
    return ("failed", event.error.to_wire()) if isinstance(event, Failed) else event


@given(events)
@example(Note("\ud800 \x1b[31m \u202e \0 \r\n \x85 \u2028"))
@PROPERTY
def test_event_survives_the_wire(event: Event) -> None:
    assert comparable(decode_event(encode_event(event))) == comparable(event)


def test_impossible_byte_counts_are_dropped() -> None:
    assert decode_event(encode_event(Progress("x", 10**4000, 1))) is None
    assert decode_event(encode_event(Progress("x", 1, 2, 10**4000))) == Progress("x", 1, 2)


@given(events)
@example(Note("\ud800 \x1b[31m \u202e \0 \r\n \x85 \u2028 \x7f"))
@PROPERTY
def test_event_is_one_ascii_line_after_the_marker(event: Event) -> None:
    line = encode_event(event)
    assert all(0x20 <= ord(character) <= 0x7F for character in line)
    assert len(line.splitlines()) == 1 and line.startswith(MARKER)


@given(requests)
@PROPERTY
def test_request_survives_the_wire(request: Envelope) -> None:
    assert decode_envelope(request.encode()) == request
    assert request.encode().isascii()


@pytest.mark.parametrize(
    "line",
    [
        "",
        "Last login: Mon",
        "{}",
        "[]",
        '{"mlxops":',
        '{"mlxops":1}',
        '{"mlxops":1,"event":"later"}',
        '{"mlxops":1,"event":["hello"]}',
        '{"mlxops":1,"event":"done"}',
        '{"mlxops":1,"event":"done","result":[]}',
        '{"mlxops":1,"event":"failed","error":"x"}',
        '{"mlxops":1,"event":"progress","name":"x","done":"1","total":2}',
        '{"mlxops":1,"event":"note","message":"cut',
        ' {"mlxops":1,"event":"note","message":"indented"}',
        '{"event":"note","message":"unmarked","mlxops":1}',
        '{"mlxops":' + "[" * 100_000,
        '{"mlxops":' + "9" * 5000 + "}",
    ],
)
def test_noise_is_not_an_event(line: str) -> None:
    assert decode_event(line) is None


@given(texts | json_values.map(json.dumps) | st.text().map(lambda text: MARKER + text))
@PROPERTY
def test_any_line_can_be_read(line: str) -> None:
    decode_event(line)


@given(st.dictionaries(st.sampled_from(["event", "message", "level", "done", "total", "result", "error"]), json_values))
@PROPERTY
def test_malformed_event_can_be_read(body: dict[str, object]) -> None:
    for kind in ("hello", "note", "phase", "progress", "done", "failed"):
        decode_event(json.dumps({"mlxops": 1, **body, "event": kind}, separators=(",", ":")))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 100_000,
        json.dumps({"mlxops": 2, "command": "status", "args": {}, "settings": Settings().to_wire()}).encode(),
        json.dumps({"mlxops": 1, "command": 7, "args": {}, "settings": Settings().to_wire()}).encode(),
        json.dumps({"mlxops": 1, "command": "status", "args": [], "settings": Settings().to_wire()}).encode(),
        json.dumps({"mlxops": 1, "command": "status", "args": {}, "settings": {}}).encode(),
    ],
)
def test_noise_is_not_a_request(data: bytes) -> None:
    with pytest.raises(ValueError):
        decode_envelope(data)


@given(st.dictionaries(st.sampled_from(["mlxops", "command", "args", "settings", "build", "asker"]), json_values))
@PROPERTY
def test_malformed_request_raises_only_value_errors(wire: dict[str, object]) -> None:
    whole = {"mlxops": 1, "command": "status", "args": {}, "settings": Settings().to_wire(), **wire}
    try:
        decode_envelope(json.dumps(whole).encode())
    except ValueError:
        pass


def request(command: str, **args: object) -> Envelope:
    return envelope(command, args, Settings(), "b")


CHANGES = [name for name in command_names() if request_type(name).changes]


@pytest.mark.parametrize("command", CHANGES)
def test_change_acts_unless_it_is_a_dry_run(command: str) -> None:
    assert request(command).request.acts and not request(command, dry_run=True).request.acts


@pytest.mark.parametrize("command", sorted(set(command_names()) - set(CHANGES)))
def test_read_does_not_act(command: str) -> None:
    assert not request(command).request.acts


@pytest.mark.parametrize(
    "args", [{"port": 8100}, {"timeout": "9"}, {"force": 1}, {"sent": {"8100": "a"}}, {"model": []}]
)
def test_argument_of_another_type_is_refused(args: dict[str, object]) -> None:
    with pytest.raises(DecodeError, match=next(iter(args))):
        request("load", **args)


def test_unknown_argument_is_ignored() -> None:
    assert request("load", model="a", later=True).request == Load(model="a")


def test_unknown_command_has_an_error_of_its_own() -> None:
    body = {"mlxops": 1, "command": "no-such-thing", "args": {}, "settings": Settings().to_wire()}
    with pytest.raises(UnknownCommandError, match="no-such-thing"):
        decode_envelope(json.dumps(body).encode())
