"""Stop a server. All operations that stop one use this module."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from mlxops.agent.context import Context
from mlxops.agent.serving import processes
from mlxops.agent.serving.ending import STILL_ENDING, Terms, end, kill_limit
from mlxops.agent.serving.stranded import expect_return, look_again
from mlxops.core.errors import Interrupted, MlxopsError, OutcomeUnknown, Refused, error_from_wire
from mlxops.core.ports import Owner, PortView, State
from mlxops.core.protocol import Phase
from mlxops.core.records import Run, Server, run_of
from mlxops.core.refusals import merge_refusals

PORT_SECONDS = 10.0
"""Time for the port of an ended server to become free."""
IDLE_SECONDS = 10.0
"""Time to end for a server without open requests, also with `--drain 0`."""


def stop(ctx: Context, view: PortView) -> float:
    """Stop the server on a port. Check that it is gone, that the port is free, and that its memory returned.

    Open requests get the time of `--drain`. Return the time (monotonic) since which the port accepts no requests.
    Raises what `end` raises; `Busy` (still_ending): its record stays, and the port is `draining`.
    """
    run = _server_run(ctx, view)
    ctx.emit(Phase("stop", f"{view.model or 'a server'} on port {view.port}, pid {run.pid}"))
    with expect_return(ctx.store, ctx.system, run, ctx.note) as seen:
        return _stop(ctx, view, seen)


def _stop(ctx: Context, view: PortView, run: Run) -> float:
    drain = _drain(ctx, view, run)
    stopped_at = time.monotonic()
    ended = end(ctx.system, run, stop_terms(ctx, drain), store=ctx.store, emit=ctx.emit)
    if ended.killed:
        ctx.note(f"it did not end within {ended.seconds:.0f} s, and was killed", "warning")
    if not _wait_until_free(ctx, view.port):
        raise MlxopsError(
            "port_still_held",
            f"the server on port {view.port} is gone, and something else listens there",
            why="a process that is not ours took the port",
            hint="`mlxctl status` names it",
        )
    ctx.store.forget_run(view.port)
    return stopped_at


def stop_terms(ctx: Context, drain: float | None = None) -> Terms:
    """Return what a stop by this operation may do. `drain`: see `Terms`."""
    return Terms(ctx.request.name, None if ctx.kill else kill_limit(ctx.paths.settings), drain)


def add_left(error: MlxopsError, others: Iterable[MlxopsError]) -> None:
    """Name in `details.left` of an error what is left of the steps that failed with `others`."""
    left = [each for other in others for each in left_by(other)]
    if left:
        error.details["left"] = merge_refusals([*_left_in(error), *left]).to_wire()


def left_by(error: MlxopsError) -> list[MlxopsError]:
    """Return the errors about the servers that are left of a step which failed with `error`."""
    own = [error_from_wire(error.to_wire())] if error.code == STILL_ENDING else []
    return [*own, *_left_in(error)]


def _left_in(error: MlxopsError) -> list[MlxopsError]:
    left = error.details.get("left")
    return [error_from_wire(left)] if isinstance(left, dict) else []


@contextmanager
def name_left(ctx: Context, failed: Sequence[MlxopsError]) -> Iterator[None]:
    """Carry out several steps in the block, which adds the error of each step to `failed`.

    If it is interrupted, name in its error the servers that have still not ended.
    """
    try:
        yield
    except Interrupted as error:
        add_left(error, [each for step in failed for each in left_by(step) if _is_left(ctx, each)])
        raise


def _is_left(ctx: Context, error: MlxopsError) -> bool:
    """Return whether the server of the error, or a process that has outlived it, is still there."""
    pid, port = error.details.get("pid"), error.details.get("port")
    process = ctx.system.process(pid) if isinstance(pid, int) else None
    if not isinstance(pid, int) or (process is not None and not process.zombie):
        return True
    return isinstance(port, int) and bool(ctx.observe_port(port).members)


@contextmanager
def report_registry_behind(stopped: PortView | None) -> Iterator[None]:
    """Write the registry inside the block, after `stopped` was stopped.

    If that fails, a refusal would be wrong, because the server is stopped. Raises `OutcomeUnknown` (registry_behind).
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
    """Stop a server that was started by hand for a port but does not listen on it. The port is another one's.

    Raises what `end` raises; after `Busy` (still_ending) no record names it, but `status` still sees it.
    """
    ctx.emit(Phase("stop", f"{server.model or 'a server'} for port {port}, pid {server.pid}"))
    run = replace(run_of(server, port, ctx.system.boot_id()), model=server.model)
    with expect_return(ctx.store, ctx.system, run, ctx.note):
        end(ctx.system, run, stop_terms(ctx), emit=ctx.emit)


