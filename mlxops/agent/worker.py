"""The process that carries out one change, detached from the connection that asked for it.

It holds its operation's lock for as long as it lives and writes its events into the record; whoever asked only
follows that record. A broken connection, a closed terminal or a killed asker do not touch it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from mlxops.agent.agreement import confirm_agreement
from mlxops.agent.context import Cancellation, Context
from mlxops.agent.host.system import shortage, this_system
from mlxops.agent.operations import operation
from mlxops.agent.paths import folder_closed, host_paths
from mlxops.agent.state import operation_log as journals
from mlxops.agent.state.operation_log import OperationLog
from mlxops.agent.state.store import Store, disk_failed, state_failed, state_unreadable, state_unwritable
from mlxops.common.files import is_hosts_fault
from mlxops.core import wire
from mlxops.core.errors import Busy, Exit, MlxopsError, bug
from mlxops.core.protocol import Done, Envelope, Event, Failed
from mlxops.core.text import amount

if TYPE_CHECKING:
    import subprocess

CANCEL_POLL_SECONDS = 0.1


def begin(store: Store, request: Envelope) -> tuple[OperationLog, subprocess.Popen[bytes] | None]:
    """Start a worker for `request`; None if there is one for its ticket already.

    Raises `Refused` when the state folder cannot be written, `Busy` (operations_locked) when others stop half way.
    """
    store.create_folders()
    try:
        journal, lock = journals.create(store.state / "ops", request)
        if lock is None:
            return journal, None
        try:
            return journal, _start(journal, lock)
        except OSError:
            journal.discard()
            raise
    except OSError as error:
        raise state_unwritable(store.state, error) from None


def _start(journal: OperationLog, lock: int) -> subprocess.Popen[bytes]:
    import subprocess

    try:
        with open(journal.folder / "stderr", "xb") as errors:
            return subprocess.Popen(
                [_own_python(), "-P", "-m", "mlxops.agent", "--worker", str(journal.folder), str(lock)],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                cwd="/",
                start_new_session=True,
                pass_fds=(lock,),
            )
    finally:
        os.close(lock)  # from now on it is the worker's alone


def _own_python() -> str:
    """This build's interpreter by its own path: `<state>/venv` may lead to another build before the worker ends, and
    the worker imports what it needs when it needs it."""
    if sys.prefix == sys.base_prefix:
        return sys.executable
    return str(Path(sys.prefix).resolve() / "bin" / Path(sys.executable).name)


def run(folder: Path, lock: int) -> int:
    """The worker itself: `python -m mlxops.agent --worker FOLDER LOCK`. Its result is the last event of the record.

    `lock` is the descriptor of the record's lock, held until the end; nothing that `subprocess` starts inherits it.
    """
    from mlxops.agent.host import process_setup

    process_setup.reset_inherited_settings()
    os.umask(0o077)
    journal = OperationLog(folder)
    try:
        emit = journal.emitter()
    except OSError:
        return int(Exit.REFUSED)  # nobody would hear what becomes of it, so nothing is begun
    cancellation = Cancellation()

    def end(number: int, frame: FrameType | None) -> None:
        journal.clear_cancel()
        cancellation.wish()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGUSR1, lambda number, frame: cancellation.take_out(journal.excluded_ports))
    # Not SIG_IGN, which the server would inherit.
    signal.signal(signal.SIGHUP, lambda number, frame: None)
    threading.Thread(target=_watch_for_cancel, args=(journal,), daemon=True).start()
    request = journal.request()
    # Which hub a host downloads from is one of its settings: a session over SSH reads no profile that could name it.
    os.environ |= {key: value for key, value in request.settings.env.items() if key == "HF_ENDPOINT"}
    paths = host_paths(request.settings, os.environ)
    context = Context(
        request=request.request,
        asker=request.asker,
        paths=paths,
        store=Store(paths.state, paths.registry),
        system=this_system(),
        emit=emit,
        environ=dict(os.environ),
        operation=journal.id,
        cancellation=cancellation,
    )
    _cut_logs(context)
    return finish(context, emit)


def _cut_logs(context: Context) -> None:
    """Servers write for months: whoever changes something looks whether a log has become too big."""
    from mlxops.agent.serving import logs

    with contextlib.suppress(OSError, Busy):
        for log, size in logs.too_big(context.store.state / "logs"):
            if logs.cut(log):
                context.note(f"cut {log}: it had {amount(size)}; its end is in {log.name}.1")


def finish(context: Context, emit: Callable[[Event], None]) -> int:
    """Carry out the request of `context`; its outcome becomes one event and the exit status."""
    outcome: Done | Failed
    try:
        with context.cancellation.open():
            if context.operation:
                confirm_agreement(context.store, context.paths)
            result = operation(context.request.name)(context, context.request)
            outcome = Done(wire.encode(result), context.request.name)
    except MlxopsError as error:
        outcome = Failed(error)
    except Exception as error:  # noqa: BLE001 - the boundary: what nobody foresaw is a bug, and is told as one
        outcome = Failed(_told(error, context.store))
    emit(outcome)
    return int(outcome.error.exit) if isinstance(outcome, Failed) else 0


def _told(error: Exception, store: Store) -> MlxopsError:
    """A disk that fails where nobody looked for it is the disk's fault, a strange thing in the state folder that of
    whoever put it there, and a host that has no descriptor left the host's; all else is ours."""
    from traceback import format_exc

    elsewhere = is_hosts_fault(error) and not _is_of(error, store.state)
    if disk_failed(error) and not elsewhere:
        return state_unwritable(store.state, error)
    if state_failed(error, store.state):
        return state_unreadable(Path(os.fsdecode(error.filename)), error)
    if is_hosts_fault(error):
        return folder_closed(error, error.filename)
    return shortage(error) or bug(error, format_exc())


def _is_of(error: OSError, folder: Path) -> bool:
    return Path(os.fsdecode(error.filename)).is_relative_to(folder)


def _watch_for_cancel(journal: OperationLog) -> None:
    """Turns wishes, which are files so that they need no pid, into the signals that the main thread hears. The one to
    end each time, since whoever waits for the end asks again whether it is still heard."""
    never = threading.Event()
    out = frozenset[int]()
    while not never.wait(CANCEL_POLL_SECONDS):
        if journal.cancel_requested:
            os.kill(os.getpid(), signal.SIGTERM)
        if journal.excluded_ports != out:
            out = journal.excluded_ports
            os.kill(os.getpid(), signal.SIGUSR1)
