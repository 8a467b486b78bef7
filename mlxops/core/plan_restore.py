"""Decide what `restore` starts: the assignments that nothing serves, in the order of their ports. Pure.

The history is the list of recorded lines, oldest first: `{"command", "operation", "at", ...}`. A start by `restore`
counts as failed until there is evidence that its server lasted (`_lasted`). Passed time is no evidence: a day later, a
server that crashed at once and a server that served look the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field

from mlxops.core.frozen import dataclass
from mlxops.core.names import is_model_name
from mlxops.core.ports import JobState, Orphan, Owner, PortView, State, World
from mlxops.core.registry import Registry
from mlxops.core.text import duration

GIVE_UP = 5
"""Number of failed starts in a row after which `restore` leaves the server to a person."""
LASTED = 2 * 3600.0
"""Seconds. A server has lasted if it was observed alive this long after its start."""
LONGEST_UPTIME = 1e10
"""Seconds, about three hundred years. Times in the history beyond it are invalid, such as integers too long for
arithmetic."""
CLEARING = frozenset({"unload", "unload-all", "reconcile"})
"""Commands that clear the assignment of the server that they stop."""
FIRST_PAUSE = 120.0
"""Seconds before a server is restarted, doubled each time: 2, 4, 8 and 16 minutes. Then `GIVE_UP` is reached."""


@dataclass(frozen=True)
class RestoreStep:
    """The start of one assigned model on its port."""

    model: str
    port: int
    why: str = ""
    """Why the step is skipped; empty if it is not."""
    again_in: float | None = None
    """Seconds until the step may be tried again, if only the pause prevents it."""
    in_hand: bool = field(default=False, compare=False)
    """The step is skipped and needs no person: a boot job or a running operation has the port, or the assignment is
    gone."""

    @property
    def stuck(self) -> bool:
        """Whether the port stays down until a person acts."""
        return bool(self.why) and not self.in_hand and self.again_in is None


@dataclass(frozen=True)
class RestoreAttempt:
    """A start by `restore`, as recorded in the history."""

    wall: float
    monotonic: float
    """Seconds of a clock that starts at each boot."""
    boot_id: str


@dataclass(frozen=True)
class Record:
    """The server that was started last on a port, from its run record and its log."""

    model: str
    boot_id: str
    proven: bool
    last_sign: float | None
    """Wall time of its last write to the log."""


@dataclass(frozen=True)
class Now:
    """The current time, in this boot of the host."""

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
    """Return the steps to start and the steps to skip, each with its reason. Served assignments are in neither.

    `cleared` has the assignments that reconcile cleared, if they are to be restored. `attempts` says how many seconds
    ago `restore` started a step and failed, newest first.
    """
    wanted = {RestoreStep(model.name, model.port) for model in registry.models.values() if model.port is not None}
    wanted |= {step for step in cleared if _is_free(registry, step)}
    reserved = {state.job.port: state for state in world.boot if state.standing.reserves}
    starts, skipped = [], []
    for step in sorted(wanted, key=lambda step: (step.port, step.model)):
        view = world.ports.get(step.port)
        if view is not None and _is_served(view, step):
            continue
        job = reserved.get(step.port)
        why = _why_port_is_taken(view) or _why_unloaded(view, step) or _why_not_allowed(step, wanted, job, slots)
        skip = (
            RestoreStep(step.model, step.port, why, in_hand=job is not None or _is_in_hand(view, step))
            if why
            else pause(step, attempts.get(step, ()))
        )
        if skip:
            skipped.append(skip)
        else:
            starts.append(step)
    return RestorePlan(tuple(starts), tuple(skipped))


def _is_free(registry: Registry, step: RestoreStep) -> bool:
    """Whether a cleared assignment may be restored: neither its model nor its port has been assigned since."""
    entry = registry.models.get(step.model)
    return entry is not None and entry.port is None and not registry.on_port(step.port)


def is_wanted(registry: Registry, step: RestoreStep, *, cleared: bool) -> bool:
    """Whether a planned step is still valid. Its model may have been unloaded since."""
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
    return loads or view.ending or _was_unloaded(view, step) or view.operation is not None or view.owner is Owner.BOOT


def _why_port_is_taken(view: PortView | None) -> str:
    """Return why nothing can be started on a port; empty if it is free or has only leftovers of a crash."""
    if view is None:
        return "the port is outside this host's range"
    if _is_down(view):
        return ""
    if view.ending:
        return f"{view.model or 'its server'} has not ended yet: {view.detail}; when it has ended: `mlxctl reconcile`"
    if view.operation is not None:
        return f"another operation is running on the port: {view.operation}"
    match view.owner:
        case Owner.BOOT:
            serves = f"serves {view.model or 'an unknown model'} there" if view.pid else "is about to serve there"
            return f"the boot job {serves}; {view.detail}"
        case Owner.HAND:
            return f"pid {view.pid}, which mlxops did not start, serves {view.model or 'an unknown model'} there"
        case Owner.MLXOPS:
            return f"a server of {view.model} is there and is {view.state}: {view.detail}; `mlxctl unload {view.port}`"
    if view.state is State.UNKNOWN:
        return f"what is on the port could not be determined: {view.detail}"
    return f"a process that is not ours holds the port: {view.detail}"


def _was_unloaded(view: PortView, step: RestoreStep) -> bool:
    """Whether the step's server ended after a command that would have cleared the step had begun to stop it."""
    run = view.run
    return view.unserved and run is not None and run.model == step.model and run.stopped_by in CLEARING


