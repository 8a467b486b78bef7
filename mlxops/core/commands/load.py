"""`load`: serve a model on a port."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import Self

from mlxops.core.command import Draining, Group, option, seconds, switch
from mlxops.core.commands.list import EstimateRow
from mlxops.core.frozen import dataclass
from mlxops.core.names import model_name
from mlxops.core.replies import HostReply
from mlxops.core.tables import each_host, one_line
from mlxops.core.wire import omitted


@dataclass(frozen=True)
class PlanRow:
    """What a dry run would do."""

    outcome: str | None = omitted(None)
    """already, adopt, start or attach; left out for an unload."""
    download: str | None = None
    """The repository whose files would be downloaded first."""
    stops: tuple[str, ...] = ()
    """Servers that would be stopped."""
    clears: tuple[str, ...] = ()
    """Models whose assignment would be cleared."""
    argv: tuple[str, ...] | None = None
    """The engine's command; None if the files are not here yet."""
    memory: EstimateRow | None = omitted(None)
    """The parts of what its server may take; left out if none would be started. Builds up to 0.3.0 do not send it."""
    operation: str | None = omitted(None)
    """The running operation that would be followed."""


@dataclass(frozen=True)
class PortResult:
    """What a port serves after a change."""

    model: str | None
    port: int | None
    alias: str | None
    """The name under which the model is served."""
    url: str | None
    """The base URL, such as http://studio:8100/v1."""
    state: str
    """The state of the port afterwards."""
    changed: bool
    """False if nothing had to be done."""
    seconds: float
    """How long it took."""
    downtime_seconds: float | None = None
    """From the stop of the port's old server until the new one is ready; None if the port had none."""
    log_path: str | None = None
    """The server's log on the host."""
    notes: tuple[str, ...] = ()
    """What the user should know, such as a server that was left alone."""
    dry_run: bool = omitted(False)
    plan: PlanRow | None = omitted(None)
    """Only in a dry run."""


@dataclass(frozen=True)
class LoadResult(PortResult):
    """What a port serves after a load or a rollback, and under which names."""

    pid: int | None = None
    """The process of the server."""
    answers_to: str | None = None
    """The only model name that the server accepts; None: any, or not known."""
    also_answers_to: tuple[str, ...] = ()
    """Further names of the same model."""
    answers_to_any: bool = False
    """The server accepts every model name."""
    drops_for_others: bool = False
    """The server drops its model if a request names an unknown one."""
    not_asked: str | None = None
    """Why the server must not be asked; None if it may be."""
    gateway: Mapping[str, object] | None = omitted(None)
    """The receipt of the gateway, added on the control node."""


@dataclass(frozen=True)
class Loading(Draining[LoadResult]):
    """What `load` and `rollback` have in common."""

    timeout: float | None = option(
        "seconds from the engine's start to the proof, never the download (180, and 60 more for each 8 GB)",
        parse=seconds("--timeout"),
    )
    overcommit: bool = switch("load it even if it is estimated not to fit in memory")
    sent: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By port, the names that the gateway sends there."""
    promised: Mapping[str, int] = field(default_factory=dict)
    """By port, the input tokens that the gateway promises there."""


@dataclass(frozen=True)
class Load(
    Loading,
    group=Group.SERVE,
    example="mlxctl load jerry-xl 8100",
    changes=True,
    cancellable=True,
):
    """Serve a model on a port; download it if missing."""

    model: str | None = option(
        "registered name, or repo id org/name", position=0, needed="load --model jerry-xl --port 8100"
    )
    port: str | None = option("port, or auto; left out: the model's own slot, else its present port", position=1)
    repo: str | None = option("org/name[@revision] to register or repoint the name to")
    force: bool = switch("swap what is on the port, move the model, or restart a server whose settings changed")
    expect: str | None = option("the model that the port must hold by then; with another one, or none, it is refused")
    require: tuple[str, ...] = option(
        "checks that the server must pass (see `probe`), else the load is undone; for example tools,stream",
        default=(),
    )
    restore: bool = False
    """Part of a `restore`; noted in the history."""
    first_attempt: bool = False
    """Of a `restore`: no earlier start of the model failed."""

    def checked(self) -> Self:
        if self.expect is not None:
            model_name(self.expect)
        if not self.require:
            return self
        from mlxops.core.conformance import parse_checks

        return replace(self, require=parse_checks(",".join(self.require), "--require"))


def show(replies: Sequence[HostReply[LoadResult]]) -> str:
    return each_host(replies, line)


def line(result: LoadResult) -> str:
    if result.dry_run:
        return plan_lines(result)
    verb = "is ready" if result.changed else "was ready already"
    if result.state != "ready":
        verb = f"is {result.state}"
    down = f", {result.downtime_seconds:.1f} s of downtime" if result.downtime_seconds is not None else ""
    took = f"({result.seconds} s{down})"
    return one_line(f"{result.model} {verb} on {result.port} as {result.alias} {took}: {result.url}")


def plan_lines(result: PortResult) -> str:
    """Return what a dry run would do, a line for each step."""
    plan = result.plan or PlanRow()
    place = f"port {result.port}" if result.port else f"{result.model}"
    what = f"{result.model} on {result.port}: {plan.outcome or 'unload'}"
    # A load prints its notes while it plans.
    notes = list(result.notes) if plan.outcome is None else []
    if plan.outcome is None and not plan.stops and not plan.clears:
        if notes:
            what, notes = "; ".join(notes), []
        elif result.state == "idle":
            what = f"{place} has nothing to unload"
    steps = [
        *([f"download: {plan.download}"] if plan.download else []),
        *(f"stop: {stop}" for stop in plan.stops),
        *(f"clear: {name}" for name in plan.clears),
        *([f"run: {shlex.join(plan.argv)}"] if plan.argv else []),
        *(f"note: {note}" for note in notes),
    ]
    return "\n".join([one_line(f"{what} (dry run, nothing changed)"), *(f"  {one_line(step)}" for step in steps)])
