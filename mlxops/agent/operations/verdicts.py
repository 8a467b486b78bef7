"""The verdicts of the last `probe` of each server: kept in its folder, and compared with those in the history."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from mlxops.agent.context import Context
from mlxops.agent.state.store import Store
from mlxops.core import conformance, wire
from mlxops.core.commands.probe import CheckedPort, VerdictRow
from mlxops.core.conformance import Verdict
from mlxops.core.drift import Drift, DriftCode
from mlxops.core.errors import MlxopsError
from mlxops.core.frozen import dataclass
from mlxops.core.ports import PortView
from mlxops.core.records import Run


@dataclass(frozen=True)
class VerdictRecord:
    """What is kept of the last `probe` of a server."""

    run_id: str
    pid: int
    at: str
    seconds: float
    name: str
    verdicts: tuple[VerdictRow, ...]
    lost: tuple[str, ...] = ()
    """The checks that got worse."""

    @property
    def worst(self) -> str | None:
        return conformance.overall(row.verdict for row in self.verdicts)


def kept(ctx: Context, row: CheckedPort, run: Run, verdicts: Sequence[Verdict]) -> CheckedPort:
    """Keep the verdicts of a row, and return the row with what got worse.

    `verdicts`: without what is promised, because an edited promise is no change of the model.
    """
    now = conformance.marks(verdicts)
    row = replace(row, lost=conformance.lost(_best_before(ctx, run), now))
    record = VerdictRecord(
        run.run_id, run.pid, row.checked_at or "", row.seconds, row.name or "", row.verdicts, row.lost
    )
    try:
        ctx.store.keep_verdicts(run.port, wire.encode(record))
    except MlxopsError as error:
        ctx.note(f"the verdicts could not be kept: {error.message}: {error.why}", "warning")
    ctx.remember(
        command="probe", **_key(run), engine_version=run.engine_version, model=run.model, port=run.port, checks=now
    )
    return row


def _key(run: Run) -> dict[str, object]:
    """Return what two servers have in common if their verdicts can be compared."""
    return {
        "repo_id": run.repo_id,
        "revision": run.revision,
        "engine": run.engine,
    }


def _best_before(ctx: Context, run: Run) -> dict[str, str]:
    """Return the best mark that each check ever had, so that a loss stays visible until it passes again."""
    key = _key(run)
    return conformance.best(
        {str(check): str(mark) for check, mark in checks.items()}
        for record in ctx.history()
        if record.get("command") == "probe" and all(record.get(name) == value for name, value in key.items())
        if isinstance(checks := record.get("checks"), dict)
    )


def last_verdicts(store: Store, run: Run) -> VerdictRecord | None:
    """Return what the last `probe` found about this very server; None if there is nothing that can be read."""
    record = store.verdicts(run.port)
    if record is None or (record.get("run_id"), record.get("pid")) != (run.run_id, run.pid):
        return None
    try:
        return wire.decode(VerdictRecord, record)
    except wire.DecodeError:
        return None


def lost_checks(views: Sequence[PortView], records: Mapping[int, VerdictRecord]) -> Iterator[Drift]:
    """Report the checks that got worse, as drift."""
    for view in views:
        record = records.get(view.port)
        if record is not None and record.lost:
            message = f"{view.port}: got worse since an earlier probe of the same model: {', '.join(record.lost)}"
            yield Drift.of(DriftCode.CONFORMANCE_LOST, view.port, view.model, message)