def _why_unloaded(view: PortView | None, step: RestoreStep) -> str:
    if view is None or view.run is None or not _was_unloaded(view, step):
        return ""
    load = f"`mlxctl load {step.model} {step.port}`"
    return f"{view.run.stopped_by} began to stop it, and it has ended since: `mlxctl reconcile`; or {load}"


def _why_not_allowed(
    step: RestoreStep, wanted: Iterable[RestoreStep], boot: JobState | None, slots: Mapping[int, str]
) -> str:
    if boot is not None:
        return f"the port belongs to the boot job {boot.job.name}: {boot.detail}"
    if sum(other.port == step.port for other in wanted) > 1:
        return "several models claim the port"
    own = next((port for port, alias in slots.items() if alias == step.model), step.port)
    if own != step.port:
        return f"{step.model} is the alias of port {own}"
    return ""


def pause(step: RestoreStep, attempts: Sequence[float]) -> RestoreStep | None:
    """Return the step with the reason to skip it for now; None if it may be started.

    `attempts` says how many seconds ago it was started and failed, newest first.
    """
    if not attempts:
        return None
    by_hand = f"`mlxctl load {step.model} {step.port}`"
    if len(attempts) >= GIVE_UP:
        why = f"it was started {len(attempts)} times and did not last; after the cause is fixed: {by_hand}"
        return RestoreStep(step.model, step.port, why)
    left = FIRST_PAUSE * 2 ** (len(attempts) - 1) - attempts[0]
    if left <= 0:
        return None
    times = "once" if len(attempts) == 1 else f"{len(attempts)} times"
    why = f"it was started {times} and did not last; the next try may be in {duration(left)}; or now: {by_hand}"
    return RestoreStep(step.model, step.port, why, left)


def last_cleared(history: Iterable[Mapping[str, object]]) -> tuple[RestoreStep, ...]:
    """Return the assignments that the latest clearing reconcile cleared, without those that a load or unload has
    touched since."""
    cleared: dict[RestoreStep, None] = {}
    operation: object = None
    for line in history:
        if line.get("command") == "reconcile":
            rows = line.get("cleared")
            steps = [step for row in rows if (step := _step(row))] if isinstance(rows, list) else []
            if steps and line.get("operation") != operation:
                operation, cleared = line.get("operation"), {}
            cleared |= dict.fromkeys(steps)
        elif line.get("command") in {"load", "unload"}:
            model, port = line.get("model"), line.get("port")
            cleared = {step: None for step in cleared if step.model != model and step.port != port}
    return tuple(cleared)


