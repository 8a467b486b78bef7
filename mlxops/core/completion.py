"""One small chat completion: what is asked, and what counts as an answer. Pure.

A server is proven by it, and so is the way through a gateway.
"""

from __future__ import annotations

import json
from collections.abc import Mapping


def question(model: str, number: int | None = None, extra: Mapping[str, object] | None = None) -> bytes:
    """Return the body of the request. `number` makes it new to every cache; `extra`: further fields."""
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": "Say hi." if number is None else f"{number}: say hi."}],
        "max_tokens": 4,
        "temperature": 0,
        "stream": False,
        **(extra or {}),
    }
    return json.dumps(asked).encode()


def completion(body: bytes) -> dict[str, object] | None:
    """The answer, None if it is no completion. What was generated does not matter (reasoning alone is an answer): that
    something was does."""
    try:
        answer = json.loads(body)
        return dict(answer) if isinstance(answer["choices"][0]["message"], dict) else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
