"""What `serve` exports: from the last look at each host to the samples."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from mlxops.core import metrics
from mlxops.core.commands.list import HostRow, MemoryRow
from mlxops.core.commands.observe import EndedOperation, ObservedPort, ObserveResult, PortTotals
from mlxops.core.commands.probe import VerdictRow
from mlxops.core.commands.status import DriftRow, PortRow, StatusResult
from mlxops.core.measuring import Figure
from mlxops.core.metrics import FAMILIES, Family, HostView, after_look, samples

NOON = 1_795_000_000.0
READY = PortRow(8100, "jerry-xl", "ready", "mlxops", "jerry", engine="mlx-lm", engine_version="0.32.2", memory_bytes=7)
HOST = HostRow(64, 9, 5, None, None, False, None, None, 0, 0)
MEMORY = MemoryRow(50, "memory in hosts.yaml", 20, 30, (), 18, 2, 3, HOST)
TOTALS = PortTotals(5, 2, 3, 12.5, {"memory": 1, "unknown": 0}, {"memory": 1, "unknown": 2})
PORT = ObservedPort(
    8100,
    started_at=NOON - 60,
    checked_at=NOON - 30,
    verdicts=(VerdictRow("tokens", "pass"), VerdictRow("tools", "fail")),
    measured_at=NOON - 90,
    figures=(Figure("long", "cold", 4, "decode", 291.0), Figure("short", "warm", 1, "first_token", 0.01)),
    totals=TOTALS,
)
DRIFT = DriftRow("orphan", 8100, "jerry", "", "")
RESULT = ObserveResult(StatusResult((), (READY,), (DRIFT, DRIFT), "/r"), MEMORY, (PORT,), 1, ())


def seen(result: ObserveResult | None, view: HostView | None = None, at: float = NOON, error: str = "") -> HostView:
    return after_look(view or HostView("studio"), at, result, error or None)


def values(*views: HostView) -> dict[str, float]:
    """Return each series as Prometheus writes it, without the host."""
    found = {}
    for sample in samples(views, "1.0"):
        pairs = zip(sample.family.labels, sample.labels, strict=True)
        labels = ",".join(f"{name}={value}" for name, value in pairs if name != "host")
        key = f"{sample.family.name.removeprefix('mlxops_')}{{{labels}}}"
        assert key not in found or len(views) > 1
        found[key] = sample.value
    return found


@pytest.mark.parametrize(
    ("series", "value"),
    [
        ("build_info{version=1.0}", 1),
        ("host_up{}", 1),
        ("host_last_contact_timestamp_seconds{}", NOON),
        ("looks_total{}", 1),
        ("failed_looks_total{}", 0),
        ("port_state{port=8100,state=ready}", 1),
        ("port_state{port=8100,state=wedged}", 0),
        ("port_state_since_timestamp_seconds{port=8100}", NOON),
        ("port_info{port=8100,alias=jerry-xl,model=jerry,owner=mlxops,engine=mlx-lm,engine_version=0.32.2}", 1),
        ("port_memory_bytes{port=8100}", 7),
        ("port_start_timestamp_seconds{port=8100}", NOON - 60),
        ("loads_total{port=8100}", 5),
        ("unloads_total{port=8100}", 2),
        ("swaps_total{port=8100}", 3),
        ("swap_downtime_seconds_total{port=8100}", 12.5),
        ("deaths_total{port=8100,cause=memory}", 1),
        ("restarts_total{port=8100,cause=unknown}", 2),
        ("drift{code=orphan}", 2),
        ("drift{code=foreign}", 0),
        ("operations_running{}", 1),
        ("operations_total{outcome=failed}", 0),
        ("probe_verdict{port=8100,check=tools,verdict=fail}", 1),
        ("probe_timestamp_seconds{port=8100}", NOON - 30),
        ("measured_decode_tokens_per_second{port=8100,prompt=long,cache=cold,streams=4}", 291),
        ("measured_first_token_seconds{port=8100,prompt=short,cache=warm,streams=1}", 0.01),
        ("measured_timestamp_seconds{port=8100}", NOON - 90),
        ("memory_budget_bytes{}", 50),
        ("memory_counted_bytes{}", 20),
        ("memory_held_bytes{}", 18),
        ("memory_reserved_bytes{}", 2),
        ("memory_stranded_bytes{}", 3),
        ("host_memory_bytes{}", 64),
        ("host_memory_used_bytes{}", 9),
        ("host_memory_wired_bytes{}", 5),
        ("host_swap_used_bytes{}", 0),
    ],
)
def test_observation_has_the_sample(series: str, value: float) -> None:
    assert values(seen(RESULT))[series] == value


@pytest.mark.parametrize("family", ["host_memory_unexplained_bytes", "host_gpu_limit_bytes", "host_error_info"])
def test_value_that_is_not_known_has_no_sample(family: str) -> None:
    assert not [series for series in values(seen(RESULT)) if series.startswith(family)]


def test_unread_history_has_no_totals() -> None:
    unread = replace(RESULT, ports=(replace(PORT, totals=None),))
    assert not {each for each in values(seen(unread)) if each.partition("{")[0] in {"loads_total", "deaths_total"}}


def test_host_that_was_never_seen_has_only_its_counts() -> None:
    assert set(values(HostView("studio"))) == {"build_info{version=1.0}", "looks_total{}", "failed_looks_total{}"}


def test_away_host_is_down_and_its_ports_are_unknown() -> None:
    away = values(seen(None, seen(RESULT), NOON + 10, "host_down"))
    assert away["host_up{}"] == 0 and away["host_error_info{code=host_down}"] == 1
    assert away["host_last_contact_timestamp_seconds{}"] == NOON
    assert (away["looks_total{}"], away["failed_looks_total{}"]) == (2, 1)
    assert not [series for series in away if series.startswith(("port_", "memory_", "drift"))]


def test_time_in_a_state_begins_when_the_state_changes() -> None:
    first = seen(RESULT)
    same = seen(RESULT, first, NOON + 10)
    wedged = replace(RESULT, status=replace(RESULT.status, ports=(replace(READY, state="wedged"),)))
    changed = seen(wedged, same, NOON + 20)
    series = "port_state_since_timestamp_seconds{port=8100}"
    assert [values(view)[series] for view in (first, same, changed)] == [NOON, NOON, NOON + 20]


def test_each_operation_is_counted_once_and_those_before_are_not() -> None:
    view = seen(replace(RESULT, ended=(EndedOperation("a", "done"),)))
    for ended in ("ab", "ab", "bc"):
        result = replace(RESULT, ended=tuple(EndedOperation(each, "failed") for each in ended))
        view = seen(None, seen(result, view), error="host_down")
    assert values(seen(RESULT, view))["operations_total{outcome=failed}"] == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400, -(10**30)])
def test_value_that_no_host_can_have_is_left_out(value: float) -> None:
    port = replace(READY, memory_bytes=value)  # type: ignore[arg-type]
    found = values(seen(replace(RESULT, status=replace(RESULT.status, ports=(port,)))))
    assert "port_memory_bytes{port=8100}" not in found and found["host_up{}"] == 1


def test_hostile_texts_become_short_labels_and_known_codes() -> None:
    port = replace(READY, model="m" * 500, alias="\ud800", state="surprising")
    drift = replace(DRIFT, code="surprising")
    found = values(seen(replace(RESULT, status=replace(RESULT.status, ports=(port,), drift=(drift,)))))
    "".join(found).encode()
    assert max(map(len, found)) < 400 and found["drift{code=other}"] == 1
    assert not [series for series in found if "surprising" in series]


def test_port_that_a_host_names_twice_is_one_series() -> None:
    twice = replace(RESULT, status=replace(RESULT.status, ports=(READY, READY)), ports=(PORT, PORT))
    assert values(seen(twice)) == values(seen(RESULT))


@pytest.mark.parametrize("family", FAMILIES, ids=[each.name for each in FAMILIES])
def test_name_follows_the_conventions_of_prometheus(family: Family) -> None:
    units = ("_seconds", "_bytes", "_per_second", "_info", "_total")
    plain = {metrics.HOST_UP, metrics.HOSTS_FILE, metrics.DRIFT, metrics.PORT_STATE, metrics.RUNNING, metrics.VERDICT}
    assert re.fullmatch(r"mlxops(_[a-z]+)+", family.name)
    assert family.name.endswith(units) or family in plain
    assert family.help.endswith(".") and all(re.fullmatch("[a-z_]+", label) for label in family.labels)
    assert not {"le", "quantile", "job", "instance"} & set(family.labels)
