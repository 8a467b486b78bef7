"""`measure`: ask ready ports for streamed answers, and compute their speed from the times.

It takes no lock and changes nothing but the history. A swap is not held up: it ends the run, which is then void.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace

from mlxops.agent.context import Context
from mlxops.agent.engines.argv import program_of
from mlxops.agent.operations.server_names import names_of
from mlxops.common.http import NoCompletion, stream_completion
from mlxops.core import names, wire
from mlxops.core.commands.measure import FigureRow, Measure, MeasuredPort, MeasureResult
from mlxops.core.errors import Busy, MlxopsError, Refused
from mlxops.core.measuring import (
    METHOD,
    WARM_TOKENS,
    Answer,
    Case,
    Earlier,
    Metric,
    NotMeasurable,
    Prompt,
    Spread,
    Verdict,
    cases,
    figures,
    last_comparable,
    median,
    prompt_text,
    read_answer,
    verdict,
)
from mlxops.core.ports import Owner, PortView, State, World
from mlxops.core.protocol import Phase

QUIET_SECONDS = 6.0
"""How long to wait for the connections of other clients. uvicorn keeps an idle one for 5 s."""
POLL_SECONDS = 0.1
_NO_ANSWER = (OSError, NoCompletion, NotMeasurable)


class _TimeUp(Exception):
    """The time for this port is over."""


def run(ctx: Context, request: Measure) -> MeasureResult:
    _, world = ctx.registry_and_world()
    views = _chosen(ctx, request, world)
    rows, errors = [], []
    for view in views:
        try:
            rows.append(_measure(ctx, request, view))
        except MlxopsError as error:
            errors.append(error)
            rows.append(_not_measured(view, error))
    if len(errors) == len(views):
        raise errors[0]
    return MeasureResult(tuple(rows))


def _chosen(ctx: Context, request: Measure, world: World) -> list[PortView]:
    """Return the ports to measure. Raises `UsageError` (bad_port), and `Refused` (not_ready) if none is ready."""
    settings = ctx.paths.settings
    ports = settings.ports if request.port is None else [names.port(request.port, settings.ports)]
    views = [world.ports[port] for port in ports]
    ready = [view for view in views if view.state is State.READY]
    if ready:
        return ready
    which = "no port is ready" if request.port is None else f"port {request.port} is {views[0].state}, not ready"
    raise Refused("not_ready", which, why="only a server that answers can be measured", hint="look: `mlxctl status`")


def _not_measured(view: PortView, error: MlxopsError) -> MeasuredPort:
    return replace(_described(view), not_measured=f"{error.message}: {error.why}")


def _described(view: PortView) -> MeasuredPort:
    """Return the row of a port, without figures."""
    return MeasuredPort(
        port=view.port,
        alias=view.alias,
        model=view.model,
        repo_id=view.repo_id,
        revision=view.revision,
        engine=view.engine,
        engine_version=view.engine_version,
        settings=_settings_hash(view),
        seconds=0.0,
        shared=False,
        figures=(),
        compared_with=None,
        engine_version_before=None,
        missing=(),
        not_measured=None,
    )


def _settings_hash(view: PortView) -> str:
    """Hash the server's options, without the program: another version may lie elsewhere."""
    ours = view.run if view.owner is Owner.MLXOPS else None
    argv = ours.settings if ours else view.server.argv if view.server else ()
    program = program_of(argv)
    return hashlib.sha256("\0".join(program.arguments if program else argv).encode()).hexdigest()[:12]


def _measure(ctx: Context, request: Measure, view: PortView) -> MeasuredPort:
    """Raises `Refused` (cannot_be_asked, no_answer), and `Busy` (open_requests, changed_meanwhile)."""
    began = time.monotonic()
    row = replace(_described(view), shared=_wait_until_quiet(ctx, request, view))
    measured = _Run(ctx, view, _known_name(view), began + request.seconds)
    measured.rounds(request)
    row = replace(
        row,
        seconds=round(time.monotonic() - began, 3),
        shared=row.shared or measured.shared,
        missing=tuple(f"{case}: {why}" for case, why in measured.failed.items() if case not in measured.answers),
    )
    same: Mapping[str, object] = {
        **{key: getattr(row, key) for key in ("port", "model", "repo_id", "revision", "engine", "settings")},
        "method": METHOD,
    }
    before = last_comparable(ctx.history(), same)
    row = replace(
        row,
        figures=tuple(_figure_rows(measured, before, shared=row.shared)),
        compared_with=before.at if before else None,
        engine_version_before=before.engine_version if before else None,
    )
    keys = ("prompt", "cache", "streams", "metric", "median", "low", "high", "rounds")
    recorded = [{key: wire.encode(getattr(each, key)) for key in keys} for each in row.figures]
    ctx.remember(
        command="measure", **same, alias=row.alias, engine_version=row.engine_version, shared=row.shared, rows=recorded
    )
    return row


