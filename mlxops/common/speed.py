"""Send several requests to a server at once, and time their streamed answers."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing

from mlxops.common.http import CHAT_COMPLETIONS, MAX_RESPONSE_BYTES, ChatServer, NoCompletion, NotHttp, open_response
from mlxops.core.measuring import Answer, NotMeasurable, read_answer
from mlxops.core.redaction import without_key

POLL_SECONDS = 0.1
MAX_ERROR_BYTES = 10_000
NO_ANSWER = (OSError, NoCompletion, NotMeasurable)
"""What `ask_at_once` raises for a server that gives no answer, or one that cannot be measured."""


class TimeUp(Exception):
    """The deadline has passed."""


def ask_at_once(
    server: ChatServer, prompts: Sequence[str], tokens: int, deadline: float, beat: Callable[[], None] = lambda: None
) -> list[Answer]:
    """Send all prompts at once, and wait for the answers. Call `beat` while waiting.

    Raises `TimeUp` at `deadline` (monotonic time), and an exception of `NO_ANSWER`.
    """
    began = time.monotonic()
    left = deadline - began
    if left <= 0:
        raise TimeUp
    outcomes: dict[int, Answer | Exception] = {}

    def ask(index: int, prompt: str) -> None:
        try:
            with closing(_stream(server, _body(server, prompt, tokens), left)) as lines:
                outcomes[index] = read_answer((at - began, line) for at, line in lines)
        except Exception as error:  # noqa: BLE001 - carried to the main thread, which raises it
            outcomes[index] = error

    threads = [threading.Thread(target=ask, args=each, daemon=True) for each in enumerate(prompts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            beat()
    return [_checked(outcome, deadline) for outcome in outcomes.values()]


def _stream(server: ChatServer, body: bytes, timeout: float) -> Generator[tuple[float, bytes]]:
    """Request a streamed chat completion. Yield each line with the time (monotonic) when it came.

    Raises `OSError`, also after `timeout` seconds, and `NoCompletion`, also for more than `MAX_RESPONSE_BYTES`.
    """
    headers = {"Content-Type": "application/json", "Connection": "close", **(server.headers or {})}
    request = (server.scheme, server.host, server.port, "POST", f"{server.base}{CHAT_COMPLETIONS}", body, headers)
    try:
        with open_response(*request, timeout=timeout) as response:
            if response.status != 200:
                text = response.read(MAX_ERROR_BYTES).decode(errors="replace")
                raise NoCompletion(f"it answered {response.status}: {' '.join(text.split())}")
            left = MAX_RESPONSE_BYTES
            while line := response.readline(left):
                yield time.monotonic(), line
                left -= len(line)
                if left <= 0:
                    raise NoCompletion(f"it sent more than {MAX_RESPONSE_BYTES} bytes")
    except NotHttp as error:
        raise NoCompletion(f"it does not speak HTTP: {error}") from None
    except ValueError:
        # A key that no header can hold. The exception's text would show it.
        raise NoCompletion("the key has characters that no HTTP header can hold") from None


def _checked(outcome: Answer | Exception, deadline: float) -> Answer:
    if isinstance(outcome, Answer):
        return outcome
    if isinstance(outcome, TimeoutError) and time.monotonic() >= deadline:
        raise TimeUp
    raise outcome


def _body(server: ChatServer, prompt: str, tokens: int) -> bytes:
    return json.dumps(
        {
            "model": server.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **(server.fields or {}),
        }
    ).encode()


def fresh_seed() -> int:
    return int.from_bytes(os.urandom(4), "big")


def reason(error: Exception, key: str | None = None) -> str:
    """Return why there is no answer, for people, without the key: LiteLLM repeats one that it does not accept."""
    text = f"it {error}" if isinstance(error, NotMeasurable) else str(error) or type(error).__name__
    return without_key(text, key)[:300]
