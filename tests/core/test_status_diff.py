"""What has changed on a host between two looks: everything that a person would want to know, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxops.core.commands.status import StatusResult
from mlxops.core.status_diff import Change, changes, differ_beyond_memory
from mlxops.core.wire import decode
from tests.properties import PROPERTY

IDLE: dict[str, object] = {
    "port": 8100,
    "alias": "jerry-xl",
    "state": "idle",
    "owner": None,
    "model": None,
    "detail": "",
}
READY = IDLE | {"state": "ready", "owner": "mlxops", "model": "qwen", "pid": 12, "memory_bytes": 5}
DRIFT = {"code": "orphan", "port": 8100, "model": "qwen", "message": "8100: left over", "hint": "mlxctl unload 8100"}


def result(
    *ports: Mapping[str, object], drift: tuple[object, ...] = (), operations: tuple[object, ...] = ()
) -> StatusResult:
    rows = {"ports": list(ports), "drift": list(drift), "operations": list(operations), "registry": "/r"}
    return decode(StatusResult, rows)


def downloading(done: int, rate: int = 0, total: int = 100) -> dict[str, object]:
    progress = {"name": "download", "done": done, "total": total, "rate": rate}
    return IDLE | {"state": "loading", "model": "qwen", "detail": f"{done} of {total}, {rate}/s", "progress": progress}


def texts(before: StatusResult, after: StatusResult) -> list[str]:
    return [change.text for change in changes(before, after)]


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (IDLE, READY, ["idle -> ready qwen"]),
        (READY, IDLE, ["ready -> idle"]),
        (READY, READY | {"state": "wedged", "detail": "no answer"}, ["ready -> wedged qwen: no answer"]),
        (READY, READY | {"pid": 34}, ["ready: pid 12 -> 34"]),
        (READY, READY | {"pid": 34, "model": "llama"}, ["ready: model qwen -> llama; pid 12 -> 34"]),
        (READY, READY | {"alias": None}, ["ready: alias jerry-xl -> none"]),
        (READY, READY | {"detail": "busy"}, ["ready: busy"]),
        (READY | {"detail": "busy"}, READY, ["ready: none"]),
        (READY, READY | {"memory_bytes": 6}, []),
        (IDLE, downloading(0), ["idle -> loading qwen: 0 of 100, 0/s"]),
        (downloading(0), downloading(9, rate=3), []),
        (downloading(9), downloading(10), ["loading: 10 of 100, 0/s"]),
        (downloading(9), downloading(9, total=99), ["loading: 9 of 99, 0/s"]),
        (downloading(100), READY | {"state": "loading", "detail": "proof"}, None),
    ],
)
def test_a_port_is_told_when_something_of_it_changes_that_matters(
    before: Mapping[str, object], after: Mapping[str, object], told: list[str] | None
) -> None:
    found = changes(result(before), result(after))
    assert all((change.what, change.port) == ("port", 8100) for change in found)
    if told is None:
        assert len(found) == 1 and "proof" in found[0].text
    else:
        assert [change.text for change in found] == told


def test_a_port_that_joins_or_leaves_the_range_is_told() -> None:
    other = IDLE | {"port": 8101}
    assert changes(result(IDLE), result(IDLE, other)) == (Change("port", 8101, "idle (new in the host's range)"),)
    assert changes(result(IDLE, other), result(IDLE)) == (Change("port", 8101, "no longer in the host's range"),)


def test_drift_is_told_when_it_comes_and_when_it_goes_and_not_in_between() -> None:
    clean, spoiled = result(READY), result(READY, drift=(DRIFT,))
    assert changes(clean, spoiled) == (Change("drift", 8100, "drift: 8100: left over; mlxctl unload 8100"),)
    assert changes(spoiled, clean) == (Change("drift", 8100, "no more drift: 8100: left over"),)
    assert changes(spoiled, spoiled) == ()


def test_a_download_without_a_port_is_told_in_tenths_and_one_that_a_port_tells_of_only_there() -> None:
    def pull(done: int) -> dict[str, object]:
        return {"operation": "id", "command": "pull", **{k: downloading(done)[k] for k in ("detail", "progress")}}

    assert texts(result(IDLE), result(IDLE, operations=(pull(0),))) == ["pull id: 0 of 100, 0/s"]
    assert texts(result(operations=(pull(0),)), result(operations=(pull(5),))) == []
    assert texts(result(operations=(pull(5),)), result(operations=(pull(55),))) == ["pull id: 55 of 100, 0/s"]
    assert texts(result(operations=(pull(55),)), result()) == ["pull id: downloads no more"]
    on_port = downloading(0) | {"operation": "id"}
    assert texts(result(on_port), result(on_port, operations=(pull(0),))) == []


ports = st.fixed_dictionaries(
    {
        "port": st.integers(8100, 8102),
        "alias": st.none(),
        "state": st.sampled_from(["idle", "ready", "loading"]),
        "owner": st.sampled_from([None, "mlxops", "hand"]),
        "model": st.sampled_from([None, "a", "b"]),
        "pid": st.sampled_from([None, 1, 2]),
        "detail": st.sampled_from(["", "busy"]),
        "memory_bytes": st.none() | st.integers(0, 3),
    }
)
TEXTS = {"message": st.just("m"), "hint": st.just("h")}
results = st.builds(
    lambda rows, drift: result(*rows, drift=tuple(drift)),
    st.lists(ports, max_size=3, unique_by=lambda row: row["port"]),
    st.lists(
        st.fixed_dictionaries({"code": st.sampled_from("xy"), **dict.fromkeys(("port", "model"), st.none()), **TEXTS})
    ),
)


@given(results, results)
@PROPERTY
def test_nothing_is_told_exactly_where_nothing_but_memory_differs(before: StatusResult, after: StatusResult) -> None:
    def known(result: StatusResult) -> object:
        """All that counts, without order and repetition."""
        return {replace(row, memory_bytes=None) for row in result.ports}, set(result.drift)

    assert (changes(before, after) == ()) == (known(before) == known(after))
    assert changes(before, before) == ()


@given(results, results)
@PROPERTY
def test_whatever_a_person_is_told_a_program_is_told_too(before: StatusResult, after: StatusResult) -> None:
    if changes(before, after):
        assert differ_beyond_memory(before, after)
