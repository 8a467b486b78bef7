"""Read the variables of an env file as sh (`set -a; . FILE`) and python-dotenv do. Pure: execute nothing.

A value is certain if both read the same one. It is doubtful if they differ or sh would run a command: which of the two
reads the gateway's file is not known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mlxops.core.frozen import dataclass

_ESCAPES = dict(zip("abfnrtv", "\a\b\f\n\r\t\v", strict=True))
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Problem:
    """A line that sh and python-dotenv may read differently. `why` never contains a value."""

    line: int
    why: str


@dataclass(frozen=True)
class EnvFile:
    values: Mapping[str, str]
    doubtful: frozenset[str] = frozenset()
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class _Setting:
    line: int
    name: str
    value: str | None
    """None: only running the line would show it."""


def parse(text: str) -> EnvFile:
    """Read the lines that are assignments, and report the others."""
    problems: dict[int, str] = {}
    # systemd and ini files have such comments. sh and python-dotenv would not take them as comments.
    text = re.sub(r"(?m)^[ \t]*;", "#", text)
    if text.startswith("\ufeff"):
        problems[1] = "a byte order mark stands before its name: save the file without one"
    sh, dotenv = _Sh(text, problems), _Dotenv(text)
    for line in dotenv.not_understood:
        if line in sh.not_understood:
            problems.setdefault(line, "it is not NAME=value, or its quotes do not end")
    shell, other = sh.values, dotenv.values
    doubtful = set[str]()
    for name in dict.fromkeys([*shell, *other]):
        one, two = shell.get(name), other.get(name)
        if one is None or two is None or one.value is None or one.value != two.value or name in sh.borrowed:
            doubtful.add(name)
            line = (two or one or _Setting(1, name, None)).line
            problems.setdefault(line, _why(name, one, two, sh))
    values = {name: setting.value or "" for name, setting in {**shell, **other}.items()}
    return EnvFile(values, frozenset(doubtful), tuple(Problem(*problem) for problem in sorted(problems.items())))


def _why(name: str, one: _Setting | None, two: _Setting | None, sh: _Sh) -> str:
    if name in sh.borrowed and one is not None and two is not None and one.value == two.value:
        return f"the value of {name} has a variable in it that this file does not set"
    if one is not None and one.value is not None and one.value.endswith("\r"):
        return f"sh keeps the carriage return at the end of {name}: save the file with LF line ends"
    return f"sh and python-dotenv do not read the same value for {name}"


class _Stop(Exception):
    """The line is malformed, or only running it would show its effect."""


class _Dotenv:
    """Read as python-dotenv does (grammar of 1.2.4). Expand `${NAME}` and `${NAME:-default}` in every value."""

    _NAME = re.compile(r"(?:export[^\S\r\n]+)?(?P<name>'[^']+'|(?!')[^=\#\s]+)[^\S\r\n]*")
    _EQUALS = re.compile(r"=(?P<blank>[^\S\r\n]*)")
    _QUOTED = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""", re.DOTALL)
    _PLAIN = re.compile(r"[^\r\n]*")
    _END = re.compile(r"(?:[^\S\r\n]*\#[^\r\n]*)?[^\S\r\n]*(?:\r\n|\n|\r|$)")
    _REST = re.compile(r"[^\r\n]*(?:\r\n|\n|\r)?")
    _REFERENCE = re.compile(r"\$\{([^}:]*)(?::-([^}]*))?\}")

    def __init__(self, text: str) -> None:
        self.values: dict[str, _Setting] = {}
        self.not_understood: set[int] = set()
        self._text, self._at = text, 0
        while self._skip_space():
            line = text.count("\n", 0, self._at) + 1
            try:
                if not text.startswith("#", self._at):
                    self._binding(line)
                self._take(self._END)
            except _Stop:
                self.not_understood.add(line)
                self._take(self._REST)

    def _skip_space(self) -> bool:
        while self._at < len(self._text) and self._text[self._at].isspace():
            self._at += 1
        return self._at < len(self._text)

    def _take(self, pattern: re.Pattern[str]) -> re.Match[str]:
        match = pattern.match(self._text, self._at)
        if match is None:
            raise _Stop
        self._at = match.end()
        return match

    def _binding(self, line: int) -> None:
        name = self._take(self._NAME)["name"].strip("'")
        if not self._text.startswith("=", self._at):
            self._check_end()
            self.not_understood.add(line)
            self.values.pop(name, None)  # the name alone removes an earlier assignment
            return
        blank = self._take(self._EQUALS)["blank"]
        if self._text.startswith(("'", '"'), self._at):
            value = self._unescaped(self._take(self._QUOTED)[0])
        elif blank and self._text.startswith("#", self._at):
            value = ""
        else:
            value = re.sub(r"\s+#.*", "", self._take(self._PLAIN)[0]).rstrip()
        self._check_end()
        self.values[name] = _Setting(line, name, self._REFERENCE.sub(self._expanded, value))

    def _check_end(self) -> None:
        if self._END.match(self._text, self._at) is None:
            raise _Stop

    def _unescaped(self, quoted: str) -> str:
        letters = r"\\([\\'])" if quoted[0] == "'" else r"""\\([\\'"abfnrtv])"""
        return re.sub(letters, lambda match: _ESCAPES.get(match[1], match[1]), quoted[1:-1])

    def _expanded(self, match: re.Match[str]) -> str:
        known = self.values.get(match[1])
        return known.value if known is not None and known.value is not None else match[2] or ""


