"""Cases in which another operation, or a person, acts at a fixed moment of an operation.

Run one with `python -m tests.faults.interleaved CASE`. The random races and code reviews found these moments. Each case
needs its own process, because the arena collects the status of every child.
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

from mlxops.agent.hub import cache
from mlxops.agent.serving import memory
from mlxops.agent.serving.logs import CAP
from mlxops.agent.state import recovery
from mlxops.agent.state.locks import try_flock
from mlxops.agent.state.operation_log import OperationLog
from mlxops.agent.state.store import Store
from mlxops.core.errors import MlxopsError
from tests.faults import batch, oracle
from tests.faults.arena import Arena, Ended, entry
from tests.lab.world import wait_until

WAIT_SECONDS = 30.0
ALPHA, BETA, GAMMA = "org/alpha", "org/beta", "org/gamma"
OPERATIONS = "mlxops.agent.operations"
LOCKS = "mlxops.agent.state.locks.try_flock"


@dataclass
class _Breakpoint:
    """A breakpoint at `function`, such as module.function or module.Class.method.

    The first call that `matches` waits for `go`.
    """

    arena: Arena
    function: str
    matches: Callable[..., bool] = lambda *args, **kwargs: True
    _made: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        owner, attribute = _owner(self.function)
        assert hasattr(owner, attribute), f"{self.function} does not exist"
        name = f"{time.monotonic_ns()}"
        self._at, self._go = self.arena.folder / f"at-{name}", self.arena.folder / f"go-{name}"

    def prepare(self) -> None:
        """Set the breakpoint. Call this in the process that is to wait."""
        owner, name = _owner(self.function)
        real: Callable[..., object] = getattr(owner, name)

        def wait(*args: object, **kwargs: object) -> object:
            if not self._at.exists() and self.matches(*args, **kwargs):
                self._at.touch()
                _wait_until(self._go.exists)
            return real(*args, **kwargs)

        setattr(owner, name, wait)

    def wait_until_reached(self) -> None:
        _wait_until(self._at.exists)

    @property
    def reached(self) -> bool:
        return self._at.exists()

    def go(self) -> None:
        self._go.touch()


def _owner(function: str) -> tuple[object, str]:
    path, _, name = function.rpartition(".")
    try:
        return importlib.import_module(path), name
    except ModuleNotFoundError:
        module, _, kind = path.rpartition(".")
        return getattr(importlib.import_module(module), kind), name


@contextmanager
def _paused_at(arena: Arena, function: str, name: str, **args: object) -> Iterator[list[Ended]]:
    """Pause an operation just before a call, during the block. Then continue it, and append its end to the list."""
    moment = _Breakpoint(arena, function)
    journal, pid = arena.begin(name, args, first=moment.prepare)
    ended: list[Ended] = []
    try:
        moment.wait_until_reached()
        yield ended
    finally:
        moment.go()
        ended.append(arena.ended(journal, pid))


def _cancel_at(arena: Arena, function: str, name: str, *, shielded: bool = False, **args: object) -> Ended:
    """Cancel an operation just before a call. The call is then made only if it is `shielded`."""
    moment = _Breakpoint(arena, function)
    journal, pid = arena.begin(name, args, first=moment.prepare)
    moment.wait_until_reached()
    journal.cancel()
    _wait_until(lambda: not journal.cancel_requested)
    if shielded:
        moment.go()
    return arena.ended(journal, pid)


def _wait_until(condition: Callable[[], object]) -> None:
    wait_until(condition, WAIT_SECONDS, "the condition")


# -- load and move ----------------------------------------------------------------------------------------------------


def _case_move_finds_another_model(arena: Arena) -> None:
    """A move plans to stop its model on the first port. Before it holds that port, another model serves there."""
    first, second = arena.ports[0], arena.ports[1]
    _load(arena, ALPHA, first)
    locks = f"{OPERATIONS}.load._locks_of_stops"
    with _paused_at(arena, locks, "load", model=ALPHA, port=str(second), force=True) as moved:
        _unload(arena, first)
        _load(arena, BETA, first)
    assert moved[0].exit == 0, moved
    _serves(arena, {first: BETA, second: ALPHA})


def _case_replaced_model_is_not_started_elsewhere(arena: Arena) -> None:
    """The replaced model may have to be restarted on its port, and would then be served twice."""
    first, second = arena.ports[0], arena.ports[1]
    _load(arena, ALPHA, first)
    with _paused_at(arena, STARTS, "load", model=BETA, port=str(first), force=True):
        for force in (False, True):
            _busy(arena.run("load", model=ALPHA, port=str(second), force=force))
        _busy(arena.run("remove", model=ALPHA))
    _serves(arena, {first: BETA})


def _case_idle_port_is_taken(arena: Arena) -> None:
    """`--port auto --force` takes another idle port instead of stopping the new server."""
    second = arena.ports[1]
    with _paused_at(arena, f"{OPERATIONS}.load.model_lock", "load", model=ALPHA, port="auto", force=True) as loaded:
        _load(arena, BETA, second)
    assert loaded[0].exit == 0, loaded
    _serves(arena, {second: BETA, arena.ports[2]: ALPHA})


def _case_model_moves_before_its_restart(arena: Arena) -> None:
    """A load without a port restarts the model on its new port, and leaves the model on its old one alone."""
    first, second = arena.ports[0], arena.ports[1]
    _load(arena, ALPHA, first)
    with _paused_at(arena, f"{OPERATIONS}.load.model_lock", "load", model=ALPHA, force=True) as loaded:
        _load(arena, ALPHA, second)
        _load(arena, BETA, first)
    assert loaded[0].exit == 0, loaded
    _serves(arena, {first: BETA, second: ALPHA})


def _case_repository_gets_a_name(arena: Arena) -> None:
    """The load holds the lock of the new name, so the model is not started a second time under it."""
    first, second = arena.ports[0], arena.ports[1]
    arena.write_registry({})
    before, starts = _Breakpoint(arena, f"{OPERATIONS}.load.model_lock"), _Breakpoint(arena, STARTS)

    def prepare() -> None:
        before.prepare()
        starts.prepare()

    journal, pid = arena.begin("load", {"model": ALPHA, "port": str(first)}, first=prepare)
    before.wait_until_reached()
    assert arena.run("load", model="short", port=str(second), repo=ALPHA).exit == 0
    _unload(arena, second)
    before.go()
    starts.wait_until_reached()
    _busy(arena.run("load", model="short", port=str(second)))
    starts.go()
    assert arena.ended(journal, pid).exit == 0
    _serves(arena, {first: "short"})


def _case_move_is_no_load_of_its_old_port(arena: Arena) -> None:
    """A load on the old port does not follow the move, and an unload of the old port does not cancel it."""
    first, second = arena.ports[0], arena.ports[1]
    _load(arena, ALPHA, first)
    with _paused_at(
        arena, f"{OPERATIONS}.swap.prefetch_weights", "load", model=ALPHA, port=str(second), force=True
    ) as moved:
        other = arena.run("load", model=ALPHA, port=str(first))
        _busy(other)
        assert other.error and "attach" not in other.error.details, other.error
        _busy(arena.run("unload", port=str(first)))
    assert moved[0].exit == 0, moved
    _serves(arena, {second: ALPHA})


def _case_two_loads_where_one_fits(arena: Arena) -> None:
    """The second load is refused, although the first server does not use its memory yet."""
    need = memory.estimate_of(arena.snapshots[ALPHA])
    assert need is not None
    arena.settings = replace(arena.settings, memory=int(need.total * 1.5))
    # Ignore the servers of other tests on this machine.
    with mock.patch.object(memory, "servers", SimpleNamespace(find_servers=lambda table: [])):
        with _paused_at(arena, STARTS, "load", model=ALPHA, port=str(arena.ports[0])) as loaded:
            second = arena.run("load", model=BETA, port=str(arena.ports[1]))
        assert (second.exit, second.error and second.error.code) == (3, "does_not_fit"), second
        assert loaded[0].exit == 0, loaded
        again = arena.run("unload", port=str(arena.ports[0])), arena.run("load", model=BETA, port=str(arena.ports[1]))
        assert [each.exit for each in again] == [0, 0], again


# -- adoption ---------------------------------------------------------------------------------------------------------


def _case_observed_server_is_replaced(arena: Arena) -> None:
    """The new server answers to the same alias. It is not adopted in place of the observed one."""
    first = arena.ports[0]
    pid = arena.start_by_hand(ALPHA, first)
    with _paused_at(arena, f"{OPERATIONS}.load.adopt", "load", model=ALPHA, port=str(first)) as adopted:
        os.kill(pid, signal.SIGKILL)
        _wait_until(lambda: not arena.servers())
        (arena.folder / "hand" / "slot-a").unlink()
        arena.start_by_hand(BETA, first)
    assert (adopted[0].exit, adopted[0].error and adopted[0].error.code) == (3, "not_adopted"), adopted
    assert arena.store.run(first) is None


def _case_adoption_is_cancelled_late(arena: Arena) -> None:
    first = arena.ports[0]
    arena.start_by_hand(ALPHA, first)
    ended = _cancel_at(arena, f"{OPERATIONS}.adopt.commit", "load", shielded=True, model=ALPHA, port=str(first))
    assert ended.exit == 0, "the adoption was complete before the request could be raised"
    _serves(arena, {first: ALPHA})


# -- restart ----------------------------------------------------------------------------------------------------------


def _case_cancelled_before_the_old_server_stops(arena: Arena) -> None:
    """The cancellation is not mistaken for an unknown restart plan."""
    first = arena.ports[0]
    _load(arena, ALPHA, first)
    ended = _cancel_at(arena, f"{OPERATIONS}.swap.cached", "load", model=BETA, port=str(first), force=True)
    assert ended.exit == 130, ended
    _serves(arena, {first: ALPHA})


def _case_cancelled_during_an_observation(arena: Arena) -> None:
    """The cancellation is not mistaken for a failed observation."""
    during = "mlxops.agent.serving.observe._hand_started"
    ended = _cancel_at(arena, during, "load", model=BETA, port=str(arena.ports[0]))
    assert ended.exit == 130, ended
    _serves(arena, {})


def _case_second_server_by_hand_is_not_restarted_as_ours(arena: Arena) -> None:
    first, second = arena.ports[0], arena.ports[1]
    _load(arena, ALPHA, second)
    arena.start_by_hand(ALPHA, first)
    assert arena.run("set", model=BETA, set=["args=--fake-exit 3"]).exit == 0
    failed = arena.run("load", model=BETA, port=str(first), force=True)
    assert failed.exit == 4, failed
    _serves(arena, {second: ALPHA})


def _case_server_that_cannot_be_removed_keeps_its_record(arena: Arena) -> None:
    """No other server is started on its port, and it stays ours."""
    first = arena.ports[0]
    _load(arena, ALPHA, first)
    assert arena.run("set", model=BETA, set=["args=--fake-act mute"]).exit == 0

    def prepare() -> None:
        owner, name = _owner("mlxops.agent.serving.launch.Launch.abort")

        def abort(start: object, *args: object) -> None:
            raise MlxopsError("will_not_die", "it is still there")

        setattr(owner, name, abort)

    journal, pid = arena.begin("load", {"model": BETA, "port": str(first), "force": True, "timeout": 2}, first=prepare)
    failed = arena.ended(journal, pid)
    run = arena.store.run(first)
    assert failed.exit == 4 and run is not None and run.model == BETA, (failed, run)
    assert len(arena.servers()) == 1
    assert arena.run("unload", port=str(first)).exit == 0 and not arena.servers()


# -- unload, restore, reconcile, rollback -----------------------------------------------------------------------------


def _case_model_moves_before_its_unload(arena: Arena) -> None:
    """An unload by name unloads the new port, and leaves the model on the old port alone."""
    first, second = arena.ports[0], arena.ports[1]
    _load(arena, ALPHA, first)
    with _paused_at(arena, f"{OPERATIONS}.unload.make_way", "unload", model=ALPHA) as unloaded:
        _load(arena, ALPHA, second)
        _load(arena, BETA, first)
    assert unloaded[0].exit == 0 and unloaded[0].result, unloaded
    assert (unloaded[0].result["port"], unloaded[0].result["changed"]) == (second, True), unloaded
    _serves(arena, {first: BETA})


def _case_unload_of_a_model_that_is_being_replaced(arena: Arena) -> None:
    """The load of the other model is not cancelled."""
    first = arena.ports[0]
    _load(arena, ALPHA, first)
    with _paused_at(arena, STARTS, "load", model=BETA, port=str(first), force=True):
        _busy(arena.run("unload", model=ALPHA))
    _serves(arena, {first: BETA})


def _case_unload_cancels_a_load_by_either_name(arena: Arena) -> None:
    """The names of the two requests may differ, as long as they mean the same model."""
    first = arena.ports[0]
    arena.write_registry({"short": entry(ALPHA, arena.snapshots[ALPHA])})
    for name in ("short", ALPHA):
        moment = _Breakpoint(arena, STARTS)
        journal, pid = arena.begin("load", {"model": ALPHA, "port": str(first)}, first=moment.prepare)
        moment.wait_until_reached()
        other, other_pid = arena.begin("unload", {"model": name})
        unloaded, loaded = arena.ended(other, other_pid), arena.ended(journal, pid)
        assert (unloaded.exit, loaded.exit) == (0, 130), (name, unloaded, loaded)
        _serves(arena, {})


def _case_unload_during_a_restore(arena: Arena) -> None:
    """The unload excludes only its own port from a restore that has just begun."""
    first, second = arena.ports[0], arena.ports[1]
    _load(arena, ALPHA, first)
    _load(arena, BETA, second)
    _crash(arena)

    def asks_for_the_port(store: Store, name: str) -> bool:
        return name == f"port-{first}"

    asks = _Breakpoint(arena, "mlxops.agent.state.store.Store.holder", asks_for_the_port)
    unload, unload_pid = arena.begin("unload", {"port": str(first)}, first=asks.prepare)
    asks.wait_until_reached()
    starts = _Breakpoint(arena, STARTS)
    restore, restore_pid = arena.begin("restore", {}, first=starts.prepare)
    starts.wait_until_reached()
    asks.go()
    assert arena.ended(unload, unload_pid).exit == 0
    restored = arena.ended(restore, restore_pid)
    assert restored.exit == 0 and restored.result, restored
    assert [row["port"] for row in _rows(restored, "restored")] == [second], restored
    _serves(arena, {second: BETA})


def _case_model_is_unloaded_during_a_reconcile(arena: Arena) -> None:
    """`restore --cleared` does not start a model that a person has unloaded."""
    first = arena.ports[0]
    _load(arena, ALPHA, first)
    _crash(arena)
    with _paused_at(arena, f"{OPERATIONS}.reconcile.settle_all", "reconcile"):
        _unload(arena, first)
    assert arena.run("restore", cleared=True).exit == 0
    _serves(arena, {})


def _case_assignment_is_removed_by_hand_during_a_restore(arena: Arena) -> None:
    """The restore does not start a model that is not assigned any more."""
    first = arena.ports[0]
    _load(arena, ALPHA, first)
    _crash(arena)
    with _paused_at(arena, f"{OPERATIONS}.restore.hold", "restore") as restored:
        arena.write_registry({ALPHA: entry(ALPHA, arena.snapshots[ALPHA])})
    assert restored[0].exit == 0 and not _rows(restored[0], "restored"), restored
    assert [row["port"] for row in _rows(restored[0], "skipped")] == [first], restored
    assert not arena.servers()


def _case_port_changes_before_its_rollback(arena: Arena) -> None:
    """A rollback from beta would load alpha. But then gamma is loaded, from which a rollback would load beta."""
    first = arena.ports[0]
    _load(arena, ALPHA, first)
    _load(arena, BETA, first)
    with _paused_at(arena, f"{OPERATIONS}.rollback.hold", "rollback", port=str(first)) as back:
        _load(arena, GAMMA, first)
    assert (back[0].exit, back[0].error and back[0].error.code) == (75, "changed_meanwhile"), back
    _serves(arena, {first: GAMMA})


def _case_rollback_to_a_model_on_another_port(arena: Arena) -> None:
    """A rollback empties no other port, even if the model was loaded there a moment ago."""
    first, second = arena.ports[0], arena.ports[1]
    _load(arena, ALPHA, first)
    _load(arena, BETA, first)
    with _paused_at(arena, f"{OPERATIONS}.rollback.hold", "rollback", port=str(first)) as back:
        _load(arena, ALPHA, second)
    assert (back[0].exit, back[0].error and back[0].error.code) == (3, "model_elsewhere"), back
    _serves(arena, {first: BETA, second: ALPHA})


def _case_rollback_to_a_name_that_is_repointed(arena: Arena) -> None:
    """A rollback does not load the files that the name means now instead of those that served before."""
    first, second = arena.ports[0], arena.ports[1]
    for model, repo in ((ALPHA, None), (BETA, None), ("name", ALPHA), (BETA, None)):
        assert arena.run("load", model=model, port=str(first), repo=repo, force=True).exit == 0
    with _paused_at(arena, f"{OPERATIONS}.rollback.hold", "rollback", port=str(first)) as back:
        assert arena.run("load", model="name", port=str(second), repo=GAMMA).exit == 0
        _unload(arena, second)
    assert (back[0].exit, back[0].error and back[0].error.code) == (75, "changed_meanwhile"), back
    _serves(arena, {first: BETA})


# -- files and records ------------------------------------------------------------------------------------------------


def _case_removal_of_shared_files(arena: Arena) -> None:
    """No load of these files can begin between the check and the deletion."""
    arena.write_registry({name: entry(ALPHA, arena.snapshots[ALPHA]) for name in ("one", "other")})
    with _paused_at(arena, "mlxops.agent.hub.removal.delete", "remove", model="one") as removed:
        _busy(arena.run("load", model="other", port=str(arena.ports[0])))
        _busy(arena.run("load", model="new", port=str(arena.ports[0]), repo=ALPHA))
    assert removed[0].exit == 0 and not arena.snapshots[ALPHA].exists(), removed
    _serves(arena, {})


def _case_removal_of_files_that_get_a_new_name(arena: Arena) -> None:
    """Files that a load serves under a new name are not removed."""
    first = arena.ports[0]
    arena.write_registry({"one": entry(ALPHA, arena.snapshots[ALPHA])})
    with _paused_at(arena, f"{OPERATIONS}.remove._hold_files", "remove", model="one") as removed:
        assert arena.run("load", model="new", port=str(first), repo=ALPHA).exit == 0
    assert (removed[0].exit, removed[0].error and removed[0].error.code) == (3, "in_use"), removed
    with _paused_at(arena, STARTS, "load", model="third", port=str(arena.ports[1]), repo=ALPHA):
        _unload(arena, first)
        refused = arena.run("remove", model="one")
        assert (refused.exit, refused.error and refused.error.code) == (3, "in_use"), refused
    _serves(arena, {arena.ports[1]: "third"})


def _case_pull_is_cancelled_after_its_last_file(arena: Arena) -> None:
    """The files stay, because a server may use them already."""
    first, path = arena.ports[0], arena.snapshots[ALPHA]
    folder, aside, there = path.parent.parent, arena.folder / "aside", arena.folder / "there"
    folder.rename(aside)

    def prepare() -> None:
        owner, name = _owner("mlxops.agent.hub.download.download")

        def download(*args: object, is_cancelled: Callable[[], bool], **kwargs: object) -> None:
            shutil.copytree(aside, folder, symlinks=True)
            there.touch()
            _wait_until(is_cancelled)

        setattr(owner, name, download)

    journal, pid = arena.begin("pull", {"repo": ALPHA}, first=prepare)
    _wait_until(there.exists)
    assert arena.run("load", model="new", port=str(first), repo=ALPHA).exit == 0
    journal.cancel()
    assert arena.ended(journal, pid).exit == 130 and path.exists()
    _serves(arena, {first: "new"})


def _case_name_is_repointed_during_its_download(arena: Arena) -> None:
    """The downloaded files are not served as those of the repository that the name means now."""
    first, path = arena.ports[0], arena.snapshots[ALPHA]
    folder, aside = path.parent.parent, arena.folder / "aside"
    arena.write_registry({"name": entry(ALPHA, path)})
    repointed = {"name": entry(BETA, arena.snapshots[BETA])}
    folder.rename(aside)

    def prepare() -> None:
        owner, name = _owner("mlxops.agent.hub.download.download")

        def download(*args: object, **kwargs: object) -> object:
            aside.rename(folder)
            arena.write_registry(repointed)
            return cache.find(arena.hub, ALPHA, None)

        setattr(owner, name, download)

    journal, pid = arena.begin("load", {"model": "name", "port": str(first)}, first=prepare)
    ended = arena.ended(journal, pid)
    assert (ended.exit, ended.error and ended.error.code) == (75, "changed_meanwhile"), ended
    assert arena.store.registry.read().raw["models"] == repointed
    _serves(arena, {})


def _case_operation_is_being_created(arena: Arena) -> None:
    """`status` and `reconcile` never mistake it for an interrupted operation."""
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


def _case_two_operations_cut_a_log(arena: Arena) -> None:
    """The second one waits, then sees that the log was cut. The log of the next server keeps its first line."""
    first = arena.ports[0]
    _load(arena, ALPHA, first)
    os.truncate(arena.store.log_path(first), CAP + 1)
    with _paused_at(arena, "shutil.copyfileobj", "set", model=GAMMA, set=["context_length=100"]):
        waits = _Breakpoint(arena, LOCKS, partial(_is_taken, arena.store.log_path(first).parent))
        journal, pid = arena.begin("load", {"model": BETA, "port": str(first), "force": True}, first=waits.prepare)
        _wait_until(lambda: waits.reached or _proves(journal))
        waits.go()
    _has_its_head(arena, first, arena.ended(journal, pid))


def _case_log_is_rotated_while_it_is_cut(arena: Arena) -> None:
    """The log becomes too big between the load's check and its rotation."""
    first = arena.ports[0]
    _load(arena, ALPHA, first)
    rotates = _Breakpoint(arena, "mlxops.agent.serving.logs.rotate")
    waits = _Breakpoint(arena, LOCKS, partial(_is_taken, arena.store.log_path(first).parent))

    def prepare() -> None:
        rotates.prepare()
        waits.prepare()

    journal, pid = arena.begin("load", {"model": BETA, "port": str(first), "force": True}, first=prepare)
    rotates.wait_until_reached()
    os.truncate(arena.store.log_path(first), CAP + 1)
    with _paused_at(arena, "shutil.copyfileobj", "set", model=GAMMA, set=["context_length=100"]):
        rotates.go()
        _wait_until(lambda: waits.reached or _proves(journal))
        waits.go()
    _has_its_head(arena, first, arena.ended(journal, pid))