def _known_name(view: PortView) -> str:
    """Return a name that the server knows, so that it neither loads nor drops a model."""
    served = names_of(view)
    if served.known and not served.not_asked:
        return served.known[0]
    raise Refused(
        "cannot_be_asked",
        f"the server on port {view.port} must not be asked",
        why=served.not_asked or "its name is not known",
        hint=f"if it was started by hand, load its model: `mlxctl load MODEL {view.port} --force`",
    )


# -- other clients, and other servers


def _clients(ctx: Context, view: PortView) -> int:
    """Count the connections to the server. Each has an open request, or had one a moment ago."""
    pids = view.members or ((view.server.pid,) if view.server else ())
    return len(ctx.system.connections(view.port, pids))


def _wait_until_quiet(ctx: Context, request: Measure, view: PortView) -> bool:
    """Wait until no client is connected. With `--force` do not wait. Return whether one is.

    Raises `Busy` (open_requests).
    """
    clients = _clients(ctx, view)
    if not clients or request.force:
        return bool(clients)
    ctx.note(f"port {view.port} is in use; waiting up to {QUIET_SECONDS:.0f} s for the end of open requests: {clients}")
    deadline = time.monotonic() + QUIET_SECONDS
    while clients := _clients(ctx, view):
        if time.monotonic() > deadline:
            raise Busy(
                "open_requests",
                f"port {view.port} is in use; open requests: {clients}",
                why="a measurement would slow them down, and they would spoil it",
                hint=f"try again later, or measure with them: `mlxctl measure {view.port} --force`",
            )
        time.sleep(POLL_SECONDS)
        ctx.beat()
    return False


def _check_same(ctx: Context, view: PortView) -> None:
    """Check that the server is still the one that is measured. Raises `Busy` (changed_meanwhile)."""
    now = ctx.observe_port(view.port)
    if now.state is State.READY and _identity(now) == _identity(view):
        return
    raise Busy(
        "changed_meanwhile",
        f"the server on port {view.port} changed while it was measured",
        why=f"it was swapped, restarted or stopped: the port is {now.state}; the run is void and is not recorded",
        hint=f"look: `mlxctl status`; then again: `mlxctl measure {view.port}`",
    )


def _identity(view: PortView) -> tuple[object, ...]:
    process = (view.run if view.owner is Owner.MLXOPS else None) or view.server
    return view.owner, view.model, view.pid, process.start if process else None


# -- the rounds


