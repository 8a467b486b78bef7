"""What another operation, or a person, does at one certain moment of an operation: `python -m tests.faults.meanwhile
CASE`.

The races find such moments by chance, and readers by thinking; what was found is kept here. A process of its own,
because the arena collects every child's status.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from mlxops.agent.serving import memory
from mlxops.agent.serving.logs import CAP
from mlxops.agent.state import recovery
from mlxops.agent.state.locks import try_flock
from mlxops.agent.state.operation_log import OperationLog
from mlxops.agent.state.store import Store
from mlxops.core.errors import MlxopsError
from tests.faults import batch, oracle
from tests.faults.arena import Arena, Ended, entry

SECONDS = 30.0
ALPHA, BETA, GAMMA = "org/alpha", "org/beta", "org/gamma"
OPERATIONS = "mlxops.agent.operations"
LOCKS = "mlxops.agent.state.locks.try_flock"


@dataclass
class _Moment:
    """The first call of `called`, as module.function or module.Class.method, that fits: it waits there for `go`."""

    arena: Arena
    called: str
    fits: Callable[..., bool] = lambda *given, **named: True
    _made: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        owner, attribute = _owner(self.called)
        assert hasattr(owner, attribute), f"{self.called} does not exist"
        name = f"{time.monotonic_ns()}"
        self._at, self._go = self.arena.folder / f"at-{name}", self.arena.folder / f"go-{name}"

    def prepare(self) -> None:
        """In the process that is to wait."""
        owner, name = _owner(self.called)
        real: Callable[..., object] = getattr(owner, name)

        def wait(*given: object, **named: object) -> object:
            if not self._at.exists() and self.fits(*given, **named):
                self._at.touch()
                _until(self._go.exists)
            return real(*given, **named)

        setattr(owner, name, wait)

    def come(self) -> None:
        _until(self._at.exists)

    @property
    def came(self) -> bool:
        return self._at.exists()

    def go(self) -> None:
        self._go.touch()


def _owner(called: str) -> tuple[object, str]:
    path, _, name = called.rpartition(".")
    try:
        return importlib.import_module(path), name
    except ModuleNotFoundError:
        module, _, kind = path.rpartition(".")
        return getattr(importlib.import_module(module), kind), name


@contextmanager
def _held_at(arena: Arena, called: str, name: str, **args: object) -> Iterator[list[Ended]]:
    """While an operation stands just before a call; then it goes on, and its end is in the list."""
    moment = _Moment(arena, called)
    journal, pid = arena.begin(name, args, first=moment.prepare)
    ended: list[Ended] = []
    try:
        moment.come()
        yield ended
    finally:
        moment.go()
        ended.append(arena.ended(journal, pid))


def _cancelled_at(arena: Arena, called: str, name: str, *, shielded: bool = False, **args: object) -> Ended:
    """Cancelled while it stands just before a call, which is not made then, unless it is `shielded`."""
    moment = _Moment(arena, called)
    journal, pid = arena.begin(name, args, first=moment.prepare)
    moment.come()
    journal.cancel()
    _until(lambda: not journal.cancel_requested)
    if shielded:
        moment.go()
    return arena.ended(journal, pid)


def _until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the other side did not come")
        time.sleep(0.001)


# -- load and move ----------------------------------------------------------------------------------------------------


def _a_move_finds_another_model(arena: Arena) -> None:
    """It has planned to stop its model on the first port, which serves another one before that port is held."""
    first, second = arena.ports[0], arena.ports[1]
    _load(arena, ALPHA, first)
    locks = f"{OPERATIONS}.load._locks_of_stops"
    with _held_at(arena, locks, "load", model=ALPHA, port=str(second), force=True) as moved:
        _unload(arena, first)
        _load(arena, BETA, first)
    assert moved[0].exit == 0, moved
    _serves(arena, {first: BETA, second: ALPHA})


def _what_is_replaced_is_not_started_elsewhere(arena: Arena) -> None:
    """It may have to come back, and would be served twice then."""
    first, second = arena.ports[0], arena.ports[1]
    _load(arena, ALPHA, first)
    with _held_at(arena, STARTS, "load", model=BETA, port=str(first), force=True):
        for force in (False, True):
            _busy(arena.run("load", model=ALPHA, port=str(second), force=force))
        _busy(arena.run("remove", model=ALPHA))
    _serves(arena, {first: BETA})


def _an_idle_port_that_serves_by_now(arena: Arena) -> None:
    """With `--port auto --force`, another one is taken: nothing is stopped that was not meant."""
    second = arena.ports[1]
    with _held_at(arena, f"{OPERATIONS}.load.model_lock", "load", model=ALPHA, port="auto", force=True) as loaded:
        _load(arena, BETA, second)
    assert loaded[0].exit == 0, loaded
    _serves(arena, {second: BETA, arena.ports[2]: ALPHA})


def _a_model_that_moves_before_it_is_loaded_anew(arena: Arena) -> None:
    """Without a port it is meant where it is by then, and not where another one is in its place."""
    first, second = arena.ports[0], arena.ports[1]
    _load(arena, ALPHA, first)
    with _held_at(arena, f"{OPERATIONS}.load.model_lock", "load", model=ALPHA, force=True) as loaded:
        _load(arena, ALPHA, second)
        _load(arena, BETA, first)
    assert loaded[0].exit == 0, loaded
    _serves(arena, {first: BETA, second: ALPHA})


def _a_repository_that_gets_a_name(arena: Arena) -> None:
    """What is held is the name that is served: the same model is not started under it a second time."""
    first, second = arena.ports[0], arena.ports[1]
    arena.write_registry({})
    before, starts = _Moment(arena, f"{OPERATIONS}.load._port_alone"), _Moment(arena, STARTS)

    def prepare() -> None:
        before.prepare()
        starts.prepare()

    journal, pid = arena.begin("load", {"model": ALPHA, "port": str(first)}, first=prepare)
    before.come()
    assert arena.run("load", model="short", port=str(second), repo=ALPHA).exit == 0
    _unload(arena, second)
    before.go()
    starts.come()
    _busy(arena.run("load", model="short", port=str(second)))
    starts.go()
    assert arena.ended(journal, pid).exit == 0
    _serves(arena, {first: "short"})


def _a_move_is_no_load_of_the_port_that_it_leaves(arena: Arena) -> None:
    """Nobody who wants that one follows it, and an unload of that one does not cancel it."""
    first, second = arena.ports[0], arena.ports[1]
    _load(arena, ALPHA, first)
    with _held_at(
        arena, f"{OPERATIONS}.swap.prefetch_weights", "load", model=ALPHA, port=str(second), force=True
    ) as moved:
        other = arena.run("load", model=ALPHA, port=str(first))
        _busy(other)
        assert other.error and "attach" not in other.error.details, other.error
        _busy(arena.run("unload", port=str(first)))
    assert moved[0].exit == 0, moved
    _serves(arena, {second: ALPHA})


def _two_loads_where_one_fits(arena: Arena) -> None:
    """The one that comes second is refused, though the first has not begun to take memory."""
    need = memory.estimate_of(arena.snapshots[ALPHA])
    assert need is not None
    arena.settings = replace(arena.settings, memory=int(need.total * 1.5))
    # Not those of other tests on this machine.
    with mock.patch.object(memory, "servers", SimpleNamespace(find=lambda look: [])):
        with _held_at(arena, STARTS, "load", model=ALPHA, port=str(arena.ports[0])) as loaded:
            second = arena.run("load", model=BETA, port=str(arena.ports[1]))
        assert (second.exit, second.error and second.error.code) == (3, "does_not_fit"), second
        assert loaded[0].exit == 0, loaded
        again = arena.run("unload", port=str(arena.ports[0])), arena.run("load", model=BETA, port=str(arena.ports[1]))
        assert [each.exit for each in again] == [0, 0], again


# -- adoption ---------------------------------------------------------------------------------------------------------


def _another_server_than_was_looked_at(arena: Arena) -> None:
    """It answers to the same alias, and is not adopted for the one that it replaced."""
    first = arena.ports[0]
    pid = arena.start_by_hand(ALPHA, first)
    with _held_at(arena, f"{OPERATIONS}.load._adopt", "load", model=ALPHA, port=str(first)) as adopted:
        os.kill(pid, signal.SIGKILL)
        _until(lambda: not arena.servers())
        (arena.folder / "hand" / "slot-a").unlink()
        arena.start_by_hand(BETA, first)
    assert (adopted[0].exit, adopted[0].error and adopted[0].error.code) == (3, "not_adopted"), adopted
    assert arena.store.run(first) is None


def _an_adoption_that_is_cancelled_late(arena: Arena) -> None:
    first = arena.ports[0]
    arena.start_by_hand(ALPHA, first)
    ended = _cancelled_at(arena, f"{OPERATIONS}.load.commit", "load", shielded=True, model=ALPHA, port=str(first))
    assert ended.exit == 0, "it was whole before the wish could be heard"
    _serves(arena, {first: ALPHA})


# -- the way back -----------------------------------------------------------------------------------------------------


def _a_cancellation_before_the_old_one_stops(arena: Arena) -> None:
    """It is not taken for a way back that is not known."""
    first = arena.ports[0]
    _load(arena, ALPHA, first)
    ended = _cancelled_at(arena, f"{OPERATIONS}.swap.cached", "load", model=BETA, port=str(first), force=True)
    assert ended.exit == 130, ended
    _serves(arena, {first: ALPHA})


def _a_cancellation_during_a_look(arena: Arena) -> None:
    """It is not taken for a host that cannot be looked at."""
    during = "mlxops.agent.serving.observe._hand_started"
    ended = _cancelled_at(arena, during, "load", model=BETA, port=str(arena.ports[0]))
    assert ended.exit == 130, ended
    _serves(arena, {})


def _a_twin_by_hand_does_not_come_back_as_ours(arena: Arena) -> None:
    first, second = arena.ports[0], arena.ports[1]
    _load(arena, ALPHA, second)
    arena.start_by_hand(ALPHA, first)
    assert arena.run("set", model=BETA, set=["args=--fake-exit 3"]).exit == 0
    failed = arena.run("load", model=BETA, port=str(first), force=True)
    assert failed.exit == 4, failed
    _serves(arena, {second: ALPHA})


def _what_cannot_be_undone_keeps_its_record(arena: Arena) -> None:
    """Nothing is started beside it, and it stays ours."""
    first = arena.ports[0]
    _load(arena, ALPHA, first)
    assert arena.run("set", model=BETA, set=["args=--fake-mute 1"]).exit == 0

    def prepare() -> None:
        owner, name = _owner("mlxops.agent.serving.launch.Launch.abort")

        def abort(start: object) -> None:
            raise MlxopsError("will_not_die", "it is still there")

        setattr(owner, name, abort)

    journal, pid = arena.begin("load", {"model": BETA, "port": str(first), "force": True, "timeout": 2}, first=prepare)
    failed = arena.ended(journal, pid)
    run = arena.store.run(first)
    assert failed.exit == 4 and run is not None and run.model == BETA, (failed, run)
    assert len(arena.servers()) == 1
    assert arena.run("unload", port=str(first)).exit == 0 and not arena.servers()


# -- unload, restore, reconcile, rollback -----------------------------------------------------------------------------


def _an_unload_of_a_model_that_moves(arena: Arena) -> None:
    """By its name it is unloaded where it is by then; what is in its old place stays."""
    first, second = arena.ports[0], arena.ports[1]
    _load(arena, ALPHA, first)
    with _held_at(arena, f"{OPERATIONS}.unload.make_way", "unload", model=ALPHA) as unloaded:
        _load(arena, ALPHA, second)
        _load(arena, BETA, first)
    assert unloaded[0].exit == 0 and unloaded[0].result, unloaded
    assert (unloaded[0].result["port"], unloaded[0].result["changed"]) == (second, True), unloaded
    _serves(arena, {first: BETA})


def _an_unload_of_a_model_that_is_being_replaced(arena: Arena) -> None:
    """Whoever wants the other one there is not cancelled for it."""
    first = arena.ports[0]
    _load(arena, ALPHA, first)
    with _held_at(arena, STARTS, "load", model=BETA, port=str(first), force=True):
        _busy(arena.run("unload", model=ALPHA))
    _serves(arena, {first: BETA})


def _an_unload_by_either_name_of_what_is_loading(arena: Arena) -> None:
    """It is the model that counts, and not what it was called when it was asked for."""
    first = arena.ports[0]
    arena.write_registry({"short": entry(ALPHA, arena.snapshots[ALPHA])})
    for name in ("short", ALPHA):
        moment = _Moment(arena, STARTS)
        journal, pid = arena.begin("load", {"model": ALPHA, "port": str(first)}, first=moment.prepare)
        moment.come()
        other, other_pid = arena.begin("unload", {"model": name})
        unloaded, loaded = arena.ended(other, other_pid), arena.ended(journal, pid)
        assert (unloaded.exit, loaded.exit) == (0, 130), (name, unloaded, loaded)
        _serves(arena, {})


def _an_unload_that_meets_a_restore(arena: Arena) -> None:
    """It takes its port out of it, and leaves it the others, also when it has begun just now."""
    first, second = arena.ports[0], arena.ports[1]
    _load(arena, ALPHA, first)
    _load(arena, BETA, second)
    _crash(arena)

    def asks_for_the_port(store: Store, name: str) -> bool:
        return name == f"port-{first}"

    asks = _Moment(arena, "mlxops.agent.state.store.Store.holder", asks_for_the_port)
    unload, unload_pid = arena.begin("unload", {"port": str(first)}, first=asks.prepare)
    asks.come()
    starts = _Moment(arena, STARTS)
    restore, restore_pid = arena.begin("restore", {}, first=starts.prepare)
    starts.come()
    asks.go()
    assert arena.ended(unload, unload_pid).exit == 0
    restored = arena.ended(restore, restore_pid)
    assert restored.exit == 0 and restored.result, restored
    assert [row["port"] for row in _rows(restored, "restored")] == [second], restored
    _serves(arena, {second: BETA})


def _a_reconcile_that_finds_nothing_to_clear_any_more(arena: Arena) -> None:
    """What a person has unloaded meanwhile, `restore --cleared` does not start."""
    first = arena.ports[0]
    _load(arena, ALPHA, first)
    _crash(arena)
    with _held_at(arena, f"{OPERATIONS}.reconcile.settle_all", "reconcile"):
        _unload(arena, first)
    assert arena.run("restore", cleared=True).exit == 0
    _serves(arena, {})


def _a_rollback_of_what_changes(arena: Arena) -> None:
    """Back from beta is alpha; but somebody has loaded gamma meanwhile, from which back is beta."""
    first = arena.ports[0]
    _load(arena, ALPHA, first)
    _load(arena, BETA, first)
    with _held_at(arena, f"{OPERATIONS}.rollback.load", "rollback", port=str(first)) as back:
        _load(arena, GAMMA, first)
    assert (back[0].exit, back[0].error and back[0].error.code) == (75, "changed_meanwhile"), back
    _serves(arena, {first: GAMMA})


def _a_rollback_to_what_serves_elsewhere(arena: Arena) -> None:
    """Another port is not emptied for it, also not if it was filled a moment ago."""
    first, second = arena.ports[0], arena.ports[1]
    _load(arena, ALPHA, first)
    _load(arena, BETA, first)
    with _held_at(arena, f"{OPERATIONS}.rollback.load", "rollback", port=str(first)) as back:
        _load(arena, ALPHA, second)
    assert (back[0].exit, back[0].error and back[0].error.code) == (3, "model_elsewhere"), back
    _serves(arena, {first: BETA, second: ALPHA})


def _a_rollback_to_a_name_that_is_repointed(arena: Arena) -> None:
    """What served before comes back, and not what the name means by now."""
    first, second = arena.ports[0], arena.ports[1]
    for model, repo in ((ALPHA, None), (BETA, None), ("name", ALPHA), (BETA, None)):
        assert arena.run("load", model=model, port=str(first), repo=repo, force=True).exit == 0
    with _held_at(arena, f"{OPERATIONS}.rollback.load", "rollback", port=str(first)) as back:
        assert arena.run("load", model="name", port=str(second), repo=GAMMA).exit == 0
        _unload(arena, second)
    assert (back[0].exit, back[0].error and back[0].error.code) == (75, "changed_meanwhile"), back
    _serves(arena, {first: BETA})


# -- files and records ------------------------------------------------------------------------------------------------


def _a_removal_of_files_that_another_name_has_too(arena: Arena) -> None:
    """They are looked at before they are deleted; nobody can begin with them in between."""
    arena.write_registry({name: entry(ALPHA, arena.snapshots[ALPHA]) for name in ("one", "other")})
    with _held_at(arena, "mlxops.agent.hub.removal.delete", "remove", model="one") as removed:
        _busy(arena.run("load", model="other", port=str(arena.ports[0])))
        _busy(arena.run("load", model="new", port=str(arena.ports[0]), repo=ALPHA))
    assert removed[0].exit == 0 and not arena.snapshots[ALPHA].exists(), removed
    _serves(arena, {})


def _a_removal_of_files_that_get_another_name(arena: Arena) -> None:
    """Whoever has begun to serve them under a name that was not there before keeps them."""
    first = arena.ports[0]
    arena.write_registry({"one": entry(ALPHA, arena.snapshots[ALPHA])})
    with _held_at(arena, f"{OPERATIONS}.remove._hold_files", "remove", model="one") as removed:
        assert arena.run("load", model="new", port=str(first), repo=ALPHA).exit == 0
    assert (removed[0].exit, removed[0].error and removed[0].error.code) == (3, "in_use"), removed
    with _held_at(arena, STARTS, "load", model="third", port=str(arena.ports[1]), repo=ALPHA):
        _unload(arena, first)
        refused = arena.run("remove", model="one")
        assert (refused.exit, refused.error and refused.error.code) == (3, "in_use"), refused
    _serves(arena, {arena.ports[1]: "third"})


def _a_pull_that_is_cancelled_when_all_is_there(arena: Arena) -> None:
    """Its files may be served by then, and stay."""
    first, path = arena.ports[0], arena.snapshots[ALPHA]
    folder, aside, there = path.parent.parent, arena.folder / "aside", arena.folder / "there"
    folder.rename(aside)

    def prepare() -> None:
        owner, name = _owner("mlxops.agent.hub.download.download")

        def download(*given: object, is_cancelled: Callable[[], bool], **named: object) -> None:
            shutil.copytree(aside, folder, symlinks=True)
            there.touch()
            _until(is_cancelled)

        setattr(owner, name, download)

    journal, pid = arena.begin("pull", {"repo": ALPHA}, first=prepare)
    _until(there.exists)
    assert arena.run("load", model="new", port=str(first), repo=ALPHA).exit == 0
    journal.cancel()
    assert arena.ended(journal, pid).exit == 130 and path.exists()
    _serves(arena, {first: "new"})


def _an_operation_that_is_being_born(arena: Arena) -> None:
    """Nobody takes it for one that was cut short, whenever they look."""
    real, looked = OperationLog.hold, list[object]()

    def hold(journal: OperationLog) -> int:
        if not looked:
            looked.append(oracle.drift_codes(arena))
            ctx = arena.context("reconcile")
            recovery.settle_all(ctx.store, ctx.paths.settings.ports, by=ctx.operation, dry_run=False)
        return real(journal)

    with mock.patch.object(OperationLog, "hold", hold):
        loaded = arena.run("load", model=ALPHA, port=str(arena.ports[0]))
    assert looked == [[]] and loaded.error is None and loaded.exit == 0, (looked, loaded)


def _a_log_that_is_cut_by_two(arena: Arena) -> None:
    """Who comes second waits, and then sees that it is done: the log of the server that starts next keeps its head."""
    first = arena.ports[0]
    _load(arena, ALPHA, first)
    os.truncate(arena.store.log_path(first), CAP + 1)
    with _held_at(arena, "shutil.copyfileobj", "set", model=GAMMA, set=["context_length=100"]):
        waits = _Moment(arena, LOCKS, partial(_is_taken, arena.store.log_path(first).parent))
        journal, pid = arena.begin("load", {"model": BETA, "port": str(first), "force": True}, first=waits.prepare)
        _until(lambda: waits.came or _proves(journal))
        waits.go()
    _has_its_head(arena, first, arena.ended(journal, pid))


def _a_log_that_is_rotated_while_it_is_cut(arena: Arena) -> None:
    """It was not too big yet when the load looked, and is when it wants to give it another name."""
    first = arena.ports[0]
    _load(arena, ALPHA, first)
    rotates = _Moment(arena, "mlxops.agent.serving.logs.rotate")
    waits = _Moment(arena, LOCKS, partial(_is_taken, arena.store.log_path(first).parent))

    def prepare() -> None:
        rotates.prepare()
        waits.prepare()

    journal, pid = arena.begin("load", {"model": BETA, "port": str(first), "force": True}, first=prepare)
    rotates.come()
    os.truncate(arena.store.log_path(first), CAP + 1)
    with _held_at(arena, "shutil.copyfileobj", "set", model=GAMMA, set=["context_length=100"]):
        rotates.go()
        _until(lambda: waits.came or _proves(journal))
        waits.go()
    _has_its_head(arena, first, arena.ended(journal, pid))


def _has_its_head(arena: Arena, port: int, loaded: Ended) -> None:
    log = arena.store.log_path(port)
    assert loaded.exit == 0, loaded
    assert log.read_bytes().startswith(b"--- mlxops "), log.read_bytes()[:80]


def _two_inits(arena: Arena) -> None:
    """Each tells what it added itself."""
    arena.write_registry({})
    with _held_at(arena, "mlxops.agent.state.registry_file.RegistryFile.update", "init") as second:
        one = arena.run("init")
    assert (len(_rows(one, "added")), len(_rows(second[0], "added"))) == (3, 0), (one, second)


STARTS = f"{OPERATIONS}.swap.Launch"
CASES: Mapping[str, Callable[[Arena], None]] = {
    name[1:].replace("_", " "): case
    for name, case in list(globals().items())
    if name.startswith(("_a_", "_an_", "_two_", "_what_", "_another_"))
}


def _proves(journal: OperationLog) -> bool:
    """Whether the new server has been started."""
    lines = (journal.folder / "events.jsonl").read_text().splitlines()
    return any(json.loads(each).get("name") == "proof" for each in lines)


def _is_taken(folder: Path, fd: int, *, shared: bool) -> bool:
    """Whether somebody else has the lock of `folder` just now; of others it is not asked."""
    return os.path.samestat(os.fstat(fd), folder.stat()) and not try_flock(fd, shared=shared)


def _rows(ended: Ended, key: str) -> list[dict[str, object]]:
    rows = ended.result[key] if ended.result else None
    assert isinstance(rows, list), ended
    return rows


def _load(arena: Arena, model: str, port: int) -> None:
    loaded = arena.run("load", model=model, port=str(port), force=True)
    assert loaded.exit == 0, loaded


def _unload(arena: Arena, port: int) -> None:
    unloaded = arena.run("unload", port=str(port))
    assert unloaded.exit == 0, unloaded


def _busy(ended: Ended) -> None:
    assert (ended.exit, ended.error and ended.error.code) == (75, "busy"), ended


def _crash(arena: Arena) -> None:
    for pid in arena.servers():
        os.kill(pid, signal.SIGKILL)
    _until(lambda: not arena.servers())


def _serves(arena: Arena, wanted: Mapping[int, str]) -> None:
    rows = oracle.rows_by_port(arena).values()
    served = {row["port"]: row["model"] for row in rows if (row["state"], row["owner"]) == ("ready", "mlxops")}
    assert served == wanted and len(arena.servers()) == len(wanted), (rows, arena.servers())
    assert not oracle.drift_codes(arena), oracle.drift_codes(arena)
    wrong = oracle.registry_sound(arena) + oracle.locks_free(arena) + oracle.nothing_hidden(arena)
    assert not wrong, wrong


def main(case: str) -> None:
    with batch.own_arena() as arena:
        assert arena.run("init").exit == 0
        CASES[case](arena)


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.write("as it should be\n")
