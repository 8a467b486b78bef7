"""Which port a load gets when another operation takes a port or the model an instant before."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlxops.agent.context import Context
from mlxops.agent.host.system import this_system
from mlxops.agent.operations.load import _hold_port_and_model
from mlxops.agent.paths import host_paths
from mlxops.agent.state.operation_log import create
from mlxops.agent.state.store import Lock, Store
from mlxops.core.commands.load import Load
from mlxops.core.errors import Busy, Refused
from mlxops.core.planner import ModelRef
from mlxops.core.ports import World
from mlxops.core.protocol import Envelope, Event
from mlxops.core.records import Operation
from mlxops.core.registry import EMPTY, Registry
from mlxops.core.settings import PortRange, Settings
from tests.core.worlds import PORTS, world
from tests.lab.envelopes import envelope

FIRST, SECOND = sorted(PORTS)[:2]
OTHER = Operation("other", "load", "other")


class Late(Context):
    """A context with an outdated observation: all ports seem idle."""

    def observe(self, registry: Registry, *, only: object = None) -> World:
        return world(EMPTY)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "state", tmp_path / "registry.json")
    made.create_folders()
    return made


def late(store: Store, port: str = "auto") -> Context:
    settings = Settings(hub=str(store.state), state=str(store.state), ports=PortRange(min(PORTS), max(PORTS)))
    request = envelope("load", {"model": "mine", "port": port}, settings, "build")

    def emit(event: Event) -> None:
        pytest.fail(str(event))

    return Late(request.request, host_paths(settings, os.environ), store, this_system(), emit, {}, operation="mine")


@contextmanager
def held(store: Store, *names: str, by: Operation = OTHER) -> Iterator[None]:
    locks = [store.lock(name, by) for name in names]
    try:
        yield
    finally:
        for lock in locks:
            assert isinstance(lock, Lock)
            lock.release()


def mine() -> ModelRef:
    return ModelRef("mine", "org/mine")


def claim(ctx: Context) -> None:
    assert isinstance(ctx.request, Load)
    with _hold_port_and_model(ctx, ctx.request, mine):
        pass


def test_auto_skips_an_idle_port_that_was_just_taken(store: Store) -> None:
    with (
        held(store, f"port-{FIRST}"),
        _hold_port_and_model(late(store), Load(model="mine", port="auto"), mine) as held_port,
    ):
        assert held_port == (SECOND, "mine")
        held_now = store.holder(f"port-{SECOND}"), store.holder("model-mine")
        assert [operation.id for operation in held_now if operation] == ["mine", "mine"]
    assert store.holder(f"port-{SECOND}") is None


def test_auto_is_refused_when_all_ports_are_taken(store: Store) -> None:
    with held(store, *(f"port-{port}" for port in PORTS)), pytest.raises(Refused) as caught:
        claim(late(store))
    assert caught.value.code == "no_idle_port"


def test_requested_port_is_not_replaced_by_another(store: Store) -> None:
    with held(store, f"port-{FIRST}"), pytest.raises(Busy, match=f"holds port {FIRST}: load other, started by"):
        claim(late(store, str(FIRST)))


def test_load_of_a_busy_model_releases_the_port(store: Store) -> None:
    with held(store, "model-mine"), pytest.raises(Busy, match="holds model mine: ") as caught:
        claim(late(store))
    assert "attach" not in caught.value.details
    assert store.holder(f"port-{FIRST}") is None


@pytest.mark.parametrize(("port", "same"), [("auto", True), (str(FIRST), True), (str(SECOND), False)])
def test_same_load_is_followed_on_any_port(store: Store, port: str, same: bool) -> None:
    log, lock = create(store.state / "ops", Envelope(late(store).request, Settings(), "build"))
    assert lock is not None
    os.close(lock)
    running = Operation(log.id, "load", "mine", FIRST)
    with held(store, f"port-{FIRST}", "model-mine", by=running), pytest.raises(Busy) as caught:
        claim(late(store, port))
    assert (caught.value.details.get("attach") == log.id) is same


def test_load_without_a_port_takes_the_port_of_one_that_just_ended(store: Store) -> None:
    """The registry that it read first has no port for the model yet."""

    class Ended(Late):
        def registry(self) -> Registry:
            before = super().registry()
            store.registry.path.write_text(json.dumps({"version": 1, "models": {"mine": {"port": SECOND}}}))
            return before

    store.registry.path.write_text(json.dumps({"version": 1, "models": {"mine": {}}}))
    ctx = late(store)
    ended = Ended(Load(model="mine"), ctx.paths, store, ctx.system, ctx.emit, {}, operation="mine")
    with _hold_port_and_model(ended, Load(model="mine"), mine) as held_port:
        assert held_port == (SECOND, "mine")
