"""Servers that died or are wedged: what the keeper tells a pass about them, and what they died of. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict

from mlxops.core.frozen import dataclass

MEMORY, UNKNOWN = "memory", "unknown"


@dataclass(frozen=True)
class Death:
    """A server that ended, with the keeper's last look at its memory. Bytes; None: not known."""

    port: int
    pid: int
    run_id: str
    at: float
    """Wall time."""
    held: int | None = None
    unexplained: int | None = None
    """What the host had in use beside it that no process explained."""
    oom_killed: bool = False
    """The kernel has killed a process of its control group for memory since the last look."""

    def to_text(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Wedged:
    """A server that lives, and completes nothing. Pid and start identify it."""

    port: int
    pid: int
    start: str

    def to_text(self) -> str:
        return json.dumps(asdict(self))


def from_text(text: str) -> Death | Wedged:
    fields = json.loads(text)
    return Death(**fields) if "run_id" in fields else Wedged(**fields)


@dataclass(frozen=True)
class Cause:
    cause: str
    """`memory` only with evidence; else `unknown`."""
    evidence: str = ""

    def __str__(self) -> str:
        return f"of memory: {self.evidence}" if self.cause == MEMORY else "cause unknown"


def cause_of(death: Death, *, last_words: str | None, jetsam: str | None) -> Cause:
    """`last_words`: the last line of its log, if that says that memory ran out. `jetsam`: macOS's report that names it.

    A signal is no evidence: any process of the same user can send SIGKILL.
    """
    if jetsam:
        return Cause(MEMORY, f"macOS killed it ({jetsam})")
    if death.oom_killed:
        return Cause(MEMORY, "the kernel killed a process of its control group")
    return Cause(MEMORY, last_words) if last_words else Cause(UNKNOWN)


def memory_deaths(history: Iterable[Mapping[str, object]]) -> dict[tuple[str, int], int]:
    """Return (model, port) -> the bytes that its server held when it died of memory, if that was the last thing to
    happen to it apart from restarts.

    A load by a person, an unload, and a server that lasted make it void.
    """
    found: dict[tuple[str, int], int] = {}
    for line in history:
        model, port, command = line.get("model"), line.get("port"), line.get("command")
        if not isinstance(model, str) or type(port) is not int:
            continue
        held = line.get("held_bytes")
        if command == "died" and line.get("cause") == MEMORY and type(held) is int:
            found[model, port] = held
        elif command in {"died", "lasted", "unload"} or (command == "load" and line.get("restore") is not True):
            found.pop((model, port), None)
    return found
