"""The live view of `status --watch` on a terminal, drawn by rich on the alternate screen.

Import this module only for a terminal: rich takes about 60 ms to import.

What `rich.live.Live(screen=True)` does (rich 15): each refresh moves the cursor home and overwrites every cell of the
screen, so that nothing flickers. It does not react to SIGWINCH, SIGTSTP or SIGCONT, and its refresh thread would report
a closed terminal with a traceback. An exception from a signal handler in the middle of its `start` or `stop` leaves the
terminal on the alternate screen. So the main thread refreshes, and the signals are handled here.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Self

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from mlxops.control.watch.view import HostState, Watched, clock
from mlxops.core.commands.status import PortRow, StatusResult
from mlxops.core.tables import one_line, size

WIDE_COLUMNS = 90
"""From this width on, show owner, memory and a column for details."""
MAX_RECENT_CHANGES = 8
MAX_WRAPPED_LINES = 3
"""A longer text is cut."""


class StatusView:
    """The status of all hosts as a rich renderable that fits any terminal.

    If it is too tall, idle ports share one line. If that is not enough, the last line says how many lines are missing.
    """

    def __init__(self, watched: Watched, interval: float) -> None:
        self._watched = watched
        self._interval = interval

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.size
        options = options.update(width=width, height=None)

        def render(*parts: RenderableType) -> list[list[Segment]]:
            return console.render_lines(Group(*parts), options, pad=False)

        for merge_idle in (False, True):
            lines = render(self._title(), *self._hosts(width, merge_idle))
            if len(lines) <= height:
                break
        missing = len(lines) - height + 1
        if missing > 1:
            note = f"... {missing} lines more; a taller window or --host shows them"
            lines = [*lines[: height - 1], *render(_clipped(note))]
        elif (room := min(MAX_RECENT_CHANGES, height - len(lines) - 1)) > 0:
            changes = [_clipped(change.short()) for change in self._watched.recent_changes[-room:]]
            lines += render(Text(), *changes) if changes else []
        for line in lines:
            yield from line
            yield Segment.line()

    def _title(self) -> Text:
        at = self._watched.last_observed
        title = f"mlxops status  {'-' if at is None else clock(at)}  every {self._interval:g} s"
        return Text(title, no_wrap=True, overflow="ellipsis")

    def _hosts(self, width: int, merge_idle: bool) -> Iterator[RenderableType]:
        states = self._watched.states
        for state in states:
            yield Text()
            yield from _host(state, len(states) > 1, width, merge_idle)


def _host(state: HostState, with_name: bool, width: int, merge_idle: bool) -> Iterator[RenderableType]:
    """Yield what is known of a host. Hide its last status while the host is away: it may be wrong."""
    if state.error is not None:
        yield _notes([(f"{state.host}:", state.away_text()), ("next:", state.error.hint)], width)
        return
    if state.result is None:
        yield _clipped(f"{state.host}: connecting")
        return
    if with_name:
        yield _clipped(state.host)
    ports = state.result.ports
    idle = [row.port for row in ports if row.state == "idle"] if merge_idle else []
    shown = [row for row in ports if not (idle and row.state == "idle")]
    if shown:
        yield _port_table(shown, width)
    if idle:
        yield _clipped(f"{len(idle)} idle: {_ranges(idle)}")
    yield _notes(list(_host_notes(state, state.result, ports)), width)


def _host_notes(state: HostState, result: StatusResult, ports: Sequence[PortRow]) -> Iterator[tuple[str, str]]:
    yield "warning:", state.note
    on_ports = {row.operation for row in ports}
    for running in result.operations:
        if running.operation not in on_ports:
            yield "running:", f"{running.command} {running.operation}: {running.detail}"
    for drift in result.drift:
        yield "drift:", f"{drift.message}; {drift.hint}"


def _port_table(ports: Sequence[PortRow], width: int) -> Table:
    """Return a table in which the model's and the alias's columns shrink first.

    A wide table has a column for details. A narrow one has them below the model.
    """
    wide = width >= WIDE_COLUMNS
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for head, fixed in (
        *(("PORT", True), ("ALIAS", False), ("STATE", True)),
        *((("OWNER", True),) if wide else ()),
        ("MODEL", False),
        *((("MEMORY", True), ("", False)) if wide else ()),
    ):
        table.add_column(head, no_wrap=fixed)
    for row in ports:
        port, alias, state, owner, model = map(_cell, (row.port, row.alias, row.state, row.owner, row.model))
        detail = _wrapped(row.detail, width)
        if wide:
            table.add_row(port, alias, state, owner, model, Text(size(row.memory_bytes)), detail)
        else:
            table.add_row(port, alias, state, Group(model, detail) if detail else model)
    return table


def _notes(notes: Sequence[tuple[str, str]], width: int) -> Table:
    """Return labels and texts; a text's further lines stand below its first one."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for label, text in notes:
        if text:
            grid.add_row(_clipped(label), _wrapped(text, width))
    return grid


