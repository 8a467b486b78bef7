"""Does a served model answer as clients expect: the checks, and their verdicts from raw answers. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from mlxops.core.completion import Completion, NotCompletion, Stream, ToolCall, lacking, parse, parse_stream
from mlxops.core.described import DescribedText
from mlxops.core.errors import UsageError
from mlxops.core.frozen import dataclass
from mlxops.core.names import shown


class Check(DescribedText):
    """What is checked, in this order."""

    TOKENS = "tokens", "A completion has text, its usage counts its tokens, and it has a finish reason."
    LENGTH = "length", "A completion ends at `max_tokens`, with the finish reason `length`."
    STOP = "stop", "A completion that the model itself ends has the finish reason `stop`."
    STREAM = "stream", "A stream has chunks, a finish reason, usage and `[DONE]`, and only events that clients read."
    SYSTEM = "system", "The answer follows a system prompt."
    TOOLS = "tools", "The model calls a tool as its schema says, and answers with the tool's result in a second turn."
    REASONING = "reasoning", "Reasoning is in a field of its own, apart from the answer."
    JSON = "json", "With a JSON schema the answer is JSON that fits it. Only for engines that have it."
    PARALLEL = "parallel", "A second request is answered while the first one streams, and both are complete."
    CANCEL = "cancel", "The server answers after a client has left a stream."
    MARKUP = "markup", "No answer has markup of a chat template in it, such as `<think>` or `[INST]`."


class Mark(DescribedText):
    """The verdict of a check, from the best to the worst."""

    PASS = "pass", "As it should be."
    SKIP = "skip", "Not checked; the detail says why."
    WARN = "warn", "The model chose otherwise, or cannot do it."
    FAIL = "fail", "The server or the model breaks clients, or lacks what its entry promises."


PROMISES = (Check.TOOLS, Check.REASONING, Check.SYSTEM, Check.JSON)
"""What a registry entry may promise. The other checks hold for every model."""
FAMILIES: Mapping[str, tuple[Check, ...]] = {
    "qwen3": (Check.TOOLS,),
    "qwen3_moe": (Check.TOOLS,),
    "gpt_oss": (Check.TOOLS, Check.REASONING),
}
"""config.json's `model_type` -> what its models can do. Some models of the Qwen3 family do not reason."""


@dataclass(frozen=True)
class Verdict:
    check: Check
    mark: Mark
    detail: str = ""
    busy: bool = False
    """It was skipped because the server was busy with the requests of others."""


@dataclass(frozen=True)
class Answer:
    """What came back from one request."""

    status: int | None
    """The HTTP status; None if nothing came back."""
    body: bytes = b""
    content_type: str = ""
    problem: str = ""
    """Why it is missing or incomplete, as a clause."""


