"""Results as text: plain tables and single lines, with nothing in them that could steer a terminal. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from mlxops.core.replies import HostReply

R = TypeVar("R")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: object) -> str:
    """Return the text with control and direction characters escaped; tabs and line ends stay."""
    text = str(text)
    if text.isprintable():  # a fifth of the time, for nearly every cell of a table
        return text
    return _CONTROL.sub(lambda match: ascii(match.group())[1:-1], text)


def one_log_line(text: object) -> str:
    """Return a line of a log, its spaces kept."""
    return harmless(text).replace("\n", " ")


def one_line(text: object) -> str:
    return " ".join(harmless(text).split())


def size(number: int | None) -> str:
    """Return bytes in powers of ten, such as `1.9 GB`; `-` for None."""
    if number is None:
        return "-"
    if number < 0:
        return f"-{size(-number)}"
    if number < 1000:
        return f"{number} B"
    value = float(number)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.5 or unit == "TB":
            break
    return f"{value:.1f} {unit}"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return aligned columns without colours or borders: as readable in a pipe as on a terminal."""
    cells = [["-" if cell is None else one_line(cell) or "-" for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [list(columns), *cells]
    ]
    return "\n".join(lines)


def host_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, many: bool) -> str:
    """Return a table whose first column is the host; with one host the column is left out. No rows give no table."""
    if not rows:
        return ""
    return table(columns, rows) if many else table(columns[1:], [row[1:] for row in rows])


def each_host(replies: Sequence[HostReply[R]], lines: Callable[[R], str]) -> str:
    """Return the lines of each result; with several hosts each line begins with its host's name."""
    shown: list[str] = []
    for reply in replies:
        if reply.result is not None:
            prefix = f"{reply.host}: " if len(replies) > 1 else ""
            shown += [prefix + line for line in lines(reply.result).splitlines()]
    return "\n".join(shown)


def joined(lines: Iterable[str]) -> str:
    return "\n".join(map(one_line, lines))
