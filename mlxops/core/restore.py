"""What `restore` starts: assignments that nothing serves, in the order of their ports. Pure.

The history is a list of lines as they were written, oldest first: `{"command", "operation", "at", ...}`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlxops.core.names import is_model_name
from mlxops.core.registry import Registry
from mlxops.core.units import duration
from mlxops.core.world import Orphan, PortView, World

GIVE_UP = 5
"""Starts in a row of a server that did not last; then a person has to look."""
LASTED = 2 * 3600.0
"""Seconds after which a start counts as one that lasted."""
LONGEST_UPTIME = 1e10
"""Seconds; three hundred years. What is no time at all, or an integer too long to be calculated with, is beyond it."""
FIRST_PAUSE, LONGEST_PAUSE = 120.0, 3600.0
"""Seconds before a server is started again, doubled each time."""


@dataclass(frozen=True)
class Step:
    model: str
    port: int
    why: str = ""
    """For steps that are not taken."""

    def to_wire(self) -> dict[str, object]:
        return {"model": self.model, "port": self.port} | ({"why": self.why} if self.why else {})


@dataclass(frozen=True)
class RestorePlan:
    starts: tuple[Step, ...] = ()
    skipped: tuple[Step, ...] = ()


def plan_restore(
    registry: Registry,
    world: World,
    *,
    boot_port: int | None,
    cleared: Iterable[Step] = (),
    attempts: Mapping[Step, Sequence[float]],
) -> RestorePlan:
    """`boot_port`: the port that a boot job of the system owns. `cleared`: what reconcile took away, if that is to
    come back. `attempts`: how many seconds ago `restore` has started a step, newest first."""
    wanted = {Step(model.name, model.port) for model in registry.models.values() if model.port is not None}
    wanted |= {step for step in cleared if _is_free(registry, step)}
    starts, skipped = [], []
    for step in sorted(wanted, key=lambda step: (step.port, step.model)):
        view = world.ports.get(step.port)
        if view is None or not _is_down(view):
            continue
        why = _why_not(registry, step, wanted, boot_port) or pause(attempts.get(step, ()))
        if why:
            skipped.append(Step(step.model, step.port, why))
        else:
            starts.append(step)
    return RestorePlan(tuple(starts), tuple(skipped))


def _is_free(registry: Registry, step: Step) -> bool:
    """A cleared assignment may come back where nobody has assigned anything else since."""
    entry = registry.models.get(step.model)
    return entry is not None and entry.port is None and not registry.on_port(step.port)


def is_wanted(registry: Registry, step: Step, *, cleared: bool) -> bool:
    """Whether a step that was planned is still to be taken: it may have been unloaded since."""
    entry = registry.models.get(step.model)
    return entry is not None and (entry.port == step.port or (cleared and _is_free(registry, step)))


def _is_down(view: PortView) -> bool:
    dead = {Orphan.INTERRUPTED, Orphan.LEADERLESS, Orphan.PORTLESS}
    return view.unserved or (view.orphan in dead and view.operation is None)


def _why_not(registry: Registry, step: Step, wanted: Iterable[Step], boot_port: int | None) -> str:
    if step.port == boot_port:
        return "the port belongs to the host's own boot job"
    if sum(each.port == step.port for each in wanted) > 1:
        return "several models claim the port"
    return ""


def pause(attempts: Sequence[float]) -> str:
    """Why a server that was started so many seconds ago, each time in vain, is not started again now; or empty."""
    in_a_row = 0
    newer = 0.0
    for ago in attempts:
        if ago - newer >= LASTED:
            break
        in_a_row, newer = in_a_row + 1, ago
    if not in_a_row:
        return ""
    if in_a_row >= GIVE_UP:
        return f"it was started {in_a_row} times and did not last; when it is mended, load it"
    left = min(FIRST_PAUSE * 2 ** (in_a_row - 1), LONGEST_PAUSE) - attempts[0]
    times = "once" if in_a_row == 1 else f"{in_a_row} times"
    return f"it ended {times}; the next try is in {duration(left)}; or now: mlxctl load" if left > 0 else ""


def last_cleared(history: Iterable[Mapping[str, object]]) -> tuple[Step, ...]:
    """What the latest reconcile that cleared anything has cleared, and nobody has loaded or unloaded since."""
    found: dict[Step, None] = {}
    operation: object = None
    for line in history:
        if line.get("command") == "reconcile":
            rows = line.get("cleared")
            steps = [step for row in rows if (step := _step(row))] if isinstance(rows, list) else []
            if steps and line.get("operation") != operation:
                operation, found = line.get("operation"), {}
            found |= dict.fromkeys(steps)
        elif line.get("command") in {"load", "unload"}:
            moved = line.get("model"), line.get("port")
            found = {step: None for step in found if step.model != moved[0] and step.port != moved[1]}
    return tuple(found)


def attempts_of(history: Iterable[Mapping[str, object]], boot_id: str, now: float) -> dict[Step, list[float]]:
    """How many seconds ago each step was started by `restore` in this boot, newest first; a load by a person, or an
    unload, wipes the slate. `now` is the monotonic clock, which begins anew with each boot."""
    found: dict[Step, list[float]] = {}
    for line in history:
        step = _step(line)
        at = line.get("monotonic")
        if step is None:
            continue
        if line.get("command") == "restore":
            if line.get("boot_id") == boot_id and isinstance(at, int | float) and 0 <= at < LONGEST_UPTIME:
                found.setdefault(step, []).insert(0, max(0.0, now - at))
        elif line.get("command") in {"load", "unload"} and line.get("restore") is not True:
            found.pop(step, None)
    return found


def _step(row: object) -> Step | None:
    if not isinstance(row, Mapping):
        return None
    model, port = row.get("model"), row.get("port")
    if not isinstance(model, str) or not is_model_name(model) or type(port) is not int:
        return None
    return Step(model, port)
