"""The agent: one request on standard input, events on standard output.

python -P -m mlxops.agent               serve requests until standard input is closed
python -P -m mlxops.agent --build       print this build's id
python -P -m mlxops.agent --restore S   run `restore` at boot; S is the state folder
python -P -m mlxops.agent --keeper S    run the keeper
python -P -m mlxops.agent --keeper-pass S A [DEATH]
                                        run a pass of the keeper; A is the descriptor for its answer
python -P -m mlxops.agent --worker D L  run the worker of an operation; D is its record, L the descriptor of its lock
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from mlxops import __version__
from mlxops.agent.agreement import agree, check_agreement, replace_agreement, saved_paths
from mlxops.agent.paths import HostPaths, folder_closed, host_paths, settings_differ
from mlxops.agent.state.locks import NoLocks, flock_within
from mlxops.agent.state.store import Store
from mlxops.common.build import build_id
from mlxops.common.files import is_hosts_fault
from mlxops.core.command import Stopping, UnknownCommandError
from mlxops.core.errors import AgentProblem, Bug, Busy, Interrupted, MlxopsError, Refused, bug, error_from_wire
from mlxops.core.protocol import (
    AGAIN,
    HEARTBEAT,
    MAX_LINE,
    Done,
    Envelope,
    Event,
    Failed,
    Hello,
    Note,
    Started,
    decode_envelope,
    encode_event,
)
from mlxops.core.settings import Settings

if TYPE_CHECKING:
    from mlxops.agent.state.operation_log import OperationLog

GC_THRESHOLD = 50_000
"""New objects before a garbage collection. The default (700) collects about a hundred times at start-up, and frees
nothing."""
BEAT_SECONDS = 5.0
"""Interval of heartbeats, which are empty lines, while there are no events."""
STAMP = f"{sys.prefix}/installed.json"
"""Written by `install.py`."""
MAX_REQUEST = 1024 * 1024
AWAY_SECONDS = 15
"""End if the control node sends no heartbeat for so long. If its machine or network fails, the connection may stay open
without an error."""
READ_SECONDS = 60
"""Time limit of one repeated read, with sending its result. No repeatable command takes that long."""


def main(argv: list[str]) -> int:
    gc.set_threshold(GC_THRESHOLD)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # it is None if it was closed
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # overrides PYTHONIOENCODING
    match argv:
        case []:
            os.umask(0o077)
            _use_build()
            return _serve_connection()
        case ["--build"]:
            _write(build_id())
            return 0
        case ["--worker", folder, lock]:
            _use_build()
            from mlxops.agent.worker import run

            status = run(Path(folder), int(lock))
            sys.stderr.flush()
            # Do not wait for threads: one of a cancelled download may hang on an unresponsive hub.
            os._exit(status)
        case ["--restore", state]:
            from mlxops.agent.boot_restore import run as restore

            return restore(Path(state))
        case ["--keeper", state]:
            _use_build()
            from mlxops.agent.keeper import run as keep

            return keep(Path(state))
        case ["--keeper-pass", state, answer, *death]:
            _use_build()
            from mlxops.agent.keeper_pass import run as keep_once

            return keep_once(Path(state), int(answer), *death)
    sys.stderr.write("mlxops.agent is run by mlxops, not by hand\n")
    return 2


def _use_build() -> None:
    """Hold a shared lock on this build's stamp until this process ends, so that deploy does not prune the build."""
    try:
        fd = os.open(STAMP, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return  # not deployed but installed in another way
    # Without locks, deploy fails before it prunes builds.
    with contextlib.suppress(NoLocks):
        flock_within(fd, shared=True)  # a deploy that probes the lock holds it for an instant


def _deploy_note() -> str:
    """Return " (deployed by ... at ...)"; empty if this build was not deployed."""
    try:
        stamp = json.loads(Path(STAMP).read_text())
        return f" (deployed by {stamp['by']} at {stamp['at']})"
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _serve_connection() -> int:
    try:
        _emit(Hello(__version__, build_id()))
        return _report_errors(_serve_requests)
    except BrokenPipeError:
        # The connection is closed. A worker continues without this process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except KeyboardInterrupt:
        return 130


def _report_errors(action: Callable[[], int]) -> int:
    """Return the exit status of `action`. If it raises an exception, emit that as the last event."""
    try:
        return action()
    except BrokenPipeError:
        raise
    except MlxopsError as error:
        _emit(Failed(error))
        return int(error.exit)
    except Exception as error:  # noqa: BLE001 - the boundary of the agent
        from traceback import format_exc

        failure = folder_closed(error, error.filename) if is_hosts_fault(error) else bug(error, format_exc())
        _emit(Failed(failure))
        return int(failure.exit)


def _serve_requests() -> int:
    envelope = _read_request()
    _check_build(envelope)
    status = _report_errors(lambda: _dispatch(envelope))
    while envelope.request.repeatable and _wait_for_repeat():
        status = _report_errors(lambda: _dispatch(envelope))
    return status


def _wait_for_repeat() -> bool:
    """Wait until the control node repeats its request. Return False if it closes the connection.

    If it is silent for too long, the alarm ends this process. A repeatable command changes nothing, so there is nothing
    to clean up.
    """
    from signal import alarm

    line = HEARTBEAT
    while line == HEARTBEAT:
        alarm(AWAY_SECONDS)
        line = sys.stdin.buffer.readline(MAX_REQUEST)
    alarm(READ_SECONDS)
    return line == AGAIN


def _dispatch(envelope: Envelope) -> int:
    paths = host_paths(envelope.settings, os.environ)
    store = Store(paths.state, paths.registry)
    request = envelope.request
    if request.name == "agree":
        replace_agreement(store, paths)
        _emit(Done({"agreed": True}, request.name))
        return 0
    if envelope.agreed and (agreed := store.agreed_settings()) is not None:
        # `--local` without a hosts.yaml: use the settings that the host agreed to.
        envelope = replace(envelope, settings=agreed)
        paths = host_paths(agreed, os.environ)
        store = Store(paths.state, paths.registry)
    if request.acts:
        return _run_change(_with_kill_limit(envelope, agree(store, paths)), store)
    if request.changes:  # a dry run is refused as the change would be
        check_agreement(store, paths)
    elif request.name != "doctor":  # it reports a disagreement as one of its findings
        paths = saved_paths(store, paths)
        store = Store(paths.state, paths.registry)
        if paths.differences and request.name != "status":  # it reports them as drift
            problem = settings_differ(paths.differences)
            _emit(Note.of(f"{problem.message}: {problem.why}; {problem.marked_hint}", "warning"))
    if request.name in {"follow", "cancel"}:
        return _follow_or_cancel(envelope, store)
    return _run_read(envelope, store, paths)


def _with_kill_limit(envelope: Envelope, agreed: Settings) -> Envelope:
    """Return the request with the settings that hold. Say so if the host's own kill_limit is the stricter one."""
    if (
        agreed.kill_limit
        and agreed.kill_limit != envelope.settings.kill_limit
        and isinstance(envelope.request, Stopping)
    ):
        from mlxops.core.text import amount

        text = f"kill_limit is {amount(agreed.kill_limit)}: the host has saved it, and hosts.yaml has no stricter one"
        _emit(Note.of(f"{text}; to save that of hosts.yaml: `mlxctl deploy`"))
    return replace(envelope, settings=agreed)


def _read_request() -> Envelope:
    data = sys.stdin.buffer.readline(MAX_REQUEST + 1)
    try:
        if len(data) > MAX_REQUEST:
            raise ValueError("the request is too long")
        return decode_envelope(data)
    except UnknownCommandError as error:
        raise Bug(
            "unknown_command",
            f"the agent knows no command {str(error)!r}",
            why=f"the control node has another version; the host has {build_id()}{_deploy_note()}",
            hint="make both sides equal: `mlxctl deploy`",
        ) from None
    except ValueError as error:
        raise AgentProblem(
            "protocol_mismatch",
            "the agent does not understand the request",
            why=str(error)[:200],
            hint="make both sides equal: `mlxctl deploy`",
        ) from None


def _check_build(envelope: Envelope) -> None:
    """Refuse a change if the control node has another build. For a read, only warn."""
    if envelope.build == build_id():
        return
    problem = AgentProblem(
        "agent_differs",
        "the agent on the host is not this mlxops",
        why=f"the host has {build_id()}{_deploy_note()}, this is {envelope.build}",
        hint="make both sides equal: `mlxctl deploy`",
    )
    if envelope.request.acts or envelope.request.name in {"agree", "cancel"}:
        raise problem
    _emit(Note.of(f"{problem.message}: {problem.why}; {problem.marked_hint}", "warning"))


def _run_read(envelope: Envelope, store: Store, paths: HostPaths) -> int:
    from mlxops.agent.context import Context
    from mlxops.agent.host.system import this_system
    from mlxops.agent.worker import finish

    beat = _Beat()
    context = Context(
        request=envelope.request,
        asker=envelope.asker,
        paths=paths,
        store=store,
        system=this_system(),
        emit=_emit,
        environ=dict(os.environ),
        beat=beat,
    )
    return finish(context, _emit)


def _run_change(envelope: Envelope, store: Store) -> int:
    """Start a worker and follow its record. If this request has started a worker before, only follow it."""
    from mlxops.agent.worker import begin

    journal, child = begin(store, envelope)
    final = _follow_or_attach(store, journal, envelope.heard)
    _emit(final)
    if child is not None:
        # Wait, because the worker holds its locks until it ends, a moment after its result.
        child.wait()
    return _exit_status(final)


def _follow_or_cancel(envelope: Envelope, store: Store) -> int:
    """Follow a running operation from where the control node left it, or cancel it."""
    from mlxops.agent.operations.ops import CancelRequest, find
    from mlxops.core.commands.cancel import Cancel
    from mlxops.core.commands.follow import Follow

    request = envelope.request
    assert isinstance(request, Follow | Cancel)
    journal = find(store, request.operation)
    if isinstance(request, Cancel):
        final = _relay_events(journal, skip=sys.maxsize, on_idle=CancelRequest(journal))
        final = _cancel_outcome(journal.id, final)
        _emit(final)
        return _exit_status(final)
    until = None if request.timeout is None else time.monotonic() + request.timeout
    final = _follow_or_attach(store, journal, envelope.heard, until)
    _emit(final)
    return _exit_status(final)


def _cancel_outcome(operation: str, final: Done | Failed) -> Done | Failed:
    """Return the result of a request to cancel.

    It is an error if the operation ended with another one, left something, or did not get the old server back.
    """
    from mlxops.core import wire
    from mlxops.core.commands.cancel import Cancel, CancelResult

    error = final.error if isinstance(final, Failed) else None
    details = error.details if isinstance(error, Interrupted) else {}
    outcome = str(details.get("previous", ""))
    worse = details.get("left") or details.get("not_restarted")
    if error is None or (isinstance(error, Interrupted) and worse is None):
        result = CancelResult(operation, cancelled=error is not None, changed=True, outcome=outcome)
        return Done(wire.encode(result), Cancel.name)
    error = error_from_wire(worse) if isinstance(worse, dict) else error
    ended = f"with this, operation {operation} ended when it was cancelled"
    error.why = "; ".join(filter(None, [error.why, outcome, ended]))
    return Failed(error)


def _exit_status(final: Done | Failed) -> int:
    return int(final.error.exit) if isinstance(final, Failed) else 0


def _follow_or_attach(store: Store, journal: OperationLog, skip: int, until: float | None = None) -> Done | Failed:
    """Follow an operation. If it ends because the same request runs already, follow that operation instead."""
    from mlxops.agent.state.operation_log import find_operation

    final = _relay_events(journal, skip, until=until)
    if isinstance(final, Failed) and isinstance(final.error, Busy):
        other = find_operation(store.state / "ops", str(final.error.details.get("attach", "")))
        if other is not None:
            _emit(Note(f"this is running already ({other.id}); following it"))
            return _relay_events(other, 0, until=until)
    return final


def _relay_events(
    journal: OperationLog, skip: int, on_idle: Callable[[], None] = lambda: None, until: float | None = None
) -> Done | Failed:
    """Emit the events of an operation's record after the first `skip`. Return the last event without emitting it.

    `on_idle` is called while there are no events. After the monotonic time `until`, return the operation's row of
    `ops` instead.
    """
    _emit(Started(journal.id))
    beat = _Beat()
    for event in journal.follow(skip):
        if isinstance(event, Done | Failed):
            return event
        if event is not None:
            _emit(event)
        else:
            beat()
            on_idle()
            if until is not None and time.monotonic() >= until:
                from mlxops.agent.operations.ops import row_of

                return row_of(journal)
    raise AssertionError("`follow` returned without a last event")


class _Beat:
    """Call it while there are no events. It sends a heartbeat every `BEAT_SECONDS`."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._last > BEAT_SECONDS:
            _write("")
            self._last = time.monotonic()


def _emit(event: Event) -> None:
    """Write an event. Raises `Refused` (result_too_long) for a line so long that the control node would skip it."""
    line = encode_event(event)
    if len(line) > MAX_LINE:
        raise Refused(
            "result_too_long",
            "the result is too long to be sent",
            why=f"it has {len(line)} bytes, and the limit is {MAX_LINE}: are there too many entries?",
            hint="the command itself was carried out; look at the registry on the host",
        )
    _write(line)


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    status = main(sys.argv[1:])
    gc.freeze()  # the interpreter collects garbage several times when it ends: a tenth of a `status`'s time
    sys.exit(status)
