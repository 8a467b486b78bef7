"""Faults inside an operation: its worker is killed before its Nth mutating system call, or that call fails."""

from __future__ import annotations

import json
import mmap
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import creations, oracle
from tests.faults.arena import Arena, Ended, entry

KILLED = (
    *("write", "pwrite64", "fsync", "fdatasync", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir"),
    *("link", "linkat", "mkdir", "mkdirat", "symlink", "symlinkat", "ftruncate", "chmod", "fchmod", "fchmodat"),
    "flock",
    *("kill", "vfork", "clone", "clone3", "fork"),
)
"""The system calls by which a worker changes files, locks and processes. The creation of a file is not among them:
strace cannot distinguish it from reading (see creations.py)."""
CREATION = "creation"
FAILING = ("write", "pwrite64", "fsync", "rename", "mkdir", "symlink", "ftruncate", "unlink")
ERRORS = ("ENOSPC", "EIO")
_CALL = re.compile(r"^([a-z0-9_]+)\(")


@dataclass(frozen=True)
class Scenario:
    name: str
    command: str
    args: Callable[[Arena], Mapping[str, object]]
    prepare: Callable[[Arena], None]
    whole: bool = True
    """One registry transaction: the document is the old or the new one."""
    again: int = 0
    """The exit status of the same operation when it is repeated."""


def _loaded(arena: Arena, model: str, port: int) -> None:
    ended = arena.run("load", model=model, port=str(port))
    assert ended.exit == 0, ended


def _registered(arena: Arena) -> None:
    assert arena.run("init").exit == 0


def _alpha(arena: Arena) -> None:
    _registered(arena)
    _loaded(arena, "org/alpha", arena.ports[0])


def _edited(arena: Arena) -> None:
    """Change the settings of a served model. Only then does a load of that model restart it."""
    _alpha(arena)
    document = json.loads(arena.registry())
    document["models"]["org/alpha"]["args"] = ["--fake-words", "again"]
    arena.write_registry(document["models"])


def _with_failing(arena: Arena) -> None:
    path = arena.snapshots["org/beta"]
    words = "ValueError: Model type fake not supported."
    arena.write_registry(
        {
            "org/alpha": entry("org/alpha", arena.snapshots["org/alpha"]),
            "org/beta": entry("org/beta", path, args=["--fake-exit", "0", "--fake-words", words]),
        }
    )
    _loaded(arena, "org/alpha", arena.ports[0])


def _stale_and_orphan(arena: Arena) -> None:
    """An assignment that no server serves, and a server whose load was never proven."""
    arena.write_registry(
        {
            "org/alpha": entry("org/alpha", arena.snapshots["org/alpha"]),
            "org/beta": entry("org/beta", arena.snapshots["org/beta"], arena.ports[1]),
            "org/gamma": entry("org/gamma", arena.snapshots["org/gamma"], arena.ports[2]),
        }
    )
    _loaded(arena, "org/alpha", arena.ports[0])
    from dataclasses import replace

    run = arena.store.run(arena.ports[0])
    assert run is not None
    arena.store.save_run(replace(run, proven_at=None))


def _two(arena: Arena) -> None:
    _alpha(arena)
    _loaded(arena, "org/beta", arena.ports[1])


def _by_hand(arena: Arena) -> None:
    _registered(arena)
    arena.start_by_hand("org/alpha", arena.ports[0])


def _load(model: str, at: int, **more: object) -> Callable[[Arena], Mapping[str, object]]:
    return lambda arena: {"model": model, "port": str(arena.ports[at]), **more}


SCENARIOS = (
    Scenario("load", "load", _load("org/alpha", 0), _registered),
    Scenario("swap", "load", _load("org/beta", 0, force=True), _alpha),
    Scenario("unload", "unload", lambda arena: {"port": str(arena.ports[0])}, _alpha),
    Scenario("reconcile", "reconcile", lambda arena: {}, _stale_and_orphan, whole=False),
    Scenario("init", "init", lambda arena: {}, lambda arena: None),
    Scenario("failing swap", "load", _load("org/beta", 0, force=True), _with_failing, again=4),
    Scenario("move", "load", _load("org/alpha", 1, force=True), _alpha),
    Scenario("restart", "load", _load("org/alpha", 0, force=True), _edited),
    Scenario("adopt", "load", _load("org/alpha", 0), _by_hand),
    Scenario("unload-all", "unload-all", lambda arena: {}, _two, whole=False),
)
FOLLOW_UPS = ("again", "reconcile", "unload", "other")


@dataclass
class Strikes:
    """The faults of one arena, by number: N is always the same fault."""

    arena: Arena
    seed: int
    errors: tuple[str, ...] = ()
    """Errors to inject; empty: kills."""
    scenarios: tuple[Scenario, ...] = SCENARIOS
    _points: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    _new: dict[str, bytes] = field(default_factory=dict)

    def trial(self, number: int) -> tuple[str, list[str]]:
        """Carry out fault `number`. Return its name, and what is wrong afterwards."""
        scenario = self.scenarios[number % len(self.scenarios)]
        points = self._points_of(scenario)
        turn, at = divmod(number // len(self.scenarios), len(points))
        syscall, count = points[at]
        rng = random.Random(f"{self.seed} {number}")
        error = rng.choice(self.errors) if self.errors else ""
        follow = FOLLOW_UPS[(turn + at) % len(FOLLOW_UPS)]
        name = f"{scenario.name}: {error or 'SIGKILL'} at {syscall} {count}, then {follow}"
        self.arena.sweep()
        scenario.prepare(self.arena)
        old = self.arena.registry()
        ended = self._strike(scenario, syscall, count, error)
        return name, self._judged(scenario, old, ended, follow)

    def _points_of(self, scenario: Scenario) -> list[tuple[str, int]]:
        """Run the operation without a fault. Return (system call or CREATION, its count) of each change."""
        if scenario.name not in self._points:
            self.arena.sweep()
            scenario.prepare(self.arena)
            log = self.arena.folder / "trace"
            calls = FAILING if self.errors else KILLED
            with mmap.mmap(-1, mmap.PAGESIZE) as made:
                options = ["-e", f"trace={','.join(calls)}"]
                args = scenario.args(self.arena)
                self.arena.struck(options, log, scenario.command, creations.counted(made), **args)
                points = [(CREATION, number + 1) for number in range(creations.count_of(made))]
            self._new[scenario.name] = self.arena.registry()
            points += mutating(log)
            random.Random(f"{self.seed} {scenario.name}").shuffle(points)
            self._points[scenario.name] = points
        return self._points[scenario.name]

    def _strike(self, scenario: Scenario, syscall: str, count: int, error: str) -> Ended:
        if syscall == CREATION:
            return self.arena.run(scenario.command, creations.struck(count, error), **scenario.args(self.arena))
        what = f"error={error}" if error else "signal=SIGKILL"
        options = ["-e", f"trace={syscall}", "-e", f"inject={syscall}:{what}:when={count}"]
        log = self.arena.folder / "strike"
        return self.arena.struck(options, log, scenario.command, **scenario.args(self.arena))

    def _judged(self, scenario: Scenario, old: bytes, ended: Ended, follow: str) -> list[str]:
        arena, new = self.arena, self._new[scenario.name]
        # A disk that fails in the recovery too keeps a swap from bringing the old server back.
        wrong = oracle.registry_old_or_new(arena, old, new, whole=scenario.whole and not self.errors)
        wrong += oracle.registry_sound(arena) + oracle.locks_free(arena) + oracle.nothing_hidden(arena)
        wrong += oracle.no_bug(ended) + oracle.result_is_true(arena, ended, new)
        if ended.exit < 0 and ended.events and ended.result is None and ended.error is None:
            wrong += oracle.named(arena, ended)
        if ended.exit >= 0 and ended.error is not None:
            wrong += self._failed_leaves_nothing(scenario, old, ended)
        wrong += self._followed(scenario, follow, new)
        return wrong + emptied(arena)

    def _failed_leaves_nothing(self, scenario: Scenario, old: bytes, ended: Ended) -> list[str]:
        """A failed operation left no assignment without a server."""
        rows = oracle.rows_by_port(self.arena)
        assigned = [m for m in _assigned(self.arena) if rows[m[1]]["state"] in {"idle", "failed"}]
        before = self._assigned_before(old)
        lost = [each for each in assigned if each not in before]
        return [f"a failed operation left assignments that nothing serves: {lost} ({ended})"] if lost else []

    @staticmethod
    def _assigned_before(old: bytes) -> list[tuple[str, int]]:
        from mlxops.core import registry

        return [(m.name, m.port) for m in registry.parse(old or None).models.values() if m.port is not None]

    def _followed(self, scenario: Scenario, follow: str, new: bytes) -> list[str]:
        """Any next command works."""
        arena = self.arena
        port = str(arena.ports[0])
        match follow:
            case "again":
                ended, wanted = arena.run(scenario.command, **scenario.args(arena)), scenario.again
            case "reconcile":
                ended, wanted = arena.run("reconcile"), 0
            case "unload":
                ended, wanted = arena.run("unload", port=port, force=True), 0
            case _:
                ended, wanted = arena.run("load", model="org/gamma", repo="org/gamma", port=port, force=True), 0
        wrong = [] if ended.exit == wanted else [f"the next command ({follow}) failed: {ended}"]
        if follow == "again" and scenario.again == 0 and scenario.whole and not _same(arena.registry(), new):
            wrong.append("asked again, it said that it was done, and the registry is not the new one")
        if follow == "reconcile" and arena.run("reconcile").result not in ({}, None):
            second = arena.run("reconcile").result or {}
            wrong += ["reconcile is not done after one run"] if second.get("changed") else []
        return wrong + oracle.registry_sound(arena) + oracle.nothing_hidden(arena)


def emptied(arena: Arena) -> list[str]:
    """Unload everything, and check that nothing is left."""
    wrong = []
    for command in ("unload-all", "reconcile"):
        ended = arena.run(command)
        wrong += [] if ended.exit == 0 else [f"{command} afterwards: {ended}"]
    return wrong + oracle.empty(arena)


def mutating(log: Path) -> list[tuple[str, int]]:
    """Return the mutating system calls of a strace log, each with its count among the calls of its name."""
    counts: dict[str, int] = {}
    points = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        found = _CALL.match(line)
        if found is None:
            continue
        counts[found[1]] = counts.get(found[1], 0) + 1
        points.append((found[1], counts[found[1]]))
    return points


def _assigned(arena: Arena) -> list[tuple[str, int]]:
    return Strikes._assigned_before(arena.registry())


def _same(one: bytes, other: bytes) -> bool:
    return bool(json.loads(one or b"{}") == json.loads(other or b"{}"))
