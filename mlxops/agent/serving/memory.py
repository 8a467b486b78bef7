"""Check whether a model fits in memory: the budget, the memory in use, and the refusal with its numbers."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from mlxops.agent.engines import ENGINES
from mlxops.agent.engines.installation import installed_version
from mlxops.agent.host.memory import HostMemory
from mlxops.agent.host.system import System, this_system
from mlxops.agent.hub.snapshot import shape, weight_files
from mlxops.agent.paths import HostPaths
from mlxops.agent.serving import processes, servers
from mlxops.agent.serving.observe import real_path, repo_of
from mlxops.agent.serving.servers import ServerProcess
from mlxops.core import memory
from mlxops.core.budget import Limits, limited
from mlxops.core.errors import Refused
from mlxops.core.frozen import dataclass
from mlxops.core.memory import Estimate, Use
from mlxops.core.ports import PortView, World
from mlxops.core.records import Operation
from mlxops.core.redaction import redact
from mlxops.core.text import amount

LINUX_SHARE = 0.9


@dataclass(frozen=True)
class Budget:
    """The bytes that all servers together may use, and where the number comes from."""

    size: int
    source: str


def budget(paths: HostPaths, host: HostMemory | None = None) -> Budget:
    """Return the host's memory budget. `host`: its memory; default: that of this machine."""
    if paths.settings.memory is not None:
        return Budget(paths.settings.memory, "memory in hosts.yaml")
    host = host or this_system().host_memory()
    if host.gpu_limit is None:
        return Budget(int(host.total * LINUX_SHARE), "nine tenths of RAM")
    source = "iogpu.wired_limit_mb" if host.gpu_limit_set else "the GPU's default limit, a share of RAM"
    return Budget(host.gpu_limit, source)


def estimate_of(path: Path, context_length: int | None = None, model_type: str = "lm") -> Estimate | None:
    """Estimate the memory of the snapshot at `path`; None if it has no weights.

    `context_length`: in tokens, if it is set. `model_type`: the type as which the engine serves it.
    """
    weights = sum(weight_files(path).values())
    if not weights:
        return None
    shaped = shape(path)
    return memory.estimate(weights, shaped.cache_of(model_type), shaped.context_length, context_length)


def in_use(world: World, system: System, reserved: Mapping[int, Operation]) -> tuple[Use, ...]:
    """Return the memory use of every MLX server of this machine: managed, started by hand, by boot or by other users,
    on any port.

    Also list stranded memory, and unrecognised processes that listen on our ports, with unknown size: not every system
    shows other users' processes. `reserved`: the memory of servers that are about to start, by port.
    """
    table = system.process_table(())
    uses, ports_seen = [], set()
    for server in servers.find_servers(table):
        if processes.waits(system, server.process):
            continue  # its operation has reserved its memory
        view = next((v for v in world.ports.values() if {v.pid, *v.members} & set(server.family)), None)
        uses.append(_use(world, system, server, view))
        ports_seen |= {view.port} if view else set()
    for view in world.ports.values():
        if view.owner is not None and view.pid is not None and view.port not in ports_seen:
            size = view.memory_bytes
            uses.append(Use(view.port, view.model or "unknown", view.owner.value, view.pid, None, size))
    if stranded := world.stranded:
        uses.append(Use(None, stranded.model, memory.STRANDED, None, None, stranded.size))
    for port, operation in reserved.items():
        more = (operation.reserves or 0) - sum(use.counted for use in uses if use.port == port)
        if more > 0:
            uses.append(Use(port, operation.model or "unknown", "loading", None, more, None))
    return tuple(sorted(uses, key=lambda use: (use.port or 0, use.pid or 0)))


def _use(world: World, system: System, server: ServerProcess, view: PortView | None) -> Use:
    """Describe a server's memory. `view`: the managed port that it serves, if any."""
    process, detected = server.process, server.detected
    path = real_path(system.folder(process.pid), detected.model)
    engine = ENGINES[server.engine]
    model_type = engine.model_type(process.argv)
    context = engine.context_length(process.argv) or world.contexts.get(view.model if view and view.model else "")
    expected = estimate_of(Path(path), context, model_type) if path else None
    version = view.run.engine_version if view and view.run else installed_version(process.argv, engine.distribution)
    own = engine.read_limits(process.argv)
    cached = engine.keeps_caches_in_memory(version)
    most = limited(expected, own, cached=cached) if expected and own != Limits() else None
    owner = "hand" if process.uid == os.getuid() else "foreign"
    return Use(
        port=view.port if view else _server_port(world, system, server),
        model=(view.model if view else None) or repo_of(path) or redact(detected.model) or "unknown",
        owner=view.owner.value if view and view.owner else owner,
        pid=process.pid,
        estimated_bytes=expected.total if expected else None,
        resident_bytes=system.shared_memory(server.family) or None,
        limit_bytes=most.total if most else None,
        limit=most,
        unbounded=model_type == "lm" and engine.is_unbounded(process.argv, version),
    )


def _server_port(world: World, system: System, server: ServerProcess) -> int | None:
    """Return the port on which a server listens, else the port in its arguments unless it could not bind it."""
    ports = {port for pid in server.family for port in system.ports_of(pid) or ()}
    if ports:
        return min(ports)
    portless = any(server.process.pid == each.pid for view in world.ports.values() for each in view.portless)
    return None if portless else server.detected.port


def check_fits(
    name: str, need: Estimate, limit: Budget, uses: Collection[Use], leaving: Collection[int], ports: Collection[int]
) -> None:
    """Raise `Refused` (does_not_fit) if a model does not fit, with the smallest set of unloads that would make room.

    `leaving`: ports that will be free anyway. Only servers on `ports` can be unloaded.
    """
    staying = [use for use in uses if use.port not in leaving]
    used = sum(use.counted for use in staying)
    missing = used + need.total - limit.size
    if missing <= 0:
        return
    room = memory.smallest_room((use for use in staying if use.port in ports), missing)
    stranded = any(use.owner == memory.STRANDED for use in staying)
    raise Refused(
        "does_not_fit",
        f"{name} does not fit in memory: it needs about {amount(need.total)}, and {amount(max(0, limit.size - used))} "
        f"of {amount(limit.size)} are left",
        why=f"{need}; serving already: {'; '.join(map(str, staying)) or 'nothing'}; budget: {limit.source}",
        hint=_make_room(room, stranded=stranded),
        details={
            "need_bytes": need.total,
            "used_bytes": used,
            "budget_bytes": limit.size,
            "missing_bytes": missing,
            "unload": [use.port for use in room or ()],
        },
    )


def _make_room(room: tuple[Use, ...] | None, *, stranded: bool) -> str:
    if room is not None:
        return f"make room: {'; '.join(use.unload for use in room)}; or take the risk: --overcommit"
    reboot = "reboot the host, " if stranded else ""
    return f"no unload would make enough room; {reboot}choose a smaller model, or take the risk: --overcommit"