def _cell(value: object) -> Text:
    return _clipped("-" if value in (None, "") else str(value))


def _clipped(text: str) -> Text:
    """Return a text of one line that ends in an ellipsis where it does not fit."""
    return Text(one_line(text), no_wrap=True, overflow="ellipsis")


def _wrapped(text: str, width: int) -> Text:
    """Return a text that wraps, cut so that it has few lines at the full width of the terminal."""
    wrapped = Text(one_line(text), overflow="fold")
    wrapped.truncate(MAX_WRAPPED_LINES * width, overflow="ellipsis")
    return wrapped


def _ranges(ports: Sequence[int]) -> str:
    """Return port numbers as `8101-8103, 8105`."""
    numbers = sorted(ports)
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


Handler = Callable[[int, FrameType | None], object] | int | None
"""What `signal.getsignal` returns."""


# -- the terminal -------------------------------------------------------------------------------------------------


class TerminalView:
    """Show a `StatusView` on the alternate screen, and restore the terminal on exit.

    After a resize, or when the user stops the process (Ctrl-Z) or continues it, call `wake`. The main loop must then
    call `draw`. While rich writes, delay Ctrl-C and SIGTERM until it is done.
    """

    def __init__(self, watched: Watched, interval: float, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._stop_requested = False
        self._writing = False
        self._delayed: list[int] = []
        """Signals that came while rich was writing."""
        self._handlers: dict[int, Handler] = {}
        """The handlers before this view."""
        # Do not let environment variables (TTY_COMPATIBLE, TTY_INTERACTIVE, JPY_...) turn the drawing off.
        self._console = Console(
            force_terminal=True,
            force_interactive=True,
            force_jupyter=False,
            legacy_windows=False,
            color_system=None,
        )
        self._live = Live(
            StatusView(watched, interval),
            console=self._console,
            screen=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def draw(self) -> None:
        """Draw the current status. If Ctrl-Z was pressed, first stop this process until it is continued.

        Raises `BrokenPipeError` if the terminal was closed.
        """
        with self._uninterrupted():
            if self._stop_requested:
                self._stop_process()
            self._console.size = _terminal_size()  # COLUMNS and LINES may be out of date
            self._live.refresh()

    def __enter__(self) -> Self:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # the ellipsis is not in every encoding
        self._replace_handlers((signal.SIGWINCH, signal.SIGTSTP), self._on_terminal_signal)
        ending = [number for number in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(number))]
        self._replace_handlers(ending, self._on_ending_signal)
        try:
            with self._uninterrupted():
                self._live.start()
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        with suppress(BrokenPipeError), self._uninterrupted():
            try:
                self._live.stop()
            finally:
                for number, handler in self._handlers.items():
                    signal.signal(number, handler)

    @contextmanager
    def _uninterrupted(self) -> Iterator[None]:
        """Let rich write, then handle the delayed signals. Raises `BrokenPipeError` if the terminal was closed."""
        self._writing = True
        try:
            with _closed_as_broken_pipe():
                yield
        finally:
            self._writing = False
        while self._delayed:
            self._on_ending_signal(self._delayed.pop(0), None)

    def _replace_handlers(self, numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> None:
        for number in numbers:
            self._handlers[number] = signal.signal(number, handler)

    def _on_terminal_signal(self, number: int, frame: FrameType | None) -> None:
        """Let the main loop redraw, or stop the process."""
        self._stop_requested |= number == signal.SIGTSTP
        self._wake()

    def _on_ending_signal(self, number: int, frame: FrameType | None) -> None:
        """Call the previous handler of the signal, which raises. While rich writes, only remember the signal."""
        handler = self._handlers[number]
        if self._writing:
            self._delayed.append(number)
        elif callable(handler):
            handler(number, frame)

    def _stop_process(self) -> None:
        """Stop as the default action of SIGTSTP does, with the shell's screen restored."""
        self._stop_requested = False
        self._live.stop()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)
        # SIGCONT continues here.
        signal.signal(signal.SIGTSTP, self._on_terminal_signal)
        self._live.start()


@contextmanager
def _closed_as_broken_pipe() -> Iterator[None]:
    """Raise `BrokenPipeError` for any `OSError`: writing to a closed terminal fails with EIO."""
    try:
        yield
    except OSError as error:
        raise BrokenPipeError(error.errno, error.strerror) from error


def _terminal_size() -> tuple[int, int]:
    """Return columns and lines."""
    try:
        columns, lines = os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        return 80, 24
    return columns or 80, lines or 24
