"""`list`: the registered models."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from mlxops.core.command import Group, Hosts, Request, switch
from mlxops.core.frozen import dataclass
from mlxops.core.replies import ErrorRow, HostReply
from mlxops.core.tables import host_table, one_line, size, table
from mlxops.core.wire import omitted


@dataclass(frozen=True)
class OptionRow:
    """An option of a model. `origin`: registry, family, settings, or budget (a limit that its load chose)."""

    key: str
    value: str | int | bool | tuple[str, ...] | None
    origin: str


@dataclass(frozen=True)
class EstimateRow:
    """The memory that a model is expected to need, in bytes."""

    weight_bytes: int
    context_bytes: int
    """Allowance for the context."""
    context_tokens: int | None
    """Tokens of the allowance; None if it is a share of the weights."""
    state_bytes: int = 0
    """States of recurrent layers. They have the same size for any context."""
    upper_estimate: bool = False
    """Builds up to 0.1.0 send neither this nor `state_bytes`."""
    total_bytes: int = 0
    """Weights, contexts with their states, kept contexts and the server program."""
    contexts: int = 1
    """Requests that are answered at once, each with its context and states."""
    cache_bytes: int = 0
    """Contexts that are kept for later requests."""
    server_bytes: int = 0
    """The server program. Builds up to 0.2.0 send neither this nor the two before."""


@dataclass(frozen=True)
class ModelRow:
    """A registered model."""

    name: str
    repo_id: str | None
    model_id: str | None
    """The model's name in requests to the engine."""
    revision: str | None
    """The commit of its files."""
    cache_path: str | None
    """The folder of its files."""
    format: str | None
    port: int | None
    """The port to which the registry assigns it; None if none."""
    engine: str
    """The engine that would serve it."""
    size_bytes: int | None
    """Bytes of its files."""
    context_length: int | None
    """Tokens that it is offered with; None if not known."""
    flags: tuple[OptionRow, ...]
    """Its options, with the families' and the host's defaults."""
    problems: tuple[str, ...]
    """What would keep it from being loaded, for people."""
    memory: EstimateRow | None = None
    """With `--memory`, if its files are here."""


@dataclass(frozen=True)
class UseRow:
    """The memory of one server, in bytes. `counted_bytes`: the part that counts against the budget."""

    port: int | None
    """None for a server outside of the port range."""
    model: str | None
    owner: str | None
    """Who started it; `loading` for memory reserved for a load; `stranded` for memory that no process has."""
    pid: int | None
    estimated_bytes: int | None
    """None if its files are not known."""
    resident_bytes: int | None
    """What its processes hold now; None if that is hidden, as on macOS for another user's."""
    counted_bytes: int
    """The larger of the two."""
    limit_bytes: int | None = None
    """What it may take if it uses the limits of its command to the full; None if it has none. Not a reservation."""
    limit: EstimateRow | None = None
    """The parts of `limit_bytes`. Builds up to 0.2.0 do not send it."""


@dataclass(frozen=True)
class HostRow:
    """The memory of a host, in bytes."""

    total_bytes: int
    in_use_bytes: int | None
    """What cannot be had without swapping or ending a process; None if not known."""
    wired_bytes: int | None
    """macOS: what cannot be swapped, the GPU's buffers among it."""
    unexplained_bytes: int | None
    """macOS: how much more is wired than all visible processes hold. The kernel's own few GB are part of it."""
    gpu_limit_bytes: int | None
    """macOS: the most that the GPU may wire."""
    gpu_limit_set: bool
    """An administrator set that limit (iogpu.wired_limit_mb)."""
    pressure: str | None
    """macOS: normal, warning or critical."""
    stalled_percent: float | None
    """Linux: the share of the last 10 s in which a process waited for memory."""
    swap_total_bytes: int | None
    swap_used_bytes: int | None
    gpu_limit_default_bytes: int | None = None
    """macOS: the limit that holds while none is set, as far as it is known. Builds up to 0.2.0 do not send it."""


@dataclass(frozen=True)
class MemoryRow:
    """The memory budget of a host."""

    budget_bytes: int
    budget_source: str
    """Where the budget comes from, for people."""
    used_bytes: int
    """The sum of what is counted for each server."""
    left_bytes: int
    """Negative if the servers exceed the budget."""
    servers: tuple[UseRow, ...]
    held_bytes: int = 0
    """What the servers hold now, as far as it is known."""
    reserved_bytes: int = 0
    """What is reserved for servers that are about to start."""
    stranded_bytes: int = 0
    """What stopped servers did not return. Only a reboot returns it."""
    host: HostRow | None = None
    """Builds up to 0.2.0 send neither this nor the three before."""


@dataclass(frozen=True)
class ListResult:
    models: tuple[ModelRow, ...]
    registry: str
    """The path of registry.json."""
    unusable: str | None
    """Why the registry cannot be used; None if it can."""
    registry_error: ErrorRow | None = None
    """Agents before 0.2.0 do not send it."""
    memory: MemoryRow | None = omitted(None)


@dataclass(frozen=True)
class List(
    Request[ListResult],
    group=Group.LOOK,
    example="mlxctl list --memory",
    hosts=Hosts.ALL,
    repeatable=True,
):
    """Show the registered models."""

    memory: bool = switch("estimate each model, and show the budget and what serves already")


