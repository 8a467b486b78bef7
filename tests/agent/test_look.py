"""Changes during an observation: `status` never mixes the state before a change with the state after it."""

from __future__ import annotations

import json
from collections.abc import Callable, Container
from pathlib import Path

import pytest

from mlxops.agent import __main__ as agent
from mlxops.agent.context import MAX_OBSERVATIONS, Context
from mlxops.agent.host.system import ProcessTable, this_system
from mlxops.agent.operations import status
from mlxops.agent.paths import host_paths
from mlxops.agent.state.store import Store
from mlxops.control.client import HostTarget, ask, local_python
from mlxops.core.commands.list import List
from mlxops.core.commands.status import Status
from mlxops.core.protocol import Done, Failed, decode_event
from mlxops.core.settings import PortRange, Settings
from tests.lab.envelopes import envelope
from tests.lab.world import free_ports

System = type(this_system())


class ChangingSystem(System):  # type: ignore[valid-type, misc]  # the class for this platform
    """This machine, with a change just after each observation of its processes."""

    def __init__(self, change: Callable[[int], None]) -> None:
        self.looks = 0
        self._change = change

    def process_table(self, ports: Container[int]) -> ProcessTable:
        table: ProcessTable = super().process_table(ports)
        self.looks += 1
        self._change(self.looks)
        return table


@pytest.fixture
def port() -> int:
    return free_ports(["127.0.0.1"], 1)[0]


@pytest.fixture
def assign(tmp_path: Path, port: int) -> Callable[[bool], None]:
    def write(assigned: bool) -> None:
        entry = {"repo_id": "org/m", "model_id": "org/m", "cache_path": None, "format": "mlx"}
        document = {"version": 1, "models": {"m": entry | {"port": port if assigned else None}}}
        (tmp_path / "new").write_text(json.dumps(document))
        (tmp_path / "new").replace(tmp_path / "registry.json")

    return write


def drift_codes(tmp_path: Path, port: int, system: ChangingSystem) -> list[object]:
    """Return the codes of the drift that `status` reports."""
    settings = Settings(hub=str(tmp_path), state=str(tmp_path / "state"), ports=PortRange(port, port))
    paths = host_paths(settings, {})
    store = Store(paths.state, paths.registry)
    context = Context(envelope("status", {}, settings, "").request, paths, store, system, lambda event: None, {})
    drift = status.run(context, Status()).drift
    return [row.code for row in drift if row.code != "entry_problem"]


def test_unload_during_status_is_no_drift(tmp_path: Path, port: int, assign: Callable[[bool], None]) -> None:
    def unload(looks: int) -> None:
        if looks == 1:
            assign(False)

    assign(True)
    system = ChangingSystem(unload)
    assert drift_codes(tmp_path, port, system) == [] and system.looks == 2


def test_unchanged_state_is_observed_once(tmp_path: Path, port: int, assign: Callable[[bool], None]) -> None:
    assign(True)
    system = ChangingSystem(lambda looks: None)
    assert drift_codes(tmp_path, port, system) == ["assigned_not_served"] and system.looks == 1


def test_constantly_changing_registry_is_reported_as_last_observed(
    tmp_path: Path, port: int, assign: Callable[[bool], None]
) -> None:
    assign(True)
    system = ChangingSystem(lambda looks: assign(True))
    assert drift_codes(tmp_path, port, system) == ["assigned_not_served"] and system.looks == MAX_OBSERVATIONS


def test_long_list_arrives(tmp_path: Path) -> None:
    entries = {f"org/model-{number}": {"repo_id": f"org/model-{number}"} for number in range(20_000)}
    (tmp_path / "registry.json").write_text(json.dumps({"version": 1, "models": entries}))
    settings = Settings(
        registry=str(tmp_path / "registry.json"), hub=str(tmp_path / "hub"), state=str(tmp_path / "state")
    )
    answer = ask(HostTarget("here", None, local_python(), settings), List(), lambda host, event: None)
    assert answer.result is not None and len(answer.result.models) == 20_000, answer.error


def test_too_long_result_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(agent, "MAX_LINE", 1000)

    def serve() -> int:
        agent._emit(Done({"models": ["x" * 1000]}))
        return 0

    assert agent._report_errors(serve) == 3
    (event,) = map(decode_event, capsys.readouterr().out.splitlines())
    assert isinstance(event, Failed) and event.error.code == "result_too_long"
