"""`logs`: the last lines of a server's log, and new ones as they are written."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from mlxops.agent.context import Context
from mlxops.agent.serving import logs as files
from mlxops.agent.serving.logs import Mark
from mlxops.core import names
from mlxops.core.commands.logs import Logs, LogsResult
from mlxops.core.errors import Refused
from mlxops.core.protocol import LogLine, Reached


def run(ctx: Context, request: Logs) -> LogsResult:
    """Emit each line as an event.

    With `follow`, continue until the connection ends. Each event then has the line's mark. After a lost connection, the
    control node repeats the request with the last mark as `after`.
    """
    port = names.port(request.port or "", ctx.paths.settings.ports)
    log = ctx.store.log_path(port)
    if request.follow:
        _follow(ctx, request, log)
    try:
        start = files.last_lines(log, request.lines)
    except FileNotFoundError:
        raise Refused(
            "no_log",
            f"port {port} has no log",
            why="mlxops has started no server there",
            hint=f"see the ports: `mlxctl status`; or wait for a log: `mlxctl logs {port} --follow`",
        ) from None
    for line in files.read(log, start):
        ctx.emit(LogLine(line.text))
    return LogsResult(port, str(log))


def _follow(ctx: Context, request: Logs, log: Path) -> NoReturn:
    start = files.parse_mark(request.after or "") or _first_mark(log, request.lines)
    while True:
        # Emit the mark before the first line, too, so that no line is lost if the connection breaks before one comes.
        ctx.emit(Reached(str(start)))
        try:
            for line in files.follow(log, start, ctx.beat):
                ctx.emit(LogLine(line.text, str(line.mark)))
        except LookupError:
            ctx.note(f"the log was cut or removed; lines from before may be in {log.name}.1", "warning")
            start = files.START


def _first_mark(log: Path, count: int) -> Mark:
    try:
        return files.last_lines(log, count)
    except FileNotFoundError:
        return files.START
