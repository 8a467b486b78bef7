"""Check whether a served model answers as clients expect: send the requests of each check, and judge the answers.

`mlxops.core.conformance` judges them. The server is one of a host's, or a gateway.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

from mlxops.common.chat import LIMITS, ChatClient, NoAnswer, Reading, ServerBusy, TimeLimits
from mlxops.common.http import ChatServer
from mlxops.common.parallel import within
from mlxops.core import conformance
from mlxops.core.conformance import FEW, MANY, SOME, Answer, Check, Mark, Messages, Verdict

SHORT_STREAM, LONG_STREAM = 8 * FEW, 24 * FEW
"""Tokens of the stream beside which a second request is sent."""
RETRY_SECONDS = 10.0
"""A stream that took longer shows without a longer one whether the second request waited for it."""


def run_checks(
    server: ChatServer,
    wanted: Collection[Check] = tuple(Check),
    *,
    json_schema: bool,
    connections: Callable[[], int] = lambda: 0,
    limits: TimeLimits = LIMITS,
) -> tuple[Verdict, ...]:
    """Make the wanted checks, and return their verdicts in the order of `Check`. Never raise for what a server does.

    `json_schema`: the engine has JSON schemas. `connections` counts the connections to the server, those of the checks
    included. It is asked where the server seems busy.
    """
    asked = _Asked(ChatClient(server, connections, limits), limits)
    verdicts: list[Verdict] = []
    rest: Verdict | None = None
    # Markup is looked for in the answers of all checks.
    steps = [step for step in _STEPS if Check.MARKUP in wanted or set(step[0]) & set(wanted)]
    for checks, run in steps:
        if Check.JSON in checks and not json_schema:
            verdicts += _each(checks, Mark.SKIP, NO_JSON_SCHEMA)
        elif rest is not None:
            verdicts += _each(checks, Mark.SKIP, rest.detail, busy=rest.busy)
        elif asked.client.seconds_left <= 0:
            verdicts += _each(checks, Mark.SKIP, f"the checks before it took {limits.total:.0f} s")
        else:
            made, rest = _make(checks, run, asked)
            verdicts += made
    markup = conformance.judge_markup(asked.answers)
    if rest is not None and rest.busy and markup.mark is not Mark.FAIL:
        markup = replace(rest, check=Check.MARKUP)  # not all answers were seen
    verdicts.append(markup)
    by_check = {verdict.check: verdict for verdict in verdicts}
    return tuple(by_check[check] for check in Check if check in wanted)


NO_JSON_SCHEMA = "the engine has no JSON schemas"


def _make(checks: Collection[Check], run: _Step, asked: _Asked) -> tuple[list[Verdict], Verdict | None]:
    """Make the checks of one step. Return their verdicts, and one for the checks that need not be made any more."""
    try:
        return list(run(asked)), None
    except ServerBusy as busy:
        verdicts = _each(checks, Mark.SKIP, str(busy), busy=True)
        return verdicts, verdicts[0]
    except NoAnswer as error:
        return _each(checks, Mark.FAIL, str(error)), Verdict(Check.MARKUP, Mark.SKIP, f"not asked: {error}")


def _each(checks: Collection[Check], mark: Mark, detail: str, *, busy: bool = False) -> list[Verdict]:
    return [Verdict(check, mark, detail, busy) for check in checks]


class _Asked:
    """A client, and the complete answers that it got, each with the check that asked for it."""

    def __init__(self, client: ChatClient, limits: TimeLimits) -> None:
        self.client, self.limits = client, limits
        self.answers: list[tuple[Check, Answer]] = []

    def ask(self, check: Check, messages: Messages, limit: int, **fields: object) -> Answer:
        answer = self.client.ask(messages, limit, **fields)
        self.answers.append((check, answer))
        return answer

    @contextmanager
    def stream(self, check: Check, messages: Messages, limit: int) -> Iterator[Reading]:
        with self.client.stream(messages, limit) as reading:
            yield reading
        if reading.ended:
            self.answers.append((check, reading.answer))


# -- the checks -------------------------------------------------------------------------------------------------------


def _check_count(asked: _Asked) -> Iterator[Verdict]:
    answer = asked.ask(Check.TOKENS, conformance.COUNT, FEW)
    if why := conformance.refusal(answer):
        raise NoAnswer(why)
    yield conformance.judge_tokens(answer)
    yield conformance.judge_length(answer, FEW)


def _check_sum(asked: _Asked) -> Iterator[Verdict]:
    answer = asked.ask(Check.REASONING, conformance.SUM, MANY)
    yield conformance.judge_stop(answer, MANY)
    yield conformance.judge_reasoning(answer, MANY)


def _check_stream(asked: _Asked) -> Iterator[Verdict]:
    with asked.stream(Check.STREAM, conformance.COUNT, 2 * FEW) as reading:
        answer = reading.rest()
    yield conformance.judge_stream(answer)


def _check_system(asked: _Asked) -> Iterator[Verdict]:
    yield conformance.judge_system(asked.ask(Check.SYSTEM, conformance.SYSTEM, SOME), SOME)


def _check_tools(asked: _Asked) -> Iterator[Verdict]:
    answer = asked.ask(Check.TOOLS, conformance.WEATHER, MANY, tools=list(conformance.TOOLS))
    call = conformance.tool_call(answer)
    second = None
    if call is not None:
        messages = conformance.second_turn(call)
        second = asked.ask(Check.TOOLS, messages, MANY, tools=list(conformance.TOOLS))
    yield conformance.judge_tools(answer, second, MANY)


def _check_json(asked: _Asked) -> Iterator[Verdict]:
    answer = asked.ask(Check.JSON, conformance.JSON, SOME, response_format=conformance.RESPONSE_FORMAT)
    yield conformance.judge_json(answer, SOME)


def _check_parallel(asked: _Asked) -> Iterator[Verdict]:
    verdict, seconds = _ask_two(asked, SHORT_STREAM)
    if verdict.mark in (Mark.WARN, Mark.SKIP) and seconds < RETRY_SECONDS:
        # On a busy host the second request of a fast server may begin late. A longer stream shows whether it waits.
        verdict, _ = _ask_two(asked, LONG_STREAM)
    if verdict.mark is Mark.WARN and asked.client.has_others():
        why = "the server is busy with other requests: the second request may have waited for them"
        verdict = Verdict(Check.PARALLEL, Mark.SKIP, why, busy=True)
    yield verdict


def _ask_two(asked: _Asked, length: int) -> tuple[Verdict, float]:
    """Send a request while a stream of so many tokens is read. Return the verdict, and how long the stream took."""
    with asked.stream(Check.PARALLEL, conformance.COUNT, length) as reading:
        # Not the first text: an engine may hold it back, until it has whole characters.
        if conformance.has_end(reading.first_bytes().body):
            why = "the stream came in one piece, so nothing can be asked while it streams"
            return Verdict(Check.PARALLEL, Mark.SKIP, why), 0.0
        began = time.monotonic()

        def timed(answer: Callable[[], Answer]) -> tuple[Answer, float]:
            return answer(), time.monotonic() - began

        found = within(
            asked.limits.answer + asked.limits.busy,
            {
                "first": lambda: timed(reading.rest),
                "second": lambda: timed(lambda: asked.ask(Check.PARALLEL, conformance.SUM, FEW)),
            },
        )
    first, first_seconds = _made(found["first"])
    second, second_seconds = _made(found["second"])
    return conformance.judge_parallel(first, first_seconds, second, second_seconds), first_seconds


def _made(outcome: tuple[Answer, float] | Exception) -> tuple[Answer, float]:
    """Return what a call returned, or raise what it raised."""
    if isinstance(outcome, TimeoutError):
        raise NoAnswer(str(outcome))
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _check_cancel(asked: _Asked) -> Iterator[Verdict]:
    with asked.stream(Check.CANCEL, conformance.COUNT, MANY) as reading:
        left = reading.first_chunk()
    yield conformance.judge_cancel(left, asked.ask(Check.CANCEL, conformance.SUM, FEW))


_Step = Callable[[_Asked], Iterator[Verdict]]
_STEPS: tuple[tuple[tuple[Check, ...], _Step], ...] = (
    ((Check.TOKENS, Check.LENGTH), _check_count),
    ((Check.STOP, Check.REASONING), _check_sum),
    ((Check.STREAM,), _check_stream),
    ((Check.SYSTEM,), _check_system),
    ((Check.TOOLS,), _check_tools),
    ((Check.JSON,), _check_json),
    ((Check.PARALLEL,), _check_parallel),
    ((Check.CANCEL,), _check_cancel),
)
