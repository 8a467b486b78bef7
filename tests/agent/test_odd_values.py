"""Values that no build writes, in the files of a host: reported or ignored, never a bug of mlxops."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxops.agent.context import Context
from mlxops.agent.host.system import this_system
from mlxops.agent.operations import operation
from mlxops.agent.paths import host_paths
from mlxops.agent.state.store import Store
from mlxops.core import wire
from mlxops.core.errors import Bug, MlxopsError
from mlxops.core.protocol import Done, Progress, encode_event
from mlxops.core.records import Operation, Stranded
from mlxops.core.replies import HostReply
from mlxops.core.settings import PortRange, Settings
from tests.core.worlds import run
from tests.lab import models
from tests.lab.envelopes import envelope
from tests.lab.ports import free_ports
from tests.properties import PROPERTY

REPO = "tiny-org/tiny-qwen3"
HUGE = 10**400
"""Python reads it, and cannot convert it to a float."""
ODD: tuple[object, ...] = (
    *(HUGE, -HUGE, 2**63, 2**31, -1, 0, 1e308, float("inf"), float("nan"), True, None),
    *("", "x", "9" * 400, "\ud800", [], [HUGE], {}, {"a": HUGE}),
)
PORT = free_ports(["127.0.0.1"], 1)[0]


OPERATIONS: tuple[tuple[str, Mapping[str, object]], ...] = (
    ("status", {}),
    ("list", {"memory": True}),
    ("ops", {}),
    ("gateway", {}),
    ("reconcile", {"dry_run": True}),
    ("restore", {"dry_run": True}),
    ("rollback", {"port": str(PORT), "dry_run": True}),
    ("unload", {"port": str(PORT), "dry_run": True}),
)


class Files:
    """A managed host in a folder, with a valid document in each of its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = Settings(
            hub=str(folder / "hub"), state=str(folder / "state"), ports=PortRange(PORT, PORT), memory=10**12
        )
        self.paths = host_paths(self.settings, {"HOME": str(folder)})
        self.store = Store(self.paths.state, self.paths.registry)
        self.store.create_folders()
        snapshot = models.install_snapshot(self.paths.hub, REPO, models.tiny_models() / models.QWEN)
        boot = this_system().boot_id()
        record = run("a", PORT).to_wire() | {
            **{"boot_id": boot, "pid": 2**22 - 1, "budget": ["--decode-concurrency", "4"], "stopped_by": "load"},
            **{"argv": ["mlx_lm.server", "--decode-concurrency", "4"], "stopping": [[2**22 - 1, "5"]]},
            **{"stopping_since": "2026-01-01T00:00:00Z", "held_bytes": 10**10, "unexplained_bytes": 10**9},
        }
        entry = {"repo_id": REPO, "model_id": REPO, "cache_path": str(snapshot), "format": "mlx", "port": PORT}
        entry |= {"context_length": 1000, "args": ["--decode-concurrency", "4"], "trust_remote_code": False}
        line: dict[str, object] = {"command": "load", "model": "a", "port": PORT, "repo_id": REPO, "revision": "main"}
        attempt = {"command": "restore", "boot_id": boot, "wall": 1.5, "monotonic": 2, "afresh": True}
        cleared = [{"model": "a", "port": PORT}]
        event = json.loads(encode_event(Progress("ending", 1, 2, 3)))
        request = envelope("load", {"model": "a", "port": str(PORT), "timeout": 5.0}, self.settings, "build")
        state, ops = self.paths.state, self.paths.state / "ops" / "20260101T000000-abcdef"
        ops.mkdir()
        self.documents: dict[Path, Any] = {
            state / "run" / f"{PORT}.json": record,
            self.store.stranded_path: Stranded(boot, 10**10, -(10**12), PORT, "a", "now").to_wire(),
            state / "locks" / f"port-{PORT}": Operation("op", "load", "a", PORT, reserves=10**9).__dict__,
            state / "history.jsonl": [line, line | attempt, line | {"command": "reconcile", "cleared": cleared}],
            state / "host.json": self.settings.to_wire(),
            self.paths.registry: {"version": 1, "models": {"a": entry}},
            (snapshot / "config.json").resolve(): json.loads((snapshot / "config.json").read_text()),
            ops / "request.json": json.loads(request.encode()),
            ops / "events.jsonl": event,
        }
        for path, document in self.documents.items():
            self.write(path, document)

    def write(self, path: Path, document: object) -> None:
        lines = document if isinstance(document, list) else [document]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def check(self, path: Path, values: Mapping[tuple[object, ...], object]) -> None:
        """Write odd values into one document. No operation fails other than with an error for people."""
        document = self.documents[path]
        odd = document
        for place, value in values.items():
            with contextlib.suppress(LookupError, TypeError):  # an earlier value replaced the place
                odd = changed(odd, place, value)
        self.write(path, odd)
        try:
            for command, args in OPERATIONS:
                try:
                    self.ask(command, args)
                except MlxopsError as error:
                    assert not isinstance(error, Bug)
        finally:
            self.write(path, document)

    def ask(self, command: str, args: Mapping[str, object]) -> object:
        request = envelope(command, args, self.settings, "").request
        paths = host_paths(self.store.agreed_settings() or self.settings, {"HOME": str(self.folder)})
        ctx = Context(request, paths, self.store, this_system(), lambda event: None, {})
        result = operation(command)(ctx, ctx.request)
        sent = json.loads(encode_event(Done(wire.encode(result), command)))["result"]
        reply: HostReply[Any] = HostReply("studio", result=wire.decode(type(request).result, sent))
        module = vars(import_module(f"mlxops.core.commands.{command}"))
        return [module[name]([reply]) for name in ("show", "show_memory") if name in module]


def places(value: object) -> Iterator[tuple[object, ...]]:
    """Yield the path of each value in a document."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in pairs:
        yield (key,)
        yield from ((key, *rest) for rest in places(part))


def changed(document: Any, place: tuple[object, ...], value: object) -> Any:
    copy = json.loads(json.dumps(document))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return copy


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("odd"))


FOUND: dict[str, tuple[str, dict[tuple[object, ...], object]]] = {
    "stranded memory too large for a float": ("stranded.json", {("size",): HUGE, ("baseline",): -HUGE}),
    "a limit that is no number": (f"{PORT}.json", {("budget", 1): ""}),
    "a context too large for a float": ("registry.json", {("models", "a", "context_length"): HUGE}),
    "a path that is no Unicode": (
        "registry.json",
        {("models", "a", "cache_path"): "\ud800", ("models", "a", "repo_id"): "x"},
    ),
    "a command that is a list": ("history.jsonl", {(1, "command"): []}),
    "progress that is true": ("events.jsonl", {("done",): True}),
    "endless ports": ("host.json", {("ports", 1): 10**12}),
    "an address that is none": ("host.json", {("bind",): "x"}),
    "a folder that is no Unicode": ("host.json", {("hub",): "\ud800"}),
}
"""What once ended in a traceback, or never."""


@pytest.mark.parametrize("what", FOUND)
def test_odd_value_that_was_a_bug_is_none(files: Files, what: str) -> None:
    name, values = FOUND[what]
    path = next(path for path in files.documents if path.name == name)
    with socket.create_server(("127.0.0.1", PORT)):
        files.check(path, values)


@settings(PROPERTY, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_odd_value_is_no_bug(files: Files, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(files.documents)))
    found = st.sampled_from(list(places(files.documents[path])))
    files.check(path, data.draw(st.dictionaries(found, st.sampled_from(ODD), min_size=1, max_size=3)))
