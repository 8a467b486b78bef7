"""The one way in which operations stop a server."""

from __future__ import annotations

import time

from mlxops.agent import processes
from mlxops.agent.operations.context import Context
from mlxops.core.errors import MlxopsError, Refused
from mlxops.core.protocol import Phase
from mlxops.core.world import Owner, PortView, Run

RELEASE_SECONDS = 10.0
"""How long the port of an ended server may stay taken."""


def stop(ctx: Context, view: PortView, grace: float) -> None:
    """Stop what a plan names, prove that it is gone and that the port is free."""
    run = view.run if view.owner is Owner.MLXOPS and view.run else None
    server = view.server
    if run is None and server is not None:
        run = Run(
            **dict.fromkeys(("model", "alias", "repo_id", "revision", "run_id", "operation", "log_path"), ""),
            port=view.port,
            engine=server.engine,
            argv=server.argv,
            pid=server.pid,
            pgid=server.pgid,
            start=server.start,
            boot_id=ctx.system.boot_id(),
            started_at="",
            adopted=True,
        )
    if run is None:
        raise Refused(
            "not_ours", f"what is on port {view.port} is not known well enough to be stopped", why=view.detail
        )
    ctx.emit(Phase("stop", f"{view.model or 'a server'} on port {view.port}, pid {run.pid}"))
    stopped = processes.stop(ctx.system, run, grace=grace)
    if stopped.killed:
        ctx.note(f"it did not end within {grace:.0f} s and was killed", "warning")
    if not _free(ctx, view.port):
        raise MlxopsError(
            "port_still_held",
            f"the server on port {view.port} is gone, and something else listens there",
            why="a process that is not ours took the port",
            hint="mlxctl status names it",
        )
    ctx.store.forget_run(view.port)


def _free(ctx: Context, port: int) -> bool:
    """Whether nobody listens on the port, or within moments nobody does any more.

    Linux calls a process a zombie once its first thread has ended; its sockets stay until the last one has, which
    a server in the middle of an answer takes a while for. Such a listener has no owner that could be seen; one that
    has is somebody else's, and there is nothing to wait for.
    """
    deadline = time.monotonic() + RELEASE_SECONDS
    while listeners := ctx.system.look({port}).on(ctx.where.settings.bind, port):
        if any(each.pids for each in listeners) or time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
