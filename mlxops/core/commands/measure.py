"""`measure`: how fast each server answers, and whether it was faster before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlxops.core.command import Group, Hosts, Request, option, seconds, switch, whole
from mlxops.core.frozen import dataclass
from mlxops.core.measuring import Case, Key, Metric, Spread, Tally, Verdict, median, verdict
from mlxops.core.replies import HostReply
from mlxops.core.tables import host_table, one_line


@dataclass(frozen=True)
class FigureRow:
    """One figure of a run: the median over its rounds, with the lowest and the highest value."""

    prompt: str
    """short or long."""
    cache: str
    """cold: the prompt was new to the server. warm: it was sent a second time."""
    streams: int
    """Requests that were sent at once."""
    metric: str
    """first_token: seconds to the first text. prefill: prompt tokens per second until then, of all streams together.
    decode: generated tokens per second after it, of all streams together."""
    unit: str
    """s or tokens/s."""
    median: float
    low: float
    high: float
    rounds: int
    """Rounds that have this figure."""
    prompt_tokens: int
    """Tokens of one prompt, by the server's count."""
    cached_tokens: int | None
    """How many of them the server had in its cache; null if it does not say."""
    completion_tokens: int
    """Tokens of one answer, by the server's count."""
    before: float | None = None
    """The median of the earlier run; null if it has none."""
    before_low: float | None = None
    before_high: float | None = None
    ratio: float | None = None
    """`median` / `before`."""
    verdict: str | None = None
    """same, slower, faster, or unsure (fewer than three rounds, or other clients used the server); null without an
    earlier run."""


@dataclass(frozen=True)
class MeasuredPort:
    """One port that was ready."""

    port: int
    alias: str | None
    model: str | None
    repo_id: str | None
    revision: str | None
    engine: str | None
    engine_version: str | None
    settings: str
    """A hash of the server's options, without limits that its load chose from the memory that was left."""
    seconds: float
    """How long it took."""
    shared: bool
    """Other clients used the server during the run. Later runs are not compared with this one."""
    figures: tuple[FigureRow, ...]
    compared_with: str | None
    """When the earlier run was, in UTC; null if there is none with this port, model, revision, engine and settings."""
    engine_version_before: str | None
    """The engine's version in the earlier run."""
    missing: tuple[str, ...]
    """What could not be measured, and why."""
    not_measured: str | None
    """Why the port was not measured; null if it was."""
    through: str | None = None
    """With `--through`: the gateway that was asked. `before` is then the server itself, in the same run. Null if the
    server was asked directly."""


@dataclass(frozen=True)
class MeasureResult:
    ports: tuple[MeasuredPort, ...]


@dataclass(frozen=True)
class Measure(Request[MeasureResult], group=Group.LOOK, example="mlxctl measure 8100", hosts=Hosts.SEVERAL):
    """Measure how fast each server answers, and compare it with the last time."""

    port: str | None = option("port to measure; default: each ready port, one after the other", position=0)
    streams: int = option(
        "requests at once in the second half of a round (4)", default=4, parse=whole("--streams", 1, 32)
    )
    rounds: int = option("rounds; figures are medians over them (5)", default=5, parse=whole("--rounds", 1, 100))
    seconds: float = option(
        "seconds after which a port is done, also within a round (300)", default=300.0, parse=seconds("--seconds")
    )
    through: bool = switch(
        "then the same through the running gateway, compared with the servers themselves", sent=False
    )
    force: bool = switch("measure also a port with open requests; the figures are not compared")


def figure_rows(tally: Tally, before: Mapping[Key, Spread], *, unsure: bool) -> tuple[FigureRow, ...]:
    """Return the figures of a run, beside those of another run. `unsure`: the comparison shows nothing."""
    return tuple(_row(case, metric, values, tally, before, unsure) for (case, metric), values in tally.values.items())


