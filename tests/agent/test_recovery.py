"""Interrupted operations: the next operation names them, writes their final event and removes their leftovers."""

from __future__ import annotations

import os
from pathlib import Path

from mlxops.agent.paths import host_paths
from mlxops.agent.state import recovery
from mlxops.agent.state.operation_log import create
from mlxops.agent.state.store import Store
from mlxops.core.settings import Settings
from tests.lab.envelopes import envelope


def test_settle_names_and_ends_an_interrupted_operation_and_removes_leftovers(tmp_path: Path) -> None:
    settings = Settings(hub=str(tmp_path / "hub"), state=str(tmp_path / "state"))
    paths = host_paths(settings, {})
    store = Store(paths.state, paths.registry)
    store.create_folders()
    log, lock = create(store.state / "ops", envelope("load", {"model": "a", "port": "8100"}, settings, ""))
    assert lock is not None
    os.close(lock)
    half = store.state / "run" / ".8100.json.999999999.0123abcd.tmp"
    half.write_text("{")
    settled = recovery.settle(store, log.id, 8100, by="next")
    assert settled is not None and "load a on 8100" in settled
    assert log.ended and not half.exists()
