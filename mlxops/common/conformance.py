"""Check whether a served model answers as clients expect: send the requests of each check, within limits.

`mlxops.core.conformance` judges the answers. The server is one of a host's, or a gateway.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mlxops.common.http import CHAT_COMPLETIONS, MAX_RESPONSE_BYTES, ChatServer, NotHttp, open_response, send_request
from mlxops.core import conformance
from mlxops.core.conformance import FEW, MANY, SOME, Answer, Check, Mark, Messages, Verdict
from mlxops.core.frozen import dataclass

if TYPE_CHECKING:
    from http.client import HTTPResponse

PAUSE_SECONDS = 0.5
FIRST_BYTES = 65536
_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


@dataclass(frozen=True)
class TimeLimits:
    """Limits in seconds."""

    answer: float = 120.0
    """Of one answer of at most `MANY` tokens."""
    busy: float = 60.0
    """Of waiting for a server that is busy with other requests, over all checks."""
    total: float = 480.0
    """After so long no further check begins."""


LIMITS = TimeLimits()


class _Busy(Exception):
    """The server does not answer because it is busy. The message says what was waited for."""


class _Refusing(Exception):
    """The server does not answer, and nothing shows that it is busy, or it refuses a plain request."""


def run_checks(
    server: ChatServer,
    wanted: Collection[Check] = tuple(Check),
    *,
    json_schema: bool,
    is_busy: Callable[[], bool] = lambda: False,
    limits: TimeLimits = LIMITS,
) -> tuple[Verdict, ...]:
    """Make the wanted checks, and return their verdicts in the order of `Check`. Never raise for what a server does.

    `json_schema`: the engine has JSON schemas. `is_busy`: whether other clients are connected, asked after a time-out.
    """
    session = _Session(server, is_busy, limits)
    verdicts: list[Verdict] = []
    stopped = ""
    # Markup is looked for in the answers of all checks.
    steps = [step for step in _STEPS if Check.MARKUP in wanted or set(step[0]) & set(wanted)]
    for asked, run in steps:
        if why := _why_skipped(session, asked, stopped, json_schema=json_schema):
            verdicts += [Verdict(check, Mark.SKIP, why) for check in asked]
            continue
        try:
            verdicts += run(session)
        except _Busy as busy:
            stopped = str(busy)
            verdicts += [Verdict(check, Mark.SKIP, stopped) for check in asked]
        except _Refusing as refusing:
            verdicts += [Verdict(check, Mark.FAIL, str(refusing)) for check in asked]
            stopped = f"not asked: {refusing}"
    verdicts.append(conformance.judge_markup(session.answers))
    by_check = {verdict.check: verdict for verdict in verdicts}
    return tuple(by_check[check] for check in Check if check in wanted)


def _why_skipped(session: _Session, asked: Collection[Check], stopped: str, *, json_schema: bool) -> str:
    if Check.JSON in asked and not json_schema:
        return "the engine has no JSON schemas"
    return stopped or (f"the checks before it took {session.limits.total:.0f} s" if session.seconds_left <= 0 else "")


class _Session:
    """The requests to one server."""

    def __init__(self, server: ChatServer, is_busy: Callable[[], bool], limits: TimeLimits) -> None:
        self._server, self._is_busy, self.limits = server, is_busy, limits
        self._deadline = time.monotonic() + limits.total
        self._busy_until: float | None = None
        self._streaming = False
        """A stream is open, so a connected client may be this one."""
        self.answers: list[tuple[Check, Answer]] = []
        """All complete answers, each with the check that asked for it."""

    @property
    def seconds_left(self) -> float:
        return self._deadline - time.monotonic()

    def ask(self, check: Check, messages: Messages, limit: int, **fields: object) -> Answer:
        """Return the answer to one request. Wait while the server is busy. Raises `_Busy`, `_Refusing`."""
        body = self._body(messages, limit, {"stream": False, **fields})
        while True:
            answer = self._ask_once(body)
            # 503 is also the answer of a server that is broken.
            if answer.status != 429 and not (answer.status == 503 and self._is_busy()):
                break
            self._wait(f"it answered {answer.status}")
        if answer.status is None:
            raise self._no_answer(answer.problem)
        self.answers.append((check, answer))
        return answer

    @contextmanager
    def stream(self, check: Check, messages: Messages, limit: int) -> Iterator[_Reading]:
        """Open a stream, and close it at the end of the block. Raises `_Refusing`."""
        server, body = self._server, self._body(messages, limit, _STREAMED)
        self._streaming = True
        try:
            with open_response(
                server.scheme, server.host, server.port, "POST", self._path, body, self._headers, timeout=self._timeout
            ) as response:
                yield (reading := _Reading(response))
        except (OSError, NotHttp, ValueError) as error:
            self._streaming = False
            raise self._no_answer(_problem(error)) from None
        finally:
            self._streaming = False
        if reading.ended:
            self.answers.append((check, reading.answer))
        if reading.late and self._is_busy():
            raise self._no_answer(reading.answer.problem)

    def _ask_once(self, body: bytes) -> Answer:
        server = self._server
        try:
            reply = send_request(
                server.scheme, server.host, server.port, "POST", self._path, body, self._headers, timeout=self._timeout
            )
        except (OSError, NotHttp, ValueError) as error:
            return Answer(None, problem=_problem(error))
        return Answer(reply.status, reply.body, reply.headers.get("content-type", ""))

    def _body(self, messages: Messages, limit: int, fields: Mapping[str, object]) -> bytes:
        body = {"model": self._server.model, "messages": list(messages), "max_tokens": limit, "temperature": 0}
        return json.dumps({**body, **(self._server.fields or {}), **fields}).encode()

    @property
    def _path(self) -> str:
        return self._server.base + CHAT_COMPLETIONS

    @property
    def _headers(self) -> Mapping[str, str]:
        return {"Content-Type": "application/json", **(self._server.headers or {})}

    @property
    def _timeout(self) -> float:
        return max(1.0, min(self.limits.answer, self.seconds_left))

    def _no_answer(self, problem: str) -> _Busy | _Refusing:
        if not self._streaming and self._is_busy():
            return _Busy(f"the server is busy with other requests: {problem}")
        return _Refusing(problem)

    def _wait(self, why: str) -> None:
        """Wait a moment for a busy server. Raises `_Busy` once the limit is reached."""
        now = time.monotonic()
        self._busy_until = self._busy_until or now + self.limits.busy
        if now > min(self._busy_until, self._deadline):
            raise _Busy(f"the server is busy: {why} for {self.limits.busy:.0f} s")
        time.sleep(PAUSE_SECONDS)


class _Reading:
    """A stream that is being read."""

    def __init__(self, response: HTTPResponse) -> None:
        self._response = response
        self._data = b""
        self._problem = ""
        self.ended = self.late = False

    def first_chunk(self) -> None:
        """Read until there is a part of an answer, or until the end. Do not look for it in what is long."""
        while not self.ended and len(self._data) < FIRST_BYTES and not conformance.has_chunk(self._data):
            self._read()

    def rest(self) -> Answer:
        while not self.ended:
            self._read()
        return self.answer

    @property
    def answer(self) -> Answer:
        kind = self._response.getheader("content-type", "") or ""
        return Answer(self._response.status, self._data, kind, self._problem)

    def _read(self) -> None:
        from http.client import HTTPException

        try:
            part = self._response.read1(65536)
        except HTTPException:
            part, self._problem = b"", "the stream was cut"
        except OSError as error:
            part, self._problem, self.late = b"", _problem(error), isinstance(error, TimeoutError)
        self._data += part
        if len(self._data) > MAX_RESPONSE_BYTES:
            part, self._problem = b"", f"it sent more than {MAX_RESPONSE_BYTES} bytes"
        self.ended = not part


def _problem(error: Exception) -> str:
    if isinstance(error, NotHttp):
        return f"it does not speak HTTP: {error}"
    if isinstance(error, ValueError):
        return "the key has characters that no HTTP header can hold"  # the exception's text has the key
    return "no complete answer in time" if isinstance(error, TimeoutError) else str(error)[:200]


# -- the checks -------------------------------------------------------------------------------------------------------


def _check_count(session: _Session) -> Iterator[Verdict]:
    answer = session.ask(Check.TOKENS, conformance.COUNT, FEW)
    if why := conformance.refusal(answer):
        raise _Refusing(why)
    yield conformance.judge_tokens(answer)
    yield conformance.judge_length(answer, FEW)


def _check_sum(session: _Session) -> Iterator[Verdict]:
    answer = session.ask(Check.REASONING, conformance.SUM, MANY)
    yield conformance.judge_stop(answer, MANY)
    yield conformance.judge_reasoning(answer, MANY)


def _check_stream(session: _Session) -> Iterator[Verdict]:
    with session.stream(Check.STREAM, conformance.COUNT, 2 * FEW) as reading:
        answer = reading.rest()
    yield conformance.judge_stream(answer)


def _check_system(session: _Session) -> Iterator[Verdict]:
    yield conformance.judge_system(session.ask(Check.SYSTEM, conformance.SYSTEM, SOME), SOME)


def _check_tools(session: _Session) -> Iterator[Verdict]:
    answer = session.ask(Check.TOOLS, conformance.WEATHER, MANY, tools=list(conformance.TOOLS))
    call = conformance.tool_call(answer)
    second = None
    if call is not None:
        messages = conformance.second_turn(call)
        second = session.ask(Check.TOOLS, messages, MANY, tools=list(conformance.TOOLS))
    yield conformance.judge_tools(answer, second, MANY)


def _check_json(session: _Session) -> Iterator[Verdict]:
    answer = session.ask(Check.JSON, conformance.JSON, SOME, response_format=conformance.RESPONSE_FORMAT)
    yield conformance.judge_json(answer, SOME)


def _check_parallel(session: _Session) -> Iterator[Verdict]:
    with session.stream(Check.PARALLEL, conformance.COUNT, 8 * FEW) as reading:
        reading.first_chunk()
        second = session.ask(Check.PARALLEL, conformance.SUM, FEW)
        first = reading.rest()
    yield conformance.judge_parallel(first, second)


def _check_cancel(session: _Session) -> Iterator[Verdict]:
    with session.stream(Check.CANCEL, conformance.COUNT, MANY) as reading:
        reading.first_chunk()
    yield conformance.judge_cancel(session.ask(Check.CANCEL, conformance.SUM, FEW))


_Step = Callable[[_Session], Iterator[Verdict]]
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
