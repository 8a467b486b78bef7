"""Operations, seen from outside: which run and which ran, how to find one, how to end one."""

from __future__ import annotations

import contextlib

from mlxops.agent.journal import Journal, recent
from mlxops.agent.operations.context import Context
from mlxops.agent.reading import Unfit
from mlxops.agent.store import Store
from mlxops.core.errors import Refused
from mlxops.core.protocol import CANCELLABLE, Failed
from mlxops.core.world import Operation

SHOWN = 20
"""Operations that have ended and are listed, the newest."""


def ops(ctx: Context) -> dict[str, object]:
    ended = 0
    rows = []
    for journal in recent(ctx.store.state / "ops"):
        alive = journal.alive()
        ended += not alive
        if alive or ended <= SHOWN:
            rows.append(_row(journal, alive))
    return {"operations": rows}


def downloads(ctx: Context) -> list[Operation]:
    """The operations that download now."""
    found = []
    for path in sorted((ctx.store.state / "locks").glob("repo-*")):
        # What is no file is nobody's lock.
        with contextlib.suppress(Unfit):
            found.append(ctx.store.holder(path.name))
    return [operation for operation in found if operation is not None]


def _row(journal: Journal, alive: bool) -> dict[str, object]:
    stand = journal.stand()
    row: dict[str, object] = {"operation": journal.id, **_asked(journal), "since": journal.since}
    row |= {"phase": stand.phase.name if stand.phase else None, "detail": str(stand), "error": None}
    if stand.progress is not None:
        row["progress"] = stand.progress.to_wire()
    if isinstance(stand.final, Failed):
        return row | {"state": "failed", "detail": stand.final.error.message, "error": stand.final.error.code}
    if stand.final is not None:
        return row | {"state": "done", "detail": ""}
    return row | {"state": "running" if alive else "interrupted"}


def _asked(journal: Journal) -> dict[str, object]:
    try:
        request = journal.request()
    except (OSError, ValueError):
        return {"command": None, "model": None, "repo": None, "port": None, "asker": None}
    texts = {key: request.text(key) for key in ("model", "repo", "port")}
    return {"command": request.command, **texts, "asker": str(request.asker)}


def find(store: Store, text: str) -> Journal:
    """The operation of an id, or of the end of one. Raises `Refused` (unknown_operation)."""
    found = [journal for journal in recent(store.state / "ops") if text and journal.id.endswith(text)]
    if len(found) == 1:
        return found[0]
    raise Refused(
        "unknown_operation",
        f"there is no operation {text!r} on this host" if not found else f"{text!r} is the end of several operations",
        why="the records of the latest two hundred are kept" if not found else ", ".join(each.id for each in found),
        hint="see: mlxctl ops",
    )


def cancel(journal: Journal) -> None:
    """Ask the operation to end. Raises `Refused` (operation_ended, not_cancellable)."""
    asked = _asked(journal)["command"]
    if not journal.alive():
        what = f"operation {journal.id} has ended already"
        raise Refused("operation_ended", what, why=f"what was asked: {asked}", hint="mlxctl ops")
    if asked not in CANCELLABLE:
        raise Refused(
            "not_cancellable",
            f"{asked} cannot be cancelled",
            why="it is done in seconds, and half of it would be worse than all of it",
            hint=f"wait for it: mlxctl ops --follow {journal.id}",
        )
    journal.cancel()
