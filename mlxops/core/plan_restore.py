"""What `restore` starts: assignments that nothing serves, in the order of their ports. Pure.

The history is a list of lines as they were written, oldest first: `{"command", "operation", "at", ...}`. A start by
`restore` counts as one in vain until something was observed that says otherwise (`_lasted`): that time has passed says
nothing, since a server that crashes at once is as old the next day as one that served.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mlxops.core.names import is_model_name
from mlxops.core.ports import JobState, Orphan, Owner, PortView, State, World
from mlxops.core.registry import Registry
from mlxops.core.text import duration

GIVE_UP = 5
"""Starts in a row of a server that did not last; then a person has to look."""
LASTED = 2 * 3600.0
"""A start has lasted if its server was seen alive so many seconds later."""
LONGEST_UPTIME = 1e10
"""Seconds; three hundred years. What is no time at all, or an integer too long to be calculated with, is beyond it."""
FIRST_PAUSE = 120.0
"""Seconds before a server is started again, doubled each time: 2, 4, 8 and 16 minutes, and then `GIVE_UP`."""


@dataclass(frozen=True)
class RestoreStep:
    model: str
    port: int
    why: str = ""
    """For steps that are not taken."""
    again_in: float | None = None
    """Seconds after which it may be taken, where only that is in the way."""
    in_hand: bool = field(default=False, compare=False)
    """Of a step that is not taken: a boot job or a running operation has the port, or its assignment is gone."""

    @property
    def stuck(self) -> bool:
        """It stays down until a person acts."""
        return bool(self.why) and not self.in_hand and self.again_in is None

    def to_wire(self) -> dict[str, object]:
        wire: dict[str, object] = {"model": self.model, "port": self.port}
        if self.why:
            wire["why"] = self.why
        if self.again_in is not None:
            wire["again_in_seconds"] = round(self.again_in, 3)
        return wire


@dataclass(frozen=True)
class RestoreAttempt:
    """A start by `restore`, as the history tells it."""

    wall: float
    monotonic: float
    """The clock that begins anew with each boot."""
    boot_id: str


@dataclass(frozen=True)
class Record:
    """What a port's run record, and the log that goes with it, tell of the server that was started there last."""

    model: str
    boot_id: str
    proven: bool
    last_sign: float | None
    """Wall time: when it last wrote to its log."""


@dataclass(frozen=True)
class Now:
    """Now, in this boot of the host."""

    boot_id: str
    booted_at: float
    wall: float
    monotonic: float


@dataclass(frozen=True)
class RestorePlan:
    starts: tuple[RestoreStep, ...] = ()
    skipped: tuple[RestoreStep, ...] = ()


def plan_restore(
    registry: Registry,
    world: World,
    *,
    slots: Mapping[int, str],
    cleared: Iterable[RestoreStep] = (),
    attempts: Mapping[RestoreStep, Sequence[float]],
) -> RestorePlan:
    """`cleared`: what reconcile took away, if that is to come back. `attempts`: how many seconds ago `restore` has
    started a step in vain, newest first. Each assignment is served, started, or skipped with the reason."""
    wanted = {RestoreStep(model.name, model.port) for model in registry.models.values() if model.port is not None}
    wanted |= {step for step in cleared if _is_free(registry, step)}
    reserved = {state.job.port: state for state in world.boot if state.standing.reserves}
    starts, skipped = [], []
    for step in sorted(wanted, key=lambda step: (step.port, step.model)):
        view = world.ports.get(step.port)
        if view is not None and _is_served(view, step):
            continue
        job = reserved.get(step.port)
        why = _what_is_there(view) or _why_not(step, wanted, job, slots)
        left = (
            RestoreStep(step.model, step.port, why, in_hand=job is not None or _is_in_hand(view, step))
            if why
            else pause(step, attempts.get(step, ()))
        )
        if left:
            skipped.append(left)
        else:
            starts.append(step)
    return RestorePlan(tuple(starts), tuple(skipped))


def _is_free(registry: Registry, step: RestoreStep) -> bool:
    """A cleared assignment may come back where nobody has assigned anything else since."""
    entry = registry.models.get(step.model)
    return entry is not None and entry.port is None and not registry.on_port(step.port)


def is_wanted(registry: Registry, step: RestoreStep, *, cleared: bool) -> bool:
    """Whether a step that was planned is still to be taken: it may have been unloaded since."""
    entry = registry.models.get(step.model)
    return entry is not None and (entry.port == step.port or (cleared and _is_free(registry, step)))


def _is_down(view: PortView) -> bool:
    dead = {Orphan.INTERRUPTED, Orphan.LEADERLESS, Orphan.PORTLESS}
    return view.unserved or (view.orphan in dead and view.operation is None)


def _is_served(view: PortView, step: RestoreStep) -> bool:
    return view.state is State.READY and view.model == step.model and view.owner is not Owner.FOREIGN


def _is_in_hand(view: PortView | None, step: RestoreStep) -> bool:
    """Whether the port changes without a person: by an operation, a boot job, or a server that loads this model."""
    if view is None:
        return False
    loads = view.state is State.LOADING and view.model == step.model
    return loads or view.operation is not None or view.owner is Owner.BOOT


def _what_is_there(view: PortView | None) -> str:
    """Return why nothing can be started on a port; empty if it is free, or holds only leftovers of a crash."""
    if view is None:
        return "the port is outside this host's range"
    if _is_down(view):
        return ""
    if view.operation is not None:
        return f"another operation is at work there: {view.operation}"
    match view.owner:
        case Owner.BOOT:
            serves = f"serves {view.model or 'something unknown'} there" if view.pid else "is about to serve there"
            return f"the boot job {serves}; {view.detail}"
        case Owner.HAND:
            return f"pid {view.pid}, which mlxops did not start, has {view.model or 'something unknown'} there"
        case Owner.MLXOPS:
            return f"a server of {view.model} is there and is {view.state}: {view.detail}; mlxctl unload {view.port}"
    if view.state is State.UNKNOWN:
        return f"what is on the port could not be determined: {view.detail}"
    return f"a process that is not ours holds the port: {view.detail}"


