"""What would bring back a server that is replaced: just what served, or nothing."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from mlxops.agent.context import Context
from mlxops.agent.host.system import this_system
from mlxops.agent.operations.swap import _way_back
from mlxops.agent.paths import host_paths
from mlxops.agent.state.store import Store
from mlxops.core.ports import Owner, PortView, State
from mlxops.core.settings import Settings
from tests.core.worlds import run as sample_run
from tests.faults.arena import entry
from tests.faults.snapshots import snapshot
from tests.lab.envelopes import envelope


@pytest.mark.parametrize("other", [False, True])
def test_a_server_whose_entry_names_other_files_by_now_does_not_come_back_with_those(
    tmp_path: Path, other: bool
) -> None:
    """It would be recorded as what it was, and serve something else."""
    settings = Settings(hub=str(tmp_path / "hub"), state=str(tmp_path / "state"))
    paths = host_paths(settings, os.environ)
    path = snapshot(paths.hub, "org/a")
    served = path.name
    if other:
        path = path.rename(path.with_name("f" * 40))
    paths.registry.write_text(json.dumps({"version": 1, "models": {"a": entry("org/a", path, 8103)}}))
    store = Store(paths.state, paths.registry)
    context = Context(envelope("load", {}, settings, "").request, paths, store, this_system(), lambda event: None, {})
    run = replace(sample_run("a", 8103), revision=served)
    view = PortView(8103, None, State.READY, Owner.MLXOPS, "a", run=run)
    back = _way_back(context, store.registry.read(), view)
    assert back is None if other else back is not None and back.revision == served
