"""`status --probe`: one small completion from every ready port, all at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping

from mlxops.agent.context import Context
from mlxops.agent.operations.server_names import names_of
from mlxops.common.http import NoCompletion, request_completion
from mlxops.core.commands.status import ProbeRow
from mlxops.core.drift import Drift, DriftCode
from mlxops.core.ports import PortView, State, World

PROBE_SECONDS = 20.0
"""Limit of one completion of four tokens. A server that is busy with other requests needs longer."""


def probe(ctx: Context, world: World) -> dict[int, ProbeRow]:
    """Probe all ready ports in parallel. Return the results by port, after little more than `PROBE_SECONDS` at most."""
    ready = [view for view in world.ports.values() if view.state is State.READY]
    probes: dict[int, ProbeRow] = {}

    def store_probe(view: PortView) -> None:
        probes[view.port] = _probe_port(ctx, view)

    threads = [threading.Thread(target=store_probe, args=(view,), daemon=True) for view in ready]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PROBE_SECONDS + 1
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    error = f"no completion within {PROBE_SECONDS:.0f} s"
    late = ProbeRow(ok=False, seconds=PROBE_SECONDS, error=error, name=None, not_asked=None)
    return {view.port: probes.get(view.port, late) for view in ready}


def _probe_port(ctx: Context, view: PortView) -> ProbeRow:
    """Request a completion under a name that the server knows, so that it neither loads nor drops a model."""
    names = names_of(view)
    if names.not_asked or not names.known:
        why = names.not_asked or "its name is not known"
        return ProbeRow(ok=None, seconds=0.0, error=None, name=None, not_asked=why)
    began = time.monotonic()
    name, error = names.known[0], None
    try:
        request_completion(ctx.paths.connect_host, view.port, name, PROBE_SECONDS)
    except (OSError, NoCompletion) as failure:
        error = str(failure)[:300] or type(failure).__name__
    seconds = round(time.monotonic() - began, 3)
    return ProbeRow(ok=error is None, seconds=seconds, error=error, name=name, not_asked=None)


def failed_probes(world: World, probes: Mapping[int, ProbeRow]) -> Iterator[Drift]:
    """Report each failed probe as drift."""
    for port, row in probes.items():
        if row.ok is False:
            view = world.ports[port]
            message = f"{port} is up, and gave no completion: {row.error}"
            reload = f"; then `mlxctl load {view.model} {port} --force`" if view.model else ""
            yield Drift.of(DriftCode.PROBE_FAILED, port, view.model, message, reload=reload)
