"""The last verdicts of each server, from `probe` and `load --require`: kept in its folder, and compared with earlier
ones of the same model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from mlxops.agent.context import Context
from mlxops.agent.state.store import Store, utc_now
from mlxops.core import conformance, wire
from mlxops.core.commands.probe import VerdictRow
from mlxops.core.conformance import Mark, Verdict
from mlxops.core.drift import Drift, DriftCode
from mlxops.core.errors import MlxopsError
from mlxops.core.frozen import dataclass
from mlxops.core.ports import PortView
from mlxops.core.records import Run


@dataclass(frozen=True)
class VerdictRecord:
    """What is kept of the last checks of a server."""

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


def keep(
    ctx: Context, run: Run, name: str, verdicts: Sequence[Verdict], promised: Collection[str], seconds: float
) -> VerdictRecord:
    """Keep the verdicts of a server, and return the record, with what got worse.

    Checks that were not made now, or were skipped, keep the verdict that this server has. The history gets the verdicts
    without what is promised, because an edited promise is no change of the model.
    """
    now = conformance.marks(verdicts)
    earlier = last_verdicts(ctx.store, run)
    made = {check for check, mark in now.items() if mark != Mark.SKIP}
    rows = {row.check: row for row in map(VerdictRow.of, conformance.with_promises(verdicts, promised))}
    rows |= {row.check: row for row in earlier.verdicts if row.check not in made} if earlier else {}
    lost = [check for check in earlier.lost if check not in made] if earlier else []
    record = VerdictRecord(
        run_id=run.run_id,
        pid=run.pid,
        at=utc_now(),
        seconds=seconds,
        name=name,
        verdicts=tuple(sorted(rows.values(), key=lambda row: conformance.position(row.check))),
        lost=(*lost, *conformance.lost(_best_before(ctx, run), now)),
    )
    try:
        ctx.store.keep_verdicts(run.port, wire.encode(record))
    except MlxopsError as error:
        ctx.note(f"the verdicts could not be kept: {error.message}: {error.why}", "warning")
    ctx.remember(
        command="probe", **_key(run), engine_version=run.engine_version, model=run.model, port=run.port, checks=now
    )
    return record


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
        for record in ctx.findings("probe")
        if all(record.get(name) == value for name, value in key.items())
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
