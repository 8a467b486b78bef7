"""The context of an operation: its request, the host's state, and the locks it takes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import field, replace
from typing import TYPE_CHECKING

from mlxops.agent.host.system import System
from mlxops.agent.paths import HostPaths
from mlxops.agent.serving.observe import observe
from mlxops.agent.state import recovery
from mlxops.agent.state.operation_log import find_operation
from mlxops.agent.state.store import Store, utc_now
from mlxops.common.files import describe_error
from mlxops.core import names
from mlxops.core.command import AnyRequest, Draining, Stopping
from mlxops.core.errors import Busy, Interrupted, MlxopsError
from mlxops.core.frozen import dataclass
from mlxops.core.ports import PortView, World
from mlxops.core.protocol import Event, Note, Requester
from mlxops.core.records import Operation
from mlxops.core.registry import Registry

if TYPE_CHECKING:
    from mlxops.agent.engines.base import Engine, EngineCommand
    from mlxops.core.planner import ModelRef

DRAIN_SECONDS = 30.0
RESTORE = "restore"
"""Name of the lock that allows one restore at a time."""
MAX_OBSERVATIONS = 4
"""If files change during each of so many observations, the last one counts."""


class PortExcluded(Interrupted):
    """An `unload` excluded this port from an operation on several ports."""


class Cancellation:
    """A request to end the operation, or to exclude a port from it.

    Inside `open`, the request is raised as an exception in the worker's main thread, at once. It is raised only once,
    so that it does not interrupt the cleanup. Inside `shield` it waits for the next `check`.
    """

    def __init__(self) -> None:
        self._requested = self._raised = self._open = False
        self._shields = 0
        self._port: int | None = None
        self._excluded = frozenset[int]()

    @property
    def requested(self) -> bool:
        return self._requested

    def request(self) -> None:
        """Request the end of the operation. Safe in a signal handler."""
        self._requested = True
        self.check()

    def exclude(self, ports: frozenset[int]) -> None:
        """Exclude these ports from the operation. Safe in a signal handler."""
        self._excluded = ports
        self.check()

    def check(self) -> None:
        """Raise `Interrupted` (cancelled) or `PortExcluded` for a pending request."""
        if not self._open or self._raised or self._shields:
            return
        if self._requested:
            self._raised = True
            raise Interrupted(
                "cancelled",
                "the operation was cancelled",
                why="it was cancelled on request, or the host is shutting down",
                hint="`mlxctl status`",
            )
        if self._port in self._excluded:
            self._raised = True
            raise PortExcluded("taken_out", f"port {self._port} was excluded from the operation")

    @contextmanager
    def for_port(self, port: int) -> Iterator[None]:
        """Mark the block as work on `port`. If the port is excluded, only this block ends."""
        self._port = port
        try:
            self.check()
            yield
        except PortExcluded:
            # The block has cleaned up. The next request may be raised.
            self._raised = False
            raise
        finally:
            self._port = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Accept requests while the operation runs. Once it has a result, a request is too late."""
        self._open = True
        try:
            self.check()
            yield
        finally:
            self._open = False

    @contextmanager
    def shield(self) -> Iterator[None]:
        """Do not interrupt the block. The next `check` raises the exception of a request that arrived in it."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1


@dataclass(frozen=True)
class Context:
    """The context of an operation. `operation` is its id; empty for reads and dry runs."""

    request: AnyRequest
    paths: HostPaths
    store: Store
    system: System
    emit: Callable[[Event], None]
    environ: Mapping[str, str]
    asker: Requester = field(default_factory=Requester)
    operation: str = ""
    beat: Callable[[], None] = lambda: None
    """Send a heartbeat while there are no events. Raises if the connection is closed."""
    cancellation: Cancellation = field(default_factory=Cancellation)

    def registry(self) -> Registry:
        return self.store.registry.read()

    def usable_registry(self) -> Registry:
        """Return the registry for a change. Raises `Refused` if it could not be written later."""
        registry = self.store.registry
        return registry.read_usable() if self.request.dry_run else registry.check_writable()

    def warn_if_unusable(self, registry: Registry) -> MlxopsError | None:
        """If the registry cannot be used, warn, and return the error that every change would get; else return None."""
        if not registry.unwritable:
            return None
        error = self.store.registry.refusal(registry)
        self.note(f"{error.message}: {error.why}; {error.marked_hint}", "warning")
        return error

    def engine(self, target: ModelRef) -> tuple[Engine, EngineCommand]:
        """Return the engine for a target, and its command. Raises `Refused` (unknown_engine, engine_not_found)."""
        from mlxops.agent.engines import engine_named

        settings = self.paths.settings
        engine = engine_named((target.entry.engine if target.entry else None) or settings.engine)
        return engine, engine.find_command(settings.launch.get(engine.name, ()), self.engine_environ)

    @property
    def engine_environ(self) -> Mapping[str, str]:
        """The environment for finding engines and for asking them for their options."""
        return {**self.environ, **self.paths.settings.env}

    @property
    def drain(self) -> float:
        """Seconds that open requests get before they are cut off."""
        seconds = self.request.drain if isinstance(self.request, Draining) else None
        return DRAIN_SECONDS if seconds is None else seconds

    @property
    def kill(self) -> bool:
        """Whether a server may be killed, whatever memory it holds."""
        return isinstance(self.request, Stopping) and self.request.kill

    def observe(self, registry: Registry, *, only: Iterable[int] | None = None) -> World:
        own = self.operation or None
        return observe(self.paths, self.store, registry, self.system, own=own, only=only, environ=self.environ)

    def registry_and_world(self) -> tuple[Registry, World]:
        """Return the registry and the ports as they were at one moment.

        A load or unload that runs during the observation changes both. An earlier and a later reading would then differ
        without any drift. So observe again, up to `MAX_OBSERVATIONS` times.
        """
        for _ in range(MAX_OBSERVATIONS):
            versions = self.store.file_versions()
            registry = self.registry()
            world = self.observe(registry)
            if self.store.file_versions() == versions and not any(view.half_changed for view in world.ports.values()):
                break
        return registry, world

    def observe_port(self, port: int) -> PortView:
        """Return what is on a port now. Results report this, not what was planned."""
        return self.observe(self.registry(), only=[port]).ports[port]

    def note(self, message: str, level: str = "info") -> None:
        self.emit(Note.of(message, level))

    def remember(self, **record: object) -> None:
        """Append a record to the history. If that fails, warn; the operation has not failed."""
        try:
            self.store.append_history(operation=self.operation, by=str(self.asker), **record)
        except OSError as error:
            self.note(f"the history could not be written: {describe_error(error)}", "warning")

    def history(self) -> list[dict[str, object]]:
        """Return the history's records, oldest first. If it cannot be read, warn and return none: servers that the
        registry assigns can still be started."""
        return self._read(self.store.history)

    def findings(self, command: str) -> list[dict[str, object]]:
        """Return what earlier runs of `measure` or `probe` noted, oldest first; none, with a warning, if it cannot be
        read."""
        return self._read(lambda: self.store.findings(command))

    def _read(self, records: Callable[[], list[dict[str, object]]]) -> list[dict[str, object]]:
        try:
            return records()
        except OSError as error:
            self.note(f"the history could not be read: {describe_error(error)}", "warning")
            return []

    def holder(self, port: int | None = None) -> Operation:
        """Return the description of this operation for the locks that it holds."""
        subject = self.request.subject
        return Operation(
            id=self.operation,
            command=self.request.name,
            model=subject.model,
            port=port,
            asker=str(self.asker),
            since=utc_now(),
            repo=subject.repo,
        )

    def with_request(self, request: AnyRequest) -> Context:
        """Return this context with another request."""
        return replace(self, request=request)

    def reserved(self) -> dict[int, Operation]:
        """Return the other operations that reserve memory for a server they are about to start, by port."""
        reserving = {}
        for port in self.paths.settings.ports:
            with contextlib.suppress(OSError):  # if a lock cannot be read, no operation can hold it either
                holder = self.store.holder(memory_lock(port))
                if holder is not None and holder.id != self.operation:
                    reserving[port] = holder
        return reserving

    @contextmanager
    def hold_port(self, port: int, *more: str) -> Iterator[None]:
        """Hold the lock of a port, and `more` locks. A dry run takes none. Raises `Busy`, which names the holder."""
        with ExitStack() as stack:
            for name in (f"port-{port}", *more):
                stack.enter_context(self.hold_lock(name, port))
            yield

    @contextmanager
    def hold_lock(self, name: str, port: int | None = None) -> Iterator[None]:
        """Hold one lock. A dry run takes none.

        Raises `Busy`. If the holder carries out the same request, `details.attach` is its id: follow that operation.
        """
        if self.request.dry_run:
            yield
            return
        held = self.store.lock(name, self.holder(port))
        if isinstance(held, Operation):
            raise busy(name, held, attach=self.is_same_request(held, port))
        try:
            if held.abandoned is not None:
                self._settle(held.abandoned)
            yield
        finally:
            held.release()

    def _settle(self, abandoned: Operation) -> None:
        """Repair the state that an interrupted operation left."""
        settled = recovery.settle(self.store, abandoned.id, abandoned.port, by=self.operation)
        if settled is not None:
            self.note(f"{settled}; this operation takes over what it left", "warning")

    def is_same_request(self, other: Operation, port: int | None) -> bool:
        """Return whether another operation carries out the same request. `port` None: on any port."""
        journal = find_operation(self.store.state / "ops", other.id)
        try:
            theirs = journal.request().request if journal else None
        except (OSError, ValueError):
            return False
        from mlxops.core.commands.load import Load

        request = self.request
        if not isinstance(request, Load) or not isinstance(theirs, Load):
            return theirs == request
        if not set(request.require) <= set(theirs.require) or request.expect not in (None, theirs.expect):
            return False
        any_port = port is None or request.port == names.AUTO
        return other.model == request.model and (any_port or other.port == port) and self._is_same_repo(other)

    def _is_same_repo(self, other: Operation) -> bool:
        """Return whether another load is of the requested repository, or none is requested."""
        wanted = self.request.subject.repo
        if wanted is None or wanted == other.repo:
            return True
        entry = self.registry().named(other.model or "")
        if other.repo is not None or entry is None:
            return False
        repo_id, revision = names.repo(wanted)
        return entry.repo_id == repo_id and revision in (None, entry.revision)


def model_lock(name: str) -> str:
    """Return the name of the lock for starting or stopping a model, or deleting its files: model-org--name."""
    return f"model-{name.replace('/', '--')}"


def memory_lock(port: int) -> str:
    """Return the name of the lock that reserves memory for the next server on a port."""
    return f"memory-{port}"


def repo_lock(repo_id: str) -> str:
    """Return the name of the lock for downloading a repository, or deleting its files."""
    return f"repo-{repo_id.replace('/', '--')}"


def busy(lock: str, holder: Operation, *, attach: bool = False) -> Busy:
    """Return the error for a lock that another operation holds. `lock`: its name, such as port-8100."""
    kind, _, name = lock.partition("-")
    held = f"holds {kind} {name.replace('--', '/')}" if name else "does the same"
    return Busy(
        "busy",
        f"another operation {held}: {holder}",
        why="only one operation at a time may use a port or a model",
        hint=f"wait for it: `mlxctl ops --follow {holder.id}`",
        details={"operation": holder.id, "lock": lock} | ({"attach": holder.id} if attach else {}),
    )
