"""One small completion through the running gateway: the proof that an alias works from a client's side.

LiteLLM puts a deployment that failed aside for some seconds, and repeats a failed request by itself, so a refusal
just after a change proves nothing: it is asked again until a deadline. Its `/health` is never used: it sends a
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
from urllib.parse import quote, urlsplit

from mlxops.common.http import (
    MAX_RESPONSE_BYTES,
    NotHttp,
    completion_request,
    parse_completion,
    send_request,
)
from mlxops.core.frozen import dataclass
from mlxops.core.gateway import SameHost, same_base, same_name

SECONDS = 60.0
"""How long an alias is asked: several times the five seconds of LiteLLM's cool-down, and a slow first answer."""
LIVELINESS_SECONDS = 5.0
INFO_SECONDS = 5.0
PAUSE = 1.0
MAX_INFO = 64 * 1024 * 1024
"""Bytes of `/v1/model/info`; LiteLLM sends about 8000 for each entry."""
MAX_PATTERNS = 32
"""Entries that are asked for one by one, because only that shows their pattern."""
_FINAL = frozenset({*range(300, 400), 400, 401, 403, 404, 405, 422})
"""Answers that will not change by waiting: an unknown alias, a wrong key, a request that it does not understand, or
that something else than the gateway is there, which sends us on."""
_SET_ASIDE = ("no deployments available", "in cooldown", "all_deployments_in_cooldown")
"""LiteLLM's messages while it does not use a deployment because an earlier request failed."""
_NO_KEY = "missing credentials"
"""LiteLLM's message, with a 500, for an entry without a key."""
_OWN_FIELDS: Mapping[str, object] = {"cache": {"no-cache": True, "no-store": True}, "disable_fallbacks": True}


@dataclass(frozen=True)
class Question:
    """A name to ask for.

    `bases`: one of these api_bases has to answer, if the gateway says where answers come from. `others`: the api_bases
    of further deployments of the same name, which may answer in turn.
    """

    alias: str
    bases: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Deployment:
    """A deployment of the running gateway, as far as it shows it."""

    alias: str
    model: str
    api_base: str | None = None
    provider: str | None = None


@dataclass(frozen=True)
class ProbeResult:
    """The result of asking for an alias.

    `code`: ok, gateway_down, no_completion; or another server answered: fallback, other_deployment (one of the same
    name, in turn), other_server (one that should not).
    """

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
    def passing(self) -> bool:
        """Whether the failure may be temporary: the server was set aside, or a timeout was too short."""
        words = self.detail.lower()
        return not self.ok and (self.status in {None, 408, 504} or any(each in words for each in _SET_ASIDE))

    @property
    def without_key(self) -> bool:
        """The gateway has no key for the server."""
        return not self.ok and _NO_KEY in self.detail.lower()

    @property
    def not_admitted(self) -> bool:
        """The gateway does not take our own key; without a database LiteLLM says that it cannot look it up."""
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
    """Where to ask, and how to compare the addresses in answers."""

    url: str
    key: str | None
    same_host: SameHost


