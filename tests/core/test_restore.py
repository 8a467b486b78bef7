"""What restore starts, and what it leaves."""

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

HOUR = 3600.0


def registry(**ports: int | None) -> Registry:
    import json

    models = {
        name: {"repo_id": f"org/{name}", "model_id": f"org/{name}", "cache_path": "/x", "format": "mlx", "port": port}
        for name, port in ports.items()
    }
    return parse(json.dumps({"version": 1, "models": models}).encode())


def world(*views: PortView) -> World:
    seen = {port: PortView(port, None, State.IDLE) for port in range(8100, 8104)}
    return World(seen | {view.port: view for view in views})


def plan(of: Registry, seen: World, *, cleared: tuple[RestoreStep, ...] = (), **ago: list[float]) -> RestorePlan:
    slots = {8100: "xl", 8103: "s"}
    attempts = {RestoreStep(m.name, m.port): ago[m.name] for m in of.models.values() if m.port and m.name in ago}
    return plan_restore(of, seen, slots=slots, cleared=cleared, attempts=attempts)


def test_starts_what_is_down_in_the_order_of_the_ports() -> None:
    found = plan(registry(b=8102, a=8103, c=8100, d=None), world())
    assert found.starts == (RestoreStep("c", 8100), RestoreStep("b", 8102), RestoreStep("a", 8103))


@pytest.mark.parametrize("owner", [Owner.MLXOPS, Owner.HAND, Owner.BOOT])
def test_leaves_what_serves_the_model_without_a_word(owner: Owner) -> None:
    assert plan(registry(a=8100), world(PortView(8100, None, State.READY, owner, "a"))) == RestorePlan()


HELD: dict[str, tuple[PortView | None, str]] = {
    "a stranger": (PortView(8100, None, State.FOREIGN, Owner.FOREIGN, detail="pid 6: nc"), "not ours holds the port"),
    "what cannot be seen": (PortView(8100, None, State.UNKNOWN, detail="no permission"), "determined: no permission"),
    "a server that hangs": (PortView(8100, None, State.WEDGED, Owner.MLXOPS, "a"), "is wedged"),
    "a server that loads": (PortView(8100, None, State.LOADING, Owner.HAND, "a", pid=7), "pid 7"),
    "another model by hand": (PortView(8100, None, State.READY, Owner.HAND, "b", pid=7), "has b there"),
    "an operation": (PortView(8100, None, State.IDLE, operation=Operation("x", "unload")), "at work there: unload"),
    "an unassigned server": (
        PortView(8100, None, State.ORPHAN, Owner.MLXOPS, "b", orphan=Orphan.UNASSIGNED),
        "mlxctl unload 8100",
    ),
    "the boot job with another model": (PortView(8100, None, State.READY, Owner.BOOT, "b", pid=7), "boot job serves b"),
    "the boot job between two runs": (PortView(8100, None, State.LOADING, Owner.BOOT), "is about to serve there"),
    "nothing, outside the range": (None, "outside this host's range"),
}


@pytest.mark.parametrize("what", HELD)
def test_says_why_an_assignment_is_left_that_is_not_served(what: str) -> None:
    view, words = HELD[what]
    seen = world(view) if view else World({})
    found = plan(registry(a=8100), seen)
    assert found.starts == () and [(step.model, step.port) for step in found.skipped] == [("a", 8100)]
    assert words in found.skipped[0].why


@pytest.mark.parametrize("what", HELD)
def test_needs_a_person_unless_the_port_changes_by_itself(what: str) -> None:
    view = HELD[what][0]
    (step,) = plan(registry(a=8100), world(view) if view else World({})).skipped
    in_hand = {
        "a server that loads",
        "an operation",
        "the boot job with another model",
        "the boot job between two runs",
    }
    assert step.stuck is (what not in in_hand)


def test_does_not_need_a_person_while_it_pauses() -> None:
    (step,) = plan(registry(a=8100), world(), a=[1.0]).skipped
    assert step.again_in and not step.stuck


def test_replaces_what_a_crash_left() -> None:
    left = PortView(8100, None, State.ORPHAN, Owner.MLXOPS, orphan=Orphan.LEADERLESS, members=(5,))
    assert plan(registry(a=8100), world(left)).starts == (RestoreStep("a", 8100),)


def test_does_not_decide_between_two_claims() -> None:
    found = plan(registry(b=8101, c=8101), world())
    assert [(step.model, step.why) for step in found.skipped] == [
        ("b", "several models claim the port"),
        ("c", "several models claim the port"),
    ]


