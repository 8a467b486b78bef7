"""The state of a port from its signals, drift, and run records."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxops.core.drift import DriftCode
from mlxops.core.port_drift import find_drift
from mlxops.core.ports import Health, JobState, Orphan, Owner, Signals, Standing, State, judge
from mlxops.core.records import Operation, Run, run_from_wire
from mlxops.core.registry import EMPTY, Registry
from mlxops.core.settings import BootJob, PortRange
from tests.core.worlds import (
    CLAIM,
    OURS,
    PORTS,
    any_signals,
    at_boot,
    by_hand,
    ending,
    foreign,
    registries,
    registry,
    run,
    server,
    serving,
    signals,
    world,
)
from tests.properties import PROPERTY, json_values

A = registry(a=8103)
B = registry(a=None, b=8103)
LOAD = Operation("op1", "load", "a", 8103, "me@mini", "now")
UNLOAD = Operation("op1", "unload", None, 8103, "me@mini", "now")

CASES: dict[str, tuple[Signals, Registry, State, Owner | None]] = {
    "nothing at all": (signals(), EMPTY, State.IDLE, None),
    "an assignment and nothing else": (signals(), A, State.IDLE, None),
    "the record of an ended server without an assignment": (
        replace(signals(), run=run()),
        EMPTY,
        State.IDLE,
        None,
    ),
    "an unreadable record and nothing else": (replace(signals(), broken_record=True), A, State.IDLE, None),
    "a load is running, nothing started yet": (replace(signals(), operation=LOAD), A, State.LOADING, Owner.MLXOPS),
    "a load is running, its server is up and unproven": (
        replace(serving(), run=run(proven=False), operation=LOAD),
        EMPTY,
        State.LOADING,
        Owner.MLXOPS,
    ),
    "our whole server": (serving(), A, State.READY, Owner.MLXOPS),
    "our whole server while an unload runs": (
        replace(serving(), operation=UNLOAD),
        A,
        State.DRAINING,
        Owner.MLXOPS,
    ),
    "our server that no longer listens while an unload runs": (
        replace(serving(), operation=UNLOAD, listening=False, listener_pids=frozenset()),
        A,
        State.DRAINING,
        Owner.MLXOPS,
    ),
    "a server by hand while an unload runs": (replace(by_hand(), operation=UNLOAD), A, State.DRAINING, Owner.HAND),
    "an ended server with an assignment": (replace(signals(), run=run()), A, State.FAILED, None),
    "our server, unhealthy": (replace(serving(), health=Health.BROKEN), A, State.FAILED, Owner.MLXOPS),
    "our server, silent": (replace(serving(), health=Health.SILENT), A, State.WEDGED, Owner.MLXOPS),
    "our server that says that it is loading": (
        replace(serving(), health=Health.LOADING),
        A,
        State.LOADING,
        Owner.MLXOPS,
    ),
    "a server by hand, not asked": (replace(by_hand(), health=Health.NOT_ASKED), A, State.UNKNOWN, None),
    "a listener whose process cannot be seen": (
        replace(signals(), listening=True, unowned=True),
        A,
        State.UNKNOWN,
        None,
    ),
    "our server lives and a listener's process cannot be seen": (
        replace(serving(), listener_pids=frozenset(), unowned=True),
        A,
        State.UNKNOWN,
        None,
    ),
    "a listener of another user": (replace(signals(), listening=True), A, State.FOREIGN, Owner.FOREIGN),
    "our server, not asked": (replace(serving(), health=Health.NOT_ASKED), A, State.UNKNOWN, None),
    "our server and the registry names another model": (serving(), B, State.MISMATCH, Owner.MLXOPS),
    "our server lives and another process listens": (
        replace(serving(), listener_pids=frozenset({6000})),
        A,
        State.MISMATCH,
        Owner.MLXOPS,
    ),
    "our server lives and the listener has no visible process": (
        replace(serving(), listener_pids=frozenset()),
        A,
        State.MISMATCH,
        Owner.MLXOPS,
    ),
    "our server without an assignment": (serving(), EMPTY, State.ORPHAN, Owner.MLXOPS),
    "our server without its port": (
        replace(serving(), listening=False, listener_pids=frozenset()),
        A,
        State.ORPHAN,
        Owner.MLXOPS,
    ),
    "our server without its leader": (replace(serving(), leader_proven=False), A, State.ORPHAN, Owner.MLXOPS),
    "our server whose load was interrupted": (
        replace(serving(), run=run(proven=False)),
        A,
        State.ORPHAN,
        Owner.MLXOPS,
    ),
    "our server that a stop did not wait for": (ending(), A, State.DRAINING, Owner.MLXOPS),
    "our server that a stop did not wait for, without its port and leader": (
        replace(ending(), leader_proven=False, listening=False, listener_pids=frozenset()),
        A,
        State.DRAINING,
        Owner.MLXOPS,
    ),
    "our server that a stop did not wait for has ended": (
        replace(signals(), run=ending().run),
        A,
        State.FAILED,
        None,
    ),
    "a server by hand": (by_hand(), EMPTY, State.READY, Owner.HAND),
    "a server by hand that the registry names": (by_hand(), A, State.READY, Owner.HAND),
    "a server by hand with another model than the registry says": (by_hand(), B, State.MISMATCH, Owner.HAND),
    "a server by hand that does not listen": (
        replace(by_hand(), listening=False, listener_pids=frozenset()),
        A,
        State.LOADING,
        Owner.HAND,
    ),
    "a server by hand that is silent": (replace(by_hand(), health=Health.SILENT), A, State.WEDGED, Owner.HAND),
    "a server by hand that is unhealthy": (replace(by_hand(), health=Health.BROKEN), A, State.FAILED, Owner.HAND),
    "a server by hand on a port of ours that ended": (replace(by_hand(), run=run()), A, State.READY, Owner.HAND),
    "the boot job's server": (at_boot(), registry(a=8100), State.READY, Owner.BOOT),
    "the boot job's server that another user owns": (
        replace(at_boot(), hand=None, health=Health.NOT_ASKED),
        registry(a=8100),
        State.READY,
        Owner.BOOT,
    ),
    "the boot job's server that does not listen yet": (
        replace(at_boot(), listening=False, listener_pids=frozenset(), health=Health.NOT_ASKED),
        EMPTY,
        State.LOADING,
        Owner.BOOT,
    ),
    "the boot job between two starts": (replace(signals(8100), boot=CLAIM), EMPTY, State.LOADING, Owner.BOOT),
    "a boot job's server that was adopted before it was known as one": (
        replace(serving(port=8100), run=replace(run(port=8100), adopted=True), hand=server(port=8100), boot=CLAIM),
        registry(a=8100),
        State.READY,
        Owner.BOOT,
    ),
    "a foreign listener": (foreign(), EMPTY, State.FOREIGN, Owner.FOREIGN),
    "a foreign listener where our server was": (
        replace(foreign(), run=run(), health=Health.SERVING),
        A,
        State.FOREIGN,
        Owner.FOREIGN,
    ),
    "a listener of which not even the pid is seen": (
        replace(signals(), listening=True),
        A,
        State.FOREIGN,
        Owner.FOREIGN,
    ),
    "it could not be observed": (replace(serving(), error="permission denied"), A, State.UNKNOWN, None),
}


@pytest.mark.parametrize("case", CASES)
def test_signals_give_state_and_owner(case: str) -> None:
    seen, known, state, owner = CASES[case]
    view = judge(seen, known)
    assert (view.state, view.owner) == (state, owner)
    assert view.port == seen.port and view.alias == seen.alias


def test_table_has_every_state_and_owner() -> None:
    assert {state for _, _, state, _ in CASES.values()} == set(State)
    assert {owner for _, _, _, owner in CASES.values()} == {None, *Owner}


@pytest.mark.parametrize(
    ("seen", "orphan"),
    [
        (replace(serving(), run=run(proven=False)), Orphan.INTERRUPTED),
        (replace(serving(), leader_proven=False), Orphan.LEADERLESS),
        (replace(serving(), listening=False), Orphan.PORTLESS),
    ],
)
def test_orphan_has_a_reason(seen: Signals, orphan: Orphan) -> None:
    view = judge(seen, A)
    assert (view.orphan, view.detail) == (orphan, orphan.value)


def test_failed_server_shows_its_last_words() -> None:
    assert "Out of memory" in judge(replace(signals(), run=run(), last_words="Out of memory"), A).detail


def test_row_of_our_server_shows_its_record() -> None:
    view = judge(serving(), A)
    shown = {
        k: getattr(view, k) for k in ("port", "alias", "state", "owner", "model", "repo_id", "revision", "pid", "pgid")
    }
    assert shown == {
        "port": 8103,
        "alias": None,
        "state": "ready",
        "owner": "mlxops",
        "model": "a",
        "repo_id": "org/a",
        "revision": "sha-a",
        "pid": 4000,
        "pgid": 4000,
    }


@pytest.mark.parametrize("named", ["/hub/a/sha-a", "org/a", "a"])
def test_hand_server_is_matched_by_path_repository_or_name(named: str) -> None:
    seen = by_hand()
    assert seen.hand is not None
    view = judge(replace(seen, hand=replace(seen.hand, model=named)), A)
    assert (view.model, view.repo_id) == ("a", "org/a")


# -- all signals ---------------------------------------------------------------------------------------

anything = any_signals(8103)


@given(anything, registries)
@PROPERTY
def test_unobserved_port_is_unknown_without_an_owner(seen: Signals, known: Registry) -> None:
    view = judge(replace(seen, error="permission denied"), known)
    assert (view.state, view.owner, view.unserved) == (State.UNKNOWN, None, False)


@given(anything, registries)
@PROPERTY
def test_port_without_proven_processes_is_ours_only_during_a_load(seen: Signals, known: Registry) -> None:
    view = judge(replace(seen, leader_proven=False, members=()), known)
    loading = seen.operation is not None and seen.operation.command == "load"
    assert view.owner is not Owner.MLXOPS or (loading and view.state is State.LOADING)


@given(anything, registries)
@PROPERTY
def test_our_ready_server_needs_every_signal(seen: Signals, known: Registry) -> None:
    view = judge(seen, known)
    if view.state is State.READY and view.owner is Owner.MLXOPS:
        assert seen.run is not None and seen.run.proven_at
        assert seen.leader_proven and seen.listening
        assert seen.listener_pids and seen.listener_pids <= set(seen.members)
        assert known.models[seen.run.model].port == 8103
        assert seen.health is Health.SERVING


@given(anything, registries)
@PROPERTY
def test_ready_server_listens_and_is_healthy(seen: Signals, known: Registry) -> None:
    if judge(seen, known).state is State.READY:
        assert seen.listening and seen.health in {Health.SERVING, Health.NOT_ASKED}


@given(anything, registries)
@PROPERTY
def test_unserved_port_has_no_listener_process_or_operation(seen: Signals, known: Registry) -> None:
    if judge(seen, known).unserved:
        assert not seen.listening and seen.hand is None and seen.operation is None and seen.error is None
        assert not seen.members and not (seen.run and seen.leader_proven)


@given(anything, registries)
@PROPERTY
def test_problem_state_has_a_detail(seen: Signals, known: Registry) -> None:
    view = judge(seen, known)
    assert (view.orphan is not None) == (view.state is State.ORPHAN)
    if view.state in {State.UNKNOWN, State.WEDGED, State.MISMATCH, State.ORPHAN}:
        assert view.detail
    if view.owner in OURS and view.state is State.READY:
        assert view.pid is not None


# -- drift ----------------------------------------------------------------------------------------------------------


def codes(known: Registry, *seen: Signals) -> list[tuple[str, int | None, str | None]]:
    return [(d.code, d.port, d.model) for d in find_drift(PortRange(8100, 8104), world(known, *seen).ports, known)]


def test_agreement_is_no_drift() -> None:
    assert codes(A, serving()) == []
    assert codes(A, by_hand()) == []
    assert codes(EMPTY) == []


@pytest.mark.parametrize(
    ("known", "seen", "code"),
    [
        (A, (), ("assigned_not_served", 8103, "a")),
        (A, (replace(signals(), run=run()),), ("assigned_not_served", 8103, "a")),
        (EMPTY, (serving(),), ("orphan", 8103, "a")),
        (B, (serving(),), ("mismatch", 8103, "a")),
        (A, (replace(serving(), health=Health.SILENT),), ("wedged", 8103, "a")),
        (A, (replace(serving(), health=Health.BROKEN),), ("failed", 8103, "a")),
        (registry(a=None), (by_hand(),), ("unregistered_server", 8103, "a")),
        (registry(a=None, b=8100), (at_boot(),), ("boot_port_assigned", 8100, "a")),
        (A, (foreign(),), ("foreign", 8103, "a")),
        (A, (replace(serving(), error="permission denied"),), ("unknown", 8103, "a")),
        (registry(a=9000), (), ("port_outside_range", 9000, "a")),
        (A, (replace(serving(), run=replace(run(), alias="old"), alias="new"),), ("alias_changed", 8103, "a")),
    ],
)
def test_difference_is_drift(
    known: Registry, seen: tuple[Signals, ...], code: tuple[str, int | None, str | None]
) -> None:
    assert codes(known, *seen) == [code]


@pytest.mark.parametrize("standing", Standing)
def test_missing_or_disabled_boot_job_is_drift(standing: Standing) -> None:
    job = BootJob(8100, "/opt/start.sh", "com.example.boot")
    state = JobState(job, standing, "said launchd", enable="sudo launchctl enable system/com.example.boot")
    found = {drift.code: drift for drift in find_drift(PortRange(8100, 8104), {}, EMPTY, [state])}
    if standing is Standing.MISSING:
        (drift,) = [found.pop(DriftCode.BOOT_JOB_MISSING)]
        assert drift.port == 8100 and "com.example.boot" in drift.message and "said launchd" in drift.message
        assert drift.hint == "comment out its line (boot:) in hosts.yaml; or install the job"
    if standing is Standing.DISABLED:
        drift = found.pop(DriftCode.BOOT_JOB_DISABLED)
        assert drift.hint.endswith("or enable it: sudo launchctl enable system/com.example.boot")
    assert not found


def test_model_of_a_boot_job_need_not_be_assigned() -> None:
    assert codes(registry(a=None), at_boot()) == codes(registry(a=8100), at_boot()) == []


def test_alias_on_another_port_is_drift() -> None:
    own = replace(signals(8101), alias="jerry-l")
    known = registry(**{"jerry-l": 8103})
    down, moved = find_drift(PortRange(8100, 8104), {8101: judge(own, known), 8103: judge(signals(8103), known)}, known)
    assert (down.code, moved.code) == ("assigned_not_served", "alias_elsewhere")
    assert down.hint.startswith("`mlxctl load jerry-l 8101`,") and "alias of port 8101" in moved.message
    there = registry(**{"jerry-l": 8101})
    (down,) = find_drift(PortRange(8100, 8104), {8101: judge(own, there)}, there)
    assert down.code == "assigned_not_served"


UNREADABLE = replace(EMPTY, unwritable="it is not JSON")


def test_unreadable_registry_makes_no_orphan() -> None:
    view = judge(serving(), UNREADABLE)
    assert (view.state, view.owner, view.orphan) == (State.READY, Owner.MLXOPS, None)
    assert codes(UNREADABLE, serving()) == []


def test_unwritable_registry_is_the_first_hint() -> None:
    known = replace(A, unwritable="its version is not 1")
    ill = replace(serving(), health=Health.SILENT)
    (found,) = find_drift(PortRange(8100, 8104), world(known, ill).ports, known)
    assert found.code == "wedged" and "repair the registry" in found.hint and "unload" not in found.hint


def test_two_claims_of_one_port_are_drift() -> None:
    found = codes(registry(a=8103, b=8103), serving())
    assert found == [("port_claimed_twice", 8103, "a"), ("port_claimed_twice", 8103, "b")]


@given(registries, st.tuples(*(any_signals(port) for port in PORTS)))
@PROPERTY
def test_drift_has_a_message_and_a_hint(known: Registry, seen: tuple[Signals, ...]) -> None:
    views = world(known, *seen).ports
    for drift in find_drift(PortRange(8100, 8104), views, known):
        assert drift.message and drift.hint and isinstance(drift.code, DriftCode)


# -- run records ----------------------------------------------------------------------------------------------------


@given(st.builds(run, st.text(max_size=9), st.integers(2, 65535), proven=st.booleans()), st.booleans())
@PROPERTY
def test_run_record_survives_the_wire(written: Run, adopted: bool) -> None:
    written = replace(written, adopted=adopted)
    assert run_from_wire(written.to_wire()) == written


@given(st.sampled_from(sorted(run().to_wire())), json_values)
@PROPERTY
def test_tampered_run_record_is_valid_or_rejected(key: str, value: object) -> None:
    wire = {**run().to_wire(), key: value}
    try:
        read = run_from_wire(wire)
    except ValueError:
        return
    assert all(isinstance(number, int) and number > 1 for number in (read.pid, read.pgid, read.port))
    assert all(isinstance(word, str) for word in (*read.argv, read.start, read.boot_id, read.run_id, read.model))


@pytest.mark.parametrize("pid", [-1, 0, 1, True, "4000", 4000.0, None])
def test_record_that_would_signal_other_groups_is_rejected(pid: object) -> None:
    for key in ("pid", "pgid"):
        with pytest.raises(ValueError, match="not all numbers"):
            run_from_wire({**run().to_wire(), key: pid})


@pytest.mark.parametrize("budget", [7, "--decode-concurrency", [1], None])
def test_run_with_a_budget_that_is_no_list_of_words_is_rejected(budget: object) -> None:
    with pytest.raises(ValueError, match="budget"):
        run_from_wire({**run().to_wire(), "budget": budget})


def test_run_of_an_earlier_build_has_no_budget() -> None:
    wire = run().to_wire()
    del wire["budget"]
    assert run_from_wire(wire) == run() and run().settings == run().argv


def test_settings_of_a_run_are_its_command_without_the_budget() -> None:
    limited = replace(run(), argv=(*run().argv, "--x", "4"), budget=("--x", "4"))
    assert limited.settings == run().argv
    assert replace(limited, budget=("--y", "4")).settings == limited.argv, "the record does not match"
