"""Who uses a server, and whether it is still the same one."""

from __future__ import annotations

from mlxops.agent.context import Context
from mlxops.core.ports import Owner, PortView


def clients(ctx: Context, view: PortView) -> int:
    """Count the connections to a server. Each has an open request, or had one a moment ago."""
    pids = view.members or ((view.server.pid,) if view.server else ())
    return len(ctx.system.connections(view.port, pids))


def identity(view: PortView) -> tuple[object, ...]:
    """Return what differs after a swap or a restart of the server on a port."""
    process = (view.run if view.owner is Owner.MLXOPS else None) or view.server
    return view.owner, view.model, view.pid, process.start if process else None
