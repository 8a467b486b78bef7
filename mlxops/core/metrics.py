"""What `serve` exports of the hosts, as samples for Prometheus. Pure.

`FAMILIES` is the table of all metrics, by the naming conventions of Prometheus. `samples` computes them from the last
observation of each host. What is not known has no sample. Each label has few values: names of hosts.yaml and of the
registry, ports of the range, and members of enums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field

from mlxops.core.commands.list import MemoryRow
from mlxops.core.commands.observe import ObservedPort, ObserveResult, PortTotals
from mlxops.core.commands.status import PortRow
from mlxops.core.drift import DriftCode
from mlxops.core.frozen import dataclass
from mlxops.core.measuring import Metric
from mlxops.core.ports import State

LONGEST_LABEL = 200
MOST_SAMPLES = 20_000
"""Limit for one host. A host that sends more is broken."""
OUTCOMES = ("done", "failed", "cancelled", "followed", "interrupted")
MEANING_OF_OTHER = "other"
"""The label of a code that this version does not know."""


@dataclass(frozen=True)
class Family:
    """A metric: its name, what it means, its labels. A name that ends with `_total` is a counter."""

    name: str
    help: str
    labels: tuple[str, ...]

    @property
    def counter(self) -> bool:
        return self.name.endswith("_total")


_HOST = ("host",)
_PORT = ("host", "port")

BUILD_INFO = Family("mlxops_build_info", "The version of mlxops that serves these metrics.", ("version",))
HOSTS_FILE = Family("mlxops_hosts_file_valid", "Whether hosts.yaml could be read when it last changed.", ())
HOST_UP = Family("mlxops_host_up", "Whether the last look at the host gave its status.", _HOST)
HOST_ERROR = Family("mlxops_host_error_info", "Why the last look at the host failed.", (*_HOST, "code"))
HOST_SEEN = Family(
    "mlxops_host_last_contact_timestamp_seconds", "When the host last gave its status, in seconds since 1970.", _HOST
)
LOOKS = Family("mlxops_looks_total", "Looks at the host since `serve` was started.", _HOST)
FAILED_LOOKS = Family("mlxops_failed_looks_total", "Looks at the host that failed.", _HOST)

PORT_STATE = Family("mlxops_port_state", "1 for the state that the port is in, 0 for the others.", (*_PORT, "state"))
PORT_SINCE = Family(
    "mlxops_port_state_since_timestamp_seconds",
    "Since when `serve` has seen the port in its state, in seconds since 1970.",
    _PORT,
)
PORT_INFO = Family(
    "mlxops_port_info",
    "The alias of the port and what is on it; the value is always 1.",
    (*_PORT, "alias", "model", "owner", "engine", "engine_version"),
)
PORT_STARTED = Family(
    "mlxops_port_start_timestamp_seconds", "When the server of the port was started, in seconds since 1970.", _PORT
)
PORT_MEMORY = Family("mlxops_port_memory_bytes", "What all processes of the server hold.", _PORT)

LOADS = Family("mlxops_loads_total", "Loads that the history of the host has.", _PORT)
UNLOADS = Family("mlxops_unloads_total", "Unloads that the history of the host has.", _PORT)
SWAPS = Family("mlxops_swaps_total", "Loads that left the port without a server for a time.", _PORT)
DOWNTIME = Family(
    "mlxops_swap_downtime_seconds_total", "How long swaps, also failed ones, left the port without a server.", _PORT
)
DEATHS = Family("mlxops_deaths_total", "Servers that ended by themselves, by cause.", (*_PORT, "cause"))
RESTARTS = Family(
    "mlxops_restarts_total", "Starts by restore or the keeper, by the cause of the death before.", (*_PORT, "cause")
)

OPERATIONS = Family(
    "mlxops_operations_total", "Operations that ended since `serve` was started, by outcome.", (*_HOST, "outcome")
)
RUNNING = Family("mlxops_operations_running", "Operations that run now.", _HOST)
DRIFT = Family("mlxops_drift", "Differences between the registry and what runs, by code.", (*_HOST, "code"))

VERDICT = Family(
    "mlxops_probe_verdict",
    "1 for the verdict of each check of the last probe of the server.",
    (*_PORT, "check", "verdict"),
)
CHECKED = Family("mlxops_probe_timestamp_seconds", "When the server was last probed, in seconds since 1970.", _PORT)
_CASE = (*_PORT, "prompt", "cache", "streams")
DECODE = Family("mlxops_measured_decode_tokens_per_second", "Generated tokens per second, as last measured.", _CASE)
PREFILL = Family("mlxops_measured_prefill_tokens_per_second", "Prompt tokens per second, as last measured.", _CASE)
FIRST_TOKEN = Family("mlxops_measured_first_token_seconds", "Time to the first token, as last measured.", _CASE)
MEASURED = Family("mlxops_measured_timestamp_seconds", "When the port was last measured, in seconds since 1970.", _PORT)

BUDGET = Family("mlxops_memory_budget_bytes", "The memory that all servers of the host together may use.", _HOST)
COUNTED = Family("mlxops_memory_counted_bytes", "The part of the budget that is taken.", _HOST)
HELD = Family("mlxops_memory_held_bytes", "What the servers hold now, as far as it is known.", _HOST)
RESERVED = Family("mlxops_memory_reserved_bytes", "What is reserved for servers that are about to start.", _HOST)
STRANDED = Family("mlxops_memory_stranded_bytes", "What stopped servers did not return.", _HOST)
TOTAL = Family("mlxops_host_memory_bytes", "The memory of the host.", _HOST)
IN_USE = Family("mlxops_host_memory_used_bytes", "The memory of the host that cannot be freed at once.", _HOST)
WIRED = Family("mlxops_host_memory_wired_bytes", "macOS: the memory of the host that cannot be swapped.", _HOST)
UNEXPLAINED = Family(
    "mlxops_host_memory_unexplained_bytes", "macOS: wired memory that no visible process holds.", _HOST
)
GPU_LIMIT = Family("mlxops_host_gpu_limit_bytes", "macOS: the most memory that the GPU may wire.", _HOST)
SWAP_USED = Family("mlxops_host_swap_used_bytes", "Swap space of the host that is in use.", _HOST)

FAMILIES = tuple(value for value in globals().values() if isinstance(value, Family))

_SPEEDS: Mapping[str, Family] = {Metric.DECODE: DECODE, Metric.PREFILL: PREFILL, Metric.FIRST_TOKEN: FIRST_TOKEN}


@dataclass(frozen=True)
class HostView:
    """What `serve` knows of one host. Times are seconds since 1970."""

    host: str
    looks: int = 0
    failed_looks: int = 0
    result: ObserveResult | None = None
    """The last look's result; None if it failed."""
    error: str | None = None
    """The code of the last look's error."""
    seen_at: float | None = None
    since: Mapping[int, tuple[str, float]] = field(default_factory=dict)
    """The state of each port, and since when it was seen."""
    known: frozenset[str] | None = None
    """The ended operations of the last result; None before the first one."""
    outcomes: Mapping[str, int] = field(default_factory=dict)
    """Operations that ended since the first result."""


