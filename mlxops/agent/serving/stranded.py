"""Stranded memory: what a stopped server held and the host does not get back before a reboot.

On macOS, a process that ends too early can leave wired memory that belongs to no process. It is claimed only by
comparing two measurements, before and after a stop. Each one counts the memory in use that no visible process explains:
if that is more after the stop than before, the difference is stranded. A server that starts or grows in between does
not matter. What a living server keeps to use it again is part of what it holds.

Processes of other users may be invisible, and then their growth looks the same. The claim is therefore compared with
every later look, and shrinks when that memory is available again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

from mlxops.agent.host.system import System
from mlxops.agent.serving import processes
from mlxops.agent.state.store import Store, utc_now
from mlxops.core.errors import Refused
from mlxops.core.memory import release_seconds
from mlxops.core.records import Run, Stranded
from mlxops.core.text import amount

MIN_BYTES = 1024**3
"""Less is not claimed: the memory in use always varies by such amounts."""
MIN_SHARE = 0.1
"""Share of what the server held that is not claimed either."""
RETURN_SECONDS = 10.0
"""A GPU's driver returns memory a little later: after this, and a second for each 4 GB."""
QUIET_SECONDS = 2.0


@contextmanager
def expect_return(store: Store, system: System, run: Run, note: Callable[[str, str], None]) -> Iterator[Run]:
    """Stop a server inside the block, and wait until its memory is available again. Record what does not return.

    Yield its run record with the look before the stop. If the block raises, the server may still hold its memory, so
    nothing is claimed; the look in the record is for the operation that finds that it has ended.
    """
    seen = _with_look(system, run)
    yield seen
    look_again(store, system, seen, note)


def _with_look(system: System, run: Run) -> Run:
    """Return the run record with a look at the memory, unless it has one: the server may have released some since.

    Add none if that cannot be measured, or if the server holds too little.
    """
    if run.held_bytes is not None:
        return run
    pids = processes.members(system, system.process_table(()), run)
    held = system.memory(pids)
    before = _unexplained(system, pids) if held is not None and held >= MIN_BYTES else None
    if before is None:
        return run
    return replace(run, held_bytes=held, unexplained_bytes=before, slept_seconds=round(system.slept_seconds()))


def _has_slept(system: System, run: Run) -> bool:
    """Return whether the host has slept since the look of the record: what it had in use then says little now."""
    return system.slept_seconds() - (run.slept_seconds or 0) > 1.0


def look_again(store: Store, system: System, run: Run, note: Callable[[str, str], None]) -> None:
    """Compare with the look before the stop of a server that has ended. Wait for its memory; record what is missing.

    `note` gets a message and its level. Nothing is claimed without an earlier look in this boot of the host,
    or if the host has slept since.
    """
    held, before = run.held_bytes, run.unexplained_bytes
    if held is None or before is None or run.boot_id != system.boot_id() or _has_slept(system, run):
        return
    if (missing := wait_for_return(system, before, held, note)) and not _has_slept(system, run):
        _record(store, system, before, missing, run.port, run.model or "a server")
        note(
            f"{amount(missing)} of its {amount(held)} of memory did not return within {return_seconds(held):.0f} s; "
            "if it stays away, only a reboot returns it",
            "warning",
        )


def return_seconds(held: int) -> float:
    """Return how long the memory of an ended server may take to become available."""
    return RETURN_SECONDS + release_seconds(held)


def wait_for_return(system: System, before: int, held: int, note: Callable[[str, str], None]) -> int:
    """Wait until the server's memory is available. Return the bytes that are missing after that time; 0 if none."""
    began = time.monotonic()
    deadline = began + return_seconds(held)
    said = False
    pause = 0.05
    while True:
        now = _unexplained(system)
        missing = 0 if now is None else min(now - before, held)
        if missing < max(MIN_BYTES, held * MIN_SHARE):
            return 0
        if time.monotonic() > deadline:
            return missing
        if not said and time.monotonic() > began + QUIET_SECONDS:
            said = True
            note(f"waiting up to {return_seconds(held):.0f} s for {amount(missing)} of memory to return", "info")
        time.sleep(pause)
        pause = min(pause * 1.5, 1.0)


def _unexplained(system: System, pids: Collection[int] = ()) -> int | None:
    """Return the memory in use that no process explains; None if that is not known now."""
    try:
        return system.unexplained(pids)
    except (Refused, OSError):
        return None


def _record(store: Store, system: System, before: int, missing: int, port: int, model: str) -> None:
    """Add the missing memory to what earlier stops have stranded and is still missing."""
    earlier = _read(store, system)
    still = max(0, min(earlier.size, before - earlier.baseline)) if earlier else 0
    record = Stranded(system.boot_id(), missing + still, before - still, port, model, utc_now())
    with contextlib.suppress(Refused):  # the server is stopped, and the warning is given
        store.save_stranded(record)


def still_missing(store: Store, system: System) -> Stranded | None:
    """Return what is stranded now; None if nothing is, or if that is not known."""
    record = _read(store, system)
    now = _unexplained(system) if record else None
    if record is None or now is None:
        return None
    size = min(record.size, now - record.baseline)
    return replace(record, size=size) if size >= MIN_BYTES else None


def _read(store: Store, system: System) -> Stranded | None:
    try:
        return store.stranded(system.boot_id())
    except (OSError, ValueError):
        return None
