"""Command lines of engines: their options, the program that a process runs, and checks of a model's own arguments."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Sequence

from mlxops.core.errors import Refused
from mlxops.core.frozen import dataclass
from mlxops.core.registry import Model


def long_options(argv: Sequence[str]) -> dict[str, str]:
    """Return the long options of an argv with their values, from `--a b` and `--a=b`. The last one wins."""
    options: dict[str, str] = {}
    for index, word in enumerate(argv):
        if word.startswith("--"):
            key, equals, value = word.partition("=")
            next_word = argv[index + 1] if index + 1 < len(argv) else ""
            options[key] = value if equals else next_word
    return options


def abbreviated_option(argv: Sequence[str], option: str, shortest: int) -> str | None:
    """Return an option's value in the argv of an argparse program, which accepts abbreviations.

    `shortest` is the length of the shortest unambiguous abbreviation, dashes included.
    """
    result = None
    for key, value in long_options(argv).items():
        if len(key) >= shortest and option.startswith(key):
            result = value
    return result or None


def parse_port(text: str) -> int | None:
    """Return the port in an option of a process; None if it is not a number."""
    return int(text) if text.isdecimal() and len(text) <= 5 else None


@dataclass(frozen=True)
class RunningProgram:
    """The program that a process runs (a file or a Python module) and its arguments."""

    path: str
    """Empty for a module."""
    module: str
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        return os.path.basename(self.path) or self.module


_PYTHON = re.compile(r"(python|pypy)[\d.]*[a-z]?", re.IGNORECASE)
_PYTHON_OPTIONS_WITH_VALUE = {"-W", "-X", "--check-hash-based-pycs"}
"""Python's own options whose value may be the next word (`python --help`)."""


START_FILE = "mlxops_start.py"
"""It runs a program after the modules of that program were imported."""
_START_WORDS = 4
"""Words before the program: Python, the file, its descriptor, the modules."""


def is_preloaded(argv: Sequence[str]) -> bool:
    """Return whether a process with this argv is a program that mlxops started with the start file."""
    return len(argv) > _START_WORDS and os.path.basename(argv[1]) == START_FILE


def program_of(argv: Sequence[str]) -> RunningProgram | None:
    """Return the program that a process with this argv runs: its first word, or the script or module of a Python.

    Later words do not count, because tmux, ssh and editors have other commands in their arguments.
    """
    if not argv or not argv[0]:
        return None
    if is_preloaded(argv):
        return program_of(argv[_START_WORDS:])
    if not _PYTHON.fullmatch(os.path.basename(argv[0])):
        return RunningProgram(argv[0], "", tuple(argv[1:]))
    words = iter(enumerate(argv[1:], 2))
    for next_index, word in words:
        if not word.startswith("-"):
            return RunningProgram(word, "", tuple(argv[next_index:]))
        if word in _PYTHON_OPTIONS_WITH_VALUE:
            next(words, None)
        elif not word.startswith("--"):
            # Short options may share a word: -um MODULE, -ImMODULE. -c is followed by code, not by a program.
            letters = re.match(r"-[^cmWX]*([cmWX]?)(.*)", word, re.DOTALL)
            letter, attached = letters.groups() if letters else ("", "")
            if letter == "m":
                module = attached or next((value for _, value in words), "")
                arguments = tuple(argv[next_index + (not attached) :])
                return RunningProgram("", module, arguments) if module else None
            if letter == "c":
                return None
            if letter and not attached:
                next(words, None)
    return None


def check_model_args(engine: str, model: Model, reserved: frozenset[str], help: str | None) -> None:
    """Check a model's own arguments against mlxops' reserved options and the engine's help text.

    `help` None: the help text is not known. Raises `Refused` (reserved_argument, unknown_argument), also for the
    abbreviation of a reserved option.
    """
    known = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", help or ""))
    for index, word in enumerate(model.args):
        key = word.partition("=")[0]
        if help is not None and re.match("--[a-z]", key) and not any(option.startswith(key) for option in known):
            raise Refused(
                "unknown_argument",
                f"the model's args contain {key!r}, which the installed {engine} does not know",
                why="its --help does not mention it",
                hint=f"remove it: {_removal_command(model, index)}; or correct it{_suggestion(key, known)}",
            )
        taken = next((r for r in reserved if key == r or (len(key) > 2 and r.startswith(key))), None)
        if taken:
            raise Refused(
                "reserved_argument",
                f"the model's args contain {key!r}",
                why=f"mlxops sets {taken} of {engine} itself",
                hint=f"remove it: {_removal_command(model, index)}",
            )


def check_model_options(engine: str, model: Model, known: Collection[str]) -> None:
    """Raise `Refused` (unsupported_option) if the entry sets an option that the engine does not have."""
    if unknown := [key for key, value in model.options.items() if value is not None and key not in known]:
        raise Refused(
            "unsupported_option",
            f"{engine} has no option for {', '.join(unknown)}",
            why=f"the entry {model.name!r} sets {'it' if len(unknown) == 1 else 'them'}",
            hint=f"remove it: `mlxctl set --model {model.name} --set {unknown[0]}=`; or set another engine for it",
        )


def _removal_command(model: Model, index: int) -> str:
    """Return the command that removes the argument at `index`, with its value, from a model's args."""
    word, after = model.args[index], model.args[index + 1 : index + 2]
    count = 2 if "=" not in word and after and not after[0].startswith("-") else 1
    rest = [*model.args[:index], *model.args[index + count :]]
    return f"`mlxctl set --model {model.name} --set {shlex.quote('args=' + shlex.join(rest))}`"


def _suggestion(key: str, known: Collection[str]) -> str:
    import difflib

    close = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
