"""The agent: one request on standard input, events on standard output.

python -P -m mlxops.agent             a request, its events; and again, as long as standard input stays open
python -P -m mlxops.agent --build     which code this is
python -P -m mlxops.agent --restore S   restore, without anybody who asks; S is the state folder
python -P -m mlxops.agent --worker D L  the worker of the operation whose record is D, its lock the descriptor L
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
from mlxops.agent.agreement import agree, check_agreement, replace_agreement
from mlxops.agent.paths import HostPaths, folder_closed, host_paths
from mlxops.agent.state.locks import NoLocks, flock_within
from mlxops.agent.state.store import Store
from mlxops.common.build import build_id
from mlxops.common.files import is_hosts_fault
from mlxops.core.errors import AgentProblem, Busy, MlxopsError, Refused, bug
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

if TYPE_CHECKING:
    from mlxops.agent.state.operation_log import OperationLog

GARBAGE = 50_000
"""Objects more than before, after which they are looked through for garbage: mostly never, and not a hundred times."""
BEAT_SECONDS = 5.0
"""How often an empty line says that the connection lives while there is nothing to tell."""
STAMP = f"{sys.prefix}/installed.json"
"""Written by `install.py`."""
MAX_REQUEST = 1024 * 1024
AWAY_SECONDS = 15
"""An asker that is there says so every few seconds; one whose machine or network has gone does not even hang up."""
LOOK_SECONDS = 60
"""Longer than any look takes that can be asked for again, and than its answer needs to be sent."""


def main(argv: list[str]) -> int:
    gc.set_threshold(GARBAGE)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # not where it was closed
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # whatever PYTHONIOENCODING says
    match argv:
        case []:
            os.umask(0o077)
            _use_build()
            return _answer()
        case ["--build"]:
            _write(build_id())
            return 0
        case ["--worker", folder, lock]:
            _use_build()
            from mlxops.agent.worker import run

            status = run(Path(folder), int(lock))
            sys.stderr.flush()
            # At once: a thread of a cancelled download may hang on a hub that says nothing.
            os._exit(status)
        case ["--restore", state]:
            from mlxops.agent.boot_restore import run as restore

            return restore(Path(state))
    sys.stderr.write("mlxops.agent is run by mlxops, not by hand\n")
    return 2


def _use_build() -> None:
    """A shared lock on this build's stamp, for as long as this process lives: deploy prunes no build that is in use."""
    try:
        fd = os.open(STAMP, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return  # not deployed but installed in another way
    # Without locks, deploy fails before it prunes builds.
    with contextlib.suppress(NoLocks):
        flock_within(fd, shared=True)  # a deploy that looks whether it is in use holds it for an instant


def _deployed() -> str:
    """Who has deployed this build and when, in parentheses; empty if nobody has."""
    try:
        stamp = json.loads(Path(STAMP).read_text())
        return f" (deployed by {stamp['by']} at {stamp['at']})"
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _answer() -> int:
    try:
        _emit(Hello(__version__, build_id()))
        return _told(_serve)
    except BrokenPipeError:
        # Nobody listens any more. A worker goes on without us.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except KeyboardInterrupt:
        return 130


def _told(serve: Callable[[], int]) -> int:
    """What `serve` returns; whatever it raises is told, as the last event."""
    try:
        return serve()
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


def _serve() -> int:
    envelope = _read_request()
    _agree_on_code(envelope)
    status = _told(lambda: _carry_out(envelope))
    while envelope.request.repeatable and _asked_again():
        status = _told(lambda: _carry_out(envelope))
    return status


def _asked_again() -> bool:
    """Wait for what the asker wants next; False when it has gone. One that is silent for too long has gone, too: then
    the alarm ends this process, wherever it is. It only looks, so there is nothing to clean up."""
    from signal import alarm

    line = HEARTBEAT
    while line == HEARTBEAT:
        alarm(AWAY_SECONDS)
        line = sys.stdin.buffer.readline(MAX_REQUEST)
    alarm(LOOK_SECONDS)
    return line == AGAIN


def _carry_out(envelope: Envelope) -> int:
    paths = host_paths(envelope.settings, os.environ)
    store = Store(paths.state, paths.registry)
    request = envelope.request
    if request.name == "agree":
        replace_agreement(store, paths)
        _emit(Done({"agreed": True}, request.name))
        return 0
    if envelope.agreed and (agreed := store.agreed_settings()) is not None:
        # `--local` without a hosts.yaml: the host knows itself best.
        envelope = replace(envelope, settings=agreed)
        paths = host_paths(agreed, os.environ)
        store = Store(paths.state, paths.registry)
    if request.acts:
        agree(store, paths)
        return _change(envelope, store)
    check_agreement(store, paths)
    if request.name in {"follow", "cancel"}:
        return _attach(envelope, store)
    return _look(envelope, store, paths)


def _read_request() -> Envelope:
    data = sys.stdin.buffer.readline(MAX_REQUEST + 1)
    try:
        if len(data) > MAX_REQUEST:
            raise ValueError("the request is too long")
        return decode_envelope(data)
    except ValueError as error:
        raise AgentProblem(
            "protocol_mismatch",
            "the agent does not understand the request",
            why=str(error)[:200],
            hint="make both sides equal: inv deploy",
        ) from None


def _agree_on_code(envelope: Envelope) -> None:
    """Changes are made only by the code that the asker has too; looking is allowed, and said."""
    if envelope.build == build_id():
        return
    problem = AgentProblem(
        "agent_differs",
        "the agent on the host is not this mlxops",
        why=f"the host has {build_id()}{_deployed()}, this is {envelope.build}",
        hint="make both sides equal: inv deploy",
    )
    if envelope.request.acts or envelope.request.name in {"agree", "cancel"}:
        raise problem
    _emit(Note(f"{problem.message}: {problem.why}; {problem.hint}", "warning"))


def _look(envelope: Envelope, store: Store, paths: HostPaths) -> int:
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


def _change(envelope: Envelope, store: Store) -> int:
    """Start a worker and follow its record. If this request has started one before, only follow."""
    from mlxops.agent.worker import begin

    journal, child = begin(store, envelope)
    final = _follow_same(store, journal, envelope.heard)
    _emit(final)
    if child is not None:
        # The result is out. The worker ends in a moment, and is the last to hold its locks.
        child.wait()
    return _status(final)


def _attach(envelope: Envelope, store: Store) -> int:
    """Follow a running operation from where the control node left it, or cancel it."""
    from mlxops.agent.operations.ops import Cancelling, find
    from mlxops.core import wire
    from mlxops.core.commands.cancel import Cancel, CancelResult
    from mlxops.core.commands.follow import Follow

    request = envelope.request
    assert isinstance(request, Follow | Cancel)
    journal = find(store, request.operation)
    if isinstance(request, Cancel):
        final = _follow(journal, heard=sys.maxsize, meanwhile=Cancelling(journal))
        result = CancelResult(journal.id, cancelled=isinstance(final, Failed), changed=True)
        _emit(Done(wire.encode(result), request.name))
        return 0
    final = _follow_same(store, journal, envelope.heard)
    _emit(final)
    return _status(final)


def _status(final: Done | Failed) -> int:
    return int(final.error.exit) if isinstance(final, Failed) else 0


def _follow_same(store: Store, journal: OperationLog, heard: int) -> Done | Failed:
    """Follow an operation; if it finds that the very same one runs already, follow that one."""
    from mlxops.agent.state.operation_log import find_operation

    final = _follow(journal, heard)
    if isinstance(final, Failed) and isinstance(final.error, Busy):
        other = find_operation(store.state / "ops", str(final.error.details.get("attach", "")))
        if other is not None:
            _emit(Note(f"this is running already ({other.id}); following it"))
            return _follow(other, 0)
    return final


def _follow(journal: OperationLog, heard: int, meanwhile: Callable[[], None] = lambda: None) -> Done | Failed:
    """Pass on the events of an operation's record; its last one is returned, not passed on. `meanwhile` is called
    while there is nothing to tell."""
    _emit(Started(journal.id))
    beat = _Beat()
    for event in journal.follow(heard):
        if isinstance(event, Done | Failed):
            return event
        if event is not None:
            _emit(event)
        else:
            beat()
            meanwhile()
    raise AssertionError("a record that is followed has an end")


class _Beat:
    """Called while there is nothing to tell; every few seconds it says that the connection lives."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._last > BEAT_SECONDS:
            _write("")
            self._last = time.monotonic()


def _emit(event: Event) -> None:
    """Raises `Refused` for what the asker would take for noise."""
    line = encode_event(event)
    if len(line) > MAX_LINE:
        raise Refused(
            "result_too_long",
            "the result is too long to be sent",
            why=f"it is {len(line)} bytes, and at most {MAX_LINE} are listened to: are there too many entries?",
            hint="what was asked was done all the same; look at the registry on the host itself",
        )
    _write(line)


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    status = main(sys.argv[1:])
    gc.freeze()  # the interpreter collects several times when it ends: a tenth of the time that a `status` takes
    sys.exit(status)