def starts_of(history: Iterable[Mapping[str, object]]) -> dict[RestoreStep, list[RestoreAttempt]]:
    """Return the starts of each step by `restore`, oldest first, since the last one that is known to have lasted.

    A load by a person, an unload, and a reconcile that clears the assignment start the count again.
    """
    attempts: dict[RestoreStep, list[RestoreAttempt]] = {}
    for line in history:
        command, step = line.get("command"), _step(line)
        if command == "reconcile":
            rows = line.get("cleared")
            for row in rows if isinstance(rows, list) else []:
                if cleared := _step(row):
                    attempts.pop(cleared, None)
        elif step is None:
            continue
        elif command == "restore":
            if attempt := _attempt(line):
                # "afresh": no earlier attempt counted as failed when this one was made.
                before = [] if line.get("afresh") is True else attempts.get(step, [])
                attempts[step] = [*before, attempt]
        elif command == "lasted" or (command in ("load", "unload") and line.get("restore") is not True):
            attempts.pop(step, None)
    return attempts


def _attempt(line: Mapping[str, object]) -> RestoreAttempt | None:
    boot_id, wall, monotonic = line.get("boot_id"), line.get("wall"), line.get("monotonic")
    if not isinstance(boot_id, str) or not isinstance(wall, int | float) or not isinstance(monotonic, int | float):
        return None
    if not (0 <= wall < LONGEST_UPTIME and 0 <= monotonic < LONGEST_UPTIME):
        return None
    return RestoreAttempt(float(wall), float(monotonic), boot_id)


def in_vain(
    starts: Mapping[RestoreStep, Sequence[RestoreAttempt]], records: Mapping[int, Record], now: Now
) -> dict[RestoreStep, list[float]]:
    """Return how many seconds ago each step was started and failed, newest first."""
    return {
        step: [_seconds_since(attempt, now) for attempt in reversed(attempts)]
        for step, attempts in starts.items()
        if attempts and not _lasted(attempts, step, records.get(step.port), now)
    }


def _seconds_since(attempt: RestoreAttempt, now: Now) -> float:
    if attempt.boot_id == now.boot_id:
        return max(0.0, now.monotonic - attempt.monotonic)
    # The wall clock may have been set back. The attempt was before this boot, so at least the uptime has passed.
    return max(now.wall - attempt.wall, now.monotonic)


def _lasted(attempts: Sequence[RestoreAttempt], step: RestoreStep, record: Record | None, now: Now) -> bool:
    """Whether the server of the last attempt served long enough, judged after it is down.

    The log shows it if the server had requests. If the server ended with the host, the host's uptime shows it, because
    a server that crashes the host, at its start or under load, does so soon. After several attempts in one boot, the
    uptime shows nothing.
    """
    last = attempts[-1]
    if record is None or record.model != step.model or not record.proven:
        return False
    if record.last_sign is not None and record.last_sign - last.wall >= LASTED:
        return True
    if last.boot_id == now.boot_id or record.boot_id != last.boot_id:
        return False
    crashed_in_that_boot = sum(attempt.boot_id == last.boot_id for attempt in attempts) > 1
    return not crashed_in_that_boot and now.booted_at - last.wall >= LASTED


def lasting(starts: Mapping[RestoreStep, Sequence[RestoreAttempt]], world: World, now: Now) -> Iterator[RestoreStep]:
    """Yield the steps whose servers run and have lasted. They are recorded now: once an idle server is down, its log is
    no evidence."""
    for step, attempts in starts.items():
        view = world.ports.get(step.port)
        serves = view is not None and view.state is State.READY and view.owner is Owner.MLXOPS
        if not serves or view is None or view.model != step.model or not attempts:
            continue
        if attempts[-1].boot_id == now.boot_id and _seconds_since(attempts[-1], now) >= LASTED:
            yield step


def _step(row: object) -> RestoreStep | None:
    if not isinstance(row, Mapping):
        return None
    model, port = row.get("model"), row.get("port")
    if not isinstance(model, str) or not is_model_name(model) or type(port) is not int:
        return None
    return RestoreStep(model, port)
