"""What restore starts, and what it leaves."""

from __future__ import annotations

from typing import ClassVar

import pytest

from mlxops.core.registry import Registry, parse
from mlxops.core.restore import GIVE_UP, LASTED, RestorePlan, Step, attempts_of, last_cleared, pause, plan_restore
from mlxops.core.world import Operation, Orphan, Owner, PortView, State, World

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


def plan(
    of: Registry, seen: World, *, boot_port: int | None = None, cleared: tuple[Step, ...] = (), **ago: list[float]
) -> RestorePlan:
    attempts = {Step(m.name, m.port): ago[m.name] for m in of.models.values() if m.port and m.name in ago}
    return plan_restore(of, seen, boot_port=boot_port, cleared=cleared, attempts=attempts)


def test_starts_what_is_down_in_the_order_of_the_ports() -> None:
    found = plan(registry(b=8102, a=8103, c=8100, d=None), world())
    assert found.starts == (Step("c", 8100), Step("b", 8102), Step("a", 8103))


@pytest.mark.parametrize(
    "view",
    [
        PortView(8100, None, State.READY, Owner.MLXOPS),
        PortView(8100, None, State.READY, Owner.HAND),
        PortView(8100, None, State.FOREIGN, Owner.FOREIGN),
        PortView(8100, None, State.UNKNOWN),
        PortView(8100, None, State.WEDGED, Owner.MLXOPS),
        PortView(8100, None, State.IDLE, operation=Operation("x", "unload")),
        PortView(8100, None, State.ORPHAN, Owner.MLXOPS, orphan=Orphan.UNASSIGNED),
    ],
)
def test_leaves_what_is_there_or_unknown(view: PortView) -> None:
    assert plan(registry(a=8100), world(view)) == RestorePlan()


def test_replaces_what_a_crash_left() -> None:
    left = PortView(8100, None, State.ORPHAN, Owner.MLXOPS, orphan=Orphan.LEADERLESS, members=(5,))
    assert plan(registry(a=8100), world(left)).starts == (Step("a", 8100),)


def test_never_takes_the_boot_jobs_port_nor_decides_between_two_claims() -> None:
    found = plan(registry(a=8100, b=8101, c=8101), world(), boot_port=8100)
    assert found.starts == ()
    assert [(step.model, step.why[:12]) for step in found.skipped] == [
        ("a", "the port bel"),
        ("b", "several mode"),
        ("c", "several mode"),
    ]


def test_brings_back_what_was_cleared_where_nothing_came_since() -> None:
    cleared = (Step("a", 8100), Step("b", 8101), Step("gone", 8102))
    found = plan(registry(a=None, b=8103, c=8101), world(), cleared=cleared)
    assert found.starts == (Step("a", 8100), Step("c", 8101), Step("b", 8103))


class TestTheHistory:
    RECONCILE: ClassVar[dict[str, object]] = {
        "command": "reconcile",
        "operation": "1",
        "cleared": [{"model": "a", "port": 8100}],
    }

    def test_tells_what_the_latest_reconcile_cleared_in_all_its_lines(self) -> None:
        second = {**self.RECONCILE, "operation": "2", "cleared": [{"model": "b", "port": 8101}]}
        third = {**self.RECONCILE, "operation": "2", "cleared": [{"model": "c", "port": 8102}]}
        assert last_cleared([self.RECONCILE]) == (Step("a", 8100),)
        assert last_cleared([self.RECONCILE, second, third]) == (Step("b", 8101), Step("c", 8102))
        assert last_cleared([self.RECONCILE, {"command": "reconcile", "stopped": []}]) == (Step("a", 8100),)

    @pytest.mark.parametrize("line", [{"model": "a", "port": 8103}, {"model": "x", "port": 8100}])
    @pytest.mark.parametrize("command", ["load", "unload"])
    def test_of_a_later_wish_wins(self, command: str, line: dict[str, object]) -> None:
        assert last_cleared([self.RECONCILE, {"command": command, **line}]) == ()

    def test_of_odd_lines_is_read_all_the_same(self) -> None:
        odd: list[dict[str, object]] = [{}, {"command": "reconcile", "cleared": "x"}, {"command": "restore"}]
        assert last_cleared([*odd, self.RECONCILE, *odd]) == (Step("a", 8100),)
        assert attempts_of(odd, "boot", 1.0) == {}
        step = {"model": "a", "port": 8100}
        hostile = [step | {"model": "../../x"}, step | {"model": "a\n"}, step | {"port": True}]
        assert last_cleared([{"command": "reconcile", "operation": "2", "cleared": hostile}]) == ()
        starts = [
            {"command": "restore", "boot_id": "boot", **step, "monotonic": at} for at in (-1, 10**4000, float("nan"))
        ]
        assert attempts_of(starts, "boot", 1.0) == {}

    def test_counts_the_starts_of_this_boot_since_a_person_acted(self) -> None:
        def start(at: float, boot: str = "now") -> dict[str, object]:
            return {"command": "restore", "model": "a", "port": 8100, "monotonic": at, "boot_id": boot}

        load: dict[str, object] = {"command": "load", "model": "a", "port": 8100}
        own_load = {**load, "restore": True}
        assert attempts_of([start(5, "before"), start(10), own_load, start(30)], "now", 40) == {
            Step("a", 8100): [10.0, 30.0]
        }
        assert attempts_of([start(10), load], "now", 40) == {}


class TestAPause:
    @pytest.mark.parametrize(
        ("attempts", "now"),
        [
            ([], True),
            ([10.0], False),
            ([121.0], True),
            ([121.0, 300.0], False),
            ([241.0, 500.0], True),
            ([2 * HOUR], True),
            ([LASTED, LASTED + 1], True),
            ([10.0, 10 + LASTED], False),
        ],
    )
    def test_grows_with_each_start_that_did_not_last(self, attempts: list[float], now: bool) -> None:
        assert (pause(attempts) == "") is now

    def test_has_an_end(self) -> None:
        """A server that always crashes is started five times, however often the timer comes."""
        attempts: list[float] = []
        clock = 0.0
        while clock < 30 * 24 * HOUR:
            if not pause([clock - at for at in reversed(attempts)]):
                attempts.append(clock)
            clock += 60
            if clock - attempts[-1] > LASTED - 60:
                break
        assert len(attempts) == GIVE_UP
