"""What may come next on a command line of mlxctl: `mlxctl __complete SHELL ...`, which the scripts of `completion` run.

It runs at each press of the tabulator key. So it imports nothing that takes time, reads one small file, and asks no
host.

    __complete bash BREAKS LINE         the line up to the cursor, and the characters at which bash divides words
    __complete zsh|fish WORD... WORD    the words before the cursor, and the one at the cursor

It prints one candidate a line. Behind it zsh and fish get a tab and its meaning. `:files` stands for names of files.
"""

from __future__ import annotations

import os
import sys

from mlxops.cli import names_folder
from mlxops.cli.words import COMMANDS

FILES = ":files"
MAX_BYTES = 1 << 18
"""Limit of the file of names; `remember` keeps it far below."""
_SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./,:@%+=-")
Flags = dict[str, tuple[str, str]]
Candidates = list[tuple[str, str]]
"""Each with its meaning."""


def names_file() -> str:
    return os.path.join(names_folder(), "names")


def main(argv: list[str]) -> int:
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape", newline="\n")  # type: ignore[union-attr]
    try:
        os.makedirs(names_folder(), 0o700, exist_ok=True)  # from now on, commands remember names
    except OSError:
        pass
    match argv:
        case ["bash", breaks, line]:
            print("\n".join(_for_bash(breaks, line)))  # noqa: T201
        case [_, *words, current]:
            print("\n".join("\t".join(each).rstrip("\t") for each in candidates(words, current)))  # noqa: T201
    return 0


def candidates(words: list[str], current: str) -> Candidates:
    """Return what may stand for `current` after the words behind `mlxctl`."""
    command = next((word for word in words if not word.startswith("-")), None)
    if command is None:
        return [(name, COMMANDS[name][0]) for name in COMMANDS] + [("--help", ""), ("--version", "")]
    if command not in COMMANDS:
        return []
    _, positions, flags = COMMANDS[command]
    flag, equals, start = current.partition("=")
    if equals and flag in flags:
        return [(f"{flag}={value}", meaning) for value, meaning in _values(_kind(flags, flag), start, words)]
    rest = words[words.index(command) + 1 :]
    if rest and _kind(flags, rest[-1]):
        return _values(_kind(flags, rest[-1]), current, words)
    typed = {word.partition("=")[0] for word in rest}
    more = [(name, meaning) for name, (kind, meaning) in flags.items() if name not in typed or kind.startswith("+")]
    free = [position for position in positions if position not in typed]
    count = _count_free(rest, flags)
    if current.startswith("-") or count >= len(free):
        return more
    return _values(_kind(flags, free[count]), current, words)


def _kind(flags: Flags, flag: str) -> str:
    """Return the kind of a flag's value; empty for a switch, and for a word that is no flag."""
    return flags[flag][0].lstrip("+") if flag in flags else ""


def _count_free(words: list[str], flags: Flags) -> int:
    """Return how many words are neither flags nor their values."""
    count, skip = 0, False
    for word in words:
        if skip:
            skip = False
        elif word.startswith("-"):
            skip = bool(_kind(flags, word))
        else:
            count += 1
    return count


def _values(kind: str, start: str, words: list[str]) -> Candidates:
    """Return the values of a kind: `@` and what `remember` calls it, `,` and a list, `:files`, or choices."""
    if kind == FILES:
        return [(FILES, "")]
    if kind.startswith(","):  # several, separated by commas
        before, comma, _ = start.rpartition(",")
        taken = before.split(",")
        return [
            (before + comma + value, meaning) for value, meaning in _values(kind[1:], "", words) if value not in taken
        ]
    if not kind.startswith("@"):
        return [(word, "") for word in kind.split() if word != "?"]
    wanted = kind[1:].split("|")
    hosts = _hosts(words)
    found: dict[str, str] = {}
    for each, host, name, meaning in remembered():
        if each in wanted and (not hosts or each == "host" or host in hosts):
            found.setdefault(name, meaning)
    return list(found.items())


def _hosts(words: list[str]) -> list[str]:
    """Return the hosts that the line names; none if it names none."""
    for index, word in enumerate(words):
        if word == "--host" and index + 1 < len(words):
            return words[index + 1].split(",")
        if word.startswith("--host="):
            return word[7:].split(",")
    return []


def remembered() -> list[list[str]]:
    """Return the rows of the file of names: kind, host, name and meaning."""
    try:
        with open(names_file(), encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            rows = [line.split("\t") for line in file.read(MAX_BYTES).split("\n")]
    except OSError:
        return []
    return [row for row in rows if len(row) == 4]


# -- bash: it leaves to us what the others do themselves -------------------------------------------------------------


def _for_bash(breaks: str, line: str) -> list[str]:
    """Return the candidates as bash has to insert them: quoted, and without the part that it does not replace."""
    words, current, kept, quote = split(line, breaks)
    while words and os.path.basename(words[0]) != "mlxctl" and "=" in words[0]:
        words = words[1:]  # variables before the command
    found = [value for value, _ in candidates(words[1:], current)]
    if found == [FILES]:
        return found
    return [_quoted(value[kept:], quote) for value in found if value.startswith(current)]


def split(line: str, breaks: str) -> tuple[list[str], str, int, str]:
    """Divide a line as a shell does.

    Return the words before the cursor, the word at the cursor, how many of its characters bash does not replace, and
    the quote that is open there.
    """
    words: list[str] = []
    word, kept, quote, begun = "", 0, "", False
    escaped = False
    for character in line:
        if escaped:
            if quote and character not in '"\\$`':
                word += "\\"
            word, escaped = word + character, False
        elif character == "\\" and quote != "'":
            escaped, begun = True, True
        elif quote:
            if character == quote:
                quote = ""
            else:
                word += character
        elif character in "\"'":
            quote, begun, kept = character, True, len(word)
        elif character in " \t\n":
            words += [word] if begun else []
            word, kept, begun = "", 0, False
        else:
            word, begun = word + character, True
            kept = len(word) if character in breaks else kept
    return words, word, kept, quote


def _quoted(text: str, quote: str) -> str:
    if quote == "'":
        return text.replace("'", "'\\''")
    unsafe = '"\\$`' if quote else ""
    return "".join(f"\\{each}" if (each in unsafe if quote else _is_unsafe(each)) else each for each in text)


def _is_unsafe(character: str) -> bool:
    return character not in _SAFE and character.isascii()