def _has_its_head(arena: Arena, port: int, loaded: Ended) -> None:
    log = arena.store.log_path(port)
    assert loaded.exit == 0, loaded
    assert log.read_bytes().startswith(b"--- mlxops "), log.read_bytes()[:80]


def _case_two_inits(arena: Arena) -> None:
    """Each reports only what it added itself."""
    arena.write_registry({})
    with _paused_at(arena, "mlxops.agent.state.registry_file.RegistryFile.update", "init") as second:
        one = arena.run("init")
    assert (len(_rows(one, "added")), len(_rows(second[0], "added"))) == (3, 0), (one, second)


STARTS = f"{OPERATIONS}.swap.Launch"
CASES: Mapping[str, Callable[[Arena], None]] = {
    name.removeprefix("_case_").replace("_", " "): case
    for name, case in list(globals().items())
    if name.startswith("_case_")
}


def _proves(journal: OperationLog) -> bool:
    """Return whether the new server has been started."""
    lines = (journal.folder / "events.jsonl").read_text().splitlines()
    return any(json.loads(each).get("name") == "proof" for each in lines)


def _is_taken(folder: Path, fd: int, *, shared: bool) -> bool:
    """Return whether `fd` is `folder` and another process holds its lock."""
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
    _wait_until(lambda: not arena.servers())


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
