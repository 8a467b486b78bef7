"""What the real LiteLLM does with configurations: run by the Python that has it, with JSON in and out.

It is imported once, and forked for each configuration, so that nothing of one reaches the next. Its whole proxy
answers: its loader, its router, its HTTP application. Behind it is a server that notes what it is asked.

    python verdicts.py < cases.json > verdicts.json
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PORT = "@PORT@"
"""Stands for the server's port, in configurations and in the environment."""
CHAT = "/v1/chat/completions"
_SECONDS = 100
WARM: dict[str, Any] = {
    "config": f"model_list:\n- model_name: a\n  litellm_params: {{model: hosted_vllm/n, api_base: http://127.0.0.1:{PORT}/v1}}\n"
    f"- model_name: b\n  litellm_params: {{model: openai/n, api_key: x, api_base: http://127.0.0.1:{PORT}/v1}}\n",
    "asks": ["a", "b"],
    "env": {},
    "files": {},
    "encoding": "utf-8",
}
_COMPLETION = {
    "id": "1",
    "object": "chat.completion",
    "created": 1,
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hi"}}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


class _Handler(BaseHTTPRequestHandler):
    """Knows one path, and any name."""

    protocol_version = "HTTP/1.1"
    asked: list[tuple[str, str]]

    def do_POST(self) -> None:
        name = str(json.loads(self.rfile.read(int(self.headers["Content-Length"]))).get("model"))
        self.asked.append((self.path, name))
        body = json.dumps({**_COMPLETION, "model": name}).encode()
        self.send_response(200 if self.path == CHAT else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


async def _answers(proxy: Any, config: Path, names: list[str], asked: list[tuple[str, str]]) -> dict[str, Any]:
    """Name -> status, and the names that the server was asked for; `start` alone, if LiteLLM does not start."""
    httpx: Any = importlib.import_module("httpx")
    try:
        await proxy.initialize(config=str(config))
    except Exception as error:  # noqa: BLE001  # any exception is the verdict
        return {"start": f"{type(error).__name__}: {error}"}
    if proxy.llm_router is not None:
        proxy.llm_router.num_retries = 0
    transport = httpx.ASGITransport(app=proxy.app, raise_app_exceptions=False)
    found: dict[str, Any] = {}
    async with httpx.AsyncClient(transport=transport, base_url="http://proxy", timeout=_SECONDS) as client:
        for name in names:
            asked.clear()
            body = {"model": name, "messages": [{"role": "user", "content": "hi"}]}
            answer = await client.post("/v1/chat/completions", json=body)
            found[name] = [answer.status_code, list(dict.fromkeys(name for path, name in asked if path == CHAT))]
    return found


def _verdict(proxy: Any, case: dict[str, Any]) -> dict[str, Any]:
    asked: list[tuple[str, str]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"asked": asked}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = str(server.server_address[1])
    os.environ.update({name: value.replace(PORT, port) for name, value in case["env"].items()})
    with tempfile.TemporaryDirectory() as folder:
        for name, text in {"config.yaml": case["config"], **case["files"]}.items():
            path = Path(folder) / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text.replace(PORT, port).encode(case["encoding"]))
        return asyncio.run(_answers(proxy, Path(folder) / "config.yaml", case["asks"], asked))


def _forked(proxy: Any, case: dict[str, Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    if os.fork() == 0:
        signal.alarm(_SECONDS)
        try:
            os.write(writing, json.dumps(_verdict(proxy, case)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        said = stream.read()
    os.wait()
    return dict(json.loads(said)) if said else {"start": "it ended without an answer"}


def main() -> None:
    cases = json.load(sys.stdin)
    out = os.dup(1)
    os.dup2(2, 1)  # LiteLLM prints a banner
    proxy = importlib.import_module("litellm.proxy.proxy_server")
    # Once here: most of what the first request imports is the same for all.
    _verdict(proxy, WARM)
    gc.freeze()
    verdicts = [_forked(proxy, case) for case in cases]
    with os.fdopen(out, "w") as stream:
        json.dump(verdicts, stream)


if __name__ == "__main__":
    main()