@dataclass(frozen=True)
class Sample:
    family: Family
    labels: tuple[str, ...]
    value: float


def samples(hosts: Iterable[HostView], version: str) -> list[Sample]:
    """Return the samples of all hosts, each series once: Prometheus refuses a page with a series twice."""
    found: dict[tuple[str, tuple[str, ...]], Sample] = {}
    for sample in (Sample(BUILD_INFO, (version,), 1), *(each for host in hosts for each in _of_host(host))):
        found.setdefault((sample.family.name, sample.labels), sample)
    return list(found.values())


def _of_host(view: HostView) -> Iterator[Sample]:
    for count, (family, labels, value) in enumerate(_values(view)):
        # A host may send anything: NaN fails the comparison, and a huge integer has no float.
        if count < MOST_SAMPLES and value is not None and -(2**63) < value < 2**63:
            yield Sample(family, tuple(map(_label, (view.host, *labels))), float(value))


def _label(value: object) -> str:
    """Return a label that can be written as UTF-8. What is not known is empty, as if the label was missing."""
    text = "" if value is None else str(value)[:LONGEST_LABEL]
    return text.encode("utf-8", "replace").decode()


_Value = tuple[Family, tuple[object, ...], float | None]
"""A family, its labels without the host, and a value; None if it is not known."""


def _values(view: HostView) -> Iterator[_Value]:
    if view.looks:
        yield HOST_UP, (), float(view.result is not None)
    yield LOOKS, (), view.looks
    yield FAILED_LOOKS, (), view.failed_looks
    yield HOST_SEEN, (), view.seen_at
    if view.error is not None:
        yield HOST_ERROR, (view.error,), 1
    if view.known is not None:
        yield from ((OPERATIONS, (outcome,), view.outcomes.get(outcome, 0)) for outcome in OUTCOMES)
    if view.result is not None:
        yield from _of_result(view, view.result)


