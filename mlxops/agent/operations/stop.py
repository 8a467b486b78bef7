"""The one way in which operations stop a server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from mlxops.agent.context import Context
from mlxops.agent.engines import ENGINES
from mlxops.agent.serving import processes
from mlxops.core.errors import MlxopsError, OutcomeUnknown, Refused
from mlxops.core.ports import Owner, PortView, State
from mlxops.core.protocol import Phase
from mlxops.core.records import Run, Server, run_of
from mlxops.core.text import amount

END_SECONDS = 5.0
"""For a server without open requests to end when it is asked to."""
RETURN_SECONDS = 10.0
"""For the memory of a server that is gone to be seen as free: a GPU's driver gives it back a little later."""
NOTICEABLE = 1024**3
"""Bytes; what less comes and goes on a host all the time, so that nothing could be concluded from it."""

RELEASE_SECONDS = 10.0
"""How long the port of an ended server may stay taken."""


def stop(ctx: Context, view: PortView, grace: float) -> float:
    """Stop what a plan names, prove that it is gone, that the port is free and its memory returned.

    Open requests get up to `grace` seconds. Returns the moment (monotonic) since which the port takes no requests.
    """
    run = _run_of(ctx, view)
    ctx.emit(Phase("stop", f"{view.model or 'a server'} on port {view.port}, pid {run.pid}"))
    available, held = ctx.system.available(), view.memory_bytes or 0
    engine = ENGINES.get(run.engine)
    drains = engine is None or engine.drains
    left = grace if drains else _wait_for_requests(ctx, view, run, grace)
    open_requests = len(_connections(ctx, run))
    asked = time.monotonic()
    stopped = processes.stop(ctx.system, run, grace=left)
    if stopped.killed:
        what = f"{open_requests} open connections" if open_requests else "it"
        ctx.note(f"{what} did not end within {left:.0f} s, and the server was killed", "warning")
    if not _free(ctx, view.port):
        raise MlxopsError(
            "port_still_held",
            f"the server on port {view.port} is gone, and something else listens there",
            why="a process that is not ours took the port",
            hint="`mlxctl status` names it",
        )
    ctx.store.forget_run(view.port)
    _see_memory_return(ctx, available, held)
    return asked


@contextmanager
def writing_what_was_stopped(stopped: PortView | None) -> Iterator[None]:
    """Write the registry after `stopped` was stopped: a failed write is then no refusal, because something was changed.

    Raises `OutcomeUnknown` (registry_behind).
    """
    try:
        yield
    except MlxopsError as error:
        if stopped is None:
            raise
        port = stopped.port
        raise OutcomeUnknown(
            "registry_behind",
            f"{stopped.model or 'the server'} on port {port} was stopped, and the registry could not be written",
            why=f"{error.message}: {error.why}; restore would start what it assigns to the port",
            hint=f"{error.marked_hint}; then: `mlxctl unload {port}`",
            details={"cause": error.code, "port": port},
        ) from None


def stop_portless(ctx: Context, server: Server, port: int) -> None:
    """Stop a server that was started by hand for a port and does not listen on it."""
    ctx.emit(Phase("stop", f"{server.model or 'a server'} for port {port}, pid {server.pid}"))
    processes.stop(ctx.system, run_of(server, port, ctx.system.boot_id()), grace=END_SECONDS)


def shown_stop(view: PortView, *, owner: bool = False) -> str:
    """Describe a server that is to be stopped, with the processes that only run it."""
    wrappers = view.server.wrappers if view.server and view.owner is Owner.HAND else ()
    along = f", with pid {', '.join(map(str, wrappers))}, which runs it" if wrappers else ""
    whose = f", owner {view.owner}" if owner else ""
    return f"{view.model or 'a server'} on {view.port}, pid {view.pid}{whose}{along}"


def _run_of(ctx: Context, view: PortView) -> Run:
    if view.owner is Owner.MLXOPS and view.run:
        return view.run
    server = view.server
    if server is None:
        raise Refused(
            "not_ours",
            f"what is on port {view.port} is not known well enough to be stopped",
            why=view.detail,
            hint="look first: `mlxctl status`; then stop it yourself on the host",
        )
    return run_of(server, view.port, ctx.system.boot_id())


def _connections(ctx: Context, run: Run) -> frozenset[tuple[str, int]]:
    return ctx.system.connections(run.port, processes.members(ctx.system, ctx.system.look(()), run))


def _wait_for_requests(ctx: Context, view: PortView, run: Run, grace: float) -> float:
    """An engine that drops its open requests when it is asked to end is asked when those of now have ended.

    It has one connection for each request. New ones that come meanwhile are not waited for, or it would never end.
    Returns the seconds that it then gets to end.
    """
    waiting = _connections(ctx, run) if view.state is State.READY else frozenset()
    if waiting:
        ctx.note(f"{len(waiting)} open requests get up to {grace:.0f} s")
    deadline = time.monotonic() + grace
    while waiting and time.monotonic() < deadline:
        time.sleep(0.05)
        waiting &= _connections(ctx, run)
    if waiting:
        ctx.note(f"{len(waiting)} open requests did not end within {grace:.0f} s and are cut off", "warning")
    return END_SECONDS


def _free(ctx: Context, port: int) -> bool:
    """Whether nobody listens on the port, or within moments nobody does any more.

    Linux calls a process a zombie once its first thread has ended; its sockets stay until the last one has, which
    a server in the middle of an answer takes a while for. Such a listener has no owner that could be seen; one that
    has is somebody else's, and there is nothing to wait for.
    """
    deadline = time.monotonic() + RELEASE_SECONDS
    while listeners := ctx.system.look({port}).on(ctx.paths.settings.bind, port):
        if any(each.pids for each in listeners) or time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _see_memory_return(ctx: Context, before: int | None, held: int) -> None:
    """Wait until at least half of what the server held is available again; say so if it does not come back."""
    if before is None or held < NOTICEABLE:
        return
    deadline = time.monotonic() + RETURN_SECONDS
    while (ctx.system.available() or 0) < before + held // 2:
        if time.monotonic() > deadline:
            ctx.note(f"its {amount(held)} of memory were not seen to return within {RETURN_SECONDS:.0f} s", "warning")
            return
        time.sleep(0.1)
