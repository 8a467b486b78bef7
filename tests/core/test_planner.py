"""Tables of situations with the plan or refusal that they lead to, and properties of all plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxops.core.errors import MlxopsError, Refused, UsageError
from mlxops.core.planner import (
    LoadPlan,
    ModelRef,
    Outcome,
    Wanted,
    check_sent_names,
    choose_port,
    init_entries,
    plan_load,
    plan_reconcile,
    plan_unload,
    plan_unload_all,
    port_of,
    resolve,
)
from mlxops.core.ports import Health, Owner, PortView, Signals, State, World
from mlxops.core.records import Operation
from mlxops.core.refusals import merge_refusals, unknown_model
from mlxops.core.registry import EMPTY, Registry, parse
from mlxops.core.settings import Settings
from tests.core.worlds import (
    CLAIM,
    MODELS,
    OURS,
    PORTS,
    SETTINGS,
    argv,
    at_boot,
    by_hand,
    ending,
    foreign,
    registries,
    registry,
    run,
    seen_ports,
    server,
    serving,
    signals,
    world,
)
from tests.properties import PROPERTY

UNKNOWN = replace(signals(), error="permission denied")
ENDED = replace(signals(), run=run())
INTERRUPTED = replace(serving(), run=run(proven=False))
LEADERLESS = replace(serving(), leader_proven=False)
PORTLESS = replace(serving(), listening=False, listener_pids=frozenset())
LOADING = replace(signals(), operation=Operation("op2", "load", "b", 8103))


def wanted(name: str = "a", port: int = 8103) -> Wanted:
    return Wanted(f"org/{name}", f"sha-{name}", "mlx-lm", argv(name, port), limits=("--decode-concurrency",))


BUDGET = ("--decode-concurrency", "4")


def limited(seen: Signals) -> Signals:
    """Return the signals of a server that was started with limits of its budget."""
    if seen.run is not None:
        return replace(seen, run=replace(seen.run, argv=(*seen.run.argv, *BUDGET), budget=BUDGET))
    assert seen.hand is not None
    return replace(seen, hand=replace(seen.hand, argv=(*seen.hand.argv, *BUDGET)))


# -- load -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """A situation and a request, with the expected outcome of the plan or code of the refusal."""

    outcome: Outcome | str
    seen: tuple[Signals, ...] = ()
    known: Registry = field(default_factory=lambda: registry(a=None, b=None))
    model: str = "a"
    port: int = 8103
    force: bool = False
    wanted: Wanted | str | None = "as usual"
    repo: str | None = None
    revision: str | None = None
    stops: tuple[int, ...] = ()
    previous: int | None = None
    cleared: tuple[str, ...] = ()
    says: str = ""
    expect: str | None = None

    def plan(self) -> LoadPlan:
        target = resolve(self.known, self.model, self.repo, self.revision)
        how = wanted(self.model, self.port) if isinstance(self.wanted, str) else self.wanted
        return plan_load(
            SETTINGS,
            self.known,
            world(self.known, *self.seen),
            target,
            self.port,
            wanted=how,
            force=self.force,
            expect=self.expect,
        )


START, ADOPT, ALREADY = Outcome.START, Outcome.ADOPT, Outcome.ALREADY
OTHER_ARGV = replace(wanted(), argv=("/bin/engine", "--model", "a", "--port", "8103", "--context-length", "9"))
OTHER_REVISION = replace(wanted(), revision="sha-new")

LOADS: dict[str, Load] = {
    "an idle port": Load(START),
    "an idle port, files to be downloaded": Load(START, wanted=None),
    "a name that has to be registered": Load(START, model="c", repo="org/c"),
    "an alias on its own slot": Load(START, model="jerry-l", repo="org/x", port=8101),
    # The name is the alias of another slot.
    "an alias on another slot": Load("alias_elsewhere", model="jerry-l", repo="org/x", says="port 8101"),
    "an alias on another slot, forced": Load("alias_elsewhere", model="jerry-l", repo="org/x", force=True),
    "an alias on the slot of another alias": Load("alias_elsewhere", model="jerry-l", repo="org/x", port=8102),
    # A boot job owns the port.
    "the boot job is between two starts": Load(
        "boot_port", (replace(signals(8100), boot=CLAIM),), port=8100, force=True, says="launchd has it"
    ),
    "the boot job of another port serves this one": Load(
        "boot_port", (at_boot("b", 8103),), registry(a=None), force=True, says="which hosts.yaml gives port 8100"
    ),
    "the boot job serves this model": Load(
        ALREADY, (at_boot("a"),), registry(a=8100), port=8100, says="served by the boot job"
    ),
    "the boot job serves this model, forced": Load(ALREADY, (at_boot("a"),), registry(a=8100), port=8100, force=True),
    "the boot job serves another model": Load(
        "boot_port", (at_boot("b"),), registry(a=None, b=8100), port=8100, says="launchctl bootout system/com.example"
    ),
    "the boot job serves another model, forced": Load(
        "boot_port", (at_boot("b"),), registry(a=None, b=8100), port=8100, force=True
    ),
    "the boot job's server is silent": Load(
        "boot_port", (replace(at_boot("a"), health=Health.SILENT),), registry(a=8100), port=8100
    ),
    "the boot job is another user's": Load(
        "boot_port", (replace(at_boot(), hand=None, health=Health.NOT_ASKED),), registry(a=8100), port=8100
    ),
    # A foreign process holds the port.
    "a foreign listener": Load("foreign_port", (foreign(),), says="pid 6000: nc -l"),
    "a foreign listener, forced": Load("foreign_port", (foreign(),), force=True),
    "a foreign listener where the registry has this model": Load("foreign_port", (foreign(),), registry(a=8103)),
    "a foreign listener where our server ended": Load(
        "foreign_port", (replace(foreign(), run=run()),), registry(a=8103), force=True
    ),
    "an unknown port": Load("unknown_port", (UNKNOWN,), force=True, says="permission denied"),
    # This model is ready there.
    "this model is ready there": Load(ALREADY, (serving(),), registry(a=8103)),
    "this model is ready there, forced": Load(ALREADY, (serving(),), registry(a=8103), force=True),
    "this model is ready there, its files are not in the cache any more": Load(
        ALREADY, (serving(),), registry(a=8103), wanted=None
    ),
    "ready with other settings": Load(
        ALREADY, (serving(),), registry(a=8103), wanted=OTHER_ARGV, says="--force restarts it"
    ),
    "ready with other settings, forced": Load(
        START, (serving(),), registry(a=8103), wanted=OTHER_ARGV, force=True, stops=(8103,), previous=8103
    ),
    "ready with another revision": Load("port_in_use", (serving(),), registry(a=8103), wanted=OTHER_REVISION),
    "ready with another revision, forced": Load(
        START, (serving(),), registry(a=8103), wanted=OTHER_REVISION, force=True, stops=(8103,), previous=8103
    ),
    "ready from another repository than is asked for, which is not in the cache": Load(
        "port_in_use", (serving(),), registry(a=8103), wanted=None, repo="org/new"
    ),
    "ready at another revision than is asked for, which is not in the cache": Load(
        "port_in_use", (serving(),), registry(a=8103), wanted=None, repo="org/a", revision="v2"
    ),
    "ready from another repository, to be downloaded, forced": Load(
        START, (serving(),), registry(a=8103), wanted=None, repo="org/new", force=True, stops=(8103,), previous=8103
    ),
    "this model by hand, as we would start it": Load(ADOPT, (by_hand(),), registry(a=None), says="adopted"),
    "this model by hand, as we would start it, and registered": Load(ADOPT, (by_hand(),), registry(a=8103)),
    "this model with limits of its budget, which another load would choose differently": Load(
        ALREADY, (limited(serving()),), registry(a=8103), force=True
    ),
    "this model with limits of its budget, and other settings, forced": Load(
        START, (limited(serving()),), registry(a=8103), wanted=OTHER_ARGV, force=True, stops=(8103,), previous=8103
    ),
    "this model by hand, with limits of a budget": Load(ADOPT, (limited(by_hand()),), registry(a=8103)),
    "this model by hand, with limits that its entry sets, too": Load(
        "port_in_use", (limited(by_hand()),), registry(a=8103), wanted=replace(wanted(), limits=())
    ),
    "this model by hand with other settings": Load("port_in_use", (by_hand(),), registry(a=8103), wanted=OTHER_ARGV),
    "this model by hand with other settings, forced": Load(
        START, (by_hand(),), registry(a=8103), wanted=OTHER_ARGV, force=True, stops=(8103,), previous=8103
    ),
    "this model by hand, its files not found": Load("port_in_use", (by_hand(),), registry(a=8103), wanted=None),
    "ours, serving, without its assignment": Load(ADOPT, (serving(),), registry(a=None), says="assignment returns"),
    "ours, serving, without its assignment, with other settings": Load(
        START, (serving(),), registry(a=None), wanted=OTHER_ARGV, stops=(8103,)
    ),
    "ours, serving, its port assigned to another": Load(
        ADOPT, (serving(),), registry(a=None, b=8103), cleared=("b",), says="assignment returns"
    ),
    "ours, serving, its port assigned to another, forced": Load(
        START, (serving(),), registry(a=None, b=8103), force=True, stops=(8103,), previous=8103, cleared=("b",)
    ),
    # Another model is there.
    "another model of ours": Load("port_in_use", (serving("b"),), registry(a=None, b=8103), says="serves b"),
    "another model of ours, forced": Load(
        START, (serving("b"),), registry(a=None, b=8103), force=True, stops=(8103,), previous=8103, cleared=("b",)
    ),
    "the expected model is swapped": Load(
        START,
        (serving("b"),),
        registry(a=None, b=8103),
        force=True,
        expect="b",
        stops=(8103,),
        previous=8103,
        cleared=("b",),
    ),
    "the expected model, by its repository": Load(
        START,
        (serving("b"),),
        registry(a=None, b=8103),
        force=True,
        expect="org/b",
        stops=(8103,),
        previous=8103,
        cleared=("b",),
    ),
    "another model than expected": Load(
        "unexpected_model", (serving("b"),), registry(a=None, b=8103), force=True, expect="c", says="holds 'b', not 'c'"
    ),
    "nothing where a model is expected": Load("unexpected_model", force=True, expect="b", says="no model, not 'b'"),
    "the expected model is only assigned": Load(
        START, known=registry(a=None, b=8103), force=True, expect="b", cleared=("b",)
    ),
    "a port in use, with the expected model but not forced": Load(
        "port_in_use", (serving("b"),), registry(a=None, b=8103), expect="b"
    ),
    "nothing to do, whatever is expected": Load(ALREADY, (serving(),), registry(a=8103), force=True, expect="b"),
    "another model by hand": Load("port_in_use", (by_hand("b"),), says="owner hand"),
    "another model by hand, forced": Load(START, (by_hand("b"),), force=True, stops=(8103,), previous=8103),
    "another model that is silent": Load(
        "port_in_use", (replace(serving("b"), health=Health.SILENT),), registry(a=None, b=8103), says="wedged"
    ),
    # A stop did not wait for the server's end.
    "another model that has not ended": Load(
        START, (ending("b"),), registry(a=None, b=8103), stops=(8103,), cleared=("b",), says="has not ended yet"
    ),
    "this model has not ended": Load(START, (ending(),), registry(a=8103), stops=(8103,)),
    "this model has not ended on another port": Load(START, (ending(port=8104),), registry(a=8104), stops=(8104,)),
    # The model is served on another port.
    "served on another port": Load(
        "model_elsewhere", (serving(port=8104),), registry(a=8104), says="served on port 8104"
    ),
    "served on another port, forced": Load(START, (serving(port=8104),), registry(a=8104), force=True, stops=(8104,)),
    "served on another port, and this one has another": Load(
        START,
        (serving(port=8104), serving("b")),
        registry(a=8104, b=8103),
        force=True,
        stops=(8103, 8104),
        previous=8103,
        cleared=("b",),
    ),
    "served by hand on another port": Load("model_elsewhere", (by_hand(port=8104),), registry(a=8104)),
    "served by hand on another port, forced": Load(
        "model_elsewhere", (by_hand(port=8104),), registry(a=8104), force=True, says="did not start"
    ),
    "served by the boot job on another port, forced": Load(
        "model_elsewhere", (at_boot("a"),), registry(a=8100), force=True
    ),
    "left over on another port": Load(START, (replace(LEADERLESS, port=8104, run=run(port=8104)),), stops=(8104,)),
    "served on another port, and by hand here as we would": Load(
        "model_elsewhere", (serving(port=8104), by_hand()), registry(a=8104)
    ),
    "served on another port, and by hand here as we would, forced": Load(
        "model_elsewhere", (serving(port=8104), by_hand()), registry(a=8104), force=True
    ),
    "served on two other ports, forced": Load(
        START, (serving(port=8104), serving(port=8102)), registry(a=8104), force=True, stops=(8102, 8104)
    ),
    "assigned to a port that cannot be seen": Load(
        "unknown_port", (replace(UNKNOWN, port=8104),), registry(a=8104), force=True
    ),
    # What an earlier life left.
    "an assignment that nothing serves": Load(
        START, known=registry(a=None, b=8103), cleared=("b",), says="taken over from b"
    ),
    "two assignments that nothing serves": Load(
        START, known=registry(a=None, b=8103, c=8103), cleared=("b", "c"), says="taken over from c"
    ),
    "an assignment whose server ended": Load(
        START, (replace(ENDED, run=run("b")),), registry(a=None, b=8103), cleared=("b",)
    ),
    "this model assigned there and not served": Load(START, known=registry(a=8103)),
    "this model's server ended": Load(START, (ENDED,), registry(a=8103)),
    "an interrupted load of another model": Load(
        START, (replace(INTERRUPTED, run=run("b", proven=False)),), stops=(8103,), says="interrupted"
    ),
    "an interrupted load of this model": Load(START, (INTERRUPTED,), stops=(8103,), says="interrupted"),
    "processes without their leader": Load(START, (LEADERLESS,), registry(a=8103), stops=(8103,)),
    "processes without their port": Load(START, (PORTLESS,), registry(a=8103), stops=(8103,)),
    "another model's processes without their port": Load(
        START, (replace(PORTLESS, run=run("b")),), registry(a=None, b=8103), stops=(8103,), cleared=("b",)
    ),
    "this model, unhealthy": Load(
        START, (replace(serving(), health=Health.BROKEN),), registry(a=8103), stops=(8103,), says="restarted"
    ),
}


@pytest.mark.parametrize("situation", LOADS)
def test_load_has_the_expected_outcome(situation: str) -> None:
    case = LOADS[situation]
    if isinstance(case.outcome, Outcome):
        plan = case.plan()
        assert plan.outcome is case.outcome
        assert tuple(view.port for view in plan.stops) == case.stops
        assert (plan.previous.port if plan.previous else None) == case.previous
        assert plan.cleared == case.cleared
        assert plan.alias == SETTINGS.slots.get(case.port, case.model)
        assert case.says in "; ".join(plan.notes)
        return
    with pytest.raises(Refused) as caught:
        case.plan()
    error = caught.value
    assert error.code == case.outcome
    assert case.says in f"{error.message}\n{error.why}\n{error.hint}"
    assert error.message and error.why and error.hint


def test_load_table_has_every_outcome_and_refusal() -> None:
    refusals = {"alias_elsewhere", "boot_port", "foreign_port", "unknown_port", "port_in_use", "model_elsewhere"}
    refusals |= {"unexpected_model"}
    assert {case.outcome for case in LOADS.values()} == {*Outcome, *refusals}


# -- unload ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unload:
    seen: tuple[Signals, ...] = ()
    known: Registry = EMPTY
    port: int = 8103
    force: bool = False
    refused: str | None = None
    stops: bool = False
    clears: tuple[str, ...] = ()


UNLOADS: dict[str, Unload] = {
    "an idle port": Unload(),
    "a stale assignment": Unload(known=registry(a=8103), clears=("a",)),
    "two stale assignments": Unload(known=registry(a=8103, b=8103), clears=("a", "b")),
    "a server that ended": Unload((ENDED,), registry(a=8103), clears=("a",)),
    "our server": Unload((serving(),), registry(a=8103), stops=True, clears=("a",)),
    "our server without an assignment": Unload((serving(),), stops=True),
    "our server that hangs": Unload(
        (replace(serving(), health=Health.SILENT),), registry(a=8103), stops=True, clears=("a",)
    ),
    "what an interrupted load left": Unload((INTERRUPTED,), stops=True),
    "a server by hand": Unload((by_hand(),), registry(a=8103), refused="hand_started"),
    "a server by hand, forced": Unload((by_hand(),), registry(a=8103), force=True, stops=True, clears=("a",)),
    "the boot job": Unload((at_boot(),), registry(a=8100), port=8100, force=True, refused="boot_port"),
    "the boot job on another port": Unload((at_boot(port=8103),), registry(a=8103), force=True, refused="boot_port"),
    "the boot job between two starts": Unload(
        (replace(signals(8100), boot=CLAIM),), registry(a=8100), port=8100, refused="boot_port"
    ),
    "a foreign process": Unload((foreign(),), registry(a=8103), force=True, refused="foreign_port"),
    "an unknown port": Unload((UNKNOWN,), registry(a=8103), force=True, refused="unknown_port"),
}


@pytest.mark.parametrize("situation", UNLOADS)
def test_unload_has_the_expected_outcome(situation: str) -> None:
    case = UNLOADS[situation]
    seen = world(case.known, *case.seen)
    if case.refused:
        with pytest.raises(Refused) as caught:
            plan_unload(case.known, seen, case.port, force=case.force)
        assert caught.value.code == case.refused and caught.value.why and caught.value.hint
        return
    plan = plan_unload(case.known, seen, case.port, force=case.force)
    assert (plan.stop is not None, plan.clear) == (case.stops, case.clears)
    assert plan.stop in (None, seen.ports[case.port])
    assert plan.changed == (case.stops or bool(case.clears))


PORTLESS_SERVER = replace(server("b"), pid=5001, pgid=5001)
"""A server that was started by hand for a port that another process holds."""


@pytest.mark.parametrize(
    "there", [serving(), by_hand(), foreign(), at_boot(port=8103)], ids=lambda each: str(each.hand)
)
def test_portless_server_is_stopped_with_force_for_every_owner(there: Signals) -> None:
    seen = world(EMPTY, replace(there, portless=(PORTLESS_SERVER,)))
    plan = plan_unload(EMPTY, seen, 8103, force=True)
    assert plan.portless == (PORTLESS_SERVER,) and plan.changed
    owned = seen.ports[8103].owner in OURS
    assert (plan.stop is not None) == owned and bool(plan.notes) != owned


def test_portless_server_stays_without_force_and_is_named() -> None:
    plan = plan_unload(EMPTY, world(EMPTY, replace(serving(), portless=(PORTLESS_SERVER,))), 8103, force=False)
    assert plan.stop is not None and plan.portless == () and "pid 5001" in plan.notes[0] and "--force" in plan.notes[0]


def test_parent_of_a_hand_server_is_named() -> None:
    parent = "pid 444: python panel.py"
    seen = replace(by_hand(), hand=replace(server(), starter=parent))
    there, known = world(EMPTY, seen), registry(a=None, b=None)
    with pytest.raises(Refused) as caught:
        plan_unload(EMPTY, there, 8103, force=False)
    notes = [
        *plan_unload(EMPTY, there, 8103, force=True).notes,
        *Load(ADOPT, (seen,)).plan().notes[1:],
        *Load(START, (seen,), known, model="b", force=True).plan().notes[:1],
    ]
    assert parent in caught.value.why and parent in there.ports[8103].detail
    assert notes == [f"its parent, {parent}, is left alone, and may start it again"] * 3


def test_foreign_port_has_a_kill_command_in_its_hint() -> None:
    there = world(EMPTY, foreign())
    with pytest.raises(Refused) as unload:
        plan_unload(EMPTY, there, 8103, force=True)
    with pytest.raises(Refused) as load:
        Load("foreign_port", (foreign(),)).plan()
    assert unload.value.hint.endswith(": kill 6000") and "on the host: kill 6000" in load.value.hint


def test_hand_server_is_refused_with_pid_and_command() -> None:
    with pytest.raises(Refused) as caught:
        plan_unload(EMPTY, world(EMPTY, by_hand()), 8103, force=False)
    assert "pid 5000" in caught.value.why and "--model a" in caught.value.why


@pytest.mark.parametrize(
    ("known", "seen", "name", "port"),
    [
        (registry(a=8104), (), "a", 8104),
        (registry(a=8104), (), "org/a", 8104),
        (registry(a=None), (serving(),), "a", 8103),
        (registry(a=None), (by_hand(),), "org/a", 8103),
        (registry(a=None), (), "a", None),
        (EMPTY, (serving(),), "a", 8103),
        (registry(a=None), (foreign(),), "a", None),
    ],
)
def test_port_of_a_model_is_found(known: Registry, seen: tuple[Signals, ...], name: str, port: int | None) -> None:
    assert port_of(known, world(known, *seen), name) == port


def test_unknown_model_is_refused_with_a_suggestion() -> None:
    known = registry(jerry_xl=None)
    with pytest.raises(Refused) as caught:
        port_of(known, world(known), "jery-xl")
    assert (caught.value.code, caught.value.why) == ("unknown_model", "did you mean jerry-xl?")
    assert "load" not in caught.value.hint, "an unload does not suggest to register it"


def test_suggestion_ignores_the_organisation() -> None:
    known = EMPTY.set_fields("org/tiny-qwen3", {"repo_id": "org/tiny-qwen3"})
    assert unknown_model("tiny-qwen", known).why == "did you mean org/tiny-qwen3?"


def test_unload_all_stops_ours_and_hand_servers_and_clears_stale() -> None:
    known = registry(jerry_xl=8100, a=8101, b=8102, c=8103)
    seen = (at_boot("jerry_xl"), serving("a", 8101), by_hand("b", 8102))
    plans = plan_unload_all(known, world(known, *seen, foreign(8104)))
    assert [(p.port, p.stop is not None, p.clear) for p in plans] == [
        (8100, False, ()),
        (8101, True, ("a",)),
        (8102, True, ("b",)),
        (8103, False, ("c",)),
    ]
    assert "left alone" in plans[0].notes[0] and not plans[0].changed


def test_unload_all_names_the_assignments_that_it_leaves() -> None:
    known = registry(a=8103, b=8104)
    (first, second) = plan_unload_all(known, world(known, foreign(), replace(UNKNOWN, port=8104)))
    assert not first.changed and "8103 is left alone" in first.notes[0]
    assert not second.changed and "could not be determined" in second.notes[0]


def test_unload_all_is_empty_on_idle_ports() -> None:
    assert plan_unload_all(registry(a=None), world(registry(a=None))) == ()


def test_merged_refusal_names_all() -> None:
    errors: list[MlxopsError] = [Refused("a", "first", why="because"), Refused("b", "second"), Refused("c", "third")]
    merged = merge_refusals(errors)
    assert (merged.code, merged.message, merged.why) == ("a", "first", "because; second; third")


# -- reconcile ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reconcile:
    seen: tuple[Signals, ...] = ()
    known: Registry = field(default_factory=lambda: registry(a=8103))
    clears: tuple[str, ...] = ()
    stops: tuple[int, ...] = ()
    forgets: tuple[int, ...] = ()
    keeps: str = ""


def stopped_by(command: str, seen: Signals) -> Signals:
    assert seen.run is not None
    return replace(seen, run=replace(seen.run, stopped_by=command))


RECONCILES: dict[str, Reconcile] = {
    "nothing serves it": Reconcile(clears=("a",)),
    "nothing serves two": Reconcile(known=registry(a=8103, b=8103), clears=("a", "b")),
    "nothing serves a port outside the range": Reconcile((signals(9000),), registry(a=9000), clears=("a",)),
    "its server ended": Reconcile((ENDED,), clears=("a",), forgets=(8103,)),
    "a record without process and assignment": Reconcile((ENDED,), registry(a=None), forgets=(8103,)),
    "an unreadable record": Reconcile((replace(signals(), broken_record=True),), clears=("a",)),
    "it is ready": Reconcile((serving(),)),
    "it is ready by hand": Reconcile((by_hand(),)),
    "the boot job serves it": Reconcile((at_boot(),), registry(a=8100)),
    "it is silent": Reconcile((replace(serving(), health=Health.SILENT),), keeps="wedged"),
    "it is unhealthy": Reconcile((replace(serving(), health=Health.BROKEN),), keeps="failed"),
    "it starts by hand": Reconcile((replace(by_hand(), listening=False),), keeps="loading"),
    "it is being loaded": Reconcile((LOADING,), keeps="loading"),
    "it is being unloaded": Reconcile(
        (replace(serving(), operation=Operation("o", "unload", port=8103)),), keeps="draining"
    ),
    "an unload did not wait for its end": Reconcile((ending(),), clears=("a",), stops=(8103,)),
    "an unload did not wait for its end, and another one runs": Reconcile(
        (replace(ending(), operation=Operation("o", "unload", port=8103)),), keeps="draining"
    ),
    "a failed load of another model did not wait for its end": Reconcile(
        (stopped_by("load", ending("b")),), stops=(8103,), keeps="a stays assigned"
    ),
    "the server of a failed load of another model has ended": Reconcile(
        (replace(ENDED, run=replace(run("b"), stopped_by="load")),), forgets=(8103,), keeps="a stays assigned"
    ),
    "a reconcile did not wait for the end of another model": Reconcile(
        (stopped_by("reconcile", ending("b")),), stops=(8103,), keeps="a stays assigned"
    ),
    "an unload of another model did not wait for its end": Reconcile((ending("b"),), clears=("a",), stops=(8103,)),
    "a swap did not wait for its end": Reconcile((stopped_by("load", ending()),), clears=("a",), stops=(8103,)),
    "another operation has an idle port": Reconcile(
        (replace(signals(), operation=Operation("o", "unload")),), keeps="idle"
    ),
    "it cannot be seen": Reconcile((UNKNOWN,), keeps="unknown"),
    "a foreign process listens": Reconcile((foreign(),), keeps="foreign"),
    "a foreign process listens where our server ended": Reconcile((replace(foreign(), run=run()),), keeps="foreign"),
    "ours serves without an assignment": Reconcile((serving(),), registry(a=None), keeps="without an assignment"),
    "a load was interrupted": Reconcile((INTERRUPTED,), registry(a=None), stops=(8103,)),
    "a load was interrupted after its commit": Reconcile((INTERRUPTED,), stops=(8103,), clears=("a",)),
    "the leader is gone": Reconcile((LEADERLESS,), stops=(8103,), clears=("a",)),
    "the port is gone": Reconcile((PORTLESS,), stops=(8103,), clears=("a",)),
    "the leader is gone and an operation is at it": Reconcile(
        (replace(LEADERLESS, operation=Operation("o", "reconcile", port=8103)),), keeps="orphan"
    ),
}


@pytest.mark.parametrize("situation", RECONCILES)
def test_reconcile_has_the_expected_outcome(situation: str) -> None:
    case = RECONCILES[situation]
    plan = plan_reconcile(case.known, world(case.known, *case.seen))
    assert tuple(plan.clear or ()) == case.clears
    assert tuple(view.port for view in plan.stops) == case.stops
    assert plan.forget == case.forgets
    assert bool(plan.kept) == bool(case.keeps) and case.keeps in "; ".join(plan.kept)


# -- resolve --------------------------------------------------------------------------------------------------------

KNOWN = parse(
    b"""{"version": 1, "models": {
    "one": {"repo_id": "org/one"},
    "pinned": {"repo_id": "org/pinned", "revision": "abc"},
    "left": {"repo_id": "org/both"}, "right": {"repo_id": "org/both"},
    "org/full": {"repo_id": "org/full"},
    "org/taken": {"repo_id": "org/elsewhere"},
    "broken": {"repo_id": 7}}}"""
)


@pytest.mark.parametrize(
    ("name", "repo", "revision", "expected"),
    [
        ("one", None, None, ("one", "org/one", None, True, False)),
        ("one", "org/one", None, ("one", "org/one", None, True, False)),
        ("one", "org/other", None, ("one", "org/other", None, True, True)),
        ("one", "org/one", "v2", ("one", "org/one", "v2", True, True)),
        ("one", None, "v2", ("one", "org/one", "v2", True, True)),
        ("pinned", None, None, ("pinned", "org/pinned", "abc", True, False)),
        ("pinned", "org/pinned", "abc", ("pinned", "org/pinned", "abc", True, False)),
        ("pinned", "org/pinned", "def", ("pinned", "org/pinned", "def", True, True)),
        ("pinned", "org/other", None, ("pinned", "org/other", None, True, True)),
        ("org/one", None, None, ("one", "org/one", None, True, False)),
        ("org/one", "org/one", "v2", ("one", "org/one", "v2", True, True)),
        ("org/full", None, None, ("org/full", "org/full", None, True, False)),
        ("org/taken", None, None, ("org/taken", "org/elsewhere", None, True, False)),
        ("new", "org/new", "v1", ("new", "org/new", "v1", False, False)),
        ("org/new", None, None, ("org/new", "org/new", None, False, False)),
        ("broken", "org/repaired", None, ("broken", "org/repaired", None, True, True)),
    ],
)
def test_name_resolves_to_a_model(
    name: str, repo: str | None, revision: str | None, expected: tuple[str, str, str | None, bool, bool]
) -> None:
    target = resolve(KNOWN, name, repo, revision)
    assert (target.name, target.repo_id, target.revision, target.entry is not None, target.repoint) == expected


@pytest.mark.parametrize(
    ("name", "repo", "code", "says"),
    [
        ("missing", None, "unknown_model", "--repo org/name"),
        ("on", None, "unknown_model", "one"),
        ("org/both", None, "ambiguous_model", "left, right"),
        ("org/new", "org/other", "ambiguous_model", "two different repositories"),
        ("broken", None, "entry_unusable", "repo_id is not a string"),
    ],
)
def test_unknown_or_ambiguous_name_is_refused(name: str, repo: str | None, code: str, says: str) -> None:
    with pytest.raises(Refused) as caught:
        resolve(KNOWN, name, repo, None)
    error = caught.value
    assert error.code == code and says in f"{error.message} {error.why} {error.hint}"


# -- choose_port ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "typed", "known", "seen", "port"),
    [
        ("a", "8104", registry(a=8103), (), 8104),
        ("jerry-l", None, EMPTY, (), 8101),
        ("jerry-l", None, registry(jerry_l=8103), (), 8101),
        ("a", None, registry(a=8104), (), 8104),
        ("jerry-l", "auto", EMPTY, (serving("b", 8101),), 8101),
        ("a", "auto", registry(a=8104), (), 8104),
        ("a", "auto", EMPTY, (), 8103),
        ("a", "auto", EMPTY, (foreign(),), 8104),
        ("a", "auto", EMPTY, (UNKNOWN,), 8104),
        ("a", "auto", EMPTY, (replace(signals(), operation=Operation("o", "load", "b", 8103)),), 8104),
        ("a", "auto", registry(b=8103), (), 8104),
        ("a", "auto", registry(a=9000), (), 8103),
    ],
)
def test_load_chooses_the_port(
    name: str, typed: str | None, known: Registry, seen: tuple[Signals, ...], port: int
) -> None:
    assert choose_port(SETTINGS, known, world(known, *seen), name, typed) == port


@pytest.mark.parametrize("typed", ["8099", "8105", "abc", "", "-1", "8100 ", "0x1fa4", "８１００", "8100\n", "081000"])
def test_bad_port_is_a_usage_error(typed: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose_port(SETTINGS, EMPTY, world(EMPTY), "a", typed)
    assert caught.value.code == "bad_port"


def test_missing_port_is_a_usage_error_that_names_the_flag() -> None:
    with pytest.raises(UsageError) as caught:
        choose_port(SETTINGS, registry(a=9000), world(EMPTY), "a", None)
    assert caught.value.code == "port_needed" and "--port auto" in caught.value.hint


def test_auto_lists_idle_slots_and_never_takes_one() -> None:
    seen = (serving("a", 8103), serving("b", 8104), foreign(8101))
    with pytest.raises(Refused) as caught:
        choose_port(SETTINGS, EMPTY, world(EMPTY, *seen), "c", "auto")
    assert caught.value.code == "no_idle_port"
    assert caught.value.why == "idle slots with an alias: 8100 (jerry-xl), 8102 (jerry-m)"


# -- init -----------------------------------------------------------------------------------------------------------


def test_init_registers_new_repositories_without_a_port() -> None:
    found = [("org/one", "s", "/c/one"), ("org/taken", "s", "/c/t"), ("org/new", "s", "/c/new")]
    assert init_entries(KNOWN, found) == {
        "org/new": {
            "repo_id": "org/new",
            "model_id": "org/new",
            "cache_path": "/c/new",
            "format": "mlx",
            "port": None,
        }
    }


# -- all worlds ------------------------------------------------------------------------------------------

NEVER = {Owner.BOOT, Owner.FOREIGN, None}
targets = st.builds(ModelRef, st.sampled_from([*MODELS, "jerry-l", "c"]), st.sampled_from(["org/a", "org/b"]))
wanteds = st.none() | st.builds(wanted, st.sampled_from(["a", "b"]), st.sampled_from(PORTS))


def touchable(view: PortView) -> bool:
    return view.owner not in NEVER and view.state not in {State.UNKNOWN, State.FOREIGN}


@dataclass(frozen=True)
class AnyLoad:
    """Any request of a load in any situation."""

    known: Registry
    seen: tuple[Signals, ...]
    target: ModelRef
    port: int
    wanted: Wanted | None
    force: bool

    @property
    def before(self) -> World:
        return world(self.known, *self.seen)

    def plan(self) -> LoadPlan | None:
        """Return the plan; None if the load is refused."""
        target = replace(self.target, entry=self.known.models.get(self.target.name))
        try:
            return plan_load(SETTINGS, self.known, self.before, target, self.port, wanted=self.wanted, force=self.force)
        except Refused as error:
            assert error.message and error.hint
            return None


any_load = st.builds(AnyLoad, registries, seen_ports, targets, st.sampled_from(PORTS), wanteds, st.booleans())


@given(any_load)
@PROPERTY
def test_load_never_stops_foreign_boot_or_unknown_servers(load: AnyLoad) -> None:
    plan = load.plan()
    assert plan is None or all(touchable(view) for view in plan.stops)


@given(any_load)
@PROPERTY
def test_load_stops_no_ready_server_without_force(load: AnyLoad) -> None:
    plan = replace(load, force=False).plan()
    assert plan is None or all(view.state is not State.READY for view in plan.stops)


@given(any_load)
@PROPERTY
def test_load_never_uses_the_alias_of_another_slot(load: AnyLoad) -> None:
    if (plan := load.plan()) is not None:
        assert plan.alias not in {alias for slot, alias in SETTINGS.slots.items() if slot != load.port}
        assert plan.alias == SETTINGS.slots.get(load.port, load.target.name)


@given(any_load)
@PROPERTY
def test_load_keeps_one_model_per_port_and_one_port_per_model(load: AnyLoad) -> None:
    plan, name, port = load.plan(), load.target.name, load.port
    if plan is None or plan.outcome is Outcome.ALREADY:
        return
    after = load.known.set_fields(name, {"repo_id": load.target.repo_id}).assign(name, port)
    assert [model.name for model in after.on_port(port)] == [name]
    lost = {m.name for m in load.known.models.values() if m.port == port} - {name}
    assert set(plan.cleared) == lost, "the plan names who loses the port"
    stopped = {view.port for view in plan.stops}
    ours = [view for view in load.before.ports.values() if view.owner in OURS]
    left = {view.port: view.model for view in ours if view.port not in stopped}
    if plan.outcome is Outcome.START:
        assert port not in left, "the earlier server of the port is stopped"
    assert name not in [model for at, model in left.items() if at != port], "it is served on no other port"


@given(any_load)
@PROPERTY
def test_previous_server_is_stopped_by_a_forced_load(load: AnyLoad) -> None:
    plan = load.plan()
    if plan is not None and plan.previous is not None:
        assert load.force and plan.previous.port == load.port and plan.previous in plan.stops


@given(registries, seen_ports, st.sampled_from(PORTS), st.booleans())
@PROPERTY
def test_unload_never_stops_foreign_boot_or_unknown_servers(
    known: Registry, seen: tuple[Signals, ...], port: int, force: bool
) -> None:
    there = world(known, *seen)
    try:
        plan = plan_unload(known, there, port, force=force)
    except Refused:
        assert not touchable(there.ports[port]) or not force
        return
    assert plan.stop is None or (touchable(plan.stop) and plan.stop.port == port)
    assert plan.stop is None or plan.stop.owner is Owner.MLXOPS or force
    assert set(plan.clear) == {model.name for model in known.on_port(port)}


@given(registries, seen_ports)
@PROPERTY
def test_unload_all_stops_only_ours_and_hand_servers(known: Registry, seen: tuple[Signals, ...]) -> None:
    there = world(known, *seen)
    for plan in plan_unload_all(known, there):
        assert plan.changed or plan.notes
        assert plan.stop is None or touchable(plan.stop)
        if plan.clear:
            assert plan.stop is not None or there.ports[plan.port].owner is None
            assert there.ports[plan.port].state is not State.UNKNOWN


@given(registries, seen_ports)
@PROPERTY
def test_reconcile_clears_only_unserved_or_stopped_ports(known: Registry, seen: tuple[Signals, ...]) -> None:
    there = world(known, *seen)
    plan = plan_reconcile(known, there)
    stopped = {view.port for view in plan.stops}
    for name, port in (plan.clear or {}).items():
        assert known.models[name].port == port
        assert there.ports[port].unserved or port in stopped
    assert all(there.ports[port].unserved for port in plan.forget)


@given(registries, seen_ports)
@PROPERTY
def test_reconcile_stops_only_orphans_and_ending_servers_of_ours(known: Registry, seen: tuple[Signals, ...]) -> None:
    for view in plan_reconcile(known, world(known, *seen)).stops:
        assert view.owner is Owner.MLXOPS and (view.state is State.ORPHAN or view.ending)
        assert view.operation is None and view.run is not None


@given(registries)
@PROPERTY
def test_second_reconcile_clears_nothing(known: Registry) -> None:
    after = known.clear(plan_reconcile(known, world(known)).clear or {})
    assert not plan_reconcile(after, world(after)).clear


@given(registries, seen_ports, st.sampled_from(MODELS), st.sampled_from([None, "auto"]))
@PROPERTY
def test_chosen_port_is_the_models_own_or_idle_without_alias(
    known: Registry, seen: tuple[Signals, ...], name: str, asked: str | None
) -> None:
    there = world(known, *seen)
    try:
        port = choose_port(SETTINGS, known, there, name, asked)
    except (Refused, UsageError):
        return
    entry = known.models.get(name)
    own = {SETTINGS.slot_of(name), entry.port if entry else None}
    assert port in own or (asked == "auto" and there.ports[port].unserved and port not in SETTINGS.slots)


def test_plan_needs_no_settings_beyond_ports_and_slots() -> None:
    plain = Settings()
    make: Callable[[], LoadPlan] = lambda: plan_load(  # noqa: E731 - read as one sentence
        plain, EMPTY, World({8100: world(EMPTY).ports[8100]}), ModelRef("a", "org/a"), 8100, wanted=None, force=False
    )
    assert (make().alias, make().outcome) == ("a", Outcome.START)


@pytest.mark.parametrize(
    ("sent", "also", "refused"),
    [
        (["jerry-xl"], (), False),
        (["default_model"], ("default_model",), False),
        (["default_model"], (), True),
        (["jerry-xl", "other"], ("default_model",), True),
    ],
)
def test_load_is_refused_if_the_gateway_sends_an_unknown_name(
    sent: list[str], also: tuple[str, ...], refused: bool
) -> None:
    if not refused:
        check_sent_names(8100, "jerry-xl", sent, also)
        return
    with pytest.raises(Refused) as raised:
        check_sent_names(8100, "jerry-xl", sent, also)
    assert (raised.value.code, raised.value.details["answers_to"]) == ("gateway_name", "jerry-xl")
