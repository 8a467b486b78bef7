"""The commands in what is told, so that they act on the host that they are about. Pure.

An agent writes `mlxctl unload 8100`: it does not know by which name the asker calls its host, nor which host a command
without `--host` would go to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from mlxops.core.errors import MlxopsError
from mlxops.core.protocol import Done, Event, Failed, Note

TASKS = (
    *("init", "list", "status", "load", "rollback", "unload", "unload-all", "set", "reconcile", "restore"),
    *("pull", "remove", "gateway", "boot", "ops", "logs", "deploy"),
)
"""Those that ask a host."""
TOLD = frozenset({"hint", "why"})
"""Keys of a result's rows under which a command may stand."""

_IN_IT = r"(?:(?!\bmlxctl |\binv )[^;`,()\n])*?"
"""The rest of a command in a sentence."""
_COMMAND = re.compile(
    rf"(?<![\w./-])(?P<command>(?:mlxctl|inv) (?:{'|'.join(sorted(TASKS, key=len, reverse=True))}))(?![\w-])"
    rf"(?!{_IN_IT} --(?:host|local)\b)"
)


def aimed(text: str, flags: str) -> str:
    """The text with `flags` (" --host studio2", " --local", or nothing) behind the task of each command in it that
    does not say itself where it goes."""
    return _COMMAND.sub(lambda found: found["command"] + flags, text) if flags else text


def aimed_event(event: Event, flags: str) -> Event:
    """The same for what a host tells."""
    match event:
        case Note(message):
            return replace(event, message=aimed(message, flags))
        case Done(result):
            return replace(event, result={key: _aimed_value(key, value, flags) for key, value in result.items()})
        case Failed(error):
            return Failed(aimed_error(error, flags))
    return event


def aimed_error(error: MlxopsError, flags: str) -> MlxopsError:
    error.hint = aimed(error.hint, flags)
    error.details = {key: _aimed_value(key, value, flags) for key, value in error.details.items()}
    return error


def _aimed_value(key: str, value: object, flags: str) -> object:
    if isinstance(value, str):
        return aimed(value, flags) if key in TOLD else value
    if isinstance(value, Mapping):
        return {inner: _aimed_value(inner, each, flags) for inner, each in value.items()}
    if isinstance(value, list):
        return [_aimed_value(key, each, flags) for each in value]
    return value
