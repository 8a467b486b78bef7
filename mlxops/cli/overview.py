"""What `mlxctl` and `mlxctl --help` show: the commands in groups, then the options. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Entry(NamedTuple):
    """A command in the overview."""

    group: str
    example: str
    help: str


COMMON_OPTIONS = (
    ("--host NAME[,NAME]", "the hosts to ask, as hosts.yaml names them"),
    ("--local", "this machine, without SSH"),
    ("--json", "print one JSON document"),
    ("--dry-run", "on changes: show the plan; change nothing"),
)
PROGRAM_OPTIONS = (
    ("COMMAND --help", "the options of a command"),
    ("--list", "the commands without groups"),
    ("--version", "version, build, Python and place"),
)
"""Invoke has more of its own. They configure shell commands, and mlxctl runs none."""
_INDENT = "  "


def overview(entries: Sequence[Entry], columns: int) -> str:
    """Return the help of the program, for a terminal of so many columns."""
    groups = dict.fromkeys(entry.group for entry in entries)
    example_width = max(len(entry.example) for entry in entries)
    help_width = max(len(entry.help) for entry in entries)
    beside = len(_INDENT) * 2 + example_width + help_width <= columns

    def lines(group: str) -> str:
        return "\n".join(_lines(entry, example_width if beside else 0) for entry in entries if entry.group == group)

    blocks = [
        "Usage: mlxctl COMMAND [OPTIONS]\n\nThe manual: mlxctl help",
        *(f"{group}\n{lines(group)}" for group in groups),
        _options("options of most commands", COMMON_OPTIONS),
        _options("options of mlxctl", PROGRAM_OPTIONS),
    ]
    return "\n\n".join(blocks)


def _lines(entry: Entry, width: int) -> str:
    """Return the example with the help beside it, or below it if `width` is 0."""
    if width:
        return f"{_INDENT}{entry.example:{width}}{_INDENT}{entry.help}"
    return f"{_INDENT}{entry.example}\n{_INDENT * 3}{entry.help}"


def _options(title: str, options: tuple[tuple[str, str], ...]) -> str:
    width = max(len(option) for option, _ in (*COMMON_OPTIONS, *PROGRAM_OPTIONS))
    return "\n".join([title, *(f"{_INDENT}{option:{width}}{_INDENT}{text}" for option, text in options)])
