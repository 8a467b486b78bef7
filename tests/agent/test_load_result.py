"""The result of a load: only a ready server is a success."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxops.agent.context import Context
from mlxops.agent.host.system import this_system
from mlxops.agent.operations import load
from mlxops.agent.paths import host_paths
from mlxops.agent.state.store import Store
from mlxops.core.commands.load import Load
from mlxops.core.errors import Exit, NotStarted
from mlxops.core.planner import LoadPlan, ModelRef, Outcome
from mlxops.core.ports import Owner, PortView, State
from mlxops.core.registry import EMPTY
from mlxops.core.settings import Settings
from tests.lab.envelopes import envelope

PLAN = LoadPlan(ModelRef("a", "org/a"), 8103, "jerry-s", Outcome.START)


def view(state: State) -> PortView:
    owner = None if state is State.IDLE else Owner.MLXOPS
    return PortView(8103, "jerry-s", state, owner, "a", pid=77, detail=f"it is {state}")


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Context]:
    """Return a function that makes a context whose port is observed in these states; the last one repeats."""
    monkeypatch.setattr(load, "READY_SECONDS", 0.3)

    def context(*states: State) -> Context:
        left = list(states)
        monkeypatch.setattr(Context, "observe_port", lambda self, port: view(left.pop(0) if len(left) > 1 else left[0]))
        settings = Settings(hub=str(tmp_path), state=str(tmp_path))
        paths = host_paths(settings, os.environ)
        store = Store(paths.state, paths.registry)
        return Context(envelope("load", {}, settings, "").request, paths, store, this_system(), lambda event: None, {})

    return context


def held(ctx: Context) -> load.Held:
    return load.Held(ctx, Load(model="a", port="8103"), PLAN.port, PLAN.target, EMPTY, began=0.0)


@pytest.mark.parametrize("state", [each for each in State if each is not State.READY])
def test_other_state_than_ready_is_a_failure(seen: Callable[..., Context], state: State) -> None:
    with pytest.raises(NotStarted) as caught:
        load._load_result(held(seen(state)), PLAN, changed=True)
    error = caught.value
    assert (error.exit, error.code, error.why) == (Exit.NOT_STARTED, "not_ready", f"it is {state}")
    assert f"is {state} a moment later" in error.message and "mlxctl load a 8103 --force" in error.hint


def test_late_server_is_waited_for(seen: Callable[..., Context]) -> None:
    result = load._load_result(held(seen(State.WEDGED, State.UNKNOWN, State.READY)), PLAN, changed=True)
    assert result.state == "ready"
