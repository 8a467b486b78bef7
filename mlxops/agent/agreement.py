"""The settings on which all who ask this host must agree: read, compared and kept in one step, so that of two that
differ on a host which nobody has asked before, only one is heard."""

from __future__ import annotations

import contextlib
import os

from mlxops.agent.paths import HostPaths, differences, host_paths, settings_differ
from mlxops.agent.state.operation_log import recent_operations
from mlxops.agent.state.store import Store
from mlxops.core.errors import Busy, Refused
from mlxops.core.settings import Settings


def agree(store: Store, paths: HostPaths) -> None:
    """Before a change: what is asked must agree with what was agreed on; what else is new in it is kept.

    Raises `Refused` (settings_differ, host_json_unusable, state_unwritable) and `Busy` (settings_locked).
    """
    store.create_folders()
    with store.settings_lock():
        agreed = store.agreed_settings()
        _refuse_others(agreed, paths)
        if agreed != paths.settings:
            store.save_agreed_settings(paths.settings)


def agree_anew(store: Store, paths: HostPaths) -> None:
    """What `deploy` asks for: these settings count from now on, whatever counted before.

    Raises `Busy` (settings_in_use) while an operation works with others: it will write where they say.
    """
    store.create_folders()
    with store.settings_lock():
        if _found(_readable(store), paths):
            _refuse_while_used(store)
        store.save_agreed_settings(paths.settings)
    with contextlib.suppress(OSError):
        store.registry.record_existence()


def confirm(store: Store, paths: HostPaths) -> None:
    """In the worker, whose record is seen as running from before this on: are its settings still those agreed on?

    Raises what `agree` raises.
    """
    with store.settings_lock():
        _refuse_others(store.agreed_settings(), paths)


def refuse_others(store: Store, paths: HostPaths) -> None:
    """Before a look, which waits for nobody. Raises `Refused` (settings_differ, host_json_unusable)."""
    _refuse_others(store.agreed_settings(), paths)


def _refuse_others(agreed: Settings | None, paths: HostPaths) -> None:
    if found := _found(agreed, paths):
        raise settings_differ(found)


def _found(agreed: Settings | None, paths: HostPaths) -> dict[str, tuple[str, str]]:
    return differences(host_paths(agreed, os.environ), paths) if agreed else {}


def _readable(store: Store) -> Settings | None:
    try:
        return store.agreed_settings()
    except Refused:
        return None  # damaged: agreeing anew is what mends it


def _refuse_while_used(store: Store) -> None:
    running = next((journal for journal in recent_operations(store.state / "ops") if journal.alive()), None)
    if running is not None:
        raise Busy(
            "settings_in_use",
            "the host's settings cannot be agreed anew now",
            why=f"operation {running.id} works with those agreed before",
            hint=f"wait for it: mlxctl ops --follow {running.id}; then again: inv deploy",
            details={"operation": running.id},
        )
