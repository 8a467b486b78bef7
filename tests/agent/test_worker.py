"""An operation's outcome becomes its last event and its exit status, even if it is cancelled at that moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxops.agent.context import Context
from mlxops.agent.host.system import this_system
from mlxops.agent.paths import host_paths
from mlxops.agent.state.store import Store
from mlxops.agent.worker import finish
from mlxops.core.protocol import Done, Event, Failed
from mlxops.core.settings import Settings
from tests.lab.envelopes import envelope


@pytest.mark.parametrize(("command", "last", "status"), [("list", Done, 0), ("unload", Failed, 2)])
def test_cancel_request_after_the_outcome_is_too_late(
    command: str, last: type[Event], status: int, tmp_path: Path
) -> None:
    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)
        context.cancellation.request()

    settings = Settings(hub=str(tmp_path / "hub"), state=str(tmp_path / "state"))
    paths = host_paths(settings, {})
    store = Store(paths.state, paths.registry)
    store.create_folders()  # as for every worker
    context = Context(envelope(command, {}, settings, "").request, paths, store, this_system(), emit, {})
    assert finish(context, emit) == status
    assert [type(event) for event in events] == [last]
