"""The web server of `serve`: its routes, the guard before them, and limits for slow and greedy clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlxops.control.serve.access import Access, Refusal, refusal
from mlxops.control.serve.exposition import Exposition

MAX_HEADER_BYTES = 16 * 1024
MAX_CONNECTIONS = 64
CHECK_SECONDS = 2.0
REQUEST_SECONDS = 10.0
"""A connection is closed that sends no whole request within this time."""
READ_SECONDS = 20.0
"""One is closed that takes nothing of its response for so long."""
GRACE_SECONDS = 1
"""How long open requests get at the end."""
TICK_SECONDS = 2
HEADERS = [
    ("X-Content-Type-Options", "nosniff"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", "default-src 'none'"),
]


def application(exposition: Exposition, access: Access, say: Callable[[str], None]) -> ASGIApp:
    """Return the application: the guard, and the routes behind it."""
    app = Starlette(routes=routes(exposition))
    app.router.redirect_slashes = False
    return Guard(app, access, say)


def routes(exposition: Exposition) -> list[BaseRoute]:
    async def metrics(request: Request) -> Response:
        page, content_type = exposition.render(request.headers.get("accept", ""))
        return Response(page, headers={"content-type": content_type})

    return [Route("/metrics", metrics)]


def server(app: ASGIApp, on_tick: Callable[[], None]) -> uvicorn.Server:
    """Return the server of the application, before it runs."""

    async def tick() -> None:
        on_tick()

    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="critical",  # hostile clients would fill the log
        access_log=False,
        server_header=False,
        proxy_headers=False,
        headers=HEADERS,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=GRACE_SECONDS,
        callback_notify=tick,
        timeout_notify=TICK_SECONDS,
    )
    return uvicorn.Server(config)


class Guard:
    """Refuse what `access` does not allow. No exception becomes more than a status of 500."""

    def __init__(self, app: ASGIApp, access: Access, say: Callable[[str], None]) -> None:
        self._app = app
        self._access = access
        self._say = say

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if refused := _too_long(scope) or refusal(self._access, scope["headers"]):
            return await _answer(refused, scope, receive, send)
        try:
            await self._app(scope, receive, send)
        except Exception as error:  # noqa: BLE001 - the boundary of a request
            self._say(f"a request failed: {type(error).__name__}: {error}")
            await _answer(Refusal(500, "mlxops failed; its own output says more"), scope, receive, send)


def _too_long(scope: Scope) -> Refusal | None:
    """Refuse a head that is too long and arrived at once. uvicorn refuses one that it has to wait for."""
    size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(a) + len(b) + 4 for a, b in scope["headers"])
    return Refusal(431, "the head of the request is too long") if size > MAX_HEADER_BYTES else None


async def _answer(refused: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer, and close the connection: the rest of the request is not read."""
    response = PlainTextResponse(refused.message + "\n", refused.status, {"connection": "close"})
    response.raw_headers.extend(refused.headers)
    await response(scope, receive, send)


class BoundedProtocol(H11Protocol):
    """HTTP with limits that uvicorn does not have: connections, seconds for a request, seconds without a read."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waits_since = self.loop.time()
        self._queued, self._queued_since = 0, self.loop.time()
        self._check: asyncio.TimerHandle | None = None
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        else:
            self._check_later()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._check is not None:
            self._check.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except h11.LocalProtocolError:
            self.transport.abort()  # garbage behind a request that is being answered

    def on_response_complete(self) -> None:
        self._waits_since = self.loop.time()
        super().on_response_complete()

    def _check_later(self) -> None:
        self._check = self.loop.call_later(CHECK_SECONDS, self._check_progress)

    def _check_progress(self) -> None:
        now, queued = self.loop.time(), self.transport.get_write_buffer_size()
        if queued != self._queued or not queued:
            self._queued, self._queued_since = queued, now
        idle = self.cycle is None or self.cycle.response_complete
        if (idle and now - self._waits_since > REQUEST_SECONDS) or now - self._queued_since > READ_SECONDS:
            self.transport.abort()
        else:
            self._check_later()