def _row(
    case: Case, metric: Metric, values: Sequence[float], tally: Tally, before: Mapping[Key, Spread], unsure: bool
) -> FigureRow:
    now, answers = Spread.of(values), tally.answers[case]
    earlier = before.get((case.prompt.value, case.cache.value, case.streams, metric.value))
    cached = [each.cached_tokens for each in answers if each.cached_tokens is not None]
    compared = Verdict.UNSURE if unsure else verdict(metric, now, earlier) if earlier else None
    return FigureRow(
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
        cached_tokens=int(median(cached)) if cached else None,
        completion_tokens=int(median(each.completion_tokens for each in answers)),
        before=earlier.median if earlier else None,
        before_low=earlier.low if earlier else None,
        before_high=earlier.high if earlier else None,
        ratio=round(now.median / earlier.median, 3) if earlier else None,
        verdict=compared.value if earlier and compared else None,
    )


def show(replies: Sequence[HostReply[MeasureResult]]) -> str:
    results = [(reply.host, reply.result) for reply in replies if reply.result]
    many = len(replies) > 1
    ports = [(f"{host}: " if many else "", each) for host, result in results for each in result.ports]
    columns = ["HOST", "PORT", "PROMPT", "CACHE", "STREAMS", "WHAT", "NOW", "BEFORE", "RATIO", "VERDICT"]
    rows = [
        [host, _name(each), row.prompt, row.cache, row.streams, row.metric.replace("_", " "), *_cells(row)]
        for host, result in results
        for each in result.ports
        for row in each.figures
    ]
    heads = [one_line(prefix + _head(each)) for prefix, each in ports]
    notes = [one_line(prefix + note) for prefix, each in ports for note in _notes(each)]
    return "\n".join(filter(None, [*heads, host_table(columns, rows, many=many), *notes]))


def _cells(row: FigureRow) -> list[object]:
    before = None if row.before is None else _figure(row.before, row.before_low, row.before_high, row.unit)
    ratio = None if row.ratio is None else f"{row.ratio:.2f}"
    shown = "WARN slower" if row.verdict == "slower" else row.verdict
    return [_figure(row.median, row.low, row.high, row.unit), before, ratio, shown]


def _figure(median: float, low: float | None, high: float | None, unit: str) -> str:
    return f"{_number(median)} {unit} ({_number(low or median)}-{_number(high or median)})"


def _number(value: float) -> str:
    """Return three digits that count, or all digits of a larger number."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _name(port: MeasuredPort) -> str:
    return f"{port.port} through" if port.through else str(port.port)


def _head(port: MeasuredPort) -> str:
    name = f"{_name(port)} {port.through}" if port.through else _name(port)
    if port.not_measured is not None:
        return f"{name}: not measured: {port.not_measured}"
    model = f"{port.model or 'a server'}" + (f" at {port.revision[:12]}" if port.revision else "")
    rounds = max((row.rounds for row in port.figures), default=0)
    engine = " ".join(filter(None, [port.engine, port.engine_version]))
    took = f"{rounds} round{'s' if rounds != 1 else ''} in {port.seconds:.0f} s"
    return f"{name}: {model}, {engine}, {took}; {_compared(port)}"


def _compared(port: MeasuredPort) -> str:
    if port.through:
        return "before: the server itself"
    if port.compared_with is None:
        return "no earlier run with this model, revision, engine and settings"
    version = port.engine_version_before
    other = f", with {port.engine} {version}" if version != port.engine_version else ""
    return f"before: {port.compared_with}{other}"


def _notes(port: MeasuredPort) -> list[str]:
    notes = [f"{_name(port)}: not measured: {each}" for each in port.missing]
    if port.shared and not port.through:
        notes.append(
            f"{port.port}: other clients used the server during the run; later runs are not compared with this one"
        )
    slower = [row for row in port.figures if row.verdict == "slower"]
    if slower:
        notes.append(
            f"WARN: {_name(port)}: {len(slower)} of {len(port.figures)} figures are slower than "
            f"{'those of the server itself' if port.through else 'before'}, by more than 10% and more than the spreads "
            "of both runs together"
        )
    return notes
