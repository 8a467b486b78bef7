"""Run some trials of one kind in their own process: `python -m tests.faults.batch KIND FIRST COUNT SEED`.

Write a line of JSON for each trial: {"number", "name", "cases", "wrong"}. All processes of a batch end with it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults import (
    broken,
    bystanders,
    children,
    gone,
    healthy,
    hostile,
    keeper,
    names,
    power,
    races,
    reuse,
    strikes,
)
from tests.faults.arena import Arena
from tests.lab.leaks import become_subreaper
from tests.lab.quick import MODELS

Trial = Callable[[int], tuple[str, int, list[str]]]


@contextmanager
def _folder() -> Iterator[Path]:
    """Return a folder in memory if possible, because a campaign flushes files a hundred thousand times."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="mlxops-faults-", dir=where, ignore_cleanup_errors=True) as name:
        yield Path(os.path.realpath(name))


@contextmanager
def trials(kind: str, seed: int) -> Iterator[Trial]:
    if kind in REMOTE:
        from tests.faults import remote

        with _folder() as folder, remote.trials(kind, folder, seed) as trial:
            yield trial
        return
    with own_arena(real=kind == "real") as arena:
        yield _of(kind, arena, seed)


@contextmanager
def own_arena(*, real: bool = False) -> Iterator[Arena]:
    """Create an arena for this process. From now on, this process collects every orphan."""
    become_subreaper()
    with _folder() as folder:
        arena = real_arena(folder) if real else Arena(folder / "host")
        try:
            yield arena
        finally:
            arena.sweep()


REMOTE = ("cuts", "hostile over SSH")


def _of(kind: str, arena: Arena, seed: int) -> Trial:
    match kind:
        case "kills":
            return _one(strikes.Strikes(arena, seed).trial)
        case "errors":
            return _one(strikes.Strikes(arena, seed, strikes.ERRORS).trial)
        case "real":
            return _one(strikes.Strikes(arena, seed, scenarios=strikes.SCENARIOS[:3]).trial)
        case "races":
            return _one(lambda number: races.trial(arena, number, seed))
        case "broken":
            return _one(lambda number: broken.trial(arena, number, seed))
        case "healthy":
            return _one(lambda number: healthy.trial(arena, number, seed))
        case "gone":
            return _one(lambda number: gone.trial(arena, number, seed))
        case "hostile":
            return _one(lambda number: hostile.trial(arena, number, seed))
        case "bystanders":
            return _one(lambda number: bystanders.trial(arena, number, seed))
        case "names":
            return _one(lambda number: names.trial(arena, number, seed))
        case "keeper":
            return _one(lambda number: keeper.trial(arena, number, seed))
        case "reuse":
            return _one(lambda number: reuse.trial(arena, number, seed))
        case "power":
            return lambda number: power.trial(arena, number, seed)
    raise ValueError(kind)


def _one(trial: Callable[[int], tuple[str, list[str]]]) -> Trial:
    def counted(number: int) -> tuple[str, int, list[str]]:
        name, wrong = trial(number)
        return name, 1, wrong

    return counted


def real_arena(folder: Path) -> Arena:
    """Run trials with the real mlx-lm and tiny models."""
    from tests.lab import cache, models

    made = models.tiny_models()
    hub = folder / "host" / "hub"
    names = zip(MODELS, (models.QWEN, models.LLAMA, models.QWEN_B), strict=True)
    snapshots = {name: models.install_snapshot(hub, name, made / model) for name, model in names}
    return Arena(folder / "host", [str(cache.engine_venv("mlx-lm") / "bin" / "mlx_lm.server")], snapshots)


def main(kind: str, first: int, count: int, seed: int) -> None:
    # The campaign sends SIGTERM when the time is up. Exit normally, so that the cleanup runs.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    with trials(kind, seed) as trial:
        for number in range(first, first + count):
            began = time.monotonic()
            try:
                name, cases, wrong = trial(number)
            except Exception as error:  # noqa: BLE001 - a trial that breaks is a trial that was lost
                import traceback

                name, cases, wrong = "", 1, [f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}"]
            row = {"number": number, "name": name, "cases": cases, "wrong": wrong, "seconds": time.monotonic() - began}
            print(json.dumps(row), flush=True)  # noqa: T201
    if kind not in REMOTE:
        children.reap()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
