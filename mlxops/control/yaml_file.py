"""Read YAML text with limits, and report a problem with its line.

PyYAML alone accepts a few hundred bytes that unfold to gigabytes (aliases of aliases), nesting that ends in a
RecursionError, and integers that take minutes to convert. `compose` refuses the first two, `construct` keeps such
an integer as text.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from yaml.composer import Composer
from yaml.resolver import Resolver

from mlxops.common.files import read_start
from mlxops.core.text import NotUTF8, utf8

MAX_NODES = 250_000
"""Nodes of a document, where an alias counts as all the nodes that it stands for."""
MAX_INTEGER_DIGITS = 32

_DESCRIPTORS = ("/dev/fd/", "/proc/self/fd/", "/dev/stdin")
_INTEGER = "tag:yaml.org,2002:int"


class FileProblem(Exception):
    """A file that cannot be used. `line` is 0 if the problem has no line."""

    def __init__(self, what: str, hint: str, line: int = 0) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        self.line = line

    def place(self, name: str) -> str:
        """Return `name:line`, or `name` if there is no line."""
        return f"{name}:{self.line}" if self.line else name


def read_text(path: Path, max_bytes: int, *, allow_pipe: bool = False) -> str:
    """Return the text of a UTF-8 file without its byte order mark. Raises `FileProblem`.

    `allow_pipe`: also accept a descriptor such as the /dev/fd/63 of a shell's `<(...)`. Reading one may block: the
    program behind it may ask for a passphrase.
    """
    from_shell = allow_pipe and str(path).startswith(_DESCRIPTORS)
    try:
        if from_shell:
            with path.open("rb") as stream:
                data = stream.read(max_bytes + 1)
        else:
            data = read_start(path, max_bytes + 1)
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileProblem(f"cannot be read: {reason}", "check the path and its permissions") from error
    if len(data) > max_bytes:
        raise FileProblem(f"is too large: more than {max_bytes // 1024} kB", "check the path")
    try:
        return utf8(data)
    except NotUTF8 as error:
        raise FileProblem(error.what, "save the file as UTF-8", error.line) from None


def compose(text: str, *, max_depth: int, aliases: bool) -> yaml.Node | None:
    """Return the root node of a document; None if it is empty. Raises `FileProblem`.

    `aliases`: allow anchors and aliases.
    """
    try:
        loader = _Loader(text)
        loader.max_depth = max_depth
        loader.aliases = aliases
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        if mark is not None and text.startswith("\t", mark.index):
            problem = FileProblem("a tab, where YAML allows only spaces", "replace it with spaces", mark.line + 1)
            raise problem from error
        raise _marked(error) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise FileProblem(f"the character U+{ord(text[error.position]):04X}", "remove it", line) from error


def construct(node: yaml.Node) -> object:
    """Return the Python value of a composed node. Merge keys are replaced in the node. Raises `FileProblem`."""
    loader = _Loader("")
    try:
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise _marked(error) from error
    except (ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:  # 2026-99-99 is no date, for example
        raise FileProblem(str(error)[:200], "correct that value, or quote it") from error
    finally:
        loader.dispose()


def _marked(error: yaml.MarkedYAMLError) -> FileProblem:
    mark = error.problem_mark or error.context_mark
    what = ", ".join(part for part in (error.problem, error.context) if part)
    hint = "correct that line; strings with special characters need quotes"
    return FileProblem(what, hint, mark.line + 1 if mark else 0)


def compose_fast(text: str, *, max_depth: int) -> yaml.Node | None:
    """Like `compose` without aliases, twenty times as fast.

    Raises `yaml.YAMLError`, `NotFast` and `FileProblem`. Call `compose` then: it may read the text, and its problems
    have the right lines. libyaml counts other line ends, and accepts a few texts more, such as {a?b: c}.
    """
    if not yaml.__with_libyaml__ or _NOT_PLAIN.search(text):
        raise NotFast
    loader = _FastLoader(text)
    loader.max_depth = max_depth
    return loader.get_single_node()


class NotFast(Exception):
    """A text with characters that libyaml and PyYAML treat differently, or a PyYAML without libyaml."""


_NOT_PLAIN = re.compile(r"[^\n -~]")


class _Limits(Composer):
    """Count nodes and levels while composing. An alias counts as all the nodes of its anchor."""

    max_depth = 0
    aliases = False
    depth = 0
    nodes = 0
    sizes: dict[str, int]
    """Anchor -> number of its nodes. An anchor that is still being composed has none."""

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[attr-defined]  # of the parser
        anchor: str | None = getattr(event, "anchor", None)
        if anchor is not None and not self.aliases:
            raise _problem(event, "anchors and aliases are not used here", "write the value out where it is needed")
        if self.depth >= self.max_depth:
            raise _problem(event, "nested too deeply", f"at most {self.max_depth} levels are read")
        before = self.nodes
        self.nodes += self._size(event, anchor) if isinstance(event, yaml.AliasEvent) else 1
        if self.nodes > MAX_NODES:
            raise _problem(event, f"more than {MAX_NODES} values, with aliases followed", "use fewer aliases")
        self.depth += 1
        try:
            node = super().compose_node(parent, index)  # type: ignore[arg-type]  # typeshed has int; PyYAML passes nodes
        finally:
            self.depth -= 1
        if anchor is not None and not isinstance(event, yaml.AliasEvent):
            self.sizes[anchor] = self.nodes - before
        return node

    def _size(self, alias: yaml.AliasEvent, anchor: str | None) -> int:
        if anchor in self.sizes:
            return self.sizes[anchor]
        if anchor in self.anchors:
            raise _problem(alias, f"the anchor {anchor} contains itself", "remove that alias")
        return 1  # PyYAML reports an unknown anchor itself


class _Loader(_Limits, yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        yaml.SafeLoader.__init__(self, text)
        self.sizes = {}

    def construct_integer(self, node: yaml.ScalarNode) -> object:
        return node.value if len(node.value) > MAX_INTEGER_DIGITS else self.construct_yaml_int(node)


_Loader.add_constructor(_INTEGER, _Loader.construct_integer)


class _FastLoader(_Limits, Resolver):
    """Compose the events of libyaml."""

    def __init__(self, text: str) -> None:
        Composer.__init__(self)
        Resolver.__init__(self)
        self.sizes = {}
        events = yaml.CSafeLoader(text)
        self.check_event, self.get_event, self.peek_event = events.check_event, events.get_event, events.peek_event


def _problem(event: yaml.Event, what: str, hint: str) -> FileProblem:
    return FileProblem(what, hint, event.start_mark.line + 1 if event.start_mark else 0)
