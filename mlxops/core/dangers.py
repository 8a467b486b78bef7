"""Name the settings that can take a host down: the GPU, the wired limit, engines without limits. Pure.

Each is a finding: `load` warns of it, `doctor` reports it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from mlxops.core.text import amount

if TYPE_CHECKING:
    from mlxops.core.doctor.findings import Finding
    from mlxops.core.memory import Use

MOST_NAMED = 5
"""Servers in one message."""
FAST_SYNCH = "MLX_METAL_FAST_SYNCH"
"""A variable of MLX. It has wedged GPUs also on single Macs (MLX issues 3142 and 3830), and MLX removed it from its
examples (pull request 4005)."""
FAST_SYNCH_WHY = "it can wedge the GPU until the host is rebooted"


def is_set(value: str | None) -> bool:
    """Return whether MLX takes a variable with this value as switched on."""
    return (value or "0").strip() not in ("", "0")


def metal_fast_synch(environ: Mapping[str, str], where: str) -> Finding | None:
    """Judge the environment of a server. `where`: what sets it, for people, such as `env in hosts.yaml`."""
    if not is_set(environ.get(FAST_SYNCH)):
        return None
    return _finding("metal_fast_synch", f"{FAST_SYNCH} is set ({where}): {FAST_SYNCH_WHY}")


def wired_limit(limit: int | None, default: int, memory: int) -> Finding | None:
    """Judge the GPU's wired limit. `default` is Apple's for this Mac, `memory` its RAM; None: the limit is not known.

    A limit of 0 is the default.
    """
    if not limit or limit <= default:
        return None
    return _finding(
        "wired_limit_high",
        f"the GPU's wired limit is raised to {amount(limit)}: that leaves {amount(max(0, memory - limit))} of "
        f"{amount(memory)} for the system, and Apple's default leaves {amount(memory - default)}",
    )


def unbounded_servers(uses: Iterable[Use]) -> Finding | None:
    """Judge the servers of a host: two that both grow without a bound compete for the same memory."""
    growing = sorted((use for use in uses if use.unbounded), key=lambda use: use.owner != "mlxops")
    if len(growing) < 2:
        return None
    return _finding(
        "unbounded_servers",
        f"{_names(growing)} have no limit of the contexts that they keep: together they can exhaust the memory",
        _again(growing),
    )


def limits_over_budget(uses: Iterable[Use], size: int) -> Finding | None:
    """Judge the limits of a host's servers against its memory budget (`size`).

    A load is not refused for it: a model that fits with one context is loaded, and each server counts with what it
    needs and holds, not with what it may take. One that fits only with `--overcommit` has its own message.
    """
    uses = list(uses)
    limited = [use for use in uses if use.limit_bytes]
    allowed = sum(use.possible for use in uses)
    if allowed <= size or not limited:
        return None
    return _finding(
        "limits_over_budget",
        f"the limits of {_names(limited)} allow {amount(allowed)} together with the other servers, and the budget is "
        f"{amount(size)}",
        _again(sorted(limited, key=lambda use: -use.possible)),
    )


def _finding(code: str, message: str, commands: str = "") -> Finding:
    from mlxops.core.doctor.findings import Finding, FindingCode  # imported here: most loads find nothing

    found = FindingCode(code)
    return Finding(found, found.level, message, found.remedy + commands)


def _names(uses: Iterable[Use]) -> str:
    names = [f"{use.model} on {use.port}" if use.port is not None else use.model for use in uses]
    more = [f"{len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else []
    return " and ".join([*names[:MOST_NAMED], *more])


def _again(uses: Iterable[Use]) -> str:
    """Return the command that gives the first server of ours new limits, if there is one."""
    ours = next((use for use in uses if use.owner == "mlxops" and use.port is not None and use.pid is not None), None)
    return f": `mlxctl unload {ours.port}`, then `mlxctl load {ours.model} {ours.port}`" if ours else ""
