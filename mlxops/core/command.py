"""What a command is. One frozen dataclass, a `Request`, declares it: fields, types, help, defaults, positions.

From this one declaration come the Invoke task and the positional forms of `mlxctl` (`mlxops.cli.options`), the form in
which the request travels and is recorded (`wire`), and the typed object that the agent's operation gets.

By convention the request of `unload-all` is the class `UnloadAll` in `mlxops/core/commands/unload_all.py`, beside its
result and the function `show`, which renders replies as text. Its operation is `run` in
`mlxops/agent/operations/unload_all.py`. A new command that only reads is these two files; the steps are in
`mlxops/docs/development.md`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import field, fields
from enum import Enum
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeAlias, TypeVar, cast, get_args

from mlxops.core import names, wire
from mlxops.core.frozen import dataclass

COMMANDS = "mlxops.core.commands"
_NAME = re.compile(r"[a-z]+(-[a-z]+)*")


class Group(Enum):
    """How help groups the commands."""

    SERVE = "serve"
    LOOK = "look"
    FILES = "files"
    HOST = "host"
    HIDDEN = ""
    """The command line has no such command; mlxops itself asks for it."""


R = TypeVar("R", covariant=True)


class Hosts(Enum):
    """Which hosts a command asks."""

    ONE = "the one that is named, or the default host"
    SEVERAL = "those that are named, or the default host"
    ALL = "those that are named, or all"
    NONE = "it asks no host by itself"


class Option(NamedTuple):
    """How a field of a request is given on the command line."""

    help: str
    position: int | None = None
    """Its place among the words without a flag, from 0."""
    parse: Callable[[str], object] | None = None
    """From the text to the field's type. Raises `UsageError`."""
    needed: str = ""
    """An example of the command line; the field must be given."""


def option(
    help: str,
    *,
    default: Any = None,
    position: int | None = None,
    parse: Callable[[str], object] | None = None,
    needed: str = "",
    sent: bool = True,
) -> Any:
    """Declare a field with a flag. `sent`: the agent gets it, too."""
    metadata = {"option": Option(help, position, parse, needed), "local": not sent}
    return field(default=default, metadata=metadata)


def switch(help: str, *, sent: bool = True) -> Any:
    """Declare a field with a flag that takes no value."""
    return option(help, default=False, sent=sent)


def seconds(flag: str, *, zero: bool = False) -> Callable[[str], float]:
    return lambda text: names.seconds(text, flag, zero=zero)


def whole(flag: str, least: int, most: int) -> Callable[[str], int]:
    return lambda text: names.whole(text, flag, least, most)


class UnknownCommandError(ValueError):
    """This version has no such command."""


class Subject(NamedTuple):
    """What a request is about: for locks, records and messages."""

    model: str | None = None
    port: str | None = None
    repo: str | None = None


@dataclass(frozen=True)
class Request(Generic[R]):
    """What a command is asked to do; `R` is its result. The docstring is the command's help."""

    name: ClassVar[str] = ""
    hosts: ClassVar[Hosts] = Hosts.ONE
    result: ClassVar[type] = object
    """The dataclass with which the agent answers: `R`."""
    changes: ClassVar[bool] = False
    """It changes the host: recorded as an operation, carried out by a worker, only by an agent of the same build."""
    cancellable: ClassVar[bool] = False
    """It may take long. The others take seconds, and are better done whole."""
    repeatable: ClassVar[bool] = False
    """It only looks, and may be asked again over the same connection."""

    dry_run = False

    nested: ClassVar[bool] = False
    """In JSON documents the result has a key of its own, `result`, and does not lie beside the host's name."""
    group: ClassVar[Group] = Group.HIDDEN
    example: ClassVar[str] = ""

    def __init_subclass__(
        cls,
        *,
        group: Group = Group.HIDDEN,
        example: str = "",
        hosts: Hosts = Hosts.ONE,
        changes: bool = False,
        cancellable: bool = False,
        repeatable: bool = False,
        nested: bool = False,
    ) -> None:
        package, _, module = cls.__module__.rpartition(".")
        cls.name = module.replace("_", "-") if package == COMMANDS else ""
        cls.group, cls.example, cls.hosts = group, example, hosts
        cls.changes, cls.cancellable, cls.repeatable = changes, cancellable, repeatable
        cls.nested = nested or changes
        if group is not Group.HIDDEN and not example:
            raise TypeError(f"{cls.__name__}: a command of the group {group.value} needs an example for the help")
        for base in getattr(cls, "__orig_bases__", ()):
            for argument in get_args(base):
                cls.result = argument if isinstance(argument, type) else cls.result

    def checked(self) -> Self:
        """Return the request to send. Raises `UsageError` for flags that contradict each other."""
        return self

    @property
    def subject(self) -> Subject:
        return Subject(*(getattr(self, key, None) for key in Subject._fields))

    @property
    def acts(self) -> bool:
        """Whether it changes something, and is not a dry run."""
        return self.changes and not self.dry_run


AnyRequest: TypeAlias = Request[object]


@dataclass(frozen=True)
class Plannable(Request[R]):
    """A change that can be shown without being made."""

    dry_run: bool = switch("show the plan; change nothing")


@dataclass(frozen=True)
class Stopping(Plannable[R]):
    """A change that may stop a server."""

    kill: bool = switch("kill a server that does not end, even one that holds more memory than kill_limit")


@dataclass(frozen=True)
class Draining(Stopping[R]):
    """A change that may stop a server which is in use."""

    drain: float | None = option(
        "seconds that open requests get before they are cut off (30)", parse=seconds("--drain", zero=True)
    )


def command_module(name: str) -> ModuleType:
    """Return the module of `mlxops.core.commands` for a command, imported now. Raises `UnknownCommandError`."""
    if not _NAME.fullmatch(name):
        raise UnknownCommandError(name)
    try:
        return import_module(f"{COMMANDS}.{name.replace('-', '_')}")
    except ModuleNotFoundError:
        raise UnknownCommandError(name) from None


@cache
def request_type(name: str) -> type[AnyRequest]:
    """Return the request of a command. Raises `UnknownCommandError`."""
    return cast("type[AnyRequest]", getattr(command_module(name), name.title().replace("-", "")))


def decode_request(name: str, args: object) -> AnyRequest:
    """Raises `UnknownCommandError`, and `wire.DecodeError` for arguments that do not fit."""
    return wire.decode(request_type(name), args)


def options_of(kind: type[AnyRequest]) -> list[tuple[str, Option, object]]:
    """Return (field, option, default) of each field with a flag."""
    return [(each.name, each.metadata["option"], each.default) for each in fields(kind) if each.metadata.get("option")]
