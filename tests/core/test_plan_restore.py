"""The assignments that restore starts, and those that it skips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest

from mlxops.core.plan_restore import (
    GIVE_UP,
    LASTED,
    Now,
    Record,
    RestoreAttempt,
    RestorePlan,
    RestoreStep,
    in_vain,
    last_cleared,
    lasting,
    pause,
    plan_restore,
    starts_of,
)
from mlxops.core.ports import JobState, Orphan, Owner, PortView, Standing, State, World
from mlxops.core.records import Operation
from mlxops.core.registry import Registry, parse
from mlxops.core.settings import BootJob
from tests.core.worlds import run

HOUR = 3600.0


def registry(**ports: int | None) -> Registry:
    import json

    models = {
        name: {"repo_id": f"org/{name}", "model_id": f"org/{name}", "cache_path": "/x", "format": "mlx", "port": port}
        for name, port in ports.items()
    }
    return parse(json.dumps({"version": 1, "models": models}).encode())


def world(*views: PortView) -> World:
    idle = {port: PortView(port, None, State.IDLE) for port in range(8100, 8104)}
    return World(idle | {view.port: view for view in views})


def plan(known: Registry, ports: World, *, cleared: tuple[RestoreStep, ...] = (), **ago: list[float]) -> RestorePlan:
    slots = {8100: "xl", 8103: "s"}
    attempts = {RestoreStep(m.name, m.port): ago[m.name] for m in known.models.values() if m.port and m.name in ago}
    return plan_restore(known, ports, slots=slots, cleared=cleared, attempts=attempts)


def test_starts_follow_the_order_of_the_ports() -> None:
    found = plan(registry(b=8102, a=8103, c=8100, d=None), world())
    assert found.starts == (RestoreStep("c", 8100), RestoreStep("b", 8102), RestoreStep("a", 8103))


@pytest.mark.parametrize("owner", [Owner.MLXOPS, Owner.HAND, Owner.BOOT])
def test_served_assignment_is_neither_started_nor_skipped(owner: Owner) -> None:
    assert plan(registry(a=8100), world(PortView(8100, None, State.READY, owner, "a"))) == RestorePlan()


UNLOADED = replace(run("a", 8100), stopped_by="unload", stopping_since="now")
TAKEN: dict[str, tuple[PortView | None, str]] = {
    "a foreign process": (
        PortView(8100, None, State.FOREIGN, Owner.FOREIGN, detail="pid 6: nc"),
        "not ours holds the port",
    ),
    "an unknown port": (PortView(8100, None, State.UNKNOWN, detail="no permission"), "determined: no permission"),
    "a server that hangs": (PortView(8100, None, State.WEDGED, Owner.MLXOPS, "a"), "is wedged"),
    "a server that loads": (PortView(8100, None, State.LOADING, Owner.HAND, "a", pid=7), "pid 7"),
    "another model by hand": (PortView(8100, None, State.READY, Owner.HAND, "b", pid=7), "serves b there"),
    "a server that a stop did not wait for": (PortView(8100, None, State.DRAINING, Owner.MLXOPS, "a"), "not ended yet"),
    "a server that ended after its unload": (
        PortView(8100, None, State.FAILED, run=UNLOADED),
        "unload began to stop it",
    ),
    "an operation": (
        PortView(8100, None, State.IDLE, operation=Operation("x", "unload")),
        "running on the port",
    ),
    "an unassigned server": (
        PortView(8100, None, State.ORPHAN, Owner.MLXOPS, "b", orphan=Orphan.UNASSIGNED),
        "mlxctl unload 8100",
    ),
    "the boot job with another model": (PortView(8100, None, State.READY, Owner.BOOT, "b", pid=7), "boot job serves b"),
    "the boot job between two runs": (PortView(8100, None, State.LOADING, Owner.BOOT), "is about to serve there"),
    "nothing, outside the range": (None, "outside this host's range"),
}


@pytest.mark.parametrize("case", TAKEN)
def test_skipped_step_has_a_reason(case: str) -> None:
    view, reason = TAKEN[case]
    found = plan(registry(a=8100), world(view) if view else World({}))
    assert found.starts == () and [(step.model, step.port) for step in found.skipped] == [("a", 8100)]
    assert reason in found.skipped[0].why


@pytest.mark.parametrize("case", TAKEN)
def test_skipped_step_is_stuck_unless_the_port_changes_by_itself(case: str) -> None:
    view = TAKEN[case][0]
    (step,) = plan(registry(a=8100), world(view) if view else World({})).skipped
    in_hand = {
        "a server that loads",
        "an operation",
        "a server that a stop did not wait for",
        "a server that ended after its unload",
        "the boot job with another model",
        "the boot job between two runs",
    }
    assert step.stuck is (case not in in_hand)


def test_pausing_step_is_not_stuck() -> None:
    (step,) = plan(registry(a=8100), world(), a=[1.0]).skipped
    assert step.again_in and not step.stuck


def test_leftovers_of_a_crash_are_replaced() -> None:
    leftover = PortView(8100, None, State.ORPHAN, Owner.MLXOPS, orphan=Orphan.LEADERLESS, members=(5,))
    assert plan(registry(a=8100), world(leftover)).starts == (RestoreStep("a", 8100),)


def test_port_with_two_claims_is_skipped() -> None:
    found = plan(registry(b=8101, c=8101), world())
    assert [(step.model, step.why) for step in found.skipped] == [
        ("b", "several models claim the port"),
        ("c", "several models claim the port"),
    ]


@pytest.mark.parametrize("standing", Standing)
def test_port_of_a_boot_job_is_skipped_unless_disabled_or_missing(standing: Standing) -> None:
    job = BootJob(8100, "/opt/start.sh", "com.example.boot")
    found = plan(registry(a=8100), replace(world(), boot=(JobState(job, standing, "said launchd"),)))
    if standing in {Standing.MISSING, Standing.DISABLED}:
        assert found == RestorePlan((RestoreStep("a", 8100),))
    else:
        why = "the port belongs to the boot job com.example.boot: said launchd"
        assert found == RestorePlan(skipped=(RestoreStep("a", 8100, why),))


def test_alias_of_another_slot_is_skipped() -> None:
    """Only a hand edit makes such an assignment. `load` would refuse it, so `restore` does not announce it."""
    found = plan(registry(xl=8101, s=8103), world())
    assert found.starts == (RestoreStep("s", 8103),)
    assert found.skipped == (RestoreStep("xl", 8101, "xl is the alias of port 8100"),)


def test_cleared_assignment_is_restored_if_still_free() -> None:
    cleared = (RestoreStep("a", 8100), RestoreStep("b", 8101), RestoreStep("gone", 8102))
    found = plan(registry(a=None, b=8103, c=8101), world(), cleared=cleared)
    assert found.starts == (RestoreStep("a", 8100), RestoreStep("c", 8101), RestoreStep("b", 8103))


class TestHistory:
    RECONCILE: ClassVar[dict[str, object]] = {
        "command": "reconcile",
        "operation": "1",
        "cleared": [{"model": "a", "port": 8100}],
    }

    def test_all_lines_of_the_latest_reconcile_count(self) -> None:
        second = {**self.RECONCILE, "operation": "2", "cleared": [{"model": "b", "port": 8101}]}
        third = {**self.RECONCILE, "operation": "2", "cleared": [{"model": "c", "port": 8102}]}
        assert last_cleared([self.RECONCILE]) == (RestoreStep("a", 8100),)
        assert last_cleared([self.RECONCILE, second, third]) == (RestoreStep("b", 8101), RestoreStep("c", 8102))
        assert last_cleared([self.RECONCILE, {"command": "reconcile", "stopped": []}]) == (RestoreStep("a", 8100),)

    @pytest.mark.parametrize("line", [{"model": "a", "port": 8103}, {"model": "x", "port": 8100}])
    @pytest.mark.parametrize("command", ["load", "unload"])
    def test_later_load_or_unload_wins(self, command: str, line: dict[str, object]) -> None:
        assert last_cleared([self.RECONCILE, {"command": command, **line}]) == ()

    def test_odd_lines_are_skipped(self) -> None:
        odd: list[dict[str, object]] = [{}, {"command": "reconcile", "cleared": "x"}, {"command": "restore"}]
        assert last_cleared([*odd, self.RECONCILE, *odd]) == (RestoreStep("a", 8100),)
        assert starts_of([*odd, {"command": "reconcile", "cleared": [1, {}]}]) == {}
        step = {"model": "a", "port": 8100}
        hostile = [step | {"model": "../../x"}, step | {"model": "a\n"}, step | {"port": True}]
        assert last_cleared([{"command": "reconcile", "operation": "2", "cleared": hostile}]) == ()
        start = {"command": "restore", "boot_id": "boot", **step, "wall": 5, "monotonic": 1}
        assert starts_of([start]) == {RestoreStep("a", 8100): [RestoreAttempt(5.0, 1.0, "boot")]}
        times: list[object] = [-1, 10**4000, float("nan"), "1", None]
        spoilt: list[dict[str, object]] = [{key: odd} for key in ("wall", "monotonic") for odd in times]
        spoilt.append({"boot_id": None})
        assert starts_of([start | change for change in spoilt]) == {}

    def test_lasting_server_or_action_of_a_person_ends_the_count(self) -> None:
        step = {"model": "a", "port": 8100}

        def start(second: int, **more: object) -> dict[str, object]:
            return {"command": "restore", **step, "wall": second, "monotonic": second, "boot_id": "b", **more}

        def seconds(*history: dict[str, object]) -> list[float]:
            return [attempt.monotonic for attempt in starts_of(history).get(RestoreStep("a", 8100), [])]

        load: dict[str, object] = {"command": "load", **step}
        assert seconds(start(1), {**load, "restore": True}, start(3)) == [1, 3]
        assert seconds(start(1), start(2), start(3, afresh=True), start(4)) == [3, 4]
        assert seconds(start(1), load) == []
        assert seconds(start(1), {"command": "unload", **step}) == []
        assert seconds(start(1), {"command": "lasted", **step}, start(2)) == [2]
        assert seconds(start(1), {"command": "reconcile", "cleared": [step]}) == []
        assert seconds(start(1), {**load, "port": 8101}) == [1]


STEP = RestoreStep("a", 8100)


class TestPause:
    @pytest.mark.parametrize(
        ("attempts", "again_in"),
        [
            ([], None),
            ([10.0], 110.0),
            ([121.0], None),
            ([121.0, 300.0], 119.0),
            ([241.0, 500.0], None),
            ([1.0, 2.0, 3.0], 479.0),
            ([959.0, 960.0, 961.0, 962.0], 1.0),
            ([960.0, 961.0, 962.0, 963.0], None),
        ],
    )
    def test_pause_grows_with_each_failed_start(self, attempts: list[float], again_in: float | None) -> None:
        skipped = pause(STEP, attempts)
        assert (skipped and skipped.again_in) == again_in
        assert skipped is None or skipped.why.endswith("; or now: `mlxctl load a 8100`")

    def test_pause_is_endless_after_too_many_starts(self) -> None:
        skipped = pause(STEP, [LASTED * 1000] * GIVE_UP)
        assert skipped is not None and skipped.again_in is None
        assert skipped.why.endswith("after the cause is fixed: `mlxctl load a 8100`")


ASSIGNED = registry(a=8100)


@dataclass
class Host:
    """A simulated host with one server. `restore` runs every `every` seconds, or only at boot if that is None. The
    server lives `lives` seconds and writes to its log for the first `talks` of them."""

    lives: float
    talks: float | None = None
    """None: until its end."""
    every: float | None = 300.0
    up: Callable[[int], float] = field(default=lambda boot: float("inf"))
    """Boot number -> seconds that the boot lasts."""
    takes_host_down: bool = False
    clock: float = 1767225600.0
    history: list[dict[str, object]] = field(default_factory=list)
    started: list[float] = field(default_factory=list)
    boot: str = ""
    """The boot in which the server was started last."""

    def run(self, days: float) -> int:
        """Simulate a number of days. Return how many times the server was started."""
        end = self.clock + days * 24 * HOUR
        boots = 0
        while self.clock < end:
            booted = self.clock
            down = min(booted + self.up(boots), end)
            served_from: float | None = None
            while self.clock < down:
                now = Now(str(boots), booted, self.clock, self.clock - booted)
                alive = served_from is not None and self.clock < served_from + self.lives
                if self.restore(now, alive=alive):
                    served_from = self.clock
                    if self.takes_host_down:
                        down = min(down, served_from + self.lives)
                self.clock += self.every or down - self.clock
            self.clock = down + 60
            boots += 1
        return len(self.started)

    def restore(self, now: Now, *, alive: bool) -> bool:
        """Run `restore` once. Return whether it starts the server."""
        starts = starts_of(self.history)
        view = PortView(8100, None, State.READY if alive else State.FAILED, Owner.MLXOPS if alive else None, "a")
        for step in lasting(starts, world(view), now):
            self.history.append({"command": "lasted", "model": step.model, "port": step.port})
        attempts = in_vain(starts, self.records(now), now)
        found = plan_restore(ASSIGNED, world(view), slots={}, attempts=attempts)
        if not found.starts:
            return False
        self.started.append(now.wall)
        self.boot = now.boot_id
        self.history.append(
            {
                "command": "restore",
                "model": "a",
                "port": 8100,
                "wall": now.wall,
                "boot_id": now.boot_id,
                "monotonic": now.monotonic,
                "afresh": STEP not in attempts,
            }
        )
        return True

    def records(self, now: Now) -> dict[int, Record]:
        if not self.started:
            return {}
        wrote = min(self.lives, self.lives if self.talks is None else self.talks, now.wall - self.started[-1])
        return {8100: Record("a", self.boot, self.lives > 30, self.started[-1] + wrote)}


class TestThirtyDays:
    """A server or host that keeps going down for thirty days."""

    @pytest.mark.parametrize("lives", [0.0, 31.0, 1.9 * HOUR])
    def test_crashing_server_is_started_five_times(self, lives: float) -> None:
        assert Host(lives).run(30) == GIVE_UP

    @pytest.mark.parametrize("talks", [None, 0.0], ids=["with requests", "without requests"])
    def test_lasting_server_is_always_restarted_at_once(self, talks: float | None) -> None:
        assert Host(3 * HOUR, talks, every=1800.0).run(30) == pytest.approx(30 * 24 / 3, abs=3)

    @pytest.mark.parametrize("every", [300.0, None], ids=["by a timer", "only at boot"])
    @pytest.mark.parametrize("lives", [0.0, 31.0])
    def test_server_that_crashes_the_host_is_started_five_times(self, lives: float, every: float | None) -> None:
        """Otherwise each boot of the host would end with the server."""
        found = Host(lives, every=every, takes_host_down=True, up=lambda boot: 30 * 24 * HOUR)
        assert found.run(30) <= GIVE_UP

    def test_host_that_reboots_nightly_restores_each_morning(self) -> None:
        """Also if the server has no requests, and `restore` runs only at boot."""
        for talks in (None, 0.0):
            assert Host(float("inf"), talks, every=None, up=lambda boot: 23.9 * HOUR).run(30) == 31

    def test_two_quick_reboots_are_no_crash(self) -> None:
        up = [60.0, 200.0, 24 * HOUR, 60.0, 24 * HOUR]
        host = Host(float("inf"), 0.0, up=lambda boot: up[boot] if boot < len(up) else 24 * HOUR)
        host.run(30)
        assert not pause(STEP, in_vain(starts_of(host.history), {}, Now("x", 0, host.clock, 1)).get(STEP, ()))

    def test_reboot_does_not_reset_five_crashes(self) -> None:
        """The fifth server may have ended with the host. Those before it did not."""
        assert Host(31.0, up=lambda boot: 24 * HOUR).run(30) == GIVE_UP


class TestEvidenceThatAServerLasted:
    NOW = Now("now", 10_000.0, 20_000.0, 10_000.0)

    def failed(self, *starts: RestoreAttempt, record: Record | None) -> list[float] | None:
        return in_vain({STEP: starts}, {8100: record} if record else {}, self.NOW).get(STEP)

    def test_log_counts_only_with_a_proven_record_of_the_model(self) -> None:
        start = RestoreAttempt(11_000.0, 1_000.0, "now")
        sign = start.wall + LASTED
        assert self.failed(start, record=Record("a", "now", True, sign)) is None
        assert self.failed(start, record=Record("a", "now", True, sign - 1)) == [9_000.0]
        assert self.failed(start, record=Record("a", "now", True, None)) == [9_000.0]
        assert self.failed(start, record=Record("a", "now", False, sign)) == [9_000.0]
        assert self.failed(start, record=Record("b", "now", True, sign)) == [9_000.0]
        assert self.failed(start, record=None) == [9_000.0]

    def test_uptime_counts_only_for_a_server_that_ended_with_the_host(self) -> None:
        start, record = RestoreAttempt(1_000.0, 5.0, "before"), Record("a", "before", True, None)
        assert self.failed(start, record=record) is None
        assert self.failed(start, record=Record("a", "before", False, None)) == [19_000.0]
        assert self.failed(RestoreAttempt(9_000.0, 5.0, "before"), record=record) == [11_000.0]
        assert self.failed(RestoreAttempt(500.0, 5.0, "before"), start, record=record) == [19_000.0, 19_500.0]

    def test_attempt_of_an_earlier_boot_is_older_than_the_uptime(self) -> None:
        assert self.failed(RestoreAttempt(10**9, 5.0, "before"), record=None) == [10_000.0]

    @pytest.mark.parametrize(
        ("view", "lasts"),
        [
            (PortView(8100, None, State.READY, Owner.MLXOPS, "a"), True),
            (PortView(8100, None, State.READY, Owner.MLXOPS, "b"), False),
            (PortView(8100, None, State.READY, Owner.HAND, "a"), False),
            (PortView(8100, None, State.WEDGED, Owner.MLXOPS, "a"), False),
        ],
    )
    def test_running_server_has_lasted_after_the_limit(self, view: PortView, lasts: bool) -> None:
        old, young = RestoreAttempt(0.0, 10_000 - LASTED, "now"), RestoreAttempt(0.0, 10_001 - LASTED, "now")
        assert bool([*lasting({STEP: [old]}, world(view), self.NOW)]) is lasts
        assert not [*lasting({STEP: [young]}, world(view), self.NOW)]
        assert not [*lasting({STEP: [RestoreAttempt(0.0, 1.0, "before")]}, world(view), self.NOW)]
