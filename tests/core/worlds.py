"""Runs, signals and worlds for the tests of port states and plans."""

from __future__ import annotations

import json
from dataclasses import fields, replace

from hypothesis import strategies as st

from mlxops.core.ports import BootClaim, Health, Owner, Signals, World, judge
from mlxops.core.records import Operation, Run, Server
from mlxops.core.registry import Registry, parse
from mlxops.core.settings import BootJob, PortRange, Settings

SETTINGS = Settings(
    ports=PortRange(8100, 8104),
    slots={8100: "jerry-xl", 8101: "jerry-l", 8102: "jerry-m"},
    boot=(BootJob(8100, "/opt/start.sh", "com.example.boot"),),
)
CLAIM = BootClaim(SETTINGS.boot[0], "launchd has it", "sudo launchctl bootout system/com.example.boot")
PORTS = tuple(SETTINGS.ports)


def registry(**ports: int | None) -> Registry:
    """Return a registry of models with their ports. Model `a` has the repository `org/a` at revision `sha-a`."""
    entries = {
        name.replace("_", "-"): {
            "repo_id": f"org/{name}",
            "model_id": f"org/{name}",
            "cache_path": f"/hub/{name}/sha-{name}",
            "format": "mlx",
            "port": port,
        }
        for name, port in ports.items()
    }
    return parse(json.dumps({"version": 1, "models": entries}).encode())


def argv(name: str, port: int) -> tuple[str, ...]:
    return ("/bin/engine", "--model", name, "--port", str(port))


def run(name: str = "a", port: int = 8103, *, proven: bool = True) -> Run:
    return Run(
        port=port,
        model=name,
        alias=SETTINGS.alias(port, name),
        repo_id=f"org/{name}",
        revision=f"sha-{name}",
        engine="mlx-lm",
        argv=argv(name, port),
        run_id="r1",
        pid=4000,
        pgid=4000,
        start="777",
        boot_id="boot",
        operation="op",
        log_path="/state/logs/x.log",
        started_at="2026-01-01T00:00:00Z",
        proven_at="2026-01-01T00:01:00Z" if proven else None,
    )


def server(name: str = "a", port: int = 8103) -> Server:
    return Server(5000, 5000, "mlx-lm", f"/hub/{name}/sha-{name}", ("/usr/bin/python", *argv(name, port)), "888")


def signals(port: int = 8103) -> Signals:
    """Return the signals of an idle port."""
    return Signals(port, SETTINGS.slots.get(port))


def serving(name: str = "a", port: int = 8103) -> Signals:
    """Return the signals of our healthy server."""
    return replace(
        signals(port),
        run=run(name, port),
        leader_proven=True,
        members=(4000, 4001),
        listening=True,
        listener_pids=frozenset({4000}),
        health=Health.SERVING,
    )


def by_hand(name: str = "a", port: int = 8103) -> Signals:
    return replace(
        signals(port),
        hand=server(name, port),
        listening=True,
        listener_pids=frozenset({5000}),
        health=Health.SERVING,
        other_listener="pid 5000",
    )


def foreign(port: int = 8103) -> Signals:
    """Return the signals of a listener that is neither ours nor an engine."""
    return replace(signals(port), listening=True, listener_pids=frozenset({6000}), other_listener="pid 6000: nc -l")


def at_boot(name: str = "a", port: int = 8100) -> Signals:
    return replace(by_hand(name, port), boot=CLAIM)


def world(known: Registry, *seen: Signals) -> World:
    """Return all ports of the range, judged. Ports without signals are idle."""
    observed = {port: signals(port) for port in PORTS} | {port.port: port for port in seen}
    return World({port: judge(seen_port, known) for port, seen_port in observed.items()})


# -- arbitrary signals -------------------------------------------------------------------------------------------------

MODELS = ("a", "b", "jerry-xl", "jerry-m")
_pids = st.frozensets(st.sampled_from([4000, 4001, 5000, 6000]), max_size=3)


def ending(name: str = "a", port: int = 8103) -> Signals:
    """Return the signals of our server that an unload did not wait for."""
    seen = serving(name, port)
    return replace(seen, run=replace(run(name, port), stopped_by="unload", stopping_since="2026-01-01T01:00:00Z"))


def any_signals(port: int) -> st.SearchStrategy[Signals]:
    """Generate signals: likely ones with up to two fields changed, or arbitrary ones."""
    changed = st.lists(st.sampled_from([item.name for item in fields(Signals)]), max_size=2)
    usual = st.sampled_from(
        [
            serving("a", port),
            serving("b", port),
            ending("a", port),
            by_hand("a", port),
            foreign(port),
            at_boot("a", port),
        ]
    )

    def change(base: Signals, other: Signals, names: list[str]) -> Signals:
        return replace(base, **{name: getattr(other, name) for name in names})

    return st.builds(change, usual, _arbitrary_signals(port), changed) | _arbitrary_signals(port)


def _arbitrary_signals(port: int) -> st.SearchStrategy[Signals]:
    model = st.sampled_from(MODELS)
    return st.builds(
        Signals,
        port=st.just(port),
        alias=st.just(SETTINGS.slots.get(port)),
        run=st.none() | st.builds(lambda name, proven: run(name, port, proven=proven), model, st.booleans()),
        broken_record=st.booleans(),
        leader_proven=st.booleans(),
        members=st.sampled_from([(), (4000,), (4000, 4001), (4001,)]),
        listening=st.booleans(),
        listener_pids=_pids,
        unowned=st.booleans(),
        hand=st.none() | st.builds(lambda name: server(name, port), model),
        boot=st.none() | st.just(CLAIM),
        operation=st.none()
        | st.builds(
            Operation, id=st.just("op2"), command=st.sampled_from(["load", "unload", "unload-all", "reconcile"])
        ),
        health=st.sampled_from(Health),
        other_listener=st.sampled_from(["", "pid 6000: x"]),
        error=st.none() | st.none() | st.none() | st.just("permission denied"),
        last_words=st.sampled_from(["", "Killed"]),
    )


registries = st.fixed_dictionaries(
    {}, optional={name.replace("-", "_"): st.none() | st.sampled_from(PORTS) for name in MODELS}
).map(lambda ports: registry(**ports))
seen_ports = st.tuples(*(any_signals(port) for port in PORTS))

OURS = (Owner.MLXOPS, Owner.HAND)
