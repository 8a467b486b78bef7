"""What another operation does at one certain moment of this one: `python -m tests.faults.meanwhile CASE`.

The races find such moments by chance; these were found by them, and are kept. A process of its own, because the arena
collects every child's status.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tests.faults import batch, oracle
from tests.faults.arena import Arena, Ended, entry

SECONDS = 30.0


@contextmanager
def _held_at(arena: Arena, moment: str, name: str, **args: object) -> Iterator[list[Ended]]:
    """While an operation stands just before it calls `moment`; then it goes on, and its end is in the list."""
    at, go = arena.folder / "at", arena.folder / "go"
    at.unlink(missing_ok=True)
    go.unlink(missing_ok=True)
    module, _, function = moment.rpartition(".")
    called: Callable[..., object] = getattr(sys.modules[module], function)

    def wait(*given: object, **named: object) -> object:
        if not at.exists():
            at.touch()
            _until(go.exists)
        return called(*given, **named)

    def prepare() -> None:
        setattr(sys.modules[module], function, wait)

    journal, pid = arena.begin(name, args, first=prepare)
    ended: list[Ended] = []
    try:
        _until(at.exists)
        yield ended
    finally:
        go.touch()
        ended.append(arena.ended(journal, pid))


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the other side did not come")
        time.sleep(0.001)


def _a_move_finds_another_model(arena: Arena) -> None:
    """It has planned to stop its model on the first port, which serves another one before that port is held."""
    first, second = arena.ports[0], arena.ports[1]
    _load(arena, "org/alpha", first)
    with _held_at(arena, LOCKS, "load", model="org/alpha", port=str(second), force=True) as moved:
        assert arena.run("unload", port=str(first)).exit == 0
        _load(arena, "org/beta", first)
    assert moved[0].exit == 0, moved
    _serves(arena, {first: "org/beta", second: "org/alpha"})


def _what_is_replaced_is_not_started_elsewhere(arena: Arena) -> None:
    """It may have to come back, and would be served twice then."""
    first, second = arena.ports[0], arena.ports[1]
    _load(arena, "org/alpha", first)
    with _held_at(arena, "mlxops.agent.operations.swap.Start", "load", model="org/beta", port=str(first), force=True):
        for force in (False, True):
            elsewhere = arena.run("load", model="org/alpha", port=str(second), force=force)
            assert (elsewhere.exit, elsewhere.error and elsewhere.error.code) == (75, "busy"), elsewhere
        deleted = arena.run("remove", model="org/alpha")
        assert (deleted.exit, deleted.error and deleted.error.code) == (75, "busy"), deleted
    _serves(arena, {first: "org/beta"})


def _an_unload_of_a_model_that_moves(arena: Arena) -> None:
    """By its name it is unloaded where it is by then; what is in its old place stays."""
    first, second = arena.ports[0], arena.ports[1]
    _load(arena, "org/alpha", first)
    with _held_at(arena, "mlxops.agent.operations.unload._make_way", "unload", model="org/alpha") as unloaded:
        _load(arena, "org/alpha", second)
        _load(arena, "org/beta", first)
    assert unloaded[0].exit == 0 and unloaded[0].result, unloaded
    assert (unloaded[0].result["port"], unloaded[0].result["changed"]) == (second, True), unloaded
    _serves(arena, {first: "org/beta"})


def _an_unload_of_a_model_that_is_being_replaced(arena: Arena) -> None:
    """Whoever wants the other one there is not cancelled for it."""
    first = arena.ports[0]
    _load(arena, "org/alpha", first)
    with _held_at(arena, "mlxops.agent.operations.swap.Start", "load", model="org/beta", port=str(first), force=True):
        unloaded = arena.run("unload", model="org/alpha")
        assert (unloaded.exit, unloaded.error and unloaded.error.code) == (75, "busy"), unloaded
    _serves(arena, {first: "org/beta"})


def _a_rollback_of_what_changes(arena: Arena) -> None:
    """Back from beta is alpha; but somebody has loaded gamma meanwhile, from which back is beta."""
    first = arena.ports[0]
    _load(arena, "org/alpha", first)
    _load(arena, "org/beta", first)
    with _held_at(arena, "mlxops.agent.operations.rollback.load", "rollback", port=str(first)) as back:
        _load(arena, "org/gamma", first)
    assert (back[0].exit, back[0].error and back[0].error.code) == (75, "changed_meanwhile"), back
    _serves(arena, {first: "org/gamma"})


def _a_removal_of_files_that_another_name_has_too(arena: Arena) -> None:
    """They are looked at before they are deleted; nobody can begin with them in between."""
    first = arena.ports[0]
    path = str(arena.snapshots["org/alpha"])
    arena.write_registry({name: entry("org/alpha", arena.snapshots["org/alpha"]) for name in ("one", "other")})
    with _held_at(arena, "mlxops.agent.hub.delete", "remove", model="one") as removed:
        loaded = arena.run("load", model="other", port=str(first))
        assert (loaded.exit, loaded.error and loaded.error.code) == (75, "busy"), loaded
    assert removed[0].exit == 0 and not os.path.exists(path), removed
    _serves(arena, {})


LOCKS = "mlxops.agent.operations.load._locks_of_stops"
CASES: Mapping[str, Callable[[Arena], None]] = {
    "a move finds another model": _a_move_finds_another_model,
    "what is replaced is not started elsewhere": _what_is_replaced_is_not_started_elsewhere,
    "an unload of a model that moves": _an_unload_of_a_model_that_moves,
    "an unload of a model that is being replaced": _an_unload_of_a_model_that_is_being_replaced,
    "a rollback of what changes": _a_rollback_of_what_changes,
    "a removal of files that another name has too": _a_removal_of_files_that_another_name_has_too,
}


def _load(arena: Arena, model: str, port: int) -> None:
    loaded = arena.run("load", model=model, port=str(port), force=True)
    assert loaded.exit == 0, loaded


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
