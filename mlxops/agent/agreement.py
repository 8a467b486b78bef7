"""The agreed settings: those that all control nodes of this host must share. The host saves them in `host.json`.

They are read, compared and saved under one lock. So if the first two control nodes of a fresh host differ, one of them
is refused.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace

from mlxops.agent.paths import HostPaths, host_paths, settings_differ, settings_differences
from mlxops.agent.state.operation_log import recent_operations
from mlxops.agent.state.store import Store
from mlxops.core.errors import Busy, Refused
from mlxops.core.settings import AGREED, Settings, stricter_kill_limit


def agree(store: Store, paths: HostPaths) -> Settings:
    """Before a change, check the request's settings against the agreed ones, then save them. Return them.

    Other settings may differ: the request's values replace the saved ones. Only the stricter `kill_limit` stays: one
    control node must not lift the limit that protects the host. `replace_agreement` lifts it.

    Raises `Refused` (settings_differ, host_json_unusable, state_unwritable) and `Busy` (settings_locked).
    """
    store.create_folders()
    with store.settings_lock():
        agreed = store.agreed_settings()
        _refuse_differences(agreed, paths)
        limit = stricter_kill_limit(agreed.kill_limit if agreed else None, paths.settings.kill_limit)
        settings = replace(paths.settings, kill_limit=limit)
        if agreed != settings:
            store.save_agreed_settings(settings)
        return settings


def replace_agreement(store: Store, paths: HostPaths) -> None:
    """Replace the agreed settings with those of the request. `deploy` asks for this.

    Raises `Busy` (settings_in_use) while an operation runs with different settings: it writes to the paths in them.
    """
    store.create_folders()
    with store.settings_lock():
        if _differences(_agreed_or_none(store), paths):
            _refuse_while_used(store)
        store.save_agreed_settings(paths.settings)
    with contextlib.suppress(OSError):
        store.registry.record_existence()


def confirm_agreement(store: Store, paths: HostPaths) -> None:
    """In the worker, check again that the request's settings are the agreed ones. Raises what `agree` raises.

    The worker's record shows a running operation, so `replace_agreement` refuses from now on.
    """
    with store.settings_lock():
        _refuse_differences(store.agreed_settings(), paths)


def check_agreement(store: Store, paths: HostPaths) -> None:
    """Before the dry run of a change, check the settings as `agree` does, without the lock."""
    _refuse_differences(store.agreed_settings(), paths)


def saved_paths(store: Store, paths: HostPaths) -> HostPaths:
    """For a read, return the paths with the saved settings, which say what the host has, and what differs from them.

    Raises `Refused` (host_json_unusable).
    """
    agreed = store.agreed_settings()
    differences = _differences(agreed, paths)
    if agreed is None or not differences:
        return paths
    saved = replace(paths.settings, **{key: getattr(agreed, key) for key in AGREED})
    return replace(host_paths(saved, os.environ), differences=differences)


def _refuse_differences(agreed: Settings | None, paths: HostPaths) -> None:
    if differences := _differences(agreed, paths):
        raise settings_differ(differences)


def _differences(agreed: Settings | None, paths: HostPaths) -> dict[str, tuple[str, str]]:
    return settings_differences(host_paths(agreed, os.environ), paths) if agreed else {}


def _agreed_or_none(store: Store) -> Settings | None:
    try:
        return store.agreed_settings()
    except Refused:
        return None  # damaged; saving new settings repairs it


def _refuse_while_used(store: Store) -> None:
    running = next((log for log in recent_operations(store.state / "ops") if log.alive()), None)
    if running is not None:
        raise Busy(
            "settings_in_use",
            "the saved settings of the host cannot be changed now",
            why=f"operation {running.id} is using them",
            hint=f"wait for it: `mlxctl ops --follow {running.id}`; then again: `mlxctl deploy`",
            details={"operation": running.id},
        )
