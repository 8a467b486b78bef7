"""Requests as tests write them: a command's name and its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from mlxops.core.command import decode_request, request_type
from mlxops.core.protocol import Envelope
from mlxops.core.settings import Settings
from mlxops.tasks import command_names


def envelope(
    command: str, args: Mapping[str, object], settings: Settings, build: str, *more: Any, **named: Any
) -> Envelope:
    """Return the request of `command` with its settings and build; the rest: further fields of `Envelope`."""
    return Envelope(decode_request(command, args), settings, build, *more, **named)


def smallest(kind: type) -> dict[str, Any]:
    """Return the smallest JSON of a result: empty lists and texts, zeros, null where it may be."""
    hints = get_type_hints(kind)
    return {each.name: _smallest(hints[each.name]) for each in fields(kind) if each.default is MISSING}


def _smallest(hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if NoneType in arguments:
        return None
    if origin is not None:
        return {} if issubclass(origin, Mapping) else []
    return smallest(hint) if isinstance(hint, type) and is_dataclass(hint) else hint()


ANY_RESULT: dict[str, Any] = {
    key: value
    for name in command_names()
    for kind in [request_type(name).result]
    if is_dataclass(kind)
    for key, value in smallest(kind).items()
}
"""Fits every command: it has the fields of all results."""
