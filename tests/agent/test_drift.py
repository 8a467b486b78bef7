"""Drift between a server's settings and its registry entry."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from mlxops.agent.context import Context
from mlxops.agent.host.system import this_system
from mlxops.agent.operations.drift import further_drift
from mlxops.agent.paths import host_paths
from mlxops.agent.state.store import Store
from mlxops.core.ports import Owner, PortView, State, World
from mlxops.core.settings import Settings
from tests.core.worlds import registry, run
from tests.lab.envelopes import envelope


@pytest.mark.parametrize(("state", "reported"), [(State.READY, True), (State.WEDGED, True), (State.LOADING, False)])
def test_server_with_another_repository_is_drift(tmp_path: Path, state: State, reported: bool) -> None:
    settings = Settings(hub=str(tmp_path / "hub"), state=str(tmp_path / "state"))
    paths = host_paths(settings, os.environ)
    store = Store(paths.state, paths.registry)
    context = Context(envelope("status", {}, settings, "").request, paths, store, this_system(), lambda event: None, {})
    view = PortView(8103, None, state, Owner.MLXOPS, "a", run=replace(run("a", 8103), repo_id="org/before"))
    drift = further_drift(context, registry(a=8103), World({8103: view}, ()))
    assert [each.code for each in drift] == ["settings_changed"] * reported
