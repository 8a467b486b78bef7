"""Verdicts from raw answers, without a server."""

from __future__ import annotations

import json

import pytest

from mlxops.core import conformance
from mlxops.core.conformance import FEW, Answer, Check, Mark, Verdict
from mlxops.core.errors import UsageError


def answer(content: str | None = "hi", *, finish: str | None = "stop", tokens: int = 3, **message: object) -> Answer:
    choices = [{"message": {"content": content, **message}, "finish_reason": finish}]
    body = {"choices": choices, "usage": {"completion_tokens": tokens}}
    return Answer(200, json.dumps(body).encode(), "application/json")


def called(arguments: str, name: str = conformance.TOOL, finish: str = "tool_calls") -> Answer:
    call = {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}
    return answer(None, finish=finish, tool_calls=[call])


_PART = b'data: {"choices": [{"delta": {"content": "hi"}, "finish_reason": %s}]}\n\n'
BEGUN = Answer(200, _PART % b"null", "text/event-stream")
WHOLE = Answer(
    200,
    _PART % b'"stop"' + b'data: {"choices": [], "usage": {"completion_tokens": 1}}\n\ndata: [DONE]\n\n',
    "text/event-stream",
)


@pytest.mark.parametrize(
    ("verdict", "mark", "words"),
    [
        (conformance.judge_tokens(answer(None, tokens=FEW)), Mark.WARN, "have no text"),
        (conformance.judge_tokens(Answer(404, b"no such model")), Mark.FAIL, "it answered 404: no such model"),
        (conformance.judge_length(answer(finish="length", tokens=5), 5), Mark.PASS, ""),
        (conformance.judge_length(answer(finish="stop", tokens=5), 5), Mark.WARN, "the engine says 'stop'"),
        (conformance.judge_length(answer(finish="stop", tokens=2), 5), Mark.WARN, "the model ended after 2 tokens"),
        (conformance.judge_length(answer(finish=None, tokens=5), 5), Mark.FAIL, "it has no finish reason"),
        (conformance.judge_length(answer("", finish="length", tokens=0), 5), Mark.FAIL, "counts no generated token"),
        (conformance.judge_stop(answer("", tokens=0), 9), Mark.WARN, "the model ended without an answer"),
        (conformance.judge_stop(answer(None, reasoning="42"), 9), Mark.PASS, ""),
        (conformance.judge_stop(answer(finish="length", tokens=9), 9), Mark.WARN, "did not end within 9 tokens"),
        (conformance.judge_stop(answer(finish="done", tokens=3), 9), Mark.FAIL, "the finish reason is 'done'"),
        (conformance.judge_system(answer("It is a Banana."), 9), Mark.PASS, ""),
        (conformance.judge_tools(called("{}"), None, 9), Mark.WARN, "do not fit the schema"),
        (conformance.judge_tools(called("[]"), None, 9), Mark.FAIL, "not a JSON object"),
        (conformance.judge_tools(called('{"city": "Rome"}'), None, 9), Mark.WARN, "for another city"),
        (conformance.judge_tools(called('{"city": "Paris"}', "get"), None, 9), Mark.WARN, "was not offered"),
        (conformance.judge_tools(called('{"city": "Paris"}', finish="stop"), None, 9), Mark.FAIL, "not 'tool_calls'"),
        (conformance.judge_tools(called('{"city": "Paris"}'), answer("ok"), 9), Mark.WARN, "did not use"),
        (conformance.judge_tools(called('{"city": "Paris"}'), answer("23"), 9), Mark.PASS, ""),
        (conformance.judge_tools(called('{"city": "Paris"}'), answer(None), 9), Mark.FAIL, "the answer is empty"),
        (conformance.judge_reasoning(answer(None, reasoning="42"), 9), Mark.FAIL, "the whole answer is in"),
        (conformance.judge_reasoning(answer(None, reasoning="hm", tokens=9), 9), Mark.PASS, ""),
        (conformance.judge_reasoning(answer("hm</think>42", reasoning="hm"), 9), Mark.FAIL, "leaks"),
        (conformance.judge_json(answer('{"capital": 1}'), 9), Mark.FAIL, "does not fit"),
        (conformance.judge_json(answer('{"capital": "P', tokens=9), 9), Mark.WARN, "not complete within 9"),
        (conformance.judge_cancel(BEGUN, answer(tokens=0)), Mark.FAIL, "the answer is empty"),
        (conformance.judge_cancel(Answer(400, b"too long"), answer()), Mark.FAIL, "would leave: it answered 400"),
        (conformance.judge_cancel(WHOLE, answer()), Mark.SKIP, "came in one piece"),
        (conformance.judge_cancel(BEGUN, answer()), Mark.PASS, ""),
        (conformance.judge_parallel(WHOLE, 9.0, answer(), 3.0), Mark.PASS, ""),
        (conformance.judge_parallel(WHOLE, 9.0, answer(), 9.5), Mark.WARN, "waited 9.0 s, until the first stream had"),
        (conformance.judge_parallel(WHOLE, 0.1, answer(), 9.5), Mark.SKIP, "ended too early to tell"),
        (conformance.judge_parallel(BEGUN, 9.0, answer(), 3.0), Mark.FAIL, "the first stream: no chunk has a finish"),
    ],
)
def test_answer_has_its_verdict(verdict: Verdict, mark: Mark, words: str) -> None:
    assert verdict.mark is mark and words in verdict.detail, verdict


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<think>hm</think> 42", ["<think>", "</think>"]),
        ("<|channel|>analysis<|message|>hm", ["<|channel|>", "<|message|>"]),
        ("hi<|im_end|>", ["<|im_end|>"]),
        ("[INST] hi [/INST]", ["[INST]", "[/INST]"]),
        ('<tool_call>{"name": 1}</tool_call>', ["<tool_call>", "</tool_call>"]),
        ("<function=get><parameter=city>", ["<function=get>", "<parameter=city>"]),
        ("hi<end_of_turn>", ["<end_of_turn>"]),
        ("hi<\uff5cend\u2581of\u2581sentence\uff5c>", ["<\uff5cend\u2581of\u2581sentence\uff5c>"]),
        ("a < b | c > d, <b>bold</b>, [1], x <- [INSTALL]", []),
        ("if (a <| b |> c) use <thinker>", []),
    ],
)
def test_markup_of_templates_is_found(text: str, found: list[str]) -> None:
    assert conformance.markup_in(text) == found


