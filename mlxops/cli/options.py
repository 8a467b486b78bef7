"""Invoke tasks made from request dataclasses: every flag, type, default and help text is declared there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from invoke.tasks import Task, task

from mlxops.core.command import AnyRequest, Hosts, Option, options_of
from mlxops.core.errors import UsageError
from mlxops.core.frozen import dataclass

R = TypeVar("R", bound=AnyRequest)


@dataclass(frozen=True)
class Common:
    """The flags that are not part of a request. `_has` says which command has which."""

    host: str | None = None
    local: bool = False
    json: bool = False
    debug: bool = False
    detach: bool = False


HOST = {
    Hosts.ONE: "host in hosts.yaml",
    Hosts.SEVERAL: "host or hosts in hosts.yaml, separated by commas",
    Hosts.ALL: "host or hosts in hosts.yaml, separated by commas; left out: all",
    Hosts.NONE: "",
}


def _has(kind: type[AnyRequest], flag: str) -> bool:
    """Return whether a command has a common flag."""
    if flag in {"host", "local"}:
        return kind.hosts is not Hosts.NONE
    return flag != "detach" or kind.changes


COMMON = {
    "local": "this machine itself, without SSH",
    "json": "print one JSON document",
    "debug": "print the traceback of a bug",
    "detach": "print the id of the operation and leave it running; see `ops --follow`",
}
Arguments = Mapping[str, Any]
"""What Invoke hands to a task: texts, flags and lists by field name."""


def task_of(kind: type[AnyRequest], carry_out: Callable[[type[AnyRequest], Common, Arguments], None]) -> Task[Any]:
    """Return the Invoke task of a command. All its arguments are flags: positionals would swallow `--help`."""
    options = options_of(kind)
    shared = [each for each in fields(Common) if _has(kind, each.name)]
    help_texts = {"host": HOST[kind.hosts]} | COMMON

    def body(context: object, **arguments: Any) -> None:
        common = Common(**{each.name: arguments.pop(each.name) for each in shared})
        carry_out(kind, common, arguments)

    parameters = [
        *(_parameter(name, _default(option, default)) for name, option, default in options),
        *(_parameter(each.name, each.default) for each in shared),
    ]
    # Invoke reads the flags from the signature.
    signature = inspect.Signature([inspect.Parameter("c", inspect.Parameter.POSITIONAL_OR_KEYWORD), *parameters])
    setattr(body, "__signature__", signature)  # noqa: B010 - mypy knows no such attribute of functions
    body.__doc__ = kind.__doc__
    made: Task[Any] = task(
        name=kind.name,
        positional=[],
        iterable=[name for name, _, default in options if isinstance(default, tuple)],
        auto_shortflags=False,
        help={name: option.help for name, option, _ in options} | {each.name: help_texts[each.name] for each in shared},
    )(body)
    return made


def _parameter(name: str, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)


def _default(option: Option, default: object) -> object:
    """Return the default for Invoke; None if mlxops parses the value, so that Invoke does not convert it."""
    return None if option.parse or isinstance(default, tuple) else default


def parse(kind: type[R], arguments: Arguments) -> R:
    """Return the request that was typed. Raises `UsageError`."""
    values = {}
    for name, option, default in options_of(kind):
        value = arguments.get(name)
        if value is None or value == []:
            if option.needed:
                raise _missing(name, option)
            value = default
        elif option.parse:
            value = option.parse(value)
        elif isinstance(default, tuple):
            value = tuple(value)
        values[name] = value
    return kind(**values).checked()


def _missing(name: str, option: Option) -> UsageError:
    return UsageError(
        "missing_argument",
        f"--{name} is needed",
        why="there is no default for it",
        hint=f"for example: `mlxctl {option.needed}`",
    )


def positions(kind: type[AnyRequest]) -> tuple[str, ...]:
    """Return the flags that `mlxctl` takes without their names, in their order, such as `--model`, `--port`."""
    positioned = [(option.position, f"--{name.replace('_', '-')}") for name, option, _ in options_of(kind)]
    return tuple(flag for position, flag in sorted((p, f) for p, f in positioned if p is not None))