@pytest.mark.parametrize("standing", Standing)
def test_leaves_a_port_to_its_boot_job_unless_that_is_known_not_to_come(standing: Standing) -> None:
    job = BootJob(8100, "/opt/start.sh", "com.example.boot")
    found = plan(registry(a=8100), replace(world(), boot=(JobState(job, standing, "said launchd"),)))
    if standing in {Standing.MISSING, Standing.DISABLED}:
        assert found == RestorePlan((RestoreStep("a", 8100),))
    else:
        why = "the port belongs to the boot job com.example.boot: said launchd"
        assert found == RestorePlan(skipped=(RestoreStep("a", 8100, why),))


def test_leaves_a_model_that_is_another_slots_alias() -> None:
    """Edited by hand: `load` refuses it, so it is not announced either."""
    found = plan(registry(xl=8101, s=8103), world())
    assert found.starts == (RestoreStep("s", 8103),)
    assert found.skipped == (RestoreStep("xl", 8101, "xl is the alias of port 8100"),)


def test_brings_back_what_was_cleared_where_nothing_came_since() -> None:
    cleared = (RestoreStep("a", 8100), RestoreStep("b", 8101), RestoreStep("gone", 8102))
    found = plan(registry(a=None, b=8103, c=8101), world(), cleared=cleared)
    assert found.starts == (RestoreStep("a", 8100), RestoreStep("c", 8101), RestoreStep("b", 8103))


class TestTheHistory:
    RECONCILE: ClassVar[dict[str, object]] = {
        "command": "reconcile",
        "operation": "1",
        "cleared": [{"model": "a", "port": 8100}],
    }

    def test_tells_what_the_latest_reconcile_cleared_in_all_its_lines(self) -> None:
        second = {**self.RECONCILE, "operation": "2", "cleared": [{"model": "b", "port": 8101}]}
        third = {**self.RECONCILE, "operation": "2", "cleared": [{"model": "c", "port": 8102}]}
        assert last_cleared([self.RECONCILE]) == (RestoreStep("a", 8100),)
        assert last_cleared([self.RECONCILE, second, third]) == (RestoreStep("b", 8101), RestoreStep("c", 8102))
        assert last_cleared([self.RECONCILE, {"command": "reconcile", "stopped": []}]) == (RestoreStep("a", 8100),)

    @pytest.mark.parametrize("line", [{"model": "a", "port": 8103}, {"model": "x", "port": 8100}])
    @pytest.mark.parametrize("command", ["load", "unload"])
    def test_of_a_later_wish_wins(self, command: str, line: dict[str, object]) -> None:
        assert last_cleared([self.RECONCILE, {"command": command, **line}]) == ()

    def test_of_odd_lines_is_read_all_the_same(self) -> None:
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

    def test_of_starts_begins_anew_where_something_lasted_or_a_person_acted(self) -> None:
        step = {"model": "a", "port": 8100}

        def start(second: int, **more: object) -> dict[str, object]:
            return {"command": "restore", **step, "wall": second, "monotonic": second, "boot_id": "b", **more}

        def seconds(*history: dict[str, object]) -> list[float]:
            return [each.monotonic for each in starts_of(history).get(RestoreStep("a", 8100), [])]

        load: dict[str, object] = {"command": "load", **step}
        assert seconds(start(1), {**load, "restore": True}, start(3)) == [1, 3]
        assert seconds(start(1), start(2), start(3, afresh=True), start(4)) == [3, 4]
        assert seconds(start(1), load) == []
        assert seconds(start(1), {"command": "unload", **step}) == []
        assert seconds(start(1), {"command": "lasted", **step}, start(2)) == [2]
        assert seconds(start(1), {"command": "reconcile", "cleared": [step]}) == []
        assert seconds(start(1), {**load, "port": 8101}) == [1]


STEP = RestoreStep("a", 8100)


class TestAPause:
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
    def test_grows_with_each_start_in_vain(self, attempts: list[float], again_in: float | None) -> None:
        left = pause(STEP, attempts)
        assert (left and left.again_in) == again_in
        assert left is None or left.why.endswith("; or now: mlxctl load a 8100")

    def test_ends_with_a_person(self) -> None:
        left = pause(STEP, [LASTED * 1000] * GIVE_UP)
        assert left is not None and left.again_in is None
        assert left.why.endswith("when it is mended: mlxctl load a 8100")


ASSIGNED = registry(a=8100)


