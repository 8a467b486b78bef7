"""`inv faults`: cause faults for a given time. A file counts them; the next run continues from there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mlxops import __version__
from mlxops.core.errors import UsageError
from tests.lab import cache

CHECKOUT = Path(__file__).resolve().parents[2]
LOST_KEPT = 200


@dataclass(frozen=True)
class Kind:
    name: str
    goal: int
    batch: int
    what: str


KINDS = (
    Kind("kills", 1000, 100, "worker killed before a mutating system call"),
    Kind("real", 40, 9, "the same with the real mlx-lm"),
    Kind("errors", 300, 75, "ENOSPC or EIO from a system call"),
    Kind("power", 2000, 10, "crash state after power loss, of recorded writes"),
    Kind("races", 300, 15, "race of 8 processes"),
    Kind("hostile", 1800, 100, "hostile input, command line and agent"),
    Kind("hostile over SSH", 200, 20, "hostile input through SSH"),
    Kind("broken", 500, 50, "broken registry"),
    Kind("healthy", 330, 55, "command beside a healthy thing that it must not harm"),
    Kind("gone", 60, 8, "registry that was there and is not, or has no locks"),
    Kind("reuse", 100, 10, "exact pid reuse"),
    Kind("bystanders", 100, 20, "server by hand beside what is none, or launched through something"),
    Kind("names", 100, 25, "probe of a hand-started server, under any name"),
    Kind("keeper", 60, 6, "server or keeper killed, beside a load, an unload, a restore or another keeper"),
    Kind("cuts", 100, 10, "connection cut, client or session killed"),
)


Rows = dict[str, dict[str, object]]
"""The trials of each kind, by its name."""


def code() -> str:
    """Return an id of the tested code: the version, and digests of all of mlxops and of this folder.

    `build.build_id` would not do. It leaves out the control node's side, which cuts and hostile strings also test.
    """
    parts = []
    for folder in ("mlxops", "tests/faults"):
        digest = hashlib.sha256()
        for path in sorted((CHECKOUT / folder).rglob("*.py")):
            data = path.read_bytes()
            digest.update(f"{path.relative_to(CHECKOUT).as_posix()}\0{len(data)}\0".encode() + data)
        parts.append(digest.hexdigest()[:12])
    return f"{__version__}+{parts[0]}, faults {parts[1]}"


@dataclass
class State:
    """The trials of one code, in a file that several campaigns may share.

    {code: {kind: {"claimed", "tried", "lost", "seconds", "cases lost"}}}: counts of different code are not added.
    """

    path: Path
    code: str = field(default_factory=code)

    @contextmanager
    def changed(self) -> Iterator[Rows]:
        """Yield the rows, and write them at the end of the block.

        Lock the folder, because the file is replaced. A killed campaign leaves the old counts or the new ones.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            document = self._document()
            yield document.setdefault(self.code, {})
            beside = self.path.with_name(f".{self.path.name}.new")
            beside.write_text(json.dumps(document, indent=1), encoding="utf-8")
            os.replace(beside, self.path)
        finally:
            os.close(folder)

    def read(self) -> Rows:
        return self._document().get(self.code, {})

    def _document(self) -> dict[str, Rows]:
        try:
            return dict(json.loads(self.path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}


def count(row: dict[str, object] | None, key: str) -> int:
    value = (row or {}).get(key, 0)
    return value if isinstance(value, int) else 0


def _number(value: object) -> float:
    return value if isinstance(value, int | float) else 0.0


def chosen(only: str | None) -> list[Kind]:
    """Return the kinds that `--only` names, separated by commas; all if it is empty. Raises `UsageError`."""
    known = {kind.name: kind for kind in KINDS}
    wanted = list(known) if only is None else [word.strip() for word in only.split(",") if word.strip()]
    unknown = [word for word in wanted if word not in known]
    if unknown or not wanted:
        what = f"there is no kind {', '.join(unknown)}" if unknown else "--only names no kind"
        raise UsageError("unknown_kind", what, why="nothing of that name is counted", hint=f"kinds: {', '.join(known)}")
    return [known[word] for word in wanted]


def run(minutes: float, seed: int, state: Path | None = None, only: str | None = None) -> bool:
    """Return whether no trial failed, in this run or before. Raises `UsageError`."""
    kinds = chosen(only)
    kept = State(state or cache.cache_folder() / "faults.json")
    deadline = time.monotonic() + minutes * 60
    skipped = _unavailable(kept, kinds)
    while time.monotonic() < deadline:
        if code() != kept.code:
            sys.stderr.write("the code has changed: run it again, which begins a count of the new one\n")
            break
        rows = kept.read()
        open_kinds = [kind for kind in kinds if kind.name not in skipped]
        if not open_kinds:
            break
        # The one that is furthest from its goal; when all are reached, they go on in turn.
        kind = min(open_kinds, key=lambda kind: count(rows.get(kind.name), "tried") / kind.goal)
        _batch(kept, kind, seed, deadline)
    sys.stdout.write(table(kept) + "\n")
    return not any(count(row, "lost") for row in kept.read().values())


def _unavailable(kept: State, kinds: list[Kind]) -> set[str]:
    """Return the kinds that this machine cannot cause. The table says why."""
    from shutil import which

    from tests.faults import reuse

    found: dict[str, str] = {}
    for kind in kinds:
        if kind.name in {"kills", "errors", "real", "power", "healthy"} and which("strace") is None:
            found[kind.name] = "no strace"
        if kind.name == "reuse" and (why := reuse.available()):
            found[kind.name] = why
        if (
            kind.name in {"cuts", "hostile over SSH"}
            and which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin") is None
        ):
            found[kind.name] = "no sshd"
    with kept.changed() as document:
        for name, why in found.items():
            document.setdefault(name, {})["skipped"] = why
    return set(found)


def batch_argv(kind: str, first: int, count: int, seed: int) -> list[str]:
    """Return the argv of a batch, in its own pid namespace if possible.

    There it observes only its own processes, and all its processes end with it.

    Batches with an sshd get no namespace, because sshd needs its users' groups.
    """
    from tests.faults import batch, reuse

    alone = () if kind in batch.REMOTE or reuse.available() else reuse.NAMESPACE
    return [*alone, sys.executable, "-m", "tests.faults.batch", kind, str(first), str(count), str(seed)]


def _batch(kept: State, kind: Kind, seed: int, deadline: float) -> None:
    """Run a batch in its own process and session. At the end, kill the whole session."""
    with kept.changed() as document:
        row = document.setdefault(kind.name, {})
        first = count(row, "claimed")
        row["claimed"] = first + kind.batch
    argv = batch_argv(kind.name, first, kind.batch, seed)
    with subprocess.Popen(argv, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                _counted(kept, kind, seed, json.loads(line))
                if time.monotonic() > deadline:
                    break
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0 and time.monotonic() < deadline:
        _counted(
            kept, kind, seed, {"number": first, "name": "batch", "cases": 1, "wrong": [f"exit {process.returncode}"]}
        )


def _counted(kept: State, kind: Kind, seed: int, row: dict[str, object]) -> None:
    cases = row["cases"]
    assert isinstance(cases, int)
    with kept.changed() as document:
        total = document.setdefault(kind.name, {})
        total["tried"] = count(total, "tried") + cases
        total["seconds"] = round(_number(total.get("seconds")) + _number(row.get("seconds")), 1)
        if row["wrong"]:
            total["lost"] = count(total, "lost") + 1
            lost = total.setdefault("cases lost", [])
            assert isinstance(lost, list)
            lost.append({"seed": seed, **{key: row[key] for key in ("number", "name", "wrong")}})
            del lost[:-LOST_KEPT]
            sys.stderr.write(f"lost: {kind.name} {row['number']}: {row['name']}: {row['wrong']}\n")


def table(kept: State) -> str:
    rows = kept.read()
    lines = [f"mlxops {kept.code}", f"{'FAULT':<58}{'TRIED':>7}{'SURVIVED':>10}{'LOST':>6}"]
    for kind in KINDS:
        row = rows.get(kind.name, {})
        tried, lost = count(row, "tried"), count(row, "lost")
        if row.get("skipped") and not tried:
            lines.append(f"{kind.what:<58}{'-':>7}{'-':>10}{'-':>6}  skipped: {row['skipped']}")
        else:
            lines.append(f"{kind.what:<58}{tried:>7}{tried - lost:>10}{lost:>6}")
    return "\n".join([*lines, *_controls()])


def _controls() -> list[str]:
    """Run the controls. The checks must fail for them."""
    from tests.faults import controls

    return [f"control: {name:<49}{'caught' if caught else 'NOT CAUGHT':>23}" for name, caught in controls.run()]


def replay(kind: str, number: int, seed: int) -> None:
    """Repeat one trial, with all its output. Raises `UsageError`."""
    chosen(kind)
    argv = batch_argv(kind, number, 1, seed)
    os.execvp(argv[0], argv)
