"""Ask the running gateway for one small completion: the proof that an alias works for clients.

LiteLLM sets a deployment that failed aside for some seconds, and repeats a failed request by itself. A refusal just
after a change therefore proves nothing: repeat the request until a deadline. Never use its `/health`: it sends a
request to every model, and a wrong name makes a server drop its weights. `/health/liveliness` and `/v1/model/info`
send no requests.

Tried with LiteLLM 1.109: `x-litellm-attempted-fallbacks` counts the fallbacks behind an answer, `disable_fallbacks` in
a request makes it fail instead, `cache: {no-cache, no-store}` bypasses its caches, semantic ones included. It does
not forward these fields. A key may be forbidden to set `cache`.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import ClassVar
from urllib.parse import quote, urlsplit

from mlxops.common.http import (
    MAX_RESPONSE_BYTES,
    NotHttp,
    completion_request,
    send_request,
)
from mlxops.core.completion import NotCompletion, parse
from mlxops.core.frozen import dataclass
from mlxops.core.gateway import SameHost, same_base, same_name
from mlxops.core.redaction import without_key

ALIAS_SECONDS = 60.0
"""How long an alias is probed: several times the five seconds of LiteLLM's cool-down, and a slow first answer."""
LIVELINESS_SECONDS = 5.0
INFO_SECONDS = 5.0
PAUSE_SECONDS = 1.0
MAX_INFO_BYTES = 64 * 1024 * 1024
"""Of `/v1/model/info`. LiteLLM sends about 8000 for each entry."""
MAX_PATTERNS = 32
"""Patterns that are requested one by one."""
_FINAL_STATUSES = frozenset({*range(300, 400), 400, 401, 403, 404, 405, 422})
"""HTTP statuses that waiting does not change: a redirect (not a gateway), an unknown alias, a wrong key, a request that
is not understood."""
_SET_ASIDE_MESSAGES = ("no deployments available", "in cooldown", "all_deployments_in_cooldown")
"""LiteLLM's messages while it does not use a deployment because an earlier request failed."""
_NO_KEY_MESSAGE = "missing credentials"
"""LiteLLM's message, with a 500, for an entry without a key."""
LITELLM_FIELDS: Mapping[str, object] = {"cache": {"no-cache": True, "no-store": True}, "disable_fallbacks": True}


@dataclass(frozen=True)
class Question:
    """A name to probe.

    `bases`: one of these api_bases must answer, if the gateway says where answers come from. `others`: the api_bases
    of further deployments of the same name, which may answer in turn.
    """

    alias: str
    bases: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Deployment:
    """What the running gateway reports about one of its deployments."""

    alias: str
    model: str
    api_base: str | None = None
    provider: str | None = None


@dataclass(frozen=True)
class ProbeResult:
    """The outcome of probing an alias.

    `code`: ok, gateway_down, no_completion. If another server answered: fallback, other_deployment (of the same name,
    in turn), other_server (a wrong one).
    """

    FURTHER_KEYS: ClassVar[Mapping[str, type]] = {"ok": bool}
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

    @property
    def temporary(self) -> bool:
        """Whether the failure may pass: the server was set aside, or a timeout was too short."""
        detail = self.detail.lower()
        set_aside = any(message in detail for message in _SET_ASIDE_MESSAGES)
        return not self.ok and (self.status in {None, 408, 504} or set_aside)

    @property
    def without_key(self) -> bool:
        """Whether the gateway has no key for the server."""
        return not self.ok and _NO_KEY_MESSAGE in self.detail.lower()

    @property
    def not_admitted(self) -> bool:
        """Whether the gateway refuses our key. Without a database LiteLLM says that it cannot look it up."""
        return not self.ok and (self.status in {401, 403} or "no connected db" in self.detail.lower())

    def to_wire(self) -> dict[str, object]:
        return {**asdict(self), "ok": self.ok}


@dataclass(frozen=True)
class _Reply:
    status: int
    body: bytes
    api_base: str | None = None
    fallbacks: bool = False


@dataclass(frozen=True)
class _Gateway:
    """Where to send requests, and how to compare the addresses in replies."""

    url: str
    key: str | None
    same_host: SameHost