def parse_checks(text: str, flag: str, allowed: Collection[Check] = tuple(Check)) -> tuple[str, ...]:
    """Parse names that commas separate. Raises `UsageError` (unknown_check)."""
    names = tuple(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
    unknown = [name for name in names if name not in list(allowed)]
    if unknown or not names:
        raise UsageError(
            "unknown_check",
            f"{shown(unknown[0]) if unknown else 'an empty list'} is not a check",
            why=f"the checks are {', '.join(allowed)}",
            hint=f"for example: {flag} tools,stream",
        )
    return names


def marks(verdicts: Iterable[Verdict]) -> dict[str, str]:
    """Return check -> mark, as files keep them."""
    return {each.check.value: each.mark.value for each in verdicts}


def position(check: str) -> int:
    """Return the place of a check in the list of checks. One of another version comes last."""
    names = [each.value for each in Check]
    return names.index(check) if check in names else len(names)


_WORSE = (Mark.PASS.value, Mark.WARN.value, Mark.FAIL.value)
"""Marks of checks that were made, from the best to the worst."""


def overall(found: Iterable[str]) -> str | None:
    """Return the worst of these marks; None if no check was made."""
    return max((mark for mark in found if mark in _WORSE), key=_WORSE.index, default=None)


def with_promises(verdicts: Iterable[Verdict], promised: Collection[str]) -> tuple[Verdict, ...]:
    """Return the verdicts. What was promised and is missing is a failure."""
    return tuple(
        replace(each, mark=Mark.FAIL, detail=f"{each.detail}; the model's entry or family promises it")
        if each.mark is Mark.WARN and each.check.value in promised
        else each
        for each in verdicts
    )


def lost(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, ...]:
    """Return the checks whose mark is worse than before. What was skipped is not known."""
    return tuple(
        check
        for check, mark in now.items()
        if mark in _WORSE and before.get(check) in _WORSE and _WORSE.index(mark) > _WORSE.index(before[check])
    )


def best(records: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Return the best mark that each check had in these records."""
    found: dict[str, str] = {}
    for record in records:
        for check, mark in record.items():
            if mark in _WORSE and _WORSE.index(mark) <= _WORSE.index(found.get(check, Mark.FAIL.value)):
                found[check] = mark
    return found


# -- requests ---------------------------------------------------------------------------------------------------------

Messages = Sequence[Mapping[str, object]]
FEW, SOME, MANY = 12, 256, 512
"""Limits of tokens: of an answer that is to be cut, of a short answer, and of one that may need reasoning first."""


def user(text: str) -> dict[str, object]:
    return {"role": "user", "content": text}


COUNT = (user("Count from 1 to 500, with a comma after each number. Write only the numbers."),)
SUM = (user("What is 17 + 25? Answer with the number only."),)
_WORD = "BANANA"
SYSTEM = (
    {"role": "system", "content": f"Answer every question with the single word {_WORD}, and with nothing else."},
    user("What is the capital of France?"),
)
TOOL = "get_temperature"
_CITY = "Paris"
_UNITS = ("celsius", "fahrenheit")
WEATHER = (user(f"How warm is it in {_CITY} now, in celsius? Call the tool {TOOL}, then answer with its result."),)
TOOLS: Messages = (
    {
        "type": "function",
        "function": {
            "name": TOOL,
            "description": "Return the present temperature of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": list(_UNITS)}},
                "required": ["city"],
            },
        },
    },
)
_TOOL_RESULT = {"city": _CITY, "temperature": 23, "unit": "celsius"}
_CAPITAL = "capital"
JSON = (user(f'What is the capital of France? Answer with JSON, such as {{"{_CAPITAL}": "Rome"}}.'),)
RESPONSE_FORMAT: Mapping[str, object] = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {_CAPITAL: {"type": "string", "maxLength": 40}},
            "required": [_CAPITAL],
            "additionalProperties": False,
        },
    },
}


def second_turn(call: ToolCall) -> Messages:
    """Return the messages that follow a tool call: the call and its result."""
    function = {"name": call.name, "arguments": call.arguments}
    return (
        *WEATHER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": call.id or "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call.id or "call_1", "name": call.name, "content": json.dumps(_TOOL_RESULT)},
    )


# -- verdicts ---------------------------------------------------------------------------------------------------------


class _Wrong(Exception):
    """An answer that cannot be judged further. The message describes it."""


def refusal(answer: Answer) -> str:
    """Return why an answer is missing or refused, as a clause; empty if it is neither."""
    return answer.problem or ("" if answer.status == 200 else f"it answered {answer.status}: {_start(answer.body)}")


def _completion(answer: Answer) -> Completion:
    """Return the completion in an answer. Raises `_Wrong`."""
    if why := refusal(answer):
        raise _Wrong(why)
    try:
        return parse(answer.body)
    except NotCompletion as error:
        raise _Wrong(f"it answered 200 without a completion: {error}: {_start(answer.body)}") from None


def has_chunk(data: bytes) -> bool:
    """Return whether the beginning of a stream has a part of an answer."""
    return parse_stream(data).chunks > 0


def has_end(data: bytes) -> bool:
    """Return whether the beginning of a stream has all of it."""
    return parse_stream(data).done


def _start(body: bytes) -> str:
    return " ".join(body[:200].decode(errors="replace").split())


def _cut(completion: Completion, limit: int) -> bool:
    """Return whether a completion ended at the limit. Its finish reason may say something else."""
    return completion.finish_reason == "length" or (completion.tokens or 0) >= limit


def judge_tokens(answer: Answer) -> Verdict:
    check = Check.TOKENS
    try:
        completion = _completion(answer)
    except _Wrong as wrong:
        return Verdict(check, Mark.FAIL, str(wrong))
    if not completion.text and (completion.tokens or 0) >= FEW:
        # Its few tokens may have been markup that the engine takes out.
        return Verdict(check, Mark.WARN, f"its first {FEW} tokens have no text")
    problem = lacking(completion)
    return Verdict(check, Mark.FAIL, problem) if problem else Verdict(check, Mark.PASS)


def judge_length(answer: Answer, limit: int) -> Verdict:
    check = Check.LENGTH
    try:
        completion = _completion(answer)
    except _Wrong as wrong:
        return Verdict(check, Mark.FAIL, str(wrong))
    reason, tokens = completion.finish_reason, completion.tokens
    if tokens is None or reason is None:
        return Verdict(check, Mark.FAIL, "it has no usage" if tokens is None else "it has no finish reason")
    if not tokens:
        return Verdict(check, Mark.FAIL, "its usage counts no generated token")
    if tokens > limit:
        return Verdict(check, Mark.FAIL, f"it generated {tokens} tokens, and max_tokens was {limit}")
    if reason == "length":
        return Verdict(check, Mark.PASS)
    if tokens < limit:
        return Verdict(check, Mark.WARN, f"the model ended after {tokens} tokens")
    return Verdict(check, Mark.WARN, f"the engine says {reason!r}: clients cannot see that the answer is cut")


def judge_stop(answer: Answer, limit: int) -> Verdict:
    check = Check.STOP
    try:
        completion = _completion(answer)
    except _Wrong as wrong:
        return Verdict(check, Mark.FAIL, str(wrong))
    if completion.finish_reason is None:
        return Verdict(check, Mark.FAIL, "it has no finish reason")
    if _cut(completion, limit):
        return Verdict(check, Mark.WARN, f"the model did not end within {limit} tokens")
    if completion.finish_reason != "stop":
        return Verdict(check, Mark.FAIL, f"the model ended, and the finish reason is {completion.finish_reason!r}")
    if not completion.text:
        return Verdict(check, Mark.WARN, "the model ended without an answer")
    return Verdict(check, Mark.PASS)


def judge_stream(answer: Answer) -> Verdict:
    problem = _stream_problem(answer)
    if problem:
        return Verdict(Check.STREAM, Mark.FAIL, problem)
    comments = parse_stream(answer.body).comments
    return Verdict(Check.STREAM, Mark.PASS, f"{comments} comments, apart from the data" if comments else "")


def _stream_problem(answer: Answer) -> str:
    """Return what breaks clients of a stream; empty if nothing does."""
    stream = parse_stream(answer.body)
    if answer.status != 200:
        return answer.problem or f"it answered {answer.status}: {_start(answer.body)}"
    if not answer.content_type.startswith("text/event-stream"):
        return f"its content type is {answer.content_type[:80]!r}, not text/event-stream"
    return "; ".join(filter(None, [*stream.problems[:3], answer.problem, *_missing_in(stream)]))


def _missing_in(stream: Stream) -> Iterable[str]:
    if not stream.chunks:
        yield "no chunk has a part of the answer"
    if stream.completion.finish_reason is None:
        yield "no chunk has a finish reason"
    if not stream.completion.tokens:
        yield "no chunk has the usage that was asked for"
    if not stream.done:
        yield "it does not end with [DONE]"


def judge_system(answer: Answer, limit: int) -> Verdict:
    check = Check.SYSTEM
    try:
        completion = _completion(answer)
    except _Wrong as wrong:
        return Verdict(check, Mark.WARN, str(wrong))
    if _WORD.lower() in completion.content.lower():
        return Verdict(check, Mark.PASS)
    if _cut(completion, limit):
        return Verdict(check, Mark.WARN, f"the model did not come to it within {limit} tokens")
    return Verdict(check, Mark.WARN, f"the model answered {shown(completion.content[:60])}")


def tool_call(answer: Answer) -> ToolCall | None:
    """Return the call to answer in the second turn; None if there is none that can be answered."""
    try:
        calls = _completion(answer).calls
    except _Wrong:
        return None
    return calls[0] if calls and not _call_problem(calls[0]) else None


def judge_tools(answer: Answer, second: Answer | None, limit: int) -> Verdict:
    """`second`: the answer to the tool's result; None if it was not asked for."""
    check = Check.TOOLS
    try:
        completion = _completion(answer)
    except _Wrong as wrong:
        return Verdict(check, Mark.WARN, str(wrong))
    if not completion.calls:
        why = f"no tool call within {limit} tokens" if _cut(completion, limit) else "the model called no tool"
        return Verdict(check, Mark.WARN, why)
    call = completion.calls[0]
    if problem := _call_problem(call):
        return Verdict(check, Mark.FAIL, problem)
    if completion.finish_reason != "tool_calls":
        reason = completion.finish_reason
        return Verdict(check, Mark.FAIL, f"it calls a tool, and the finish reason is {reason!r}, not 'tool_calls'")
    if problem := _misfit(call):
        return Verdict(check, Mark.WARN, problem)
    return _judge_second_turn(second)


def _judge_second_turn(second: Answer | None) -> Verdict:
    check = Check.TOOLS
    try:
        completion = _completion(second or Answer(None, problem="it was not sent"))
    except _Wrong as wrong:
        return Verdict(check, Mark.FAIL, f"the second turn, with the tool's result: {wrong}")
    if not completion.text:
        return Verdict(check, Mark.FAIL, "the second turn, with the tool's result: the answer is empty")
    if str(_TOOL_RESULT["temperature"]) not in completion.text:
        return Verdict(check, Mark.WARN, "the model did not use the tool's result")
    return Verdict(check, Mark.PASS)


def _call_problem(call: ToolCall) -> str:
    """Return why clients cannot carry out a tool call; empty if they can."""
    if not call.name or not call.id:
        return f"a tool call has no {'name' if not call.name else 'id'}"
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        return f"the arguments of a tool call are not JSON: {shown(call.arguments[:80])}"
    return "" if isinstance(arguments, dict) else "the arguments of a tool call are not a JSON object"


def _misfit(call: ToolCall) -> str:
    """Return how a call differs from the tool's schema; empty if it fits."""
    if call.name != TOOL:
        return f"the model called {shown(call.name[:60])}, which was not offered"
    arguments = json.loads(call.arguments)
    if unknown := sorted(arguments.keys() - {"city", "unit"}):
        return f"the model gave an argument that the schema does not have: {shown(unknown[0][:60])}"
    if not isinstance(arguments.get("city"), str) or arguments.get("unit", _UNITS[0]) not in _UNITS:
        return "the model's arguments do not fit the schema"
    return "" if _CITY.lower() in arguments["city"].lower() else "the model called the tool for another city"


def judge_reasoning(answer: Answer, limit: int) -> Verdict:
    check = Check.REASONING
    try:
        completion = _completion(answer)
    except _Wrong as wrong:
        return Verdict(check, Mark.WARN, str(wrong))
    if found := [mark for mark in markup_in(completion.content) if mark in _REASONING_MARKUP]:
        return Verdict(check, Mark.FAIL, f"reasoning leaks into the answer: {found[0]}")
    if not completion.reasoning:
        return Verdict(check, Mark.WARN, "the answer has no reasoning in a field of its own")
    if not completion.content and not _cut(completion, limit):
        return Verdict(check, Mark.FAIL, "the whole answer is in the field for reasoning")
    return Verdict(check, Mark.PASS)


def judge_json(answer: Answer, limit: int) -> Verdict:
    check = Check.JSON
    try:
        completion = _completion(answer)
    except _Wrong as wrong:
        return Verdict(check, Mark.FAIL, str(wrong))
    try:
        value = json.loads(completion.content)
    except (ValueError, RecursionError):
        if _cut(completion, limit):
            return Verdict(check, Mark.WARN, f"the JSON was not complete within {limit} tokens")
        return Verdict(check, Mark.FAIL, f"the answer is not JSON: {shown(completion.content[:60])}")
    if not isinstance(value, dict) or value.keys() != {_CAPITAL} or not isinstance(value[_CAPITAL], str):
        return Verdict(check, Mark.FAIL, f"the JSON does not fit the schema: {shown(completion.content[:60])}")
    return Verdict(check, Mark.PASS)


def judge_parallel(first: Answer, first_seconds: float, second: Answer, second_seconds: float) -> Verdict:
    """`first`: the whole stream. `second`: the answer to a request that was sent when the stream had begun.

    The seconds are from the second request on, until the end of the stream and until the answer.
    """
    check = Check.PARALLEL
    if problem := _stream_problem(first):
        return Verdict(check, Mark.FAIL, f"the first stream: {problem}")
    try:
        completion = _completion(second)
    except _Wrong as wrong:
        return Verdict(check, Mark.FAIL, f"the second request: {wrong}")
    if not completion.tokens:
        return Verdict(check, Mark.FAIL, "the second request: the answer is empty")
    after = second_seconds - first_seconds
    if after <= 0:
        return Verdict(check, Mark.PASS)
    # A short answer takes less time than the rest of the stream, unless the stream ended almost at once.
    if first_seconds < after:
        return Verdict(check, Mark.SKIP, "the first stream ended too early to tell")
    waited = f"the second request waited {first_seconds:.1f} s, until the first stream had ended"
    return Verdict(check, Mark.WARN, f"{waited}: the server answers one request at a time")


def judge_cancel(left: Answer, after: Answer) -> Verdict:
    """`left`: what a client read of a stream before it left. `after`: the answer to a request that was sent then."""
    if problem := refusal(left):
        return Verdict(Check.CANCEL, Mark.FAIL, f"the stream that a client would leave: {problem}")
    if has_end(left.body):
        return Verdict(Check.CANCEL, Mark.SKIP, "the stream came in one piece, so a client cannot leave it")
    try:
        completion = _completion(after)
    except _Wrong as wrong:
        return Verdict(Check.CANCEL, Mark.FAIL, f"after a client has left a stream: {wrong}")
    if not completion.tokens:
        return Verdict(Check.CANCEL, Mark.FAIL, "after a client has left a stream, the answer is empty")
    return Verdict(Check.CANCEL, Mark.PASS)


# -- markup -----------------------------------------------------------------------------------------------------------

_MARKUP = re.compile(
    r"</?(?:think|thinking|tool_call|tool_response|tools|function|parameter)(?:=[^>\s]*)?>"
    r"|<\|[a-z_]{2,40}\|>|\[/?(?:INST|TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS|THINK)\]|<</?SYS>>"
    r"|</?(?:start|end)_of_turn>|<\uff5c[^<>\n]{2,40}\uff5c>"
)
"""Tags and special tokens of the chat templates of Qwen, GPT-OSS, Llama, Mistral, Gemma and DeepSeek."""
_REASONING_MARKUP = {
    *("<think>", "</think>", "<thinking>", "</thinking>", "[THINK]", "[/THINK]"),
    *("<|channel|>", "<|start|>", "<|message|>"),
}


def markup_in(text: str) -> list[str]:
    """Return the markup in a text, each once."""
    return list(dict.fromkeys(match.group() for match in _MARKUP.finditer(text)))


def judge_markup(answers: Sequence[tuple[Check, Answer]]) -> Verdict:
    """`answers`: each with the check that asked for it, streams included."""
    for check, answer in answers:
        if found := markup_in(_content(answer)):
            return Verdict(Check.MARKUP, Mark.FAIL, f"an answer of the check {check} has {', '.join(found[:3])}")
    if not any(_content(answer) for _, answer in answers):
        return Verdict(Check.MARKUP, Mark.SKIP, "no answer has content")
    return Verdict(Check.MARKUP, Mark.PASS)


def _content(answer: Answer) -> str:
    if answer.content_type.startswith("text/event-stream"):
        return parse_stream(answer.body).completion.content
    try:
        return parse(answer.body).content
    except NotCompletion:
        return ""