def test_promise_turns_only_a_warning_into_a_failure() -> None:
    verdicts = [
        Verdict(Check.TOOLS, Mark.WARN, "none"),
        Verdict(Check.JSON, Mark.SKIP),
        Verdict(Check.SYSTEM, Mark.WARN),
    ]
    found = conformance.with_promises(verdicts, ("tools", "json", "later"))
    assert [each.mark for each in found] == [Mark.FAIL, Mark.SKIP, Mark.WARN]


@pytest.mark.parametrize(
    ("before", "now", "lost"),
    [
        ({"tools": "pass"}, {"tools": "warn"}, ("tools",)),
        ({"tools": "warn"}, {"tools": "fail"}, ("tools",)),
        ({"tools": "warn"}, {"tools": "pass"}, ()),
        ({"tools": "pass"}, {"tools": "skip"}, ()),
        ({"tools": "skip"}, {"tools": "fail"}, ()),
        ({}, {"tools": "fail"}, ()),
        ({"tools": "new"}, {"tools": "fail", "later": "fail"}, ()),
    ],
)
def test_check_is_lost_if_it_gets_worse(before: dict[str, str], now: dict[str, str], lost: tuple[str, ...]) -> None:
    assert conformance.lost(before, now) == lost


def test_best_mark_of_each_check_counts() -> None:
    records = [{"a": "warn", "b": "fail"}, {"a": "pass", "b": "skip"}, {"a": "fail", "c": "odd"}]
    assert conformance.best(records) == {"a": "pass", "b": "fail"}


@pytest.mark.parametrize(
    ("found", "worst"), [([], None), (["skip"], None), (["pass", "skip"], "pass"), (["fail", "warn"], "fail")]
)
def test_worst_mark_is_the_word_of_a_server(found: list[str], worst: str | None) -> None:
    assert conformance.overall(found) == worst


def test_checks_are_parsed() -> None:
    assert conformance.parse_checks("tools, stream,tools", "--require") == ("tools", "stream")
    for text in ("", ",", "tool"):
        with pytest.raises(UsageError, match="is not a check"):
            conformance.parse_checks(text, "--require")


def test_every_promise_of_a_family_is_a_check_that_may_be_promised() -> None:
    assert {check for checks in conformance.FAMILIES.values() for check in checks} <= set(conformance.PROMISES)