class _Sh:
    """Read as `set -a; . FILE` does (POSIX, "Shell Command Language"), for lines that only assign."""

    def __init__(self, text: str, problems: dict[int, str]) -> None:
        self.values: dict[str, _Setting] = {}
        self.not_understood: set[int] = set()
        self.borrowed: set[str] = set()
        """Variables whose value refers to a variable that the file does not set."""
        self._text, self._at, self._problems = text, 0, problems
        while self._at < len(text):
            self._line()

    def _line(self) -> None:
        text = self._text
        begin = self._at
        line = text.count("\n", 0, begin) + 1
        before = dict(self.values)
        try:
            self._blanks()
            self._word("export")
            while match := _NAME.match(text, self._at):
                if text[match.end() : match.end() + 1] != "=":
                    raise _Stop
                self._at = match.end() + 1
                self._unset = False
                value = self._value()
                self.values[match[0]] = _Setting(line, match[0], value)
                self.borrowed.discard(match[0])
                if self._unset:
                    self.borrowed.add(match[0])
                self._blanks()
            self._end()
        except _Stop:
            # Only running the line would show what it sets.
            self.values = before
            self.not_understood.add(line)
            self._at = self._end_of_line(begin)
            for match in re.finditer(rf"(?<!\w)({_NAME.pattern})=", text[begin : self._at]):
                self.values[match[1]] = _Setting(line, match[1], None)

    def _end_of_line(self, at: int) -> int:
        """Return the position after the newline that ends the line at `at`, neither quoted nor escaped."""
        first = self._text.find("\n", at) + 1 or len(self._text)
        quote = ""
        while at < len(self._text):
            letter = self._text[at]
            at += 1
            if letter == "\\" and quote != "'":
                at += 1
            elif letter == "\n" and not quote:
                return at
            elif letter == quote:
                quote = ""
            elif letter in "'\"" and not quote:
                quote = letter
        return len(self._text) if not quote else first

    def _blanks(self) -> None:
        while self._text[self._at : self._at + 1] in {" ", "\t"}:
            self._at += 1

    def _word(self, word: str) -> None:
        if re.compile(rf"{word}[ \t]+").match(self._text, self._at):
            self._at += len(word)
            self._blanks()

    def _end(self) -> None:
        """Take the end of a command: a comment, a semicolon, or the end of the line."""
        text = self._text
        if text.startswith("#", self._at):
            end = text.find("\n", self._at)
            self._at = len(text) if end < 0 else end
        if self._at < len(text) and text[self._at] not in ";\n":
            raise _Stop
        self._at += 1

    def _value(self) -> str:
        """Take one word, remove its quotes and expand its variables."""
        text, made = self._text, list[str]()
        if text.startswith("~", self._at):
            raise _Stop
        while self._at < len(text) and (letter := text[self._at]) not in " \t\n;":
            self._at += 1
            if letter == "'":
                end = text.find("'", self._at)
                if end < 0:
                    raise _Stop
                made.append(text[self._at : end])
                self._at = end + 1
            elif letter == '"':
                made.append(self._quoted())
            elif letter == "\\":
                following = text[self._at : self._at + 1]
                self._at += 1
                made.append("" if following == "\n" else following)
            elif letter == "$":
                made.append(self._expanded())
            elif letter in "&|<>()`":
                raise _Stop
            else:
                made.append(letter)
        return "".join(made)

    def _quoted(self) -> str:
        text, made = self._text, list[str]()
        while self._at < len(text):
            letter = text[self._at]
            self._at += 1
            if letter == '"':
                return "".join(made)
            if letter == "\\" and text[self._at : self._at + 1] in {"$", "`", '"', "\\", "\n"}:
                made.append(text[self._at].replace("\n", ""))
                self._at += 1
            elif letter == "$":
                made.append(self._expanded())
            elif letter == "`":
                raise _Stop
            else:
                made.append(letter)
        raise _Stop

    _REFERENCE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)(?:(:?-)([^}$`\\\"']*))?\}|([A-Za-z_][A-Za-z0-9_]*)")

    def _expanded(self) -> str:
        match = self._REFERENCE.match(self._text, self._at)
        if match is None:
            following = self._text[self._at : self._at + 1]
            if following and following in "({'\"0123456789@*#?-$!":
                raise _Stop
            return "$"
        self._at = match.end()
        known = self.values.get(match[1] or match[4])
        if known is not None:
            if known.value is None:
                raise _Stop
            return known.value or (match[3] or "" if match[2] == ":-" else "")
        if match[2] is None:
            self._unset = True
        return match[3] or ""
