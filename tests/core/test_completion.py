"""What counts as a completion."""

from __future__ import annotations

import json

import pytest

from mlxops.common.http import completion_request, parse_completion


def test_answer_with_any_message_is_a_completion() -> None:
    answer = {"id": "1", "choices": [{"message": {"reasoning": "hm"}}]}
    assert parse_completion(json.dumps(answer).encode()) == answer


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"hi", b"\xff", b"null", b"[]", b"{}", b"[" * 200_000),
        *(b'{"error": "x"}', b'{"choices": []}', b'{"choices": [{}]}', b'{"choices": [{"message": "hi"}]}'),
    ],
    ids=lambda body: body[:40].decode(errors="replace"),
)
def test_other_answer_returns_none(body: bytes) -> None:
    assert parse_completion(body) is None


def test_request_names_the_model_and_few_tokens() -> None:
    asked = json.loads(completion_request("jerry-xl"))
    assert asked["model"] == "jerry-xl" and 0 < asked["max_tokens"] < 10 and asked["stream"] is False
