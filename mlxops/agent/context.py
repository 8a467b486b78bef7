"""What every operation works with, and how it holds the ports that it touches."""

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
from mlxops.core.command import AnyRequest, Draining
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
"""The lock of the one restore that may run."""
LOOKS = 4
"""What changes that often while we look is told as it was seen last."""


class TakenOut(Interrupted):
    """Of an operation on several ports, the part on this one is not wanted any more."""


class Cancellation:
    """Somebody's wish that the operation ends, or that it leaves a port alone: raised at once in the worker's main
    thread while it is `open`, but never twice, because what follows is the cleaning up, and not within a `shield`."""

    def __init__(self) -> None:
        self._wished = self._raised = self._open = False
        self._shields = 0
        self._part: int | None = None
        self._taken_out = frozenset[int]()

    @property
    def wished(self) -> bool:
        return self._wished

    def wish(self) -> None:
        """Called from a signal's handler."""
        self._wished = True
        self.check()

    def take_out(self, ports: frozenset[int]) -> None:
        """Called from a signal's handler."""
        self._taken_out = ports
        self.check()

    def check(self) -> None:
        """Raises `Interrupted` (cancelled), or `TakenOut`, if there is a wish that was not heard yet."""
        if not self._open or self._raised or self._shields:
            return
        if self._wished:
            self._raised = True
            raise Interrupted(
                "cancelled",
                "the operation was cancelled",
                why="somebody asked for it, or the host is shutting down",
                hint="mlxctl status",
            )
        if self._part in self._taken_out:
            self._raised = True
            raise TakenOut("taken_out", f"port {self._part} was taken out of the operation")

    @contextmanager
    def part(self, port: int) -> Iterator[None]:
        """What is in it is done for `port`, and ends alone if that is taken out."""
        self._part = port
        try:
            self.check()
            yield
        except TakenOut:
            # It is cleaned up by now: the next wish may be heard.
            self._raised = False
            raise
        finally:
            self._part = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """While the operation runs. A wish that comes when it has its result, and only has to tell it, is too late."""
        self._open = True
        try:
            self.check()
            yield
        finally:
            self._open = False

    @contextmanager
    def shield(self) -> Iterator[None]:
        """What is in it happens as a whole. A wish that comes meanwhile is heard at the next `check`."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1


@dataclass(frozen=True)
class Context:
    """What an operation works with. `operation` is its id; empty for reads and dry runs."""

    request: AnyRequest
    paths: HostPaths
    store: Store
    system: System
    emit: Callable[[Event], None]
    environ: Mapping[str, str]
    asker: Requester = field(default_factory=Requester)
    operation: str = ""
    beat: Callable[[], None] = lambda: None
    """Says that the connection lives, now and then, while there is nothing to tell; raises if nobody listens."""
    cancellation: Cancellation = field(default_factory=Cancellation)

    def registry(self) -> Registry:
        return self.store.registry.read()

    def usable_registry(self) -> Registry:
        """For a change. Raises `Refused` before anything is done if it could not be written in the end."""
        registry = self.store.registry
        return registry.read_usable() if self.request.dry_run else registry.check_writable()

    def warn_if_unusable(self, registry: Registry) -> MlxopsError | None:
        """Return the error with which every change is refused, if the registry cannot be used; warn of it."""
        if not registry.unwritable:
            return None
        error = self.store.registry.refusal(registry)
        self.note(f"{error.message}: {error.why}; {error.hint}", "warning")
        return error

    def engine(self, target: ModelRef) -> tuple[Engine, EngineCommand]:
        """Return the engine for a target, and its command. Raises `Refused` (unknown_engine, engine_not_found)."""
        from mlxops.agent.engines import engine_named

        settings = self.paths.settings
        engine = engine_named((target.entry.engine if target.entry else None) or settings.engine)
        return engine, engine.find_command(settings.launch.get(engine.name, ()), self.engine_environ)

    @property
    def engine_environ(self) -> Mapping[str, str]:
        """The environment in which engines are looked for and asked."""
        return {**self.environ, **self.paths.settings.env}

    @property
    def drain(self) -> float:
        """Seconds that open requests get."""
        seconds = self.request.drain if isinstance(self.request, Draining) else None
        return DRAIN_SECONDS if seconds is None else seconds

    def observe(self, registry: Registry, *, only: Iterable[int] | None = None) -> World:
        own = self.operation or None
        return observe(self.paths, self.store, registry, self.system, own=own, only=only, environ=self.environ)

    def look(self) -> tuple[Registry, World]:
        """The registry, and life, as they were together. A load or unload that goes on while we look changes both: what
        was seen first then disagrees with what was read later, and that is no drift. So look again, a few times."""
        for _ in range(LOOKS):
            marks = self.store.file_versions()
            registry = self.registry()
            world = self.observe(registry)
            if self.store.file_versions() == marks and not any(view.overtaken for view in world.ports.values()):
                break
        return registry, world

    def look_again(self, port: int) -> PortView:
        """What is on a port now: a result tells what is there, not what was meant."""
        return self.observe(self.registry(), only=[port]).ports[port]

    def note(self, message: str, level: str = "info") -> None:
        self.emit(Note(message, level))

    def remember(self, **what: object) -> None:
        """The history is worth a warning, not a failure."""
        try:
            self.store.append_history(operation=self.operation, by=str(self.asker), **what)
        except OSError as error:
            self.note(f"the history could not be written: {describe_error(error)}", "warning")

    def history(self) -> list[dict[str, object]]:
        """What was remembered, oldest first; one that cannot be read keeps nobody from starting what the registry
        assigns."""
        try:
            return self.store.history()
        except OSError as error:
            self.note(f"the history could not be read: {describe_error(error)}", "warning")
            return []

    def holder(self, port: int | None = None) -> Operation:
        """How this operation presents itself in the locks that it holds."""
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

    def doing(self, request: AnyRequest) -> Context:
        """Return the same operation with another request."""
        return replace(self, request=request)

    def reserved(self) -> dict[int, Operation]:
        """Other operations that keep memory free for what they are about to start, by port."""
        found = {}
        for port in self.paths.settings.ports:
            with contextlib.suppress(OSError):  # where that cannot be told, nobody can lock anything either
                held = self.store.holder(memory_lock(port))
                if held is not None and held.id != self.operation:
                    found[port] = held
        return found

    @contextmanager
    def locked(self, port: int, *more: str) -> Iterator[None]:
        """The locks of a port and of whatever else; raises `Busy` naming who holds one. None for a dry run."""
        with ExitStack() as stack:
            for name in (f"port-{port}", *more):
                stack.enter_context(self.alone(name, port))
            yield

    @contextmanager
    def alone(self, name: str, port: int | None = None) -> Iterator[None]:
        """One lock. Raises `Busy`; `details.attach` is then the operation to follow, if it is the very same wish."""
        if self.request.dry_run:
            yield
            return
        held = self.store.lock(name, self.holder(port))
        if isinstance(held, Operation):
            raise busy(name, held, attach=self.is_wanted_too(held, port))
        try:
            if held.abandoned is not None:
                self._settle(held.abandoned)
            yield
        finally:
            held.release()

    def _settle(self, left: Operation) -> None:
        settled = recovery.settle(self.store, left.id, left.port, by=self.operation)
        if settled is not None:
            self.note(f"{settled}; what it left is repaired", "warning")

    def is_wanted_too(self, other: Operation, port: int | None) -> bool:
        """Whether another operation does just what this one is to do; `port` None: wherever it does it."""
        journal = find_operation(self.store.state / "ops", other.id)
        try:
            asked = journal.request().request if journal else None
        except (OSError, ValueError):
            return False
        from mlxops.core.commands.load import Load

        request = self.request
        if not isinstance(request, Load) or not isinstance(asked, Load):
            return asked == request
        anywhere = port is None or request.port == names.AUTO
        return other.model == request.model and (anywhere or other.port == port) and self._is_of_its_repo(other)

    def _is_of_its_repo(self, other: Operation) -> bool:
        """Whether the repository that is asked for, if one is, is the one that another load is about."""
        asked = self.request.subject.repo
        if asked is None or asked == other.repo:
            return True
        entry = self.registry().named(other.model or "")
        if other.repo is not None or entry is None:
            return False
        repo_id, revision = names.repo(asked)
        return entry.repo_id == repo_id and revision in (None, entry.revision)


def model_lock(name: str) -> str:
    """The lock of whoever starts or stops a model, or deletes its files, as model-org--name."""
    return f"model-{name.replace('/', '--')}"


def memory_lock(port: int) -> str:
    """The lock of whoever keeps memory free for what is about to serve on a port."""
    return f"memory-{port}"


def repo_lock(repo_id: str) -> str:
    """The lock of whoever downloads a repository, or deletes its files."""
    return f"repo-{repo_id.replace('/', '--')}"


def busy(lock: str, holder: Operation, *, attach: bool = False) -> Busy:
    """`lock`: its name, as port-8100, or as `model_lock` and `repo_lock` make them."""
    kind, _, name = lock.partition("-")
    held = f"holds {kind} {name.replace('--', '/')}" if name else "does the same"
    return Busy(
        "busy",
        f"another operation {held}: {holder}",
        why="one operation at a time on a port, and with a model",
        hint=f"wait for it: mlxctl ops --follow {holder.id}",
        details={"operation": holder.id, "lock": lock} | ({"attach": holder.id} if attach else {}),
    )
