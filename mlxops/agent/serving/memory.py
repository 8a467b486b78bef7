"""Check whether a model fits in memory: the budget, the memory in use, and the refusal with its numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from mlxops.agent.engines import ENGINES
from mlxops.agent.engines.argv import long_options
from mlxops.agent.engines.installation import installed_version
from mlxops.agent.host.system import System
from mlxops.agent.hub.snapshot import shape, weight_files
from mlxops.agent.paths import HostPaths
from mlxops.agent.serving import servers
from mlxops.agent.serving.observe import real_path, repo_of
from mlxops.agent.serving.servers import ServerProcess
from mlxops.core import memory
from mlxops.core.budget import Limits, limited
from mlxops.core.errors import Refused
from mlxops.core.frozen import dataclass
from mlxops.core.memory import Estimate, Use
from mlxops.core.ports import PortView, World
from mlxops.core.records import Operation
from mlxops.core.text import amount

GPU_SHARE = 0.75
"""The default of macOS for the memory that the GPU may wire: about three quarters of RAM."""
LINUX_SHARE = 0.9


@dataclass(frozen=True)
class Budget:
    """The bytes that all servers together may use, and where the number comes from."""

    size: int
    source: str


def budget(paths: HostPaths, sysctl: Callable[[str], str] | None = None) -> Budget:
    """Return the host's memory budget. `sysctl` returns a kernel variable as macOS prints it; default: the real one."""
    if paths.settings.memory is not None:
        return Budget(paths.settings.memory, "memory in hosts.yaml")
    if sysctl is not None or sys.platform == "darwin":
        return _mac_budget(sysctl or _sysctl)
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Budget(int(size * LINUX_SHARE), "nine tenths of RAM")


def _mac_budget(sysctl: Callable[[str], str]) -> Budget:
    # 0 is the default and means a share of RAM. The variable exists since macOS 14.
    wired = _parse_number(sysctl("iogpu.wired_limit_mb")) * 1024 * 1024
    if wired:
        return Budget(wired, "iogpu.wired_limit_mb")
    return Budget(
        int(_parse_number(sysctl("hw.memsize")) * GPU_SHARE), "three quarters of RAM, the GPU's default limit"
    )


def _parse_number(text: str) -> int:
    return int(text.strip()) if text.strip().isdecimal() else 0


def _sysctl(name: str) -> str:
    command = ["/usr/sbin/sysctl", "-n", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return done.stdout if done.returncode == 0 else ""


def estimate_of(path: Path, context_length: int | None = None, model_type: str = "lm") -> Estimate | None:
    """Estimate the memory of the snapshot at `path`; None if it has no weights.

    `context_length`: in tokens, if it is set. `model_type`: the type as which the engine serves it.
    """
    weights = sum(weight_files(path).values())
    if not weights:
        return None
    shaped = shape(path)
    return memory.estimate(weights, shaped.served_as(model_type), shaped.context_length, context_length)


def in_use(world: World, system: System, reserved: Mapping[int, Operation]) -> tuple[Use, ...]:
    """Return the memory use of every MLX server of this machine: managed, started by hand, by boot or by other users,
    on any port.

    Also list unrecognised processes that listen on our ports, with unknown size: not every system shows other users'
    processes. `reserved`: the memory of servers that are about to start, by port.
    """
    look = system.look(())
    uses, ports_seen = [], set()
    for server in servers.find_servers(look):
        view = next((v for v in world.ports.values() if {v.pid, *v.members} & set(server.family)), None)
        uses.append(_use(world, system, server, view))
        ports_seen |= {view.port} if view else set()
    for view in world.ports.values():
        if view.owner is not None and view.pid is not None and view.port not in ports_seen:
            size = view.memory_bytes
            uses.append(Use(view.port, view.model or "unknown", view.owner.value, view.pid, None, size))
    for port, operation in reserved.items():
        more = (operation.reserves or 0) - sum(use.counted for use in uses if use.port == port)
        if more > 0:
            uses.append(Use(port, operation.model or "unknown", "loading", None, more, None))
    return tuple(sorted(uses, key=lambda use: (use.port or 0, use.pid or 0)))


def _use(world: World, system: System, server: ServerProcess, view: PortView | None) -> Use:
    """Describe a server's memory. `view`: the managed port that it serves, if any."""
    process, detected = server.process, server.detected
    path = real_path(system.folder(process.pid), detected.model)
    flags = long_options(process.argv)
    context, model_type = flags.get("--context-length", ""), flags.get("--model-type", "lm")
    expected = estimate_of(Path(path), int(context) if context.isdecimal() else None, model_type) if path else None
    engine = ENGINES[server.engine]
    version = view.run.engine_version if view and view.run else installed_version(process.argv, engine.distribution)
    own = engine.read_limits(process.argv)
    cached = engine.keeps_caches_in_memory(version)
    owner = "hand" if process.uid == os.getuid() else "foreign"
    return Use(
        port=view.port if view else _server_port(world, system, server),
        model=(view.model if view else None) or repo_of(path) or detected.model or "unknown",
        owner=view.owner.value if view and view.owner else owner,
        pid=process.pid,
        estimated_bytes=expected.total if expected else None,
        resident_bytes=system.memory(server.family) or None,
        limit_bytes=limited(expected, own, cached=cached).total if expected and own != Limits() else None,
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
    raise Refused(
        "does_not_fit",
        f"{name} does not fit in memory: it needs about {amount(need.total)}, and {amount(max(0, limit.size - used))} "
        f"of {amount(limit.size)} are left",
        why=f"{need}; serving already: {'; '.join(map(str, staying)) or 'nothing'}; budget: {limit.source}",
        hint=_make_room(room),
        details={
            "need_bytes": need.total,
            "used_bytes": used,
            "budget_bytes": limit.size,
            "missing_bytes": missing,
            "unload": [use.port for use in room or ()],
        },
    )


def _make_room(room: tuple[Use, ...] | None) -> str:
    if room is None:
        return "no unload would make enough room; choose a smaller model, or take the risk: --overcommit"
    return f"make room: {'; '.join(use.unload for use in room)}; or take the risk: --overcommit"
