"""The worker: a process that carries out one change, detached from the connection that requested it.

It holds its operation's lock until it ends, and writes its events into the operation's record. The agent of the
connection only follows that record. So a broken connection, a closed terminal or a killed client does not stop it.
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
    """Start a worker for `request`. Return None for the worker if the request's ticket has one already.

    Raises `Refused` if the state folder cannot be written, and `Busy` (operations_locked) if another process keeps the
    lock of the operations' folder.
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
        os.close(lock)  # only the worker holds it now


def _own_python() -> str:
    """Return this build's interpreter by its real path.

    The worker imports modules late, and the link `<state>/venv` may point to another build before it ends.
    """
    if sys.prefix == sys.base_prefix:
        return sys.executable
    return str(Path(sys.prefix).resolve() / "bin" / Path(sys.executable).name)


def run(folder: Path, lock: int) -> int:
    """Run the worker: `python -m mlxops.agent --worker FOLDER LOCK`. Its result is the last event of the record.

    `lock` is the descriptor of the record's lock, held until the end. Child processes do not inherit it.
    """
    from mlxops.agent.host import process_setup

    process_setup.reset_inherited_settings()
    os.umask(0o077)
    journal = OperationLog(folder)
    try:
        emit = journal.emitter()
    except OSError:
        return int(Exit.REFUSED)  # without a record the result would be lost, so begin nothing
    cancellation = Cancellation()

    def cancel(number: int, frame: FrameType | None) -> None:
        journal.clear_cancel()
        cancellation.request()

    signal.signal(signal.SIGTERM, cancel)
    signal.signal(signal.SIGUSR1, lambda number, frame: cancellation.exclude(journal.excluded_ports))
    # Not SIG_IGN, which the server would inherit.
    signal.signal(signal.SIGHUP, lambda number, frame: None)
    threading.Thread(target=_watch_for_cancel, args=(journal,), daemon=True).start()
    request = journal.request()
    # The hub's address is a setting of the host: an SSH session reads no profile that could set it.
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
    """Cut server logs that are too big. Servers run for months, so every change checks this."""
    from mlxops.agent.serving import logs

    with contextlib.suppress(OSError, Busy):
        for log, size in logs.too_big(context.store.state / "logs"):
            if logs.cut(log):
                context.note(f"cut {log}: it had {amount(size)}; its end is in {log.name}.1")


def finish(context: Context, emit: Callable[[Event], None]) -> int:
    """Carry out the request of `context`. Emit the outcome as the last event, and return the exit status."""
    outcome: Done | Failed
    try:
        with context.cancellation.open():
            if context.operation:
                confirm_agreement(context.store, context.paths)
            result = operation(context.request.name)(context, context.request)
            outcome = Done(wire.encode(result), context.request.name)
    except MlxopsError as error:
        outcome = Failed(error)
    except Exception as error:  # noqa: BLE001 - the boundary: report unexpected exceptions, too
        outcome = Failed(classify_error(error, context.store))
    emit(outcome)
    return int(outcome.error.exit) if isinstance(outcome, Failed) else 0


def classify_error(error: Exception, store: Store) -> MlxopsError:
    """Return the error to report for an unexpected exception.

    Failing disks, strange files in the state folder, closed folders, and a lack of descriptors or memory are the
    host's fault. Everything else is a bug in mlxops.
    """
    from traceback import format_exc

    elsewhere = is_hosts_fault(error) and not _is_in(error, store.state)
    if disk_failed(error) and not elsewhere:
        return state_unwritable(store.state, error)
    if state_failed(error, store.state):
        return state_unreadable(Path(os.fsdecode(error.filename)), error)
    if is_hosts_fault(error):
        return folder_closed(error, error.filename)
    return shortage(error) or bug(error, format_exc())


def _is_in(error: OSError, folder: Path) -> bool:
    return Path(os.fsdecode(error.filename)).is_relative_to(folder)


def _watch_for_cancel(journal: OperationLog) -> None:
    """Turn requests to cancel, or to exclude ports, into signals for the main thread.

    Requests are files, so that they need no pid. A request to cancel is signalled each time: `ops --cancel` repeats it
    to check that this worker still responds.
    """
    never = threading.Event()
    excluded = frozenset[int]()
    while not never.wait(CANCEL_POLL_SECONDS):
        if journal.cancel_requested:
            os.kill(os.getpid(), signal.SIGTERM)
        if journal.excluded_ports != excluded:
            excluded = journal.excluded_ports
            os.kill(os.getpid(), signal.SIGUSR1)
