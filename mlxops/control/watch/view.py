"""What `status --watch` shows: frames for a terminal, lines for a pipe, documents for a program."""

from __future__ import annotations

import textwrap
import time
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mlxops.control.client import HostReply
from mlxops.control.render import document_line, one_line, size, status_table
from mlxops.control.watch.link import Observation
from mlxops.core.errors import MlxopsError
from mlxops.core.status_diff import Change, Row, changes, rows, told_apart

WIDE = 90
"""Columns from which owner and memory are shown."""
KEPT = 50
"""Changes that are remembered for the end of a frame."""
NEWS = 8
"""Changes that a frame shows at most."""
CUT = "..."


@dataclass(frozen=True)
class HostState:
    """What is known of one host. Times are wall time in seconds, for display."""

    host: str
    result: Row | None = None
    """The last that it told."""
    error: MlxopsError | None = None
    """Why it did not tell anything the last time."""
    reachable: bool = True
    seen: float | None = None
    away_since: float | None = None
    note: str = ""

    @property
    def heard(self) -> bool:
        return self.result is not None or self.error is not None

    @property
    def answer(self) -> HostReply:
        """What it last told, or why it does not: what it told before that may be wrong by now."""
        return HostReply(self.host, error=self.error) if self.error else HostReply(self.host, self.result)


@dataclass(frozen=True)
class ChangeEvent:
    """A change, with its host and the time at which it was seen."""

    at: float
    host: str
    change: Change

    def __str__(self) -> str:
        """`2026-11-23T08:12:03Z studio 8100 idle -> loading jerry-xl`; `-` where no port is concerned."""
        return f"{stamp(self.at)} {self._words()}"

    def short(self) -> str:
        return f"{clock(self.at)} {self._words()}"

    def _words(self) -> str:
        return one_line(f"{self.host} {self.change.port or '-'} {self.change.text}")