def show(replies: Sequence[HostReply[ListResult]]) -> str:
    many = len(replies) > 1
    rows: list[list[object]] = []
    for reply in replies:
        if reply.error is not None:
            rows.append([reply.host, reply.error.code, "", "", "", "", "", "", reply.error.message])
        if reply.result is None:
            continue
        if error := reply.result.registry_error:
            rows.append([reply.host, error.code, "", "", "", "", "", "", f"{error.message}: {error.why}"])
        for row in reply.result.models:
            about = [reply.host, row.name, row.repo_id, (row.revision or "")[:12], size(row.size_bytes)]
            rows.append([*about, row.format, row.port, shown_options(row.flags), "; ".join(row.problems)])
    if not rows:
        return _no_models("" if many else "".join(reply.flags for reply in replies))
    columns = ["HOST", "NAME", "REPO", "REVISION", "SIZE", "FORMAT", "PORT", "FLAGS", "PROBLEMS"]
    return host_table(columns, rows, many=many)


def _no_models(flags: str) -> str:
    """`flags`: what a command needs to go to the host that has no models."""
    cache = f"what the cache holds: `mlxctl init{flags}`"
    return f"no models are registered; {cache}; or load one: `mlxctl load ORG/NAME PORT{flags}`"


def shown_options(options: Sequence[OptionRow]) -> str:
    """Return `key=value, key=value (origin)`, without the host's own defaults, which are the same for all."""
    groups = groupby((row for row in options if row.origin != "settings"), lambda row: row.origin)
    return ", ".join(f"{', '.join(f'{row.key}={_value(row)}' for row in rows)} ({origin})" for origin, rows in groups)


def _value(row: OptionRow) -> str:
    if isinstance(row.value, tuple):
        return " ".join(row.value)
    if row.origin == "budget" and row.key.endswith("bytes") and isinstance(row.value, int):
        return size(row.value).replace(" ", "")
    return "null" if row.value is None else str(row.value)


def show_memory(replies: Sequence[HostReply[ListResult]]) -> str:
    """Return the budget, what serves, and what each registered model would need."""
    return "\n\n".join(_memory(reply, many=len(replies) > 1) for reply in replies)


def _memory(reply: HostReply[ListResult], *, many: bool) -> str:
    title = [f"{reply.host}:"] if many else []
    if reply.error is not None:
        return "\n".join([*title, one_line(reply.error.message)])
    if reply.result is None or reply.result.memory is None:
        return "\n".join(title)
    memory = reply.result.memory
    serving = [[use.port, use.model, use.owner, *map(size, _sizes(use))] for use in memory.servers]
    models = [_need(row, memory.left_bytes) for row in reply.result.models]
    return "\n".join(
        [
            *title,
            _budget(memory),
            *([_host(memory.host)] if memory.host else []),
            "",
            table(["PORT", "SERVES", "OWNER", "ESTIMATE", "MEMORY", "COUNTED", "LIMIT"], serving),
            "",
            table(["MODEL", "PORT", "WEIGHTS", "CONTEXT", "TOKENS", "NEEDS", "FITS NOW"], models),
        ]
    )


def _sizes(use: UseRow) -> tuple[int | None, ...]:
    return (use.estimated_bytes, use.resident_bytes, use.counted_bytes, use.limit_bytes)


def _budget(memory: MemoryRow) -> str:
    return ", ".join(
        [
            f"budget {size(memory.budget_bytes)} ({one_line(memory.budget_source)})",
            f"counted {size(memory.used_bytes)}",
            f"held {size(memory.held_bytes)}",
            f"reserved {size(memory.reserved_bytes)}",
            *([f"stranded {size(memory.stranded_bytes)}"] if memory.stranded_bytes else []),
            f"free {size(memory.left_bytes)}",
        ]
    )


def _host(host: HostRow) -> str:
    """Return the line about the host, without what is not known."""
    kind = "default"
    if host.gpu_limit_set:
        usual = host.gpu_limit_default_bytes
        kind = "set" + (f"; the default is {size(usual)}" if usual is not None else "")
    parts = [
        f"host {size(host.total_bytes)}",
        f"in use {size(host.in_use_bytes)}" if host.in_use_bytes is not None else "",
        f"wired {size(host.wired_bytes)}" if host.wired_bytes is not None else "",
        f"of it no process explains {size(host.unexplained_bytes)}" if host.unexplained_bytes is not None else "",
        f"GPU limit {size(host.gpu_limit_bytes)} ({kind})" if host.gpu_limit_bytes is not None else "",
        f"pressure {one_line(host.pressure)}" if host.pressure else "",
        f"waiting for memory {host.stalled_percent:.0f} % of the last 10 s" if host.stalled_percent else "",
        f"swap {size(host.swap_used_bytes)} of {size(host.swap_total_bytes)}" if host.swap_total_bytes else "",
    ]
    return ", ".join(filter(None, parts))


def _need(row: ModelRow, left: int) -> list[object]:
    need = row.memory
    if need is None:
        return [row.name, row.port, "-", "-", None, "-", "-"]
    context = f"{'up to ' if need.upper_estimate else ''}{size(need.context_bytes)}"
    fits = "yes" if need.total_bytes <= left else "no"
    return [row.name, row.port, size(need.weight_bytes), context, need.context_tokens, size(need.total_bytes), fits]
