"""A managed host in a folder, for thousands of faults: a cache, a registry, a state folder, a quick fake engine.

Operations run as on a real host: with a record, and with a worker that carries them out. The worker is a fork of the
campaign, so that it needs no start of an interpreter. It runs the same function as a real worker. The agent and the
connection are not part of it: the races through the agent, and the cuts, test those.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlxops.agent
from mlxops.agent import worker
from mlxops.agent.context import Context
from mlxops.agent.host.system import this_system
from mlxops.agent.operations import operation
from mlxops.agent.paths import host_paths
from mlxops.agent.state import operation_log as journals
from mlxops.agent.state.operation_log import OperationLog
from mlxops.agent.state.store import Store
from mlxops.core import wire
from mlxops.core.errors import MlxopsError
from mlxops.core.protocol import Done, Envelope, Event, Failed, Requester, decode_event
from mlxops.core.settings import PortRange, Settings
from tests.faults import children
from tests.faults.creations import Fault
from tests.lab.envelopes import envelope
from tests.lab.homelab import loopback_addresses
from tests.lab.quick import MODELS, install_engine, snapshot
from tests.lab.world import free_ports

for _module in pkgutil.walk_packages(mlxops.agent.__path__, "mlxops.agent."):
    # Now, and not in every fork; and what is edited while a campaign runs does not mix with what it began with.
    if not _module.name.endswith((".gate", ".__main__")):
        importlib.import_module(_module.name)

PORTS = 3
OPERATION_SECONDS = 90.0
UP_SECONDS = 20.0


@dataclass(frozen=True)
class Ended:
    """How an operation ended. `exit` is negative for a signal."""

    journal: OperationLog
    exit: int
    events: tuple[Event, ...]
    words: str = ""
    """What its worker wrote to standard error, such as a traceback."""

    @property
    def result(self) -> Mapping[str, object] | None:
        return next((event.result for event in self.events if isinstance(event, Done)), None)

    @property
    def error(self) -> MlxopsError | None:
        return next((event.error for event in self.events if isinstance(event, Failed)), None)

    def __str__(self) -> str:
        error = self.error
        reason = f"{error.code}: {error.message} ({error.why})" if error else self.words.strip()[-300:]
        return f"exit {self.exit}" + (f": {reason}" if reason else "")


@dataclass
class Arena:
    folder: Path
    engine: Sequence[str] = ()
    """The engine's program; empty: the fake one."""
    snapshots: Mapping[str, Path] = field(default_factory=dict)
    ports: range = range(0)

    def __post_init__(self) -> None:
        self.hub = self.folder / "hub"
        self.state = self.folder / "state"
        self.registry_path = self.hub / "registry.json"
        self.program = self.folder / "bin" / "mlx_lm.server"
        self.program.parent.mkdir(parents=True)
        if self.engine:
            self.program.symlink_to(self.engine[0])
        else:
            install_engine(self.program.parent)
            self.snapshots = {name: snapshot(self.hub, name) for name in MODELS}
        # An address of its own: on 127.0.0.1 every other program's outgoing connection may take one of its ports.
        (self.address,) = loopback_addresses(1)
        self.ports = free_ports([self.address], PORTS)
        self.settings = Settings(
            bind=self.address,
            hub=str(self.hub),
            state=str(self.state),
            engine="mlx-lm",
            launch={"mlx-lm": (str(self.program),)},
            ports=PortRange(self.ports[0], self.ports[-1]),
            slots={self.ports[0]: "slot-a"},
            memory=10**12,
        )
        self.store = Store(self.state, self.registry_path)
        # Port 9 is "discard", on which no server listens. So no request for an unknown repository leaves this machine.
        self.environ = {"HOME": str(self.folder), "PATH": "/usr/bin:/bin", "HF_ENDPOINT": "http://127.0.0.1:9"}

    # Operations

    def request(self, name: str, **args: object) -> Envelope:
        return envelope(name, args, self.settings, "", Requester("faults", "here"))

    def context(self, name: str, **args: object) -> Context:
        request = self.request(name, **args)
        paths = host_paths(request.settings, self.environ)
        return Context(request.request, paths, self.store, this_system(), lambda event: None, self.environ)

    def look(self, name: str = "status", **args: object) -> Mapping[str, object]:
        """Run a read, or a dry run, in this process."""
        ctx = self.context(name, **args)
        result: Mapping[str, object] = wire.encode(operation(name)(ctx, ctx.request))
        return result

    def begin(
        self, name: str, args: Mapping[str, object], *, stopped: bool = False, first: Fault = lambda: None
    ) -> tuple[OperationLog, int]:
        """Start the worker of an operation. Return its record and its pid. The worker calls `first` at its start."""
        self.store.create_folders()
        journal, lock = journals.create(self.state / "ops", self.request(name, **args))
        assert lock is not None
        os.environ.update(self.environ)
        output = journal.folder / "stderr"

        def body() -> int:
            first()
            return worker.run(journal.folder, lock)

        try:
            return journal, children.fork(body, output, stopped=stopped, keep=lock)
        finally:
            os.close(lock)

    def run(self, name: str, first: Fault = lambda: None, /, **args: object) -> Ended:
        """Run an operation. Its worker calls `first` at its start, which may cause a fault."""
        journal, pid = self.begin(name, args, first=first)
        return self.ended(journal, pid)

    def struck(
        self, fault: Sequence[str], log: Path, name: str, first: Fault = lambda: None, /, **args: object
    ) -> Ended:
        """Run an operation whose worker runs under strace with these options."""
        journal, pid = self.begin(name, args, stopped=True, first=first)
        tracer = children.traced(pid, fault, log)
        ended = self.ended(journal, pid)
        children.wait(tracer, 20)
        return ended

    def ended(self, journal: OperationLog, pid: int) -> Ended:
        status = children.wait(pid, OPERATION_SECONDS)
        try:
            lines = (journal.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
        except OSError:
            lines = []
        events = tuple(event for event in map(decode_event, lines) if event is not None)
        return Ended(journal, status, events, (journal.folder / "stderr").read_text(errors="replace"))

    # The host

    def registry(self) -> bytes:
        try:
            return self.registry_path.read_bytes()
        except FileNotFoundError:
            return b""

    def servers(self) -> dict[int, str]:
        """Return the live processes of this host's engine, including gates: pid -> command."""
        children.reap()
        wanted = os.fsencode(self.program)
        found = {}
        for name in os.listdir("/proc"):
            if name.isdigit():
                try:
                    argv = Path(f"/proc/{name}/cmdline").read_bytes()
                except OSError:
                    continue
                if wanted in argv:
                    found[int(name)] = argv.replace(b"\0", b" ").decode(errors="replace")
        return found

    def start_by_hand(self, model: str, port: int, *options: str, alias: str | None = None) -> int:
        """Start a server by hand with the arguments that mlxops would use. Return its pid once it listens."""
        folder = self.folder / "hand"
        folder.mkdir(exist_ok=True)
        name = alias or self.settings.alias(port, model)
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(self.snapshots[model])
        argv = [str(self.program), "--model", name, "--host", self.address, "--port", str(port), *options]

        def serve() -> int:
            os.chdir(folder)
            os.execv(argv[0], argv)

        pid = children.fork(serve, folder / "log")
        self.listener(port, folder / "log")
        return pid

    def by_path(self, model: str, port: int, *options: str) -> list[str]:
        """Return the command of a server that gets its model as a path."""
        paths = ["--host", self.address, "--port", str(port)]
        return [str(self.program), "--model", str(self.snapshots[model]), *paths, *options]

    def listener(self, port: int, log: Path) -> int:
        """Wait for a listener on a port. Return its pid. `log`: shown if there is none in time."""
        deadline = time.monotonic() + UP_SECONDS
        while not (
            pids := [p for each in this_system().process_table({port}).on(self.address, port) for p in each.pids]
        ):
            assert time.monotonic() < deadline, f"nothing listens on {port}: {log.read_text(errors='replace')[-400:]}"
            time.sleep(0.005)
        return min(pids)

    def sweep(self) -> None:
        """Kill every server, and delete everything except the cache."""
        while servers := self.servers():
            children.end(servers)
        shutil.rmtree(self.state, ignore_errors=True)
        for path in self.hub.iterdir():
            if path.is_file():
                path.unlink()

    def write_registry(self, models: Mapping[str, Mapping[str, object]]) -> None:
        self.registry_path.write_text(json.dumps({"version": 1, "models": models}, indent=2) + "\n", encoding="utf-8")


def entry(repo_id: str, path: Path, port: int | None = None, **more: object) -> dict[str, object]:
    return {"repo_id": repo_id, "model_id": repo_id, "cache_path": str(path), "format": "mlx", "port": port, **more}
