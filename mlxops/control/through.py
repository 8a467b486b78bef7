"""One small completion through the running gateway: the proof that an alias works from a client's side.

LiteLLM puts a deployment that failed aside for some seconds, and repeats a failed request by itself, so a refusal
just after a change proves nothing: it is asked again until a deadline. Its `/health` is never used: it sends a
request to every model, and a wrong name makes a server drop its weights. `/health/liveliness` asks nobody.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from urllib.parse import urlsplit

from mlxops.core.completion import completion, question
from mlxops.deadline import answer_until

SECONDS = 60.0
"""How long an alias is asked: several times the five seconds of LiteLLM's cool-down, and a slow first answer."""
LIVELINESS_SECONDS = 5.0
PAUSE = 1.0
MAX_BODY = 1024 * 1024
_FINAL = frozenset({*range(300, 400), 400, 401, 403, 404, 405, 422})
"""Answers that will not change by waiting: an unknown alias, a wrong key, a request that it does not understand, or
that something else than the gateway is there, which sends us on."""


@dataclass(frozen=True)
class Passage:
    """What came of asking for an alias. `code`: ok, gateway_down, no_completion, or other_server."""

    alias: str
    code: str
    seconds: float
    attempts: int
    status: int | None = None
    api_base: str | None = None
    """Where the gateway says that the answer came from (LiteLLM's header x-litellm-model-api-base)."""
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.code == "ok"

    def to_wire(self) -> dict[str, object]:
        return {**asdict(self), "ok": self.ok}


@dataclass(frozen=True)
class _Reply:
    status: int
    body: bytes
    api_base: str | None = None


def ask(
    url: str,
    key: str | None,
    alias: str,
    *,
    expected: str | None = None,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> Passage:
    """One completion by alias from the gateway at `url`, asked until `seconds` are over. Never raises.

    `expected` is the api_base that has to answer, if the gateway tells where its answers come from.
    """
    began, attempts = clock(), 0
    while True:
        attempts += 1
        left = seconds - (clock() - began)
        passage = _once(url, key, alias, expected, max(1.0, left))
        over = clock() - began
        if passage.code == "gateway_down" and _alive(url):
            detail = f"the gateway lives, and did not answer for {alias} in {over:.0f} s"
            passage = replace(passage, code="no_completion", detail=detail)
        final = passage.code in {"ok", "gateway_down", "other_server"} or passage.status in _FINAL
        if final or over + PAUSE > seconds:
            return replace(passage, seconds=round(over, 3), attempts=attempts)
        pause(PAUSE)


def ask_all(
    url: str, key: str | None, wanted: Sequence[tuple[str, str | None]], seconds: float = SECONDS
) -> tuple[Passage, ...]:
    """Each (alias, expected api_base), all at once: one slow model does not hold up the others."""
    from concurrent.futures import ThreadPoolExecutor

    if not wanted:
        return ()
    with ThreadPoolExecutor(max_workers=min(len(wanted), 16)) as pool:
        return tuple(pool.map(lambda one: ask(url, key, one[0], expected=one[1], seconds=seconds), wanted))


def _alive(url: str) -> bool:
    return _send(url, "GET", "/health/liveliness", None, {}, LIVELINESS_SECONDS) is not None


def _once(url: str, key: str | None, alias: str, expected: str | None, timeout: float) -> Passage:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        reply = _send(url, "POST", "/v1/chat/completions", question(alias), headers, timeout)
    except ValueError:
        # A key that no header can hold. The exception's text would show it.
        return Passage(alias, "no_completion", 0, 0, 401, detail="the key has characters that no HTTP header can hold")
    if reply is None:
        return Passage(alias, "gateway_down", 0, 0, detail=f"no answer from {url}")
    if reply.status != 200 or completion(reply.body) is None:
        words = _hidden(_words(reply.body), key)
        return Passage(alias, "no_completion", 0, 0, reply.status, detail=f"it answered {reply.status}: {words}")
    came_from = reply.api_base
    if expected and came_from and came_from.rstrip("/") != expected.rstrip("/"):
        detail = f"the answer came from {came_from}, not from {expected}: the gateway runs with another configuration"
        return Passage(alias, "other_server", 0, 0, 200, came_from, detail)
    return Passage(alias, "ok", 0, 0, 200, came_from)


def _send(
    url: str, method: str, path: str, data: bytes | None, headers: Mapping[str, str], timeout: float
) -> _Reply | None:
    """None: nobody answered. Raises `ValueError` for headers that cannot be sent."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout)
    connection.response_class = answer_until(time.monotonic() + timeout)
    try:
        connection.request(method, parts.path.rstrip("/") + path, data, dict(headers))
        response = connection.getresponse()
        return _Reply(response.status, response.read(MAX_BODY), response.getheader("x-litellm-model-api-base"))
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _words(body: bytes) -> str:
    """The message of an OpenAI-style error, else the beginning of the answer."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, LookupError, TypeError, RecursionError):
        message = body[:300].decode(errors="replace")
    return " ".join(str(message).split())[:300]


def _hidden(text: str, key: str | None) -> str:
    """LiteLLM repeats a key that it does not accept."""
    return text.replace(key, "[key]") if key else text
