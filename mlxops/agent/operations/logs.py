"""`logs`: a server's log, from its end on."""

from __future__ import annotations

from mlxops.agent import logs as files
from mlxops.agent.operations.context import Context
from mlxops.core import names
from mlxops.core.errors import Refused
from mlxops.core.protocol import Line


def logs(ctx: Context) -> dict[str, object]:
    """Each line is an event; with `follow` there is no end but that of the connection."""
    port = names.port(ctx.request.text("port") or "", ctx.where.settings.ports)
    log = ctx.store.log_path(port)
    try:
        end = files.end_of(log, int(ctx.request.number("lines") or 0))
    except FileNotFoundError:
        if not ctx.request.flag("follow"):
            raise Refused(
                "no_log",
                f"port {port} has no log",
                why="nothing was started there by mlxops",
                hint=f"mlxctl status; or wait for one: mlxctl logs {port} --follow",
            ) from None
        end = files.End([], "", 0)
    for line in end.lines:
        ctx.emit(Line(line))
    if ctx.request.flag("follow"):
        for line in files.follow(log, end.position, ctx.beat):
            ctx.emit(Line(line))
    elif end.rest:
        ctx.emit(Line(end.rest))
    return {"port": port, "path": str(log)}
