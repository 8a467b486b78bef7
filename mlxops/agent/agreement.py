"""The settings on which all who ask this host must agree: read, compared and kept in one step, so that of two that
differ on a host which nobody has asked before, only one is heard."""

from __future__ import annotations

import contextlib
import os

from mlxops.agent.paths import Place, differences, place, settings_differ
from mlxops.agent.state.operation_log import recent
from mlxops.agent.state.store import Store
from mlxops.core.errors import Busy, Refused
from mlxops.core.settings import Settings


def agree(store: Store, where: Place) -> None:
    """Before a change: what is asked must agree with what was agreed on; what else is new in it is kept.

    Raises `Refused` (settings_differ, host_json_unusable, state_unwritable) and `Busy` (settings_locked).
    """
    store.ready()
    with store.settling():
        agreed = store.agreed()
        _refuse_others(agreed, where)
        if agreed != where.settings:
            store.agree(where.settings)


def agree_anew(store: Store, where: Place) -> None:
    """What `deploy` asks for: these settings count from now on, whatever counted before.

    Raises `Busy` (settings_in_use) while an operation works with others: it will write where they say.
    """
    store.ready()
    with store.settling():
        if _found(_readable(store), where):
            _refuse_while_used(store)
        store.agree(where.settings)
    with contextlib.suppress(OSError):
        store.registry.remember()


def confirm(store: Store, where: Place) -> None:
    """In the worker, whose record is seen as running from before this on: are its settings still those agreed on?

    Raises what `agree` raises.
    """
    with store.settling():
        _refuse_others(store.agreed(), where)


def refuse_others(store: Store, where: Place) -> None:
    """Before a look, which waits for nobody. Raises `Refused` (settings_differ, host_json_unusable)."""
    _refuse_others(store.agreed(), where)


def _refuse_others(agreed: Settings | None, where: Place) -> None:
    if found := _found(agreed, where):
        raise settings_differ(found)


def _found(agreed: Settings | None, where: Place) -> dict[str, tuple[str, str]]:
    return differences(place(agreed, os.environ), where) if agreed else {}


def _readable(store: Store) -> Settings | None:
    try:
        return store.agreed()
    except Refused:
        return None  # damaged: agreeing anew is what mends it


def _refuse_while_used(store: Store) -> None:
    running = next((journal for journal in recent(store.state / "ops") if journal.alive()), None)
    if running is not None:
        raise Busy(
            "settings_in_use",
            "the host's settings cannot be agreed anew now",
            why=f"operation {running.id} works with those agreed before",
            hint=f"wait for it: mlxctl ops --follow {running.id}; then again: inv deploy",
            details={"operation": running.id},
        )