def _why_not(step: RestoreStep, wanted: Iterable[RestoreStep], boot: JobState | None, slots: Mapping[int, str]) -> str:
    if boot is not None:
        return f"the port belongs to the boot job {boot.job.name}: {boot.detail}"
    if sum(each.port == step.port for each in wanted) > 1:
        return "several models claim the port"
    own = next((port for port, alias in slots.items() if alias == step.model), step.port)
    if own != step.port:
        return f"{step.model} is the alias of port {own}"
    return ""


def pause(step: RestoreStep, attempts: Sequence[float]) -> RestoreStep | None:
    """The step as it is left, if it was started so many seconds ago, each time in vain; None if it may be taken."""
    if not attempts:
        return None
    by_hand = f"mlxctl load {step.model} {step.port}"
    if len(attempts) >= GIVE_UP:
        why = f"it was started {len(attempts)} times and was not seen to last; when it is mended: {by_hand}"
        return RestoreStep(step.model, step.port, why)
    left = FIRST_PAUSE * 2 ** (len(attempts) - 1) - attempts[0]
    if left <= 0:
        return None
    times = "once" if len(attempts) == 1 else f"{len(attempts)} times"
    why = f"it was started {times} and did not last; the next try may be in {duration(left)}; or now: {by_hand}"
    return RestoreStep(step.model, step.port, why, left)


def last_cleared(history: Iterable[Mapping[str, object]]) -> tuple[RestoreStep, ...]:
    """What the latest reconcile that cleared anything has cleared, and nobody has loaded or unloaded since."""
    found: dict[RestoreStep, None] = {}
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


def starts_of(history: Iterable[Mapping[str, object]]) -> dict[RestoreStep, list[RestoreAttempt]]:
    """The starts of each step by `restore`, oldest first, since one is known to have lasted. A load by a person, an
    unload, or a reconcile that takes the assignment away, wipes the slate."""
    found: dict[RestoreStep, list[RestoreAttempt]] = {}
    for line in history:
        command, step = line.get("command"), _step(line)
        if command == "reconcile":
            rows = line.get("cleared")
            for row in rows if isinstance(rows, list) else []:
                if cleared := _step(row):
                    found.pop(cleared, None)
        elif step is None:
            continue
        elif command == "restore":
            if start := _start(line):
                before = [] if line.get("afresh") is True else found.get(step, [])
                found[step] = [*before, start]
        elif command == "lasted" or (command in {"load", "unload"} and line.get("restore") is not True):
            found.pop(step, None)
    return found


def _start(line: Mapping[str, object]) -> RestoreAttempt | None:
    boot_id, wall, monotonic = line.get("boot_id"), line.get("wall"), line.get("monotonic")
    if not isinstance(boot_id, str) or not isinstance(wall, int | float) or not isinstance(monotonic, int | float):
        return None
    if not (0 <= wall < LONGEST_UPTIME and 0 <= monotonic < LONGEST_UPTIME):
        return None
    return RestoreAttempt(float(wall), float(monotonic), boot_id)


def in_vain(
    starts: Mapping[RestoreStep, Sequence[RestoreAttempt]], records: Mapping[int, Record], now: Now
) -> dict[RestoreStep, list[float]]:
    """How many seconds ago each step was started in vain, newest first."""
    return {
        step: [_ago(start, now) for start in reversed(of)]
        for step, of in starts.items()
        if of and not _lasted(of, step, records.get(step.port), now)
    }


def _ago(start: RestoreAttempt, now: Now) -> float:
    if start.boot_id == now.boot_id:
        return max(0.0, now.monotonic - start.monotonic)
    return max(now.wall - start.wall, now.monotonic)  # wall time may have been set back; it was before this boot


def _lasted(starts: Sequence[RestoreAttempt], step: RestoreStep, record: Record | None, now: Now) -> bool:
    """Whether the server that was started last has served for long, by what can be seen now that it is down.

    Its log says so, if anybody asked it anything. Else, if nobody knows of its end but that the host went down, the
    host tells: a start that took the host down, or a server that did so under load, did that earlier.
    """
    last = starts[-1]
    if record is None or record.model != step.model or not record.proven:
        return False
    if record.last_sign is not None and record.last_sign - last.wall >= LASTED:
        return True
    if last.boot_id == now.boot_id or record.boot_id != last.boot_id:
        return False
    crashed_then = sum(start.boot_id == last.boot_id for start in starts) > 1
    return not crashed_then and now.booted_at - last.wall >= LASTED


def lasting(starts: Mapping[RestoreStep, Sequence[RestoreAttempt]], world: World, now: Now) -> Iterator[RestoreStep]:
    """The steps whose servers are seen to have lasted: worth remembering, because an idle server's log tells nothing
    once it is down."""
    for step, of in starts.items():
        view = world.ports.get(step.port)
        serves = view is not None and view.state is State.READY and view.owner is Owner.MLXOPS
        if not serves or view is None or view.model != step.model or not of:
            continue
        if of[-1].boot_id == now.boot_id and _ago(of[-1], now) >= LASTED:
            yield step


def _step(row: object) -> RestoreStep | None:
    if not isinstance(row, Mapping):
        return None
    model, port = row.get("model"), row.get("port")
    if not isinstance(model, str) or not is_model_name(model) or type(port) is not int:
        return None
    return RestoreStep(model, port)
