"""Requests as tests write them: a command's name and its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxops.core.command import decode_request
from mlxops.core.protocol import Envelope
from mlxops.core.settings import Settings


def envelope(command: str, args: Mapping[str, object], settings: Settings, build: str, **more: Any) -> Envelope:
    """Return the request of `command` with its settings and build; `more`: further fields of `Envelope`."""
    return Envelope(decode_request(command, args), settings, build, **more)
