"""Find the differences between the registry, hosts.yaml and the running servers. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from mlxops.core.drift import Drift, DriftCode
from mlxops.core.ports import JobState, Owner, PortView, Standing, State
from mlxops.core.registry import Model, Registry
from mlxops.core.settings import PortRange

_SERVER_DRIFT = {
    State.ORPHAN: DriftCode.ORPHAN,
    State.MISMATCH: DriftCode.MISMATCH,
    State.WEDGED: DriftCode.WEDGED,
    State.FAILED: DriftCode.FAILED,
}
"""States of our own servers that are drift."""


def find_drift(
    ports: PortRange, views: Mapping[int, PortView], registry: Registry, boot: Iterable[JobState] = ()
) -> tuple[Drift, ...]:
    """Return the differences, each with the command that removes it. `ports` is the host's range."""
    slots = {view.alias: view.port for view in views.values() if view.alias}
    idle = next((port for port in ports if port in views and views[port].unserved and not registry.on_port(port)), None)
    drifts = [drift for view in views.values() for drift in _port_drift(view, registry.on_port(view.port), slots, idle)]
    if registry.unwritable:
        # All other commands that change anything are refused until the registry is repaired.
        drifts = [
            replace(drift, hint="repair the registry first, then look again: `mlxctl status`") for drift in drifts
        ]
    return (
        *drifts,
        *(drift for view in views.values() for drift in _portless_servers(view)),
        *(drift for model in registry.models.values() for drift in _entry_drift(model, ports, slots, registry)),
        *_boot_job_drift(boot),
    )


def _port_drift(
    view: PortView, assigned: tuple[Model, ...], slots: Mapping[str, int], idle: int | None
) -> Iterator[Drift]:
    """Yield the drift of one port. `slots` maps aliases to ports, `idle` is a free port to suggest."""
    port, names = view.port, [model.name for model in assigned]
    if view.unserved:
        yield from (_not_served(view, name, slots.get(name, port)) for name in names)
    elif view.ending:
        yield Drift.of(DriftCode.STILL_ENDING, port, view.model, f"{port}: {view.detail}")
    elif view.owner is Owner.MLXOPS and view.state in _SERVER_DRIFT:
        yield Drift.of(_SERVER_DRIFT[view.state], port, view.model, f"{port}: {view.detail}")
    elif view.owner is Owner.BOOT and view.state is not State.LOADING and names and view.model not in names:
        yield _boot_port_assigned(view, names, idle)
    elif view.owner is Owner.HAND and view.model not in names:
        message = f"{port} is served by a process that mlxops did not start, and the registry does not say so"
        yield Drift.of(DriftCode.UNREGISTERED_SERVER, port, view.model, message)
    elif view.state is State.UNKNOWN:
        message = f"what is on port {port} could not be determined: {view.detail}"
        yield Drift.of(DriftCode.UNKNOWN, port, names[0] if names else None, message)
    elif view.owner is Owner.FOREIGN and names:
        message = f"{names[0]} is assigned to {port}, but a process that is not ours holds the port"
        kill = f": kill {view.pid}" if view.pid is not None else ""
        yield Drift.of(DriftCode.FOREIGN, port, names[0], message, kill=kill)
    if view.run and view.owner is Owner.MLXOPS and not view.ending and view.alias and view.run.alias != view.alias:
        message = f"{port} serves under {view.run.alias}, but its slot is {view.alias}"
        yield Drift.of(DriftCode.ALIAS_CHANGED, port, view.model, message)


def _not_served(view: PortView, name: str, load_port: int) -> Drift:
    code, message = DriftCode.ASSIGNED_NOT_SERVED, f"{name} is assigned to {view.port}, but nothing serves it"
    if view.rebooted:
        return Drift(code, view.port, name, message, "`mlxctl restore`")
    return Drift.of(code, view.port, name, message, load_port=load_port)


def _boot_port_assigned(view: PortView, names: list[str], idle: int | None) -> Drift:
    code, port = DriftCode.BOOT_PORT_ASSIGNED, view.port
    message = f"{port} is served by the boot job, and the registry assigns {', '.join(names)} to it"
    if idle is None:
        return Drift(code, port, view.model, message, "make its port null in the registry")
    return Drift.of(code, port, view.model, message, assigned=names[0], idle_port=idle)


def _portless_servers(view: PortView) -> Iterator[Drift]:
    for server in view.portless:
        model = server.model or "a model"
        message = f"pid {server.pid} was started for port {view.port}, does not listen, and may hold {model} in memory"
        yield Drift.of(DriftCode.PORTLESS_SERVER, view.port, None, message, pid=server.pid)


def _entry_drift(model: Model, ports: PortRange, slots: Mapping[str, int], registry: Registry) -> Iterator[Drift]:
    """Yield what is wrong with the assignment of one registry entry."""
    name, port, own = model.name, model.port, slots.get(model.name)
    if port is None:
        return
    if port not in ports:
        message = f"{name} is assigned to {port}, outside this host's range {ports}"
        yield Drift.of(DriftCode.PORT_OUTSIDE_RANGE, port, name, message)
    if own not in (None, port):
        message = f"{name} is the alias of port {own}, and is assigned to {port}"
        yield Drift.of(DriftCode.ALIAS_ELSEWHERE, port, name, message)
    if len(registry.on_port(port)) > 1:
        message = f"{name} is not the only model that claims port {port}"
        yield Drift.of(DriftCode.PORT_CLAIMED_TWICE, port, name, message)


def _boot_job_drift(jobs: Iterable[JobState]) -> Iterator[Drift]:
    for state in jobs:
        port, name = state.job.port, state.job.name
        if state.standing is Standing.MISSING:
            message = f"hosts.yaml gives port {port} to the boot job {name}, which is not installed: {state.detail}"
            yield Drift.of(DriftCode.BOOT_JOB_MISSING, port, None, message)
        elif state.standing is Standing.DISABLED:
            message = f"hosts.yaml gives port {port} to the boot job {name}, which is disabled: {state.detail}"
            yield Drift.of(DriftCode.BOOT_JOB_DISABLED, port, None, message, enable=state.enable)
