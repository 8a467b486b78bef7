"""Commands in texts for people. Pure.

An author writes a command in backticks: "wait for it: `mlxctl ops --follow 7f3a`". `split` takes them out, so that the
text travels together with its commands as data. The control node knows how the user calls the host, and `aim` adds the
flags that each command needs to go there.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Sequence

Commands = tuple[tuple[str, ...], ...]
"""Argument lists, such as `("mlxctl", "unload", "8100")`, in the order in which the text names them."""
_MARKED = re.compile(r"`((?:mlxctl|inv) [^`]+)`")


def split(text: str) -> tuple[str, Commands]:
    """Return the text without the backticks of its commands, and the commands."""
    commands: list[tuple[str, ...]] = []

    def plain(match: re.Match[str]) -> str:
        try:
            commands.append(tuple(shlex.split(match[1])))
        except ValueError:  # a quote in a value without quotes
            return match[1]
        return shlex.join(commands[-1])

    return _MARKED.sub(plain, text), tuple(commands)


def mark(text: str, commands: Commands) -> str:
    """Return the text with its commands in backticks: the inverse of `split`."""
    return _replaced(text, commands, lambda command: f"`{shlex.join(command)}`")


def aim(text: str, commands: Iterable[Sequence[str]], flags: Sequence[str]) -> tuple[str, Commands]:
    """Return text and commands with `flags`, such as `("--host", "studio2")`, in each command without such flags."""
    before = tuple(map(tuple, commands))
    after = {command: _with_flags(command, flags) for command in before}
    return _replaced(text, before, lambda command: shlex.join(after[command])), tuple(after[each] for each in before)


HOSTLESS = frozenset({"completion", "help", "schema", "setup", "skill"})
"""Commands that ask no host, and so take no `--host`."""


def _with_flags(command: tuple[str, ...], flags: Sequence[str]) -> tuple[str, ...]:
    hostless = len(command) < 2 or command[1] in HOSTLESS
    if hostless or command[1].startswith("-") or {"--host", "--local"}.intersection(command):
        return command
    return (*command[:2], *flags, *command[2:])


def _replaced(text: str, commands: Commands, new: Callable[[tuple[str, ...]], str]) -> str:
    """Replace the commands in their order. A command that the text does not have is left out."""
    done, rest = "", text
    for command in commands:
        before, matched, after = rest.partition(shlex.join(command))
        if matched:
            done, rest = done + before + new(command), after
    return done + rest


def commands_from_wire(value: object) -> Commands:
    """Return the commands of an error or a note; none if the value is not a list of lists of texts."""
    if not isinstance(value, list) or not all(isinstance(words, list) for words in value):
        return ()
    return tuple(tuple(map(str, words)) for words in value)