def look_for_memory(ctx: Context, port: int) -> None:
    """Look for the memory of a server that ended after its stop had given up, or after the stop's worker was killed."""
    run = None
    with contextlib.suppress(OSError, ValueError):
        run = ctx.store.run(port)
    if run is None or run.held_bytes is None or processes.members(ctx.system, ctx.system.process_table(()), run):
        return
    look_again(ctx.store, ctx.system, run, ctx.note)
    ctx.store.save_run(replace(run, held_bytes=None, unexplained_bytes=None))  # once is enough


def shown_stop(view: PortView, *, owner: bool = False) -> str:
    """Describe a server to stop, with its wrapper processes."""
    wrappers = view.server.wrappers if view.server and view.owner is Owner.HAND else ()
    wrapper_text = f", with pid {', '.join(map(str, wrappers))}, which runs it" if wrappers else ""
    owner_text = f", owner {view.owner}" if owner else ""
    return f"{view.model or 'a server'} on {view.port}, pid {view.pid}{owner_text}{wrapper_text}"


def _server_run(ctx: Context, view: PortView) -> Run:
    """Return the run record of our own server; for another one, a record with what is known of it."""
    if view.owner is Owner.MLXOPS and view.run:
        return view.run
    server = view.server
    if server is None:
        raise Refused(
            "not_ours",
            f"too little is known about the server on port {view.port} to stop it",
            why=view.detail,
            hint="look first: `mlxctl status`; then stop it yourself on the host",
        )
    return replace(run_of(server, view.port, ctx.system.boot_id()), model=view.model or "")


def _connections(ctx: Context, run: Run) -> frozenset[tuple[str, int]]:
    return ctx.system.connections(run.port, processes.members(ctx.system, ctx.system.process_table(()), run))


def _drain(ctx: Context, view: PortView, run: Run) -> float | None:
    """Give the open requests of a server their time. Return the seconds in which the server finishes them itself.

    An engine that does not drain drops them at its first signal, so they are waited for here. It has one connection for
    each request. Requests that arrive later are not waited for: there might always be one more.
    """
    if view.state is not State.READY:
        return None
    pending = _connections(ctx, run)
    if pending:
        ctx.note(f"{len(pending)} open requests get up to {ctx.drain:.0f} s")
    if processes.finishes_requests(ctx.system, run):
        # A request may also come between this look and the signal.
        return ctx.drain if pending else max(ctx.drain, IDLE_SECONDS)
    deadline = time.monotonic() + ctx.drain
    while pending and time.monotonic() < deadline:
        time.sleep(0.05)
        pending &= _connections(ctx, run)
    if pending:
        ctx.note(f"{len(pending)} open requests did not end within {ctx.drain:.0f} s and are cut off", "warning")
    return None


def _wait_until_free(ctx: Context, port: int) -> bool:
    """Wait until no process listens on the port, up to `PORT_SECONDS`. Return whether it is free.

    Linux calls a process a zombie once its first thread has ended. Its sockets stay open until the last thread ends,
    which takes a while if the server is answering a request. Such a listener has no visible owner. A listener with an
    owner belongs to another process: do not wait for that.
    """
    deadline = time.monotonic() + PORT_SECONDS
    while listeners := ctx.system.process_table({port}).on(ctx.paths.settings.bind, port):
        if any(each.pids for each in listeners) or time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
