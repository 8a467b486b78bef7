"""The restart plan of a replaced server: with exactly the files that it served, or none."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from mlxops.agent.context import Context
from mlxops.agent.host.system import this_system
from mlxops.agent.operations.swap import _plan_restart
from mlxops.agent.paths import host_paths
from mlxops.agent.state.store import Store
from mlxops.core.ports import Owner, PortView, State
from mlxops.core.settings import Settings
from tests.core.worlds import run as sample_run
from tests.faults.arena import entry
from tests.lab.envelopes import envelope
from tests.lab.quick import snapshot


@pytest.mark.parametrize("other", [False, True])
def test_restart_never_uses_other_files(tmp_path: Path, other: bool) -> None:
    """Otherwise the run record would name the old revision while the server has another one."""
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
    restart = _plan_restart(context, store.registry.read(), view)
    assert restart is None if other else restart is not None and restart.revision == served
