"""The program `mlxctl`: the collection of `inv`, with positional forms such as `load MODEL PORT`.

Usage errors exit with 2. The user's Invoke configuration is not read.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Sequence
from typing import Any

from invoke.config import Config
from invoke.exceptions import Exit, ParseError
from invoke.parser.argument import Argument
from invoke.program import Program
from invoke.tasks import Task

from mlxops import __version__
from mlxops.cli import options
from mlxops.common.build import PACKAGE, build_id
from mlxops.control import output
from mlxops.core.command import UnknownCommandError, request_type
from mlxops.core.errors import Exit as Status
from mlxops.core.errors import OutputFailed, UsageError


def positional_form(command: str) -> str:
    """Return how a command is typed, such as `mlxctl load MODEL PORT`."""
    return " ".join(["mlxctl", command, *(flag.removeprefix("--").upper() for flag in _flags_of(command))])


class _OwnConfig(Config):
    """A configuration without files and environment variables, which are for other task suites."""

    def __init__(self) -> None:
        super().__init__(lazy=True)

    def load_shell_env(self) -> None:
        """Read nothing."""


class _Mlxctl(Program):
    def print_help(self) -> None:
        import shutil

        from mlxops.cli import overview
        from mlxops.tasks import overview_entries

        print(overview.overview(overview_entries(), shutil.get_terminal_size((120, 24)).columns))  # noqa: T201

    def print_version(self) -> None:
        python = ".".join(map(str, sys.version_info[:3]))
        print(f"mlxctl {__version__} (build {build_id()}, Python {python}, {PACKAGE})")  # noqa: T201

    def print_task_help(self, name: str) -> None:
        from mlxops.tasks import example

        rows = self.parser.contexts[name].help_tuples()
        usage = " ".join([positional_form(name), *(["[options]"] if rows else [])])
        docstring = inspect.getdoc(self.collection[name]) or ""
        print(f"Usage: {usage}\n\n{docstring}\n\nExample: {example(name)}\n")  # noqa: T201
        if rows:
            print("Options:")  # noqa: T201
            self.print_columns(rows)

    def parse_core(self, argv: list[str] | None) -> None:
        try:
            super().parse_core(argv)
        except ParseError as error:
            raise _usage(error) from None

    def parse_tasks(self) -> None:
        try:
            super().parse_tasks()
        except ParseError as error:
            raise _usage(error) from None

    def parse_cleanup(self) -> None:
        try:
            super().parse_cleanup()
        except ParseError as error:  # --help WHAT
            raise _usage(error) from None
        except Exit as error:  # --list WHAT; without a message the program has done its work
            if not error.message:
                raise
            raise _usage(error) from None


def _usage(error: ParseError | Exit) -> SystemExit:
    task = getattr(getattr(error, "context", None), "name", None)
    hint = f"`mlxctl {task} --help`" if task else "`mlxctl --list`"
    problem = UsageError("usage", str(error).rstrip("!"), why="it is not a command line of mlxctl", hint=hint)
    if "--json" in sys.argv:
        try:
            output.say(output.error_document(next((w for w in sys.argv[1:] if not w.startswith("-")), ""), problem))
        except (BrokenPipeError, OutputFailed):
            output.discard(1)  # standard error has the error, too
    output.Console(many=False).error("", problem)
    return SystemExit(int(Status.USAGE))


def with_flags(words: Sequence[str], takes_value: frozenset[str]) -> list[str]:
    """Return `load --model NAME --port PORT` for `load NAME PORT`. Other words stay as they are.

    `takes_value`: flags whose next word is their value and not a position.
    """
    flags = _flags_of(words[0]) if words else ()
    if not flags:
        return list(words)
    typed = {word.partition("=")[0] for word in words}
    made, free = [words[0]], iter([flag for flag in flags if flag not in typed])
    rest = iter(words[1:])
    for word in rest:
        if word.startswith("-"):
            made.append(word)
            if word in takes_value:
                made += [value for value in [next(rest, None)] if value is not None]
        else:
            flag = next(free, None)
            made += [flag, word] if flag else [word]
    return made


def _flags_of(command: str) -> tuple[str, ...]:
    try:
        return options.positions(request_type(command))
    except UnknownCommandError:
        return ()


def _arguments(task: Task[Any]) -> list[Argument]:
    """Return the arguments of a copy, because `get_arguments` removes the help texts of its task."""
    copied = copy.copy(task)
    copied.help = dict(task.help)
    return copied.get_arguments()


def run() -> None:
    """Run `mlxctl`. Raises `SystemExit`."""
    try:
        try:
            _run()
        finally:
            # Invoke prints help and lists, and may not notice that they could not be written.
            if sys.stdout is not None:
                output.say("", end="")
    except BrokenPipeError:
        output.discard(1)
        raise SystemExit(141) from None
    except OutputFailed as error:
        output.discard(1)
        output.Console(many=False).error("", error)
        raise SystemExit(int(error.exit)) from None


def _run() -> None:
    from mlxops.tasks import collection

    namespace = collection(sys.argv[1:])
    takes_value = frozenset(
        name
        for task in namespace.tasks.values()
        for argument in _arguments(task)
        if argument.takes_value
        for name in (f"--{(argument.name or '').replace('_', '-')}",)
    )
    program = _Mlxctl(version=__version__, namespace=namespace, name="mlxctl", binary="mlxctl", config_class=_OwnConfig)
    program.run(["mlxctl", *with_flags(sys.argv[1:], takes_value)])
