"""Find the differences between the registry, hosts.yaml and the running servers. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from mlxops.core.drift import Drift
from mlxops.core.ports import JobState, Owner, PortView, Standing, State
from mlxops.core.registry import Model, Registry
from mlxops.core.settings import PortRange


def drift(
    ports: PortRange, views: Mapping[int, PortView], registry: Registry, boot: Iterable[JobState] = ()
) -> tuple[Drift, ...]:
    """Return the differences between registry, hosts.yaml and the running servers, each with the command that helps."""
    slots = {view.alias: view.port for view in views.values() if view.alias}
    idle = next((port for port in ports if port in views and views[port].unserved and not registry.on_port(port)), None)
    found = [each for view in views.values() for each in _drift_of_port(view, registry.on_port(view.port), slots, idle)]
    if registry.unwritable:
        # Every command that changes anything is refused until then.
        found = [replace(each, hint="mend the registry first, then look again: mlxctl status") for each in found]
    found += [each for view in views.values() for each in _portless(view)]
    for model in registry.models.values():
        port, own = model.port, slots.get(model.name)
        if port is not None and port not in ports:
            message = f"{model.name} is assigned to {port}, outside this host's range {ports}"
            found.append(Drift("port_outside_range", port, model.name, message, "mlxctl reconcile"))
        if port is not None and own not in (None, port):
            message = f"{model.name} is the alias of port {own}, and is assigned to {port}"
            found.append(
                Drift("alias_elsewhere", port, model.name, message, f"mlxctl unload {port}, then load it there")
            )
        if port is not None and len(registry.on_port(port)) > 1:
            message = f"{model.name} is not the only model that claims port {port}"
            hint = f"mlxctl unload {port}, then load the right one"
            found.append(Drift("port_claimed_twice", port, model.name, message, hint))
    return (*found, *_drift_of_boot_jobs(boot))


def _drift_of_boot_jobs(jobs: Iterable[JobState]) -> Iterator[Drift]:
    comment = "comment out its line (boot:) in hosts.yaml"
    for state in jobs:
        port, name = state.job.port, state.job.name
        if state.standing is Standing.MISSING:
            message = f"hosts.yaml gives port {port} to the boot job {name}, which is not installed: {state.detail}"
            yield Drift("boot_job_missing", port, None, message, f"{comment}; or install the job")
        elif state.standing is Standing.DISABLED:
            message = f"hosts.yaml gives port {port} to the boot job {name}, which is disabled: {state.detail}"
            yield Drift("boot_job_disabled", port, None, message, f"{comment}; or enable it: {state.enable}")


def _portless(view: PortView) -> Iterator[Drift]:
    for server in view.portless:
        what = server.model or "a model"
        message = f"pid {server.pid} was started for port {view.port}, does not listen, and may hold {what} in memory"
        yield Drift("portless_server", view.port, None, message, f"stop it on the host: kill {server.pid}")


def _drift_of_port(
    view: PortView, assigned: tuple[Model, ...], slots: Mapping[str, int], idle: int | None
) -> Iterator[Drift]:
    """`slots`: the ports of the aliases; `idle`: a free port, for hints."""
    port, names = view.port, [model.name for model in assigned]
    if view.unserved:
        for name in names:
            message = f"{name} is assigned to {port}, but nothing serves it"
            load = f"mlxctl load {name} {slots.get(name, port)}, or mlxctl reconcile"
            yield Drift("assigned_not_served", port, name, message, "mlxctl restore" if view.rebooted else load)
    elif view.owner is Owner.MLXOPS and view.state in {State.ORPHAN, State.MISMATCH, State.WEDGED, State.FAILED}:
        yield Drift(view.state.value, port, view.model, f"{port}: {view.detail}", f"mlxctl unload {port}")
    elif view.owner is Owner.BOOT and view.state is not State.LOADING and names and view.model not in names:
        message = f"{port} is served by the boot job, and the registry assigns {', '.join(names)} to it"
        hint = "make its port null in the registry"
        if idle is not None:
            hint = f"load it elsewhere, for example: mlxctl load {names[0]} {idle}; or {hint}"
        yield Drift("boot_port_assigned", port, view.model, message, hint)
    elif view.owner is Owner.HAND and view.model not in names:
        message = f"{port} is served by a process that mlxops did not start, and the registry does not say so"
        yield Drift("unregistered_server", port, view.model, message, f"mlxctl unload {port} --force, then load")
    elif view.state is State.UNKNOWN:
        message = f"what is on port {port} could not be determined: {view.detail}"
        yield Drift("unknown", port, names[0] if names else None, message, "nothing is changed meanwhile; try again")
    elif view.owner is Owner.FOREIGN and names:
        message = f"{names[0]} is assigned to {port}, but a process that is not ours holds the port"
        kill = f": kill {view.pid}" if view.pid is not None else ""
        hint = f"mlxops never signals it; stop it yourself on the host{kill}"
        yield Drift("foreign", port, names[0], message, hint)
    if view.run and view.owner is Owner.MLXOPS and view.alias and view.run.alias != view.alias:
        message = f"{port} serves under {view.run.alias}, but its slot is {view.alias}"
        yield Drift("alias_changed", port, view.model, message, f"mlxctl load {view.model} {port} --force")