def _of_result(view: HostView, result: ObserveResult) -> Iterator[_Value]:
    yield RUNNING, (), result.running
    yield from _drift(result)
    yield from _memory(result.memory)
    more = {each.port: each for each in result.ports}
    for row in result.status.ports:
        yield from _port(row, view.since.get(row.port))
        if row.port in more:
            yield from _observed(more[row.port])


def _drift(result: ObserveResult) -> Iterator[_Value]:
    counts = dict.fromkeys((*DriftCode, MEANING_OF_OTHER), 0)
    for row in result.status.drift:
        counts[row.code if row.code in counts else MEANING_OF_OTHER] += 1
    yield from ((DRIFT, (str(code),), count) for code, count in counts.items())


def _memory(row: MemoryRow) -> Iterator[_Value]:
    yield BUDGET, (), row.budget_bytes
    yield COUNTED, (), row.used_bytes
    yield HELD, (), row.held_bytes
    yield RESERVED, (), row.reserved_bytes
    yield STRANDED, (), row.stranded_bytes
    if row.host is not None:
        yield TOTAL, (), row.host.total_bytes
        yield IN_USE, (), row.host.in_use_bytes
        yield WIRED, (), row.host.wired_bytes
        yield UNEXPLAINED, (), row.host.unexplained_bytes
        yield GPU_LIMIT, (), row.host.gpu_limit_bytes
        yield SWAP_USED, (), row.host.swap_used_bytes


def _port(row: PortRow, since: tuple[str, float] | None) -> Iterator[_Value]:
    port = (row.port,)
    for state in State:
        yield PORT_STATE, (*port, state.value), float(row.state == state.value)
    if since is not None and since[0] == row.state:
        yield PORT_SINCE, port, since[1]
    yield PORT_INFO, (*port, row.alias, row.model, row.owner, row.engine, row.engine_version), 1
    yield PORT_MEMORY, port, row.memory_bytes


def _observed(more: ObservedPort) -> Iterator[_Value]:
    port = (more.port,)
    yield PORT_STARTED, port, more.started_at
    yield CHECKED, port, more.checked_at
    yield from ((VERDICT, (*port, each.check, each.verdict), 1) for each in more.verdicts)
    yield MEASURED, port, more.measured_at
    for figure in more.figures:
        if figure.metric in _SPEEDS:
            case = (figure.prompt, figure.cache, figure.streams)
            yield _SPEEDS[figure.metric], (*port, *case), figure.median
    if more.totals is not None:
        yield from _totals(port, more.totals)


def _totals(port: tuple[object, ...], totals: PortTotals) -> Iterator[_Value]:
    yield LOADS, port, totals.loads
    yield UNLOADS, port, totals.unloads
    yield SWAPS, port, totals.swaps
    yield DOWNTIME, port, totals.downtime_seconds
    yield from ((DEATHS, (*port, cause), count) for cause, count in totals.deaths.items())
    yield from ((RESTARTS, (*port, cause), count) for cause, count in totals.restarts.items())


# -- from one look to the next


def after_look(view: HostView, at: float, result: ObserveResult | None, error: str | None) -> HostView:
    """Return the view after a look at `at`, which gave a result or an error code."""
    if result is None:
        return HostView(
            host=view.host,
            looks=view.looks + 1,
            failed_looks=view.failed_looks + 1,
            error=error or MEANING_OF_OTHER,
            seen_at=view.seen_at,
            known=view.known,
            outcomes=view.outcomes,
        )
    return HostView(
        host=view.host,
        looks=view.looks + 1,
        failed_looks=view.failed_looks,
        result=result,
        seen_at=at,
        since={row.port: _since(view, row, at) for row in result.status.ports},
        known=frozenset(each.operation for each in result.ended),
        outcomes=_outcomes(view, result),
    )


def _since(view: HostView, row: PortRow, at: float) -> tuple[str, float]:
    before = view.since.get(row.port)
    return before if before is not None and before[0] == row.state else (row.state, at)


def _outcomes(view: HostView, result: ObserveResult) -> Mapping[str, int]:
    """Count the operations that ended since the last result. Those before the first one are not counted."""
    counts = dict(view.outcomes)
    if view.known is not None:
        for each in result.ended:
            if each.operation not in view.known and each.outcome in OUTCOMES:
                counts[each.outcome] = counts.get(each.outcome, 0) + 1
    return counts
