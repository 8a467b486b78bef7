"""What changed on a host between two polls: everything that a user wants to know, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxops.core.commands.status import DriftRow, PortRow, RunningRow, StatusResult
from mlxops.core.protocol import Progress
from mlxops.core.status_diff import Change, changes, differ_beyond_memory
from tests.properties import PROPERTY

IDLE = PortRow(8100, "jerry-xl", "idle")
READY = replace(IDLE, state="ready", owner="mlxops", model="qwen", pid=12, memory_bytes=5)
DRIFT = DriftRow("orphan", 8100, "qwen", "8100: left over", "mlxctl unload 8100")


def result(*ports: PortRow, drift: tuple[DriftRow, ...] = (), operations: tuple[RunningRow, ...] = ()) -> StatusResult:
    return StatusResult(operations, ports, drift, "/registry.json")


def progress(done: int, rate: int = 0, total: int = 100) -> Progress:
    return Progress("download", done, total, rate)


def downloading(done: int, rate: int = 0, total: int = 100) -> PortRow:
    detail = f"{done} of {total}, {rate}/s"
    return replace(IDLE, state="loading", model="qwen", detail=detail, progress=progress(done, rate, total))


def texts(before: StatusResult, after: StatusResult) -> list[str]:
    return [change.text for change in changes(before, after)]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (IDLE, READY, ["idle -> ready qwen"]),
        (READY, IDLE, ["ready -> idle"]),
        (READY, replace(READY, state="wedged", detail="no answer"), ["ready -> wedged qwen: no answer"]),
        (READY, replace(READY, pid=34), ["ready: pid 12 -> 34"]),
        (READY, replace(READY, pid=34, model="llama"), ["ready: model qwen -> llama; pid 12 -> 34"]),
        (READY, replace(READY, alias=None), ["ready: alias jerry-xl -> none"]),
        (READY, replace(READY, detail="busy"), ["ready: busy"]),
        (replace(READY, detail="busy"), READY, ["ready: none"]),
        (READY, replace(READY, memory_bytes=6), []),
        (IDLE, downloading(0), ["idle -> loading qwen: 0 of 100, 0/s"]),
        (downloading(0), downloading(9, rate=3), []),
        (downloading(9), downloading(10), ["loading: 10 of 100, 0/s"]),
        (downloading(9), downloading(9, total=99), ["loading: 9 of 99, 0/s"]),
        (
            downloading(100),
            replace(READY, state="loading", detail="proof"),
            ["loading: owner none -> mlxops; pid none -> 12; proof"],
        ),
    ],
)
def test_change_of_a_port_is_reported_if_it_matters(before: PortRow, after: PortRow, expected: list[str]) -> None:
    found = changes(result(before), result(after))
    assert all((change.what, change.port) == ("port", 8100) for change in found)
    assert [change.text for change in found] == expected


def test_port_that_joins_or_leaves_the_range_is_reported() -> None:
    other = replace(IDLE, port=8101)
    assert changes(result(IDLE), result(IDLE, other)) == (Change("port", 8101, "idle (new in the host's range)"),)
    assert changes(result(IDLE, other), result(IDLE)) == (Change("port", 8101, "no longer in the host's range"),)


def test_drift_is_reported_when_it_begins_and_when_it_ends() -> None:
    clean, drifted = result(READY), result(READY, drift=(DRIFT,))
    assert changes(clean, drifted) == (Change("drift", 8100, "drift: 8100: left over; mlxctl unload 8100"),)
    assert changes(drifted, clean) == (Change("drift", 8100, "no more drift: 8100: left over"),)
    assert changes(drifted, drifted) == ()


def test_download_without_a_port_is_reported_in_tenths() -> None:
    def pull(done: int) -> RunningRow:
        return RunningRow("id", "pull", downloading(done).detail, progress(done))

    assert texts(result(IDLE), result(IDLE, operations=(pull(0),))) == ["pull id: 0 of 100, 0/s"]
    assert texts(result(operations=(pull(0),)), result(operations=(pull(5),))) == []
    assert texts(result(operations=(pull(5),)), result(operations=(pull(55),))) == ["pull id: 55 of 100, 0/s"]
    assert texts(result(operations=(pull(55),)), result()) == ["pull id: downloads no more"]


def test_download_of_a_port_is_reported_only_there() -> None:
    on_port = replace(downloading(0), operation="id")
    running = RunningRow("id", "pull", on_port.detail, on_port.progress)
    assert texts(result(on_port), result(on_port, operations=(running,))) == []


ports = st.builds(
    lambda port, state, owner, model, pid, memory, detail: PortRow(
        port, None, state, owner, model, pid=pid, memory_bytes=memory, detail=detail
    ),
    st.integers(8100, 8102),
    st.sampled_from(["idle", "ready", "loading"]),
    st.sampled_from([None, "mlxops", "hand"]),
    st.sampled_from([None, "a", "b"]),
    st.sampled_from([None, 1, 2]),
    st.none() | st.integers(0, 3),
    st.sampled_from(["", "busy"]),
)
results = st.builds(
    lambda rows, codes: result(*rows, drift=tuple(DriftRow(code, None, None, "m", "") for code in codes)),
    st.lists(ports, max_size=3, unique_by=lambda row: row.port),
    st.lists(st.sampled_from("xy")),
)


@given(results, results)
@PROPERTY
def test_no_change_means_that_nothing_but_memory_differs(before: StatusResult, after: StatusResult) -> None:
    def content(status: StatusResult) -> object:
        """All that counts, without order and repetition."""
        return {replace(row, memory_bytes=None) for row in status.ports}, set(status.drift)

    assert (changes(before, after) == ()) == (content(before) == content(after))
    assert changes(before, before) == ()


@given(results, results)
@PROPERTY
def test_change_for_a_user_is_a_difference_for_a_program(before: StatusResult, after: StatusResult) -> None:
    if changes(before, after):
        assert differ_beyond_memory(before, after)