def ask(
    url: str,
    key: str | None,
    alias: str,
    *,
    expected: str | Collection[str] | None = None,
    others: Collection[str] = (),
    same_host: SameHost = same_name,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> ProbeResult:
    """One completion by alias from the gateway at `url`, asked until `seconds` are over. Never raises.

    `expected` and `others` are a `Question`'s `bases` and `others`. Reports the last real error: a timeout or a
    deployment that was set aside does not hide an earlier one.
    """
    bases = (expected,) if isinstance(expected, str) else tuple(expected or ())
    asked, gateway = Question(alias, bases, tuple(others)), _Gateway(url, key, same_host)
    began, attempts = clock(), 0
    real: ProbeResult | None = None
    replied: ProbeResult | None = None
    while True:
        attempts += 1
        left = seconds - (clock() - began)
        passage = _once(gateway, asked, max(1.0, left))
        over = clock() - began
        if passage.code == "gateway_down" and _alive(gateway):
            detail = f"the gateway lives, and did not answer for {alias} in {over:.0f} s"
            passage = replace(passage, code="no_completion", detail=detail)
        if passage.status is not None:
            replied = passage
        if not passage.passing:
            real = passage
        final = passage.code in {"ok", "gateway_down", "other_server"} or (
            passage.code == "no_completion"
            and not passage.passing
            and (passage.status in _FINAL or passage.without_key)
        )
        if final or over + PAUSE > seconds:
            last = passage if final else real or replied or passage
            return replace(last, seconds=round(over, 3), attempts=attempts)
        pause(PAUSE)


def ask_all(
    url: str,
    key: str | None,
    wanted: Sequence[Question],
    seconds: float = SECONDS,
    same_host: SameHost = same_name,
) -> tuple[ProbeResult, ...]:
    """Ask for all of them in parallel: one slow model does not delay the others."""
    from concurrent.futures import ThreadPoolExecutor

    if not wanted:
        return ()

    def one(asked: Question) -> ProbeResult:
        return ask(
            url, key, asked.alias, expected=asked.bases, others=asked.others, same_host=same_host, seconds=seconds
        )

    with ThreadPoolExecutor(max_workers=min(len(wanted), 16)) as pool:
        return tuple(pool.map(one, wanted))


def deployments(url: str, key: str | None) -> tuple[Deployment, ...] | None:
    """Ask the running gateway for its deployments; None if it does not answer as LiteLLM does.

    For the pattern `*` LiteLLM lists hundreds of rows, one for each model of a provider that it knows. All have one id,
    and asking for that id returns the pattern.
    """
    rows = _model_info(url, key)
    if rows is None:
        return None
    models: dict[str, set[str]] = {}
    for row in rows:
        if (found := _deployment(row)) is not None:
            models.setdefault(_id(row), set()).add(found.model)
    spread = [each for each, sent in models.items() if each and len(sent) > 1]
    kept = [row for row in rows if _id(row) not in spread]
    for each in spread[:MAX_PATTERNS]:
        one = _model_info(url, key, f"?litellm_model_id={quote(each)}")
        if one is None:
            break
        kept += one
    return tuple(found for row in kept if (found := _deployment(row)) is not None)


def _model_info(url: str, key: str | None, which: str = "") -> list[object] | None:
    try:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        reply = _send(url, "GET", f"/v1/model/info{which}", None, headers, INFO_SECONDS, MAX_INFO)
        rows = json.loads(reply.body)["data"] if reply is not None and reply.status == 200 else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return rows if isinstance(rows, list) else None


def _id(row: object) -> str:
    """What names a deployment; empty if it has none."""
    info = row.get("model_info") if isinstance(row, dict) else None
    return str(info.get("id") or "") if isinstance(info, dict) else ""


def _deployment(row: object) -> Deployment | None:
    """Parse a row of `/v1/model/info`; None for others, and for a team's own, whose name only that team can use."""
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


def _alive(gateway: _Gateway) -> bool:
    return _send(gateway.url, "GET", "/health/liveliness", None, {}, LIVELINESS_SECONDS) is not None


def _once(gateway: _Gateway, asked: Question, timeout: float) -> ProbeResult:
    alias, key = asked.alias, gateway.key
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    number = secrets.randbelow(10**9)

    def send(extra: Mapping[str, object]) -> _Reply | None:
        body = completion_request(alias, number, extra)
        reply = _send(gateway.url, "POST", "/v1/chat/completions", body, headers, timeout)
        if reply is not None and reply.status in {404, 405} and _error(reply.body) is None:
            # The path is missing, not the model: this gateway may have no /v1.
            bare = _send(gateway.url, "POST", "/chat/completions", body, headers, timeout)
            reply = bare if bare is not None and bare.status not in {404, 405} else reply
        return reply

    try:
        reply = send(_OWN_FIELDS)
        if reply is not None and _refuses_fields(reply):
            reply = send({})
    except ValueError:
        # A key that no header can hold. The exception's text would show it.
        return ProbeResult(
            alias, "no_completion", 0, 0, 401, detail="the key has characters that no HTTP header can hold"
        )
    if reply is None:
        return ProbeResult(alias, "gateway_down", 0, 0, detail=f"no answer from {gateway.url}")
    if reply.status != 200 or parse_completion(reply.body) is None:
        words = _hidden(_words(reply.body), key)
        return ProbeResult(alias, "no_completion", 0, 0, reply.status, detail=f"it answered {reply.status}: {words}")
    return _judged(gateway, asked, reply)


def _judged(gateway: _Gateway, asked: Question, reply: _Reply) -> ProbeResult:
    """Judge a completion by the server that it came from."""
    came_from = reply.api_base

    def passage(code: str, detail: str = "") -> ProbeResult:
        return ProbeResult(asked.alias, code, 0, 0, 200, came_from, detail)

    def among(bases: Collection[str]) -> bool:
        return came_from is not None and any(same_base(came_from, each, gateway.same_host) for each in bases)

    if reply.fallbacks:
        where = f" at {came_from}" if came_from else ""
        return passage("fallback", f"the gateway's fallback{where} answered for it: its own server did not")
    if came_from is None or not asked.bases or among(asked.bases):
        return passage("ok")
    right = " or ".join(asked.bases)
    if among(asked.others):
        return passage("other_deployment", f"its other deployment at {came_from} answered each time, never {right}")
    return passage("other_server", f"the answer came from {came_from}, not from {right}")


def _refuses_fields(reply: _Reply) -> bool:
    """Whether the gateway may have refused the request because of the fields that only LiteLLM knows."""
    words = reply.body[:10_000].decode(errors="replace").lower()
    if reply.status == 403:
        return "cache control" in words
    return reply.status in {400, 422} and any(f in words for f in ("disable_fallbacks", '"cache"', "'cache'", "extra"))


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


def _words(body: bytes) -> str:
    """The message of an OpenAI-style error, else the beginning of the answer."""
    message = _error(body)
    if message is None:
        message = body[:300].decode(errors="replace")
    return " ".join(message.split())[:300]


def _error(body: bytes) -> str | None:
    """Return the message of an OpenAI-style error; None if this is none."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _hidden(text: str, key: str | None) -> str:
    """LiteLLM repeats a key that it does not accept."""
    return text.replace(key, "[key]") if key else text
