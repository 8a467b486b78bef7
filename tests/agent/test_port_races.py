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
from mlxops.agent.operations.load import Held, hold
from mlxops.agent.paths import host_paths
from mlxops.agent.state.operation_log import create
from mlxops.agent.state.store import Lock, Store
from mlxops.core.commands.load import Load
from mlxops.core.errors import Busy, Refused, UsageError
from mlxops.core.ports import World
from mlxops.core.protocol import Envelope, Event
from mlxops.core.records import Operation
from mlxops.core.registry import EMPTY, Registry
from mlxops.core.settings import PortRange, Settings
from tests.core.worlds import PORTS, world
from tests.lab.envelopes import envelope

FIRST, SECOND = sorted(PORTS)[:2]
LATE_CONTEXT = 4096
OTHER = Operation("other", "load", "other")


class Late(Context):
    """A context with an outdated observation: all ports seem idle."""

    def observe(self, registry: Registry, *, only: object = None) -> World:
        return world(EMPTY)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "state", tmp_path / "registry.json")
    made.create_folders()
    assign(made, None)
    return made


def assign(store: Store, port: int | None, context_length: int | None = None) -> None:
    """Write the registry, as another operation would."""
    entry = {"repo_id": "org/mine", "port": port, "context_length": context_length}
    store.registry.path.write_text(json.dumps({"version": 1, "models": {"mine": entry}}))


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


def claim(ctx: Context) -> Held:
    assert isinstance(ctx.request, Load)
    with hold(ctx, ctx.request) as claimed:
        return claimed


def test_auto_skips_an_idle_port_that_was_just_taken(store: Store) -> None:
    with held(store, f"port-{FIRST}"), hold(late(store), Load(model="mine", port="auto")) as claimed:
        assert (claimed.port, claimed.target.name) == (SECOND, "mine")
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


class Meanwhile(Late):
    """A context of a load without a port. Once it has read the registry, another operation assigns the model `port`."""

    port: int | None = None

    def usable_registry(self) -> Registry:
        before = super().usable_registry()
        assign(self.store, self.port, context_length=LATE_CONTEXT)
        return before


def meanwhile(store: Store, port: int | None) -> Context:
    ctx = late(store)
    made = Meanwhile(Load(model="mine"), ctx.paths, store, ctx.system, ctx.emit, {}, operation="mine")
    object.__setattr__(made, "port", port)
    return made


def test_load_without_a_port_takes_the_port_of_one_that_just_ended(store: Store) -> None:
    claimed = claim(meanwhile(store, SECOND))
    assert (claimed.port, claimed.target.name) == (SECOND, "mine")


def test_load_without_a_port_follows_its_model_to_another_port(store: Store) -> None:
    assign(store, FIRST)
    assert claim(meanwhile(store, SECOND)).port == SECOND


def test_load_without_a_port_is_refused_if_its_model_loses_the_port(store: Store) -> None:
    assign(store, FIRST)
    with pytest.raises(UsageError) as caught:
        claim(meanwhile(store, None))
    assert caught.value.code == "port_needed"


def test_registry_of_a_held_load_was_read_under_the_locks(store: Store) -> None:
    assign(store, FIRST)
    claimed = claim(meanwhile(store, FIRST))
    assert claimed.registry.models["mine"].context_length == LATE_CONTEXT
    assert claimed.target.entry == claimed.registry.models["mine"]