def stamp(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def clock(at: float) -> str:
    return time.strftime("%H:%M:%SZ", time.gmtime(at))


class Watched:
    """The hosts that are watched, and what has changed on them lately."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._known = {host: HostState(host) for host in hosts}
        self._news: list[ChangeEvent] = []

    @property
    def known(self) -> tuple[HostState, ...]:
        return tuple(self._known.values())

    @property
    def answers(self) -> tuple[HostReply, ...]:
        return tuple(known.answer for known in self.known)

    @property
    def complete(self) -> bool:
        """Something is known of every host."""
        return all(known.heard for known in self.known)

    @property
    def drifted(self) -> bool:
        """Something is known of every host, and somewhere registry and life disagree."""
        return self.complete and any(rows(known.answer.result, "drift") for known in self.known)

    @property
    def latest(self) -> tuple[ChangeEvent, ...]:
        return tuple(self._news)

    def note(self, host: str, text: str) -> None:
        self._known[host] = replace(self._known[host], note=text)

    def take(self, sighting: Observation) -> tuple[ChangeEvent, ...]:
        """Remember what was seen; returns what has changed. The first that is heard of a host is no change."""
        before = self._known[sighting.answer.host]
        after = _after(before, sighting)
        self._known[before.host] = after
        found = _changes(before, after) if before.heard else ()
        news = tuple(ChangeEvent(sighting.at, before.host, change) for change in found)
        self._news = [*self._news, *news][-KEPT:]
        return news


def _after(before: HostState, sighting: Observation) -> HostState:
    answer = sighting.answer
    if answer.error is None:
        return replace(before, result=answer.result, error=None, reachable=True, seen=sighting.at, away_since=None)
    # It was last there when it was last seen: how soon it went after that, nobody knows.
    since = before.away_since or before.seen or sighting.at
    return replace(before, error=answer.error, reachable=answer.reachable, away_since=since, note="")


def _changes(before: HostState, after: HostState) -> Iterator[Change]:
    if after.error is not None:
        if before.error is None or before.error.code != after.error.code:
            yield Change("host", None, _away(after))
        return
    if before.error is not None and before.away_since is not None:
        yield Change("host", None, f"back, was away since {stamp(before.away_since)}")
    if before.result is not None and after.result is not None:
        yield from changes(before.result, after.result)


def _away(known: HostState) -> str:
    error = known.error
    assert error is not None and known.away_since is not None
    standing = "away" if not known.reachable else "not telling"
    return f"{standing} since {stamp(known.away_since)}: {error.code}: {error.message}"


# -- for a program --------------------------------------------------------------------------------------------------


class Documents:
    """A status document of one host for everything that changes there but memory."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched

    def lines(self, sighting: Observation) -> list[str]:
        host = sighting.answer.host
        (before,) = [known for known in self._watched.known if known.host == host]
        news = self._watched.take(sighting)
        (after,) = [known for known in self._watched.known if known.host == host]
        if before.heard and not news and not _differ(before, after):
            return []
        away = stamp(after.away_since) if after.away_since is not None else None
        more = {
            **(sighting.answer.result or {}),
            "at": stamp(sighting.at),
            "away_since": away,
            "changes": [each.change.to_wire() for each in news],
        }
        return [document_line("status", [sighting.answer], {host: more})]


def _differ(before: HostState, after: HostState) -> bool:
    if before.error is not None or after.error is not None:
        return False  # a change of these is news
    return told_apart(before.result or {}, after.result or {})


# -- for a pipe -----------------------------------------------------------------------------------------------------


class LineView:
    """First the whole, as soon as something is known of every host; then a line for each change."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._begun = False

    def lines(self, sighting: Observation) -> list[str]:
        news = self._watched.take(sighting)
        if self._begun:
            return list(map(str, news))
        if not self._watched.complete:
            return []
        self._begun = True
        return [status_table(self._watched.answers)]


# -- for a terminal -------------------------------------------------------------------------------------------------


def frame(watched: Watched, title: str, width: int, height: int) -> list[str]:
    """At most `height` lines of at most `width` columns. Where there is no room for everything, idle ports share a line
    first; what still does not fit is counted."""
    for idle_together in (False, True):
        body = [clip(title, width)]
        for known in watched.known:
            body += ["", *_host(known, len(watched.known) > 1, width, idle_together)]
        if len(body) <= height:
            break
    if len(body) > height:
        more = len(body) - height + 1
        return [*body[: height - 1], clip(f"{CUT} {more} lines more; a taller window or --host shows them", width)]
    room = min(NEWS, height - len(body) - 2)
    news = [clip(each.short(), width) for each in watched.latest[-room:]] if room > 0 else []
    return [*body, "", *news] if news else body


def _host(known: HostState, many: bool, width: int, idle_together: bool) -> Iterator[str]:
    if known.error is not None:
        yield from _wrapped(f"{known.host}: {_away(known)}", width)
        if known.error.hint:
            yield from _wrapped(f"next: {known.error.hint}", width, indent=2)
        return
    if known.result is None:
        yield clip(f"{known.host}: connecting", width)
        return
    if many:
        yield clip(known.host, width)
    if known.note:
        yield from _wrapped(f"warning: {known.note}", width)
    ports = rows(known.result, "ports")
    shown = [row for row in ports if not (idle_together and row.get("state") == "idle")]
    yield from _table(shown, width)
    if len(shown) < len(ports):
        idle = [row.get("port") for row in ports if row.get("state") == "idle"]
        yield clip(f"{len(idle)} idle: {_ranges(idle)}", width)
    on_ports = {row.get("operation") for row in ports}
    for row in rows(known.result, "operations"):
        if row.get("operation") not in on_ports:
            yield from _wrapped(f"running: {row.get('command')} {row.get('operation')}: {row.get('detail')}", width)
    for row in rows(known.result, "drift"):
        yield from _wrapped(f"drift: {row.get('message')}; {row.get('hint')}", width)


def _table(ports: Sequence[Row], width: int) -> Iterator[str]:
    """Columns that fit; what is to be told of a port in words stands behind them, or where it does not fit, below."""
    if not ports:
        return
    keys = ["port", "alias", "state", *(["owner"] if width >= WIDE else []), "model"]
    heads = [key.upper() for key in keys] + (["MEMORY"] if width >= WIDE else [])
    cells = [
        [one_line(row.get(key)) if row.get(key) not in (None, "") else "-" for key in keys]
        + ([size(row.get("memory_bytes"))] if width >= WIDE else [])
        for row in ports
    ]
    widths = [max(map(cell_width, column)) for column in zip(heads, *cells, strict=True)]
    for name, least in (("model", 12), ("alias", 8)):
        over = sum(widths) + 2 * (len(widths) - 1) - width
        place = keys.index(name)
        widths[place] = max(min(widths[place], least), widths[place] - max(0, over))
    yield _row(heads, widths, width)
    for row, line in zip(ports, cells, strict=True):
        text = _row(line, widths, width)
        detail = one_line(row.get("detail") or "")
        behind = f"{_padded(text, sum(widths) + 2 * (len(widths) - 1))}  {detail}"
        if not detail or cell_width(behind) <= width:
            yield behind.rstrip()
        else:
            yield text
            yield from _wrapped(detail, width, indent=6)


def _row(cells: Sequence[str], widths: Sequence[int], width: int) -> str:
    parts = [_padded(clip(cell, most), most) for cell, most in zip(cells, widths, strict=True)]
    return clip("  ".join(parts).rstrip(), width)


def _wrapped(text: str, width: int, indent: int = 0, most: int = 3) -> list[str]:
    """At most so many lines; the later ones are indented."""
    lines = textwrap.wrap(
        one_line(text),
        max(12, width),
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 2 * (indent == 0)),
        break_on_hyphens=False,
        max_lines=most,
        placeholder=f" {CUT}",
    )
    return [clip(line, width) for line in lines]


def _ranges(ports: Sequence[object]) -> str:
    """`8101-8103, 8105`."""
    numbers = sorted(port for port in ports if isinstance(port, int))
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def cell_width(text: str) -> int:
    """Columns of a terminal that it takes: wide characters of East Asia take two, marks that combine none (UAX #11)."""
    return sum(_cells(character) for character in text)


def _cells(character: str) -> int:
    if unicodedata.category(character) in {"Mn", "Me", "Cf"}:
        return 0
    return 2 if unicodedata.east_asian_width(character) in {"W", "F"} else 1


def clip(text: str, width: int) -> str:
    """As much of it as fits into `width` columns, and a mark where something is missing."""
    text = one_line(text) if "\n" in text or "\t" in text else text
    if cell_width(text) <= width:
        return text
    mark = CUT if width >= len(CUT) else ""
    kept, room = "", width - len(mark)
    for character in text:
        room -= _cells(character)
        if room < 0:
            break
        kept += character
    return kept + mark


def _padded(text: str, width: int) -> str:
    return text + " " * (width - cell_width(text))
