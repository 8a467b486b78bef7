"""Operations that were cut short: whoever comes next writes their end and puts right what they left."""

from __future__ import annotations

import os
from pathlib import Path

from mlxops.agent.paths import host_paths
from mlxops.agent.state import recovery
from mlxops.agent.state.operation_log import create
from mlxops.agent.state.store import Store
from mlxops.core.protocol import Request
from mlxops.core.settings import Settings


def test_the_next_one_names_it_writes_its_end_and_removes_what_it_was_writing(tmp_path: Path) -> None:
    settings = Settings(hub=str(tmp_path / "hub"), state=str(tmp_path / "state"))
    paths = host_paths(settings, {})
    store = Store(paths.state, paths.registry)
    store.create_folders()
    journal, lock = create(store.state / "ops", Request("load", {"model": "a", "port": "8100"}, settings, ""))
    assert lock is not None
    os.close(lock)
    half = store.state / "run" / ".8100.json.999999999.0123abcd.tmp"
    half.write_text("{")
    settled = recovery.settle(store, journal.id, 8100, by="next")
    assert settled is not None and "load a on 8100" in settled
    assert journal.ended and not half.exists()
