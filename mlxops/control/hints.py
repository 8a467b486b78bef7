"""Aim the commands that a host suggests at this host. Pure.

An agent suggests `mlxctl unload 8100`. It knows neither how the user calls its host, nor to which host a command
without `--host` would go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mlxops.core.errors import MlxopsError
from mlxops.core.hints import aim, commands_from_wire, split
from mlxops.core.protocol import Done, Event, Failed, Note

TEXTS = ("hint", "why")
"""Keys of a row beside its `commands`, in whose text the commands are."""


def aimed(text: str, flags: str) -> str:
    """Return a text, whose commands are in backticks, with the flags (such as " --host studio2") in each command."""
    return aim(*split(text), flags.split())[0]


def aimed_event(event: Event, flags: str) -> Event:
    """Return the event with the flags in each command that it suggests."""
    if not flags:
        return event
    match event:
        case Note(message, level, commands):
            message, commands = aim(message, commands, flags.split())
            return Note(message, level, commands)
        case Done(result):
            return replace(event, result={key: _aimed_value(value, flags) for key, value in result.items()})
        case Failed(error):
            return Failed(aimed_error(error, flags))
    return event


def aimed_error(error: MlxopsError, flags: str) -> MlxopsError:
    """Add the target's flags to the commands in the error. Changes and returns `error`."""
    error.hint, error.commands = aim(error.hint, error.commands, flags.split())
    error.details = {key: _aimed_value(value, flags) for key, value in error.details.items()}
    return error


def _aimed_value(value: object, flags: str) -> object:
    if isinstance(value, list):
        return [_aimed_value(item, flags) for item in value]
    if not isinstance(value, Mapping):
        return value
    row = {key: _aimed_value(each, flags) for key, each in value.items()}
    if commands := commands_from_wire(row.get("commands")):
        for key in TEXTS:
            if isinstance(text := row.get(key), str):
                row[key], after = aim(text, commands, flags.split())
                row["commands"] = [list(command) for command in after]
    return row