@dataclass
class Host:
    """A host on which `restore` runs every few minutes, or only when it has booted; and one server, that lives for so
    many seconds, and writes to its log for so many of them."""

    lives: float
    talks: float | None = None
    """None: to its end."""
    every: float | None = 300.0
    up: Callable[[int], float] = field(default=lambda boot: float("inf"))
    """How long each boot lasts."""
    takes_host_down: bool = False
    clock: float = 1767225600.0
    history: list[dict[str, object]] = field(default_factory=list)
    started: list[float] = field(default_factory=list)
    boot: str = ""
    """In which it was started last."""

    def run(self, days: float) -> int:
        """How many times the server was started."""
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
        """Whether it starts the server."""
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
    """Of a server that is down again and again."""

    @pytest.mark.parametrize("lives", [0.0, 31.0, 1.9 * HOUR])
    def test_one_that_does_not_last_is_started_five_times(self, lives: float) -> None:
        assert Host(lives).run(30) == GIVE_UP

    @pytest.mark.parametrize("talks", [None, 0.0], ids=["asked to its end", "never asked"])
    def test_one_that_lasts_always_comes_back_at_once(self, talks: float | None) -> None:
        assert Host(3 * HOUR, talks, every=1800.0).run(30) == pytest.approx(30 * 24 / 3, abs=3)

    @pytest.mark.parametrize("every", [300.0, None], ids=["by a timer", "only at boot"])
    @pytest.mark.parametrize("lives", [0.0, 31.0])
    def test_one_that_takes_the_host_down_is_started_five_times(self, lives: float, every: float | None) -> None:
        """Each boot of the host would end with it."""
        found = Host(lives, every=every, takes_host_down=True, up=lambda boot: 30 * 24 * HOUR)
        assert found.run(30) <= GIVE_UP

    def test_a_host_that_is_rebooted_each_night_restores_each_morning(self) -> None:
        """Also what nobody has ever asked anything, with nobody looking but the one restore at boot."""
        for talks in (None, 0.0):
            assert Host(float("inf"), talks, every=None, up=lambda boot: 23.9 * HOUR).run(30) == 31

    def test_two_reboots_at_once_are_no_crash(self) -> None:
        up = [60.0, 200.0, 24 * HOUR, 60.0, 24 * HOUR]
        host = Host(float("inf"), 0.0, up=lambda boot: up[boot] if boot < len(up) else 24 * HOUR)
        host.run(30)
        assert not pause(STEP, in_vain(starts_of(host.history), {}, Now("x", 0, host.clock, 1)).get(STEP, ()))

    def test_a_reboot_does_not_make_five_crashes_undone(self) -> None:
        """The fifth may have gone down with the host for all that is known; those before it have not."""
        assert Host(31.0, up=lambda boot: 24 * HOUR).run(30) == GIVE_UP


class TestSigns:
    NOW = Now("now", 10_000.0, 20_000.0, 10_000.0)

    def vain(self, *starts: RestoreAttempt, record: Record | None) -> list[float] | None:
        return in_vain({STEP: starts}, {8100: record} if record else {}, self.NOW).get(STEP)

    def test_of_the_log_count_only_with_the_proven_record_of_this_model(self) -> None:
        start = RestoreAttempt(11_000.0, 1_000.0, "now")
        sign = start.wall + LASTED
        assert self.vain(start, record=Record("a", "now", True, sign)) is None
        assert self.vain(start, record=Record("a", "now", True, sign - 1)) == [9_000.0]
        assert self.vain(start, record=Record("a", "now", True, None)) == [9_000.0]
        assert self.vain(start, record=Record("a", "now", False, sign)) == [9_000.0]
        assert self.vain(start, record=Record("b", "now", True, sign)) == [9_000.0]
        assert self.vain(start, record=None) == [9_000.0]

    def test_of_the_host_count_only_for_what_went_down_with_it(self) -> None:
        start, record = RestoreAttempt(1_000.0, 5.0, "before"), Record("a", "before", True, None)
        assert self.vain(start, record=record) is None
        assert self.vain(start, record=Record("a", "before", False, None)) == [19_000.0]
        assert self.vain(RestoreAttempt(9_000.0, 5.0, "before"), record=record) == [11_000.0]
        assert self.vain(RestoreAttempt(500.0, 5.0, "before"), start, record=record) == [19_000.0, 19_500.0]

    def test_of_another_boot_are_older_than_this_one_whatever_the_clock_said(self) -> None:
        assert self.vain(RestoreAttempt(10**9, 5.0, "before"), record=None) == [10_000.0]

    @pytest.mark.parametrize(
        ("view", "seen"),
        [
            (PortView(8100, None, State.READY, Owner.MLXOPS, "a"), True),
            (PortView(8100, None, State.READY, Owner.MLXOPS, "b"), False),
            (PortView(8100, None, State.READY, Owner.HAND, "a"), False),
            (PortView(8100, None, State.WEDGED, Owner.MLXOPS, "a"), False),
        ],
    )
    def test_of_a_server_that_serves(self, view: PortView, seen: bool) -> None:
        old, young = RestoreAttempt(0.0, 10_000 - LASTED, "now"), RestoreAttempt(0.0, 10_001 - LASTED, "now")
        assert bool([*lasting({STEP: [old]}, world(view), self.NOW)]) is seen
        assert not [*lasting({STEP: [young]}, world(view), self.NOW)]
        assert not [*lasting({STEP: [RestoreAttempt(0.0, 1.0, "before")]}, world(view), self.NOW)]
