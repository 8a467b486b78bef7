"""A chat completion as a server sends it: one body, or a stream of events. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field

from mlxops.core.frozen import dataclass

DONE = "[DONE]"
_LINE_END = re.compile(r"\r\n?")
_BLANK_LINES = re.compile(r"\n{2,}")


class NotCompletion(ValueError):
    """An answer is not a chat completion. The message describes it."""


@dataclass(frozen=True)
class ToolCall:
    """One tool call. Absent fields are empty."""

    name: str
    arguments: str
    """JSON text, as OpenAI's clients expect it; empty if the server sent something else."""
    id: str = ""


@dataclass(frozen=True)
class Completion:
    """The first choice of a chat completion."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    finish_reason: str | None = None
    tokens: int | None = None
    """Generated tokens, from the usage; None if the answer has none."""

    @property
    def text(self) -> str:
        """Everything that was generated: reasoning, answer and tool calls."""
        return "".join((self.reasoning, self.content, *(f"{each.name}{each.arguments}" for each in self.calls)))


def lacking(completion: Completion) -> str:
    """Return what a completion lacks to show that a token was generated, as a clause; empty if it lacks nothing."""
    if not completion.tokens:
        return "its usage counts no generated token"
    if not completion.text:
        return f"it has no text, although its usage counts {completion.tokens} generated tokens"
    return "" if completion.finish_reason else "it has no finish reason"


def parse(body: bytes) -> Completion:
    """Parse the body of a completion that was not streamed. Raises `NotCompletion`."""
    answer = _object(body)
    choice, message = _choice(answer, "message")
    return Completion(
        content=_text(message.get("content")),
        reasoning=_reasoning(message),
        calls=tuple(map(_call, _objects(message.get("tool_calls")))),
        finish_reason=_text(choice.get("finish_reason")) or None,
        tokens=_tokens(answer),
    )


@dataclass(frozen=True)
class Stream:
    """A streamed completion, put together from its events."""

    completion: Completion = Completion()
    chunks: int = 0
    """Events with a part of the answer."""
    done: bool = False
    """It ends with `[DONE]`."""
    comments: int = 0
    """Lines that begin with a colon."""
    problems: tuple[str, ...] = field(default=())
    """What breaks clients."""


def parse_stream(data: bytes) -> Stream:
    """Parse the body of a streamed completion. Never raises: what does not fit is a problem."""
    text = _LINE_END.sub("\n", data.decode(errors="replace"))
    problems: list[str] = []
    chunks: list[Mapping[str, object]] = []
    done, comments = False, 0
    for block in filter(None, map(str.strip, _BLANK_LINES.split(text))):
        lines = block.splitlines()
        marked = [line for line in lines if line.startswith(":")]
        comments += len(marked)
        if len(marked) == len(lines):
            continue
        if marked:
            problems.append("a comment shares an event with data")
        value = "\n".join(line[5:].strip() for line in lines if line.startswith("data:"))
        if done:
            problems.append(f"it goes on after {DONE}")
        elif value == DONE:
            done = True
        elif not value:
            problems.append(f"an event has no data: {block[:80]!r}")
        else:
            chunks += _chunk(value, problems)
    return Stream(
        completion=_put_together(chunks),
        chunks=sum(bool(_delta_text(chunk)) for chunk in chunks),
        done=done,
        comments=comments,
        problems=tuple(dict.fromkeys(problems)),
    )


def _chunk(value: str, problems: list[str]) -> list[Mapping[str, object]]:
    """Return the chunk of an event's data; nothing if it is something else, which becomes a problem."""
    try:
        chunk = _object(value.encode(errors="replace"))
    except NotCompletion:
        problems.append(f"an event is not a JSON object: {value[:80]!r}")
        return []
    if "error" in chunk or not isinstance(chunk.get("choices"), list):
        problems.append(f"an event is not a chunk: {value[:120]}")
        return []
    return [chunk]


def _put_together(chunks: Sequence[Mapping[str, object]]) -> Completion:
    deltas = [_choice_of(chunk, "delta") for chunk in chunks]
    counts = [count for chunk in chunks if (count := _tokens(chunk)) is not None]
    reasons = [reason for choice, _ in deltas if (reason := _text(choice.get("finish_reason")))]
    return Completion(
        content="".join(_text(delta.get("content")) for _, delta in deltas),
        reasoning="".join(_reasoning(delta) for _, delta in deltas),
        calls=_joined_calls(call for _, delta in deltas for call in _objects(delta.get("tool_calls"))),
        finish_reason=reasons[-1] if reasons else None,
        tokens=counts[-1] if counts else None,
    )


def _joined_calls(parts: Iterable[Mapping[str, object]]) -> tuple[ToolCall, ...]:
    """Join the parts of streamed tool calls by their index."""
    calls: dict[object, ToolCall] = {}
    for part in parts:
        index, call = json.dumps(part.get("index")), _call(part)
        first = calls.get(index, ToolCall("", ""))
        calls[index] = ToolCall(first.name + call.name, first.arguments + call.arguments, first.id or call.id)
    return tuple(calls.values())


def _delta_text(chunk: Mapping[str, object]) -> str:
    _, delta = _choice_of(chunk, "delta")
    return _text(delta.get("content")) + _reasoning(delta) + "".join(map(str, _objects(delta.get("tool_calls"))))


def _object(body: bytes) -> Mapping[str, object]:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise NotCompletion("it is not JSON") from None
    if not isinstance(answer, dict):
        raise NotCompletion("it is not a JSON object")
    return answer


def _choice(answer: Mapping[str, object], key: str) -> tuple[Mapping[str, object], Mapping[str, object]]:
    """Return the first choice and its message or delta. Raises `NotCompletion`."""
    choices = _objects(answer.get("choices"))
    message = choices[0].get(key) if choices else None
    if not isinstance(message, dict):
        raise NotCompletion("it has no message")
    return choices[0], message


def _choice_of(chunk: Mapping[str, object], key: str) -> tuple[Mapping[str, object], Mapping[str, object]]:
    """Return the first choice and its delta, both empty if there is none: the chunk with the usage has no choice."""
    try:
        return _choice(chunk, key)
    except NotCompletion:
        choices = _objects(chunk.get("choices"))
        return (choices[0] if choices else {}), {}


def _objects(value: object) -> list[Mapping[str, object]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _reasoning(message: Mapping[str, object]) -> str:
    """Engines call it `reasoning_content` (mlx-openai-server, LiteLLM) or `reasoning` (mlx-lm). Some send both."""
    return _text(message.get("reasoning_content")) or _text(message.get("reasoning"))


def _call(value: Mapping[str, object]) -> ToolCall:
    function = value.get("function")
    fields = function if isinstance(function, dict) else {}
    return ToolCall(_text(fields.get("name")), _text(fields.get("arguments")), _text(value.get("id")))


def _tokens(answer: Mapping[str, object]) -> int | None:
    usage = answer.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if type(count) is int else None