class _Run:
    """The rounds of one port: what was measured, and what could not be."""

    def __init__(self, ctx: Context, view: PortView, name: str, deadline: float) -> None:
        self._ctx, self._view, self._name, self._deadline = ctx, view, name, deadline
        self.values: dict[tuple[Case, Metric], list[float]] = defaultdict(list)
        self.answers: dict[Case, list[Answer]] = defaultdict(list)
        self.failed: dict[Case, str] = {}
        """Case -> why its last failed group failed. The next round tries it again."""
        self.shared = False

    def rounds(self, request: Measure) -> None:
        """Raises `Refused` (no_answer) if there is no figure at all, and `Busy` (changed_meanwhile)."""
        seconds = 0.0
        try:
            with suppress(*_NO_ANSWER):  # not measured: the first request may compile kernels
                self._ask([prompt_text(Prompt.SHORT, _seed())], WARM_TOKENS)
            for number in range(1, request.rounds + 1):
                took = f" ({seconds:.0f} s each)" if seconds else ""
                self._ctx.emit(Phase("measure", f"port {self._view.port}, round {number} of {request.rounds}{took}"))
                began = time.monotonic()
                self._round(request.streams)
                seconds = time.monotonic() - began
        except _TimeUp:
            self._ctx.note(f"port {self._view.port}: the {request.seconds:.0f} s of --seconds are over")
        _check_same(self._ctx, self._view)
        if not self.values:
            raise Refused(
                "no_answer",
                f"the server on port {self._view.port} gave no answer that can be measured",
                why=next(iter(self.failed.values()), f"none was complete within {request.seconds:.0f} s"),
                hint=f"ask it: `mlxctl status --probe`; or give it more time: `mlxctl measure {self._view.port} "
                f"--seconds {min(2 * request.seconds + 1, 86400):.0f}`",
            )

    def _round(self, streams: int) -> None:
        for cold, warm in cases(streams):
            prompts = [prompt_text(cold.prompt, _seed()) for _ in range(cold.streams)]
            for case in (cold, warm):
                self._measure_case(case, prompts)
        _check_same(self._ctx, self._view)

    def _measure_case(self, case: Case, prompts: Sequence[str]) -> None:
        try:
            answers = self._ask(prompts, case.tokens)
        except _NO_ANSWER as error:
            _check_same(self._ctx, self._view)
            self.failed[case] = _reason(error)
            return
        self.shared = self.shared or bool(_clients(self._ctx, self._view))
        self.answers[case] += answers
        for metric, value in figures(case, answers).items():
            self.values[case, metric].append(value)

    def _ask(self, prompts: Sequence[str], tokens: int) -> list[Answer]:
        """Send all prompts at once, and wait for the answers. Raises `_TimeUp`, or what one of them raised."""
        began = time.monotonic()
        left = self._deadline - began
        if left <= 0:
            raise _TimeUp
        outcomes: dict[int, Answer | Exception] = {}

        def ask(index: int, prompt: str) -> None:
            body = _body(self._name, prompt, tokens)
            try:
                with closing(stream_completion(self._ctx.paths.connect_host, self._view.port, body, left)) as lines:
                    outcomes[index] = read_answer((at - began, line) for at, line in lines)
            except Exception as error:  # noqa: BLE001 - carried to the main thread, which raises it
                outcomes[index] = error

        threads = [threading.Thread(target=ask, args=each, daemon=True) for each in enumerate(prompts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(POLL_SECONDS)
                self._ctx.beat()
        return [self._checked(outcome) for outcome in outcomes.values()]

    def _checked(self, outcome: Answer | Exception) -> Answer:
        if isinstance(outcome, Answer):
            return outcome
        if isinstance(outcome, TimeoutError) and time.monotonic() >= self._deadline:
            raise _TimeUp
        raise outcome


def _seed() -> int:
    return int.from_bytes(os.urandom(4))


def _reason(error: Exception) -> str:
    return f"it {error}" if isinstance(error, NotMeasurable) else str(error)[:300] or type(error).__name__


def _body(name: str, prompt: str, tokens: int) -> bytes:
    return json.dumps(
        {
            "model": name,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()


# -- the rows


def _figure_rows(measured: _Run, before: Earlier | None, *, shared: bool) -> Iterable[FigureRow]:
    for (case, metric), values in measured.values.items():
        now, answers = Spread.of(values), measured.answers[case]
        row = FigureRow(
            prompt=case.prompt.value,
            cache=case.cache.value,
            streams=case.streams,
            metric=metric.value,
            unit=metric.unit,
            median=now.median,
            low=now.low,
            high=now.high,
            rounds=now.rounds,
            prompt_tokens=int(median(each.prompt_tokens for each in answers)),
            cached_tokens=_cached(answers),
            completion_tokens=int(median(each.completion_tokens for each in answers)),
        )
        earlier = before.spreads.get((row.prompt, row.cache, row.streams, row.metric)) if before else None
        if earlier is not None:
            row = replace(
                row,
                before=earlier.median,
                before_low=earlier.low,
                before_high=earlier.high,
                ratio=round(now.median / earlier.median, 3),
                verdict=Verdict.UNSURE.value if shared else verdict(metric, now, earlier).value,
            )
        yield row


def _cached(answers: Sequence[Answer]) -> int | None:
    counts = [each.cached_tokens for each in answers if each.cached_tokens is not None]
    return int(median(counts)) if counts else None