def probe_alias(
    url: str,
    key: str | None,
    question: Question,
    *,
    same_host: SameHost = same_name,
    seconds: float = ALIAS_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> ProbeResult:
    """Request one completion by alias from the gateway at `url`, for up to `seconds`. Never raise.

    Report the last real error: a timeout or a deployment that was set aside does not hide an earlier one.
    """
    gateway = _Gateway(url, key, same_host)
    began, attempts = clock(), 0
    last_real: ProbeResult | None = None
    last_replied: ProbeResult | None = None
    while True:
        attempts += 1
        left = seconds - (clock() - began)
        result = _request_completion(gateway, question, max(1.0, left))
        passed = clock() - began
        if result.code == "gateway_down" and _is_alive(gateway):
            detail = f"the gateway is up, and did not answer for {question.alias} in {passed:.0f} s"
            result = replace(result, code="no_completion", detail=detail)
        if result.status is not None:
            last_replied = result
        if not result.temporary:
            last_real = result
        final = _is_final(result)
        if final or passed + PAUSE_SECONDS > seconds:
            reported = result if final else last_real or last_replied or result
            return replace(reported, seconds=round(passed, 3), attempts=attempts)
        pause(PAUSE_SECONDS)


def _is_final(result: ProbeResult) -> bool:
    """Return whether repeating the request cannot change the result."""
    if result.code == "no_completion":
        return not result.temporary and (result.status in _FINAL_STATUSES or result.without_key)
    return result.code in {"ok", "gateway_down", "other_server"}


def probe_all(
    url: str,
    key: str | None,
    questions: Sequence[Question],
    seconds: float = ALIAS_SECONDS,
    same_host: SameHost = same_name,
) -> tuple[ProbeResult, ...]:
    """Probe all names in parallel: one slow model does not delay the others."""
    from concurrent.futures import ThreadPoolExecutor

    if not questions:
        return ()
    with ThreadPoolExecutor(max_workers=min(len(questions), 16)) as pool:
        return tuple(
            pool.map(lambda question: probe_alias(url, key, question, same_host=same_host, seconds=seconds), questions)
        )


def deployments(url: str, key: str | None) -> tuple[Deployment, ...] | None:
    """Return the running gateway's deployments; None if it does not answer as LiteLLM does.

    For the pattern `*` LiteLLM lists hundreds of rows, one for each model of a provider that it knows. They share one
    id, and a request for that id returns the pattern.
    """
    rows = _model_info(url, key)
    if rows is None:
        return None
    models: dict[str, set[str]] = {}
    for row in rows:
        if (deployment := _parse_deployment(row)) is not None:
            models.setdefault(_row_id(row), set()).add(deployment.model)
    pattern_ids = [row_id for row_id, sent in models.items() if row_id and len(sent) > 1]
    kept = [row for row in rows if _row_id(row) not in pattern_ids]
    for row_id in pattern_ids[:MAX_PATTERNS]:
        pattern_rows = _model_info(url, key, f"?litellm_model_id={quote(row_id)}")
        if pattern_rows is None:
            break
        kept += pattern_rows
    return tuple(deployment for row in kept if (deployment := _parse_deployment(row)) is not None)


def _model_info(url: str, key: str | None, query: str = "") -> list[object] | None:
    try:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        reply = _send(url, "GET", f"/v1/model/info{query}", None, headers, INFO_SECONDS, MAX_INFO_BYTES)
        rows = json.loads(reply.body)["data"] if reply is not None and reply.status == 200 else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return rows if isinstance(rows, list) else None


def _row_id(row: object) -> str:
    """Return the id of a deployment; empty if it has none."""
    info = row.get("model_info") if isinstance(row, dict) else None
    return str(info.get("id") or "") if isinstance(info, dict) else ""


def _parse_deployment(row: object) -> Deployment | None:
    """Parse a row of `/v1/model/info`; None for other rows, and for a team's own: only that team can use its name."""
    fields = row if isinstance(row, dict) else {}
    params, info = fields.get("litellm_params"), fields.get("model_info")
    if not isinstance(params, dict) or (isinstance(info, dict) and info.get("team_id")):
        return None

    def text(value: object) -> str | None:
        return value if isinstance(value, str) and value else None

    alias, model = text(fields.get("model_name")), text(params.get("model"))
    if alias is None or model is None:
        return None
    base = text(params.get("api_base")) or text(params.get("base_url"))
    return Deployment(alias, model, base, text(params.get("custom_llm_provider")))


def _is_alive(gateway: _Gateway) -> bool:
    return _send(gateway.url, "GET", "/health/liveliness", None, {}, LIVELINESS_SECONDS) is not None


def _request_completion(gateway: _Gateway, question: Question, timeout: float) -> ProbeResult:
    alias, key = question.alias, gateway.key
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    number = secrets.randbelow(10**9)

    def send(extra: Mapping[str, object]) -> _Reply | None:
        body = completion_request(alias, number, extra)
        reply = _send(gateway.url, "POST", "/v1/chat/completions", body, headers, timeout)
        if reply is not None and reply.status in {404, 405} and _error_message(reply.body) is None:
            # The path is missing, not the model: this gateway may have no /v1.
            bare = _send(gateway.url, "POST", "/chat/completions", body, headers, timeout)
            reply = bare if bare is not None and bare.status not in {404, 405} else reply
        return reply

    try:
        reply = send(LITELLM_FIELDS)
        if reply is not None and _refuses_fields(reply):
            reply = send({})
    except ValueError:
        # A key that no header can hold. The exception's text would show it.
        return ProbeResult(
            alias, "no_completion", 0, 0, 401, detail="the key has characters that no HTTP header can hold"
        )
    if reply is None:
        return ProbeResult(alias, "gateway_down", 0, 0, detail=f"no answer from {gateway.url}")
    if reply.status != 200 or not _has_token(reply.body):
        message = without_key(_message(reply.body), key)
        return ProbeResult(alias, "no_completion", 0, 0, reply.status, detail=f"it answered {reply.status}: {message}")
    return _judge(gateway, question, reply)


def _has_token(body: bytes) -> bool:
    """Return whether a token was generated, by the text or by the usage: the few first ones may have no text."""
    try:
        completion = parse(body)
    except NotCompletion:
        return False
    return bool(completion.text or completion.tokens)


def _judge(gateway: _Gateway, question: Question, reply: _Reply) -> ProbeResult:
    """Judge a completion by the server that it came from."""
    came_from = reply.api_base

    def result(code: str, detail: str = "") -> ProbeResult:
        return ProbeResult(question.alias, code, 0, 0, 200, came_from, detail)

    def among(bases: Collection[str]) -> bool:
        return came_from is not None and any(same_base(came_from, base, gateway.same_host) for base in bases)

    if reply.fallbacks:
        place = f" at {came_from}" if came_from else ""
        return result("fallback", f"the gateway's fallback{place} answered for it: its own server did not")
    if came_from is None or not question.bases or among(question.bases):
        return result("ok")
    right = " or ".join(question.bases)
    if among(question.others):
        return result("other_deployment", f"its other deployment at {came_from} answered each time, never {right}")
    return result("other_server", f"the answer came from {came_from}, not from {right}")


def _refuses_fields(reply: _Reply) -> bool:
    """Return whether the gateway may have refused the fields that only LiteLLM knows."""
    text = reply.body[:10_000].decode(errors="replace").lower()
    if reply.status == 403:
        return "cache control" in text
    return reply.status in {400, 422} and any(f in text for f in ("disable_fallbacks", '"cache"', "'cache'", "extra"))


def _send(
    url: str,
    method: str,
    path: str,
    data: bytes | None,
    headers: Mapping[str, str],
    timeout: float,
    limit: int = MAX_RESPONSE_BYTES,
) -> _Reply | None:
    """Send a request; None if nothing answers. Raises `ValueError` for headers that cannot be sent."""
    parts = urlsplit(url)
    # `url` may end in /v1, as a client's base URL does.
    path = parts.path.rstrip("/").removesuffix("/v1") + path
    try:
        reply = send_request(
            parts.scheme, parts.hostname or "", parts.port, method, path, data, headers, timeout=timeout, limit=limit
        )
    except (OSError, NotHttp):
        return None
    fallbacks = reply.headers.get("x-litellm-attempted-fallbacks", "0").strip()
    return _Reply(
        reply.status,
        reply.body,
        reply.headers.get("x-litellm-model-api-base"),
        fallbacks=fallbacks.isdecimal() and int(fallbacks[:9]) > 0,
    )


def _message(body: bytes) -> str:
    """Return the message of an OpenAI-style error, else the beginning of the body."""
    message = _error_message(body)
    if message is None:
        message = body[:300].decode(errors="replace")
    return " ".join(message.split())[:300]


def _error_message(body: bytes) -> str | None:
    """Return the message of an OpenAI-style error; None if it is not one."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
