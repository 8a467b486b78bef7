"""What counts as a completion."""

from __future__ import annotations

import json

import pytest

from mlxops.common.http import completion_request
from mlxops.core.completion import Completion, NotCompletion, ToolCall, lacking, parse, parse_stream


def test_request_names_the_model_and_few_tokens() -> None:
    asked = json.loads(completion_request("jerry-xl"))
    assert asked["model"] == "jerry-xl" and 0 < asked["max_tokens"] < 10 and asked["stream"] is False


CALL = {"id": "c1", "function": {"name": "get", "arguments": '{"a": 1}'}}
WHOLE = Completion("hi", finish_reason="stop", tokens=1)


@pytest.mark.parametrize(
    ("message", "completion"),
    [
        ({"content": "hi"}, WHOLE),
        ({"content": None, "reasoning": "hm"}, Completion("", "hm", (), "stop", 1)),
        ({"content": "hi", "reasoning_content": "hm", "reasoning": "hm"}, Completion("hi", "hm", (), "stop", 1)),
        ({"tool_calls": [CALL]}, Completion("", "", (ToolCall("get", '{"a": 1}', "c1"),), "stop", 1)),
        ({"tool_calls": [{"function": {"arguments": {}}}, 7]}, Completion("", "", (ToolCall("", ""),), "stop", 1)),
    ],
)
def test_completion_is_parsed(message: dict[str, object], completion: Completion) -> None:
    body = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}
    assert parse(json.dumps(body).encode()) == completion


@pytest.mark.parametrize("body", [b"", b"[" * 200_000, b"[]", b'{"choices": []}', b'{"choices": [{"message": 1}]}'])
def test_other_answer_is_no_completion(body: bytes) -> None:
    with pytest.raises(NotCompletion):
        parse(body)


@pytest.mark.parametrize(
    ("completion", "problem"),
    [
        (WHOLE, ""),
        (Completion("", "hm", (), "length", 4), ""),
        (Completion("", "", (ToolCall("get", "{}"),), "tool_calls", 4), ""),
        (Completion("hi", finish_reason="stop", tokens=0), "its usage counts no generated token"),
        (Completion("hi", finish_reason="stop"), "its usage counts no generated token"),
        (Completion("", finish_reason="stop", tokens=4), "it has no text, although its usage counts 4"),
        (Completion("hi", tokens=1), "it has no finish reason"),
    ],
)
def test_proof_needs_tokens_text_and_a_finish_reason(completion: Completion, problem: str) -> None:
    assert problem in lacking(completion) and bool(problem) == bool(lacking(completion))


def events(*values: object, end: str = "data: [DONE]\n\n") -> bytes:
    return ("".join(f"data: {json.dumps(value)}\n\n" for value in values) + end).encode()


def chunk(finish: str | None = None, **delta: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


USAGE = {"choices": [], "usage": {"completion_tokens": 2}}


def test_stream_is_put_together() -> None:
    parts = [{"index": 0, **CALL}], [{"index": 0, "function": {"arguments": " "}}]
    data = events(
        chunk(role="assistant", content=""),
        chunk(reasoning="h"),
        chunk(reasoning_content="m"),
        chunk(content="h"),
        chunk(content="i"),
        *(chunk(tool_calls=part) for part in parts),
        chunk("tool_calls"),
        USAGE,
    )
    stream = parse_stream(data)
    assert stream.completion == Completion("hi", "hm", (ToolCall("get", '{"a": 1} ', "c1"),), "tool_calls", 2)
    assert (stream.chunks, stream.done, stream.comments, stream.problems) == (6, True, 0, ())


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b": keepalive 1/2\n\n" + events(chunk(content="a")), ""),
        (events(chunk(content="a")).replace(b"\n", b"\r\n"), ""),
        (
            (b": keepalive\n" + events(chunk(content="a"))).replace(b"\n", b"\r\n"),
            "a comment shares an event with data",
        ),
        (b": keepalive\n" + events(chunk(content="a")), "a comment shares an event with data"),
        (events({"error": {"message": "broken"}}), "an event is not a chunk"),
        (events([1]), "an event is not a JSON object"),
        (b"data: {\n\n" + events(), "an event is not a JSON object"),
        (b"event: ping\n\n" + events(), "an event has no data"),
        (events(end="data: [DONE]\n\ndata: more\n\n"), "it goes on after [DONE]"),
    ],
)
def test_what_breaks_clients_of_a_stream_is_a_problem(data: bytes, problem: str) -> None:
    assert [each[: len(problem)] for each in parse_stream(data).problems] == ([problem] if problem else [])


def test_any_bytes_can_be_a_stream() -> None:
    for data in (b"", b"\xff\xfe", b"data:", b"data: " + b"[" * 200_000, b"<html>"):
        assert not parse_stream(data).done
