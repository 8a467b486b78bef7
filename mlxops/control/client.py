"""Send one request to one host or to many, pass on their events, and return their replies."""

from __future__ import annotations

import getpass
import ipaddress
import math
import os
import re
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, cast

from mlxops.common.build import build_id
from mlxops.control.channel import NOISE_BYTES, ConnectionLost, Ended, ReadLimits, Session, Transport, events
from mlxops.control.hints import aimed, aimed_event
from mlxops.core import wire
from mlxops.core.command import AnyRequest, Request, request_type
from mlxops.core.errors import AgentProblem, MlxopsError, OutcomeUnknown, Unreachable
from mlxops.core.frozen import dataclass
from mlxops.core.protocol import (
    Done,
    Envelope,
    Event,
    Failed,
    Hello,
    LogLine,
    Note,
    Reached,
    Requester,
    Started,
    short_name,
)
from mlxops.core.replies import HostReply as HostReply
from mlxops.core.settings import Settings

if TYPE_CHECKING:
    from mlxops.control.deploy import DeployOptions
    from mlxops.core.commands.deploy import DeployResult

R = TypeVar("R")
SILENCE_SECONDS = 30.0
"""Limit for an agent's silence. It sends something every five seconds while it follows an operation."""
GATEWAY_SECONDS = 3.0
RECONNECT_SECONDS = 120.0
"""How long to reconnect after the last event, if the connection broke during a change or `logs --follow`."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0
"""Seconds between two tries."""
_SCARCE = re.compile(
    r"Too many open files|Cannot allocate memory|Resource temporarily unavailable|MemoryError|out of memory",
    re.IGNORECASE,
)
"""Last messages of Python and shells that lacked a descriptor, memory or a process."""
_NO_SHELL = re.compile(r"restricted|not available|sftp connections only", re.IGNORECASE)
"""Last messages of login shells and forced commands that run nothing."""
PASSING = frozenset({"host_down", "connection_refused", "connection_timeout"})
"""Codes of unreachable hosts that may be temporary."""


@dataclass(frozen=True)
class HostTarget:
    """A host to ask. `ssh` None means this machine itself."""

    name: str
    ssh: str | None
    python: tuple[str, ...]
    settings: Settings
    agreed: bool = False
    """There is no configuration here. The host uses the settings that it has saved."""
    flags: str = ""
    """What a suggested command needs to go to this host, such as " --host studio2"; "" if it needs nothing."""


Listen = Callable[[str, Event], None]
"""Called with the host's name and an event, from the thread of that host."""


def local_python() -> tuple[str, ...]:
    return (sys.executable,)


def this_asker() -> Requester:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = "?"
    return Requester(user, socket.gethostname(), short_name(os.environ.get("MLXOPS_BY", "")))


def ask(target: HostTarget, request: Request[R], listen: Listen) -> HostReply[R]:
    """Send one request to one host. An error of the host or the network is part of the reply."""
    return _reply(target, request, _Conversation(target, request, listen))


def start(target: HostTarget, request: Request[R], listen: Listen) -> HostReply[R]:
    """Ask one host for a change, and return once the host has named the operation."""
    return _reply(target, request, _Conversation(target, request, listen, detach=True))


def _reply(target: HostTarget, request: Request[R], conversation: _Conversation) -> HostReply[R]:
    try:
        done = conversation.result()
        if isinstance(done, Started):
            return HostReply(target.name, flags=target.flags, operation=done.operation)
        followed = done.command not in ("", request.name)
        kind = request_type(done.command).result if followed else request.result
        result = cast("R", decoded(target, kind, done.result))
    except MlxopsError as error:
        return HostReply(target.name, error=error, flags=target.flags)
    return HostReply(
        target.name,
        result,
        command=done.command or ("" if request.name == "follow" else request.name),
        flags=target.flags,
    )


def decoded(target: HostTarget, kind: type, result: Mapping[str, object]) -> object:
    """Return the result as a `kind`. Raises `AgentProblem` if it is not one."""
    try:
        return wire.decode(kind, result)
    except wire.DecodeError as error:
        raise AgentProblem(
            "protocol_mismatch",
            f"the result of {target.name} cannot be understood",
            why=str(error)[:300],
            hint=aimed("make both sides equal: `mlxctl deploy`", target.flags),
        ) from None


def ask_all(targets: Sequence[HostTarget], request: Request[R], listen: Listen) -> tuple[HostReply[R], ...]:
    """Send the same request to every host at once; return the replies in the order of `targets`."""
    if len(targets) == 1:
        return (ask(targets[0], request, listen),)
    answers: dict[int, HostReply[R]] = {}
    broken: list[BaseException] = []

    def one(index: int, target: HostTarget) -> None:
        try:
            answers[index] = ask(target, request, listen)
        except BaseException as error:  # noqa: BLE001 - carried to the main thread, which is the boundary
            broken.append(error)

    if any(target.ssh for target in targets):
        from mlxops.control.ssh.connection import import_libraries

        import_libraries()
    build_id()  # Cached. Threads that come at the same time would all compute it.
    threads = [threading.Thread(target=one, args=row, daemon=True) for row in enumerate(targets)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if broken:
        raise broken[0]
    return tuple(answers[index] for index in range(len(targets)))


def deploy(target: HostTarget, listen: Listen, options: DeployOptions) -> HostReply[DeployResult]:
    """Install this tree's agent on the host, then save the host's settings there.

    After a rollback to another build, do not save them: that build takes settings only from its own control node.
    """
    from mlxops.control.deploy import install
    from mlxops.control.inventory import Host
    from mlxops.core.commands.agree import Agree
    from mlxops.core.commands.deploy import DeployResult

    host = Host(target.name, target.ssh or target.name, target.python, target.settings)
    try:
        transport = connect(target)
        try:
            by = replace(options, by=str(this_asker()))
            installed = install(transport, host, lambda text: listen(target.name, Note(text)), options=by)
        finally:
            transport.close()
        result = wire.decode(DeployResult, installed)
    except MlxopsError as error:
        return HostReply(target.name, error=error)
    if not (options.dry_run or (options.rollback and result.build != build_id())):
        agreed = ask(target, Agree(), listen)
        if agreed.error is not None:
            return HostReply(target.name, result, agreed.error, command="deploy")
        result = replace(result, agreed=True)
    return HostReply(target.name, result, command="deploy")


def connect(target: HostTarget) -> Transport:
    """Raises `Unreachable`."""
    if target.ssh is None:
        from mlxops.control.local import LocalTransport

        return LocalTransport()
    from mlxops.control.ssh.connection import open_ssh

    return open_ssh(target.ssh)


def with_address(target: HostTarget) -> Settings:
    """Return the settings. If servers listen on every interface, set `address` to the host's name, resolved by SSH."""
    settings = target.settings
    if settings.address is not None or not _is_wildcard(settings.bind):
        return settings
    return replace(settings, address=reached_at(target))


def reached_at(target: HostTarget) -> str:
    """Return the host name or IP address at which the gateway reaches the servers. Raises `Unreachable`."""
    settings = target.settings
    if settings.address is not None or not _is_wildcard(settings.bind):
        return settings.address or settings.bind
    if target.ssh is None:
        return socket.gethostname()
    from mlxops.control.ssh.config import resolve

    return resolve(target.ssh, 10.0).hostname


def _is_wildcard(address: str) -> bool:
    return ipaddress.ip_address(address).is_unspecified


def envelope_for(target: HostTarget, request: AnyRequest) -> Envelope:
    ticket = os.urandom(4).hex()
    return Envelope(request, target.settings, build_id(), this_asker(), target.agreed, ticket=ticket)


def agent_argv(target: HostTarget) -> list[str]:
    return [*target.python, "-P", "-m", "mlxops.agent"]


def ended_early(target: HostTarget, ended: Ended, *, greeted: bool) -> Exception:
    """Return the error for an agent that ended without a result. `greeted`: it sent its `hello`."""
    words = [line.strip() for line in ended.stderr.splitlines() if line.strip()]
    if greeted:
        return ConnectionLost(words[-1] if words else f"the agent ended with status {ended.status}")
    if words and _SCARCE.search(words[-1]):
        return AgentProblem(
            "agent_not_started",
            f"the mlxops agent could not be started on {target.name}",
            why=f"{' '.join(target.python)}: {words[-1]}"[:300],
            hint="raise the limit (see: ulimit -a) or free memory, then try again; the request was not sent",
        )
    if _NO_SHELL.search(words[-1]) if words else ended.status == 1:
        # nologin prints to standard output, and false prints nothing. Python would print to standard error.
        return AgentProblem(
            "no_shell",
            f"the account that ssh logs in to on {target.name} runs no commands",
            why=f"its login shell, or a forced command, ended with status {ended.status}"
            + (f": {words[-1]}" if words else " and said nothing")[:300],
            hint="give it a login shell that runs commands (on the host: chsh -s /bin/sh), and no ForceCommand; "
            f"`ssh {shlex.quote(target.ssh or target.name)} /bin/sh -c true` must end with status 0",
        )
    return AgentProblem(
        "agent_missing",
        f"there is no mlxops agent on {target.name}",
        why=f"{' '.join(target.python)}: {words[-1] if words else f'status {ended.status}'}"[:300],
        hint=aimed("install it: `mlxctl deploy`", target.flags),
    )


def read_events(target: HostTarget, session: Session, patience: ReadLimits) -> Iterator[Event | None]:
    """Yield the events of a host, with suggested commands aimed at it. None is a heartbeat. Raises `ConnectionLost`."""
    for event in events(session, patience):
        yield event and aimed_event(event, target.flags)


def lost(target: HostTarget, why: object) -> Unreachable:
    """Return the error for a connection that broke during a request that only reads."""
    message = f"the connection to {target.name} was lost"
    return Unreachable("connection_lost", message, why=str(why), hint="try again")


def _deadline_of(request: AnyRequest) -> float | None:
    """Return when (monotonic) to stop following an operation; None: at its end."""
    if request.name != "follow":
        return None
    from mlxops.core.commands.follow import Follow

    assert isinstance(request, Follow)
    return None if request.timeout is None else time.monotonic() + request.timeout


class _Conversation:
    """One request and its reply, over as many connections as necessary."""

    def __init__(self, target: HostTarget, request: AnyRequest, listen: Listen, *, detach: bool = False) -> None:
        self._target = target
        self._listen = listen
        self._detach = detach
        self._envelope = envelope_for(target, request)
        self._deadline = _deadline_of(request)
        self._hello = False
        self._operation = ""
        """The record that is followed. `_heard` counts its received events."""
        self._heard = 0
        self._mark = ""
        """The position in a followed log."""
        self._news = 0.0
        """When (monotonic) the host last sent an event other than `hello` and `started`."""

    @property
    def _lasting(self) -> bool:
        """Whether the operation goes on without a connection, so that a new connection can follow it."""
        return self._envelope.request.acts or self._envelope.request.name == "follow"

    @property
    def _resumable(self) -> bool:
        return self._lasting or bool(self._mark)

    def result(self) -> Done | Started:
        """Return the result; after `detach` the operation that was started.

        Raises the host's `MlxopsError`, `Unreachable`, or `OutcomeUnknown` if the host of a running operation sends
        nothing for `RECONNECT_SECONDS`.
        """
        try:
            return self._over_one_connection()
        except ConnectionLost as why:
            if not self._resumable:
                raise lost(self._target, why) from None
            return self._attached_again(str(why))

    def _attached_again(self, why: str) -> Done | Started:
        self._say_lost(why)
        pause, news, since = FIRST_PAUSE, self._news, time.monotonic()
        while True:
            time.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)
            try:
                return self._over_one_connection()
            except ConnectionLost as broken:
                why = str(broken)
            except Unreachable as error:
                why = error.message if not error.why else f"{error.message}: {error.why}"
                # A cut connection during the login looks like a refusal of too many keys.
                if error.code not in PASSING and not error.details.get("ended"):
                    raise self._given_up(why) from None
            if self._news > news:
                # The connection worked, and broke again. The time limit begins again.
                self._say_lost(why)
                pause, news, since = FIRST_PAUSE, self._news, time.monotonic()
            elif time.monotonic() > min(since + RECONNECT_SECONDS, self._deadline or math.inf):
                raise self._given_up(why)

    def _say_lost(self, why: str) -> None:
        goes_on = "the operation goes on; " if self._lasting else ""
        self._listen(self._target.name, Note(f"the connection was lost ({why}); {goes_on}reconnecting", "warning"))

    def _given_up(self, why: str) -> MlxopsError:
        return self._unknown(why) if self._lasting else lost(self._target, why)

    def _unknown(self, why: str) -> OutcomeUnknown:
        name = self._target.name
        follow = f"`inv ops --follow {self._operation}`" if self._operation else "`inv ops`"
        return OutcomeUnknown(
            "outcome_unknown",
            f"the connection to {name} was lost; the command may still be running there",
            why=why,
            hint=aimed(f"later: {follow}; it is safe to run the same command again", self._target.flags),
            details={"operation": self._operation} if self._operation else None,
        )

    def _over_one_connection(self) -> Done | Started:
        transport = connect(self._target)
        try:
            envelope = replace(self._next_envelope(), settings=with_address(self._target))
            session = transport.start(agent_argv(self._target), envelope.encode())
            try:
                return self._hear(session)
            finally:
                session.close()
        finally:
            transport.close()

    def _next_envelope(self) -> Envelope:
        """Return the request, or a request for the rest of the record or log that was already received in part."""
        if self._mark:
            from mlxops.core.commands.logs import Logs

            assert isinstance(self._envelope.request, Logs)
            return replace(self._envelope, request=replace(self._envelope.request, after=self._mark))
        if not self._operation:
            return self._envelope
        from mlxops.core.commands.follow import Follow

        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        return replace(self._envelope, request=Follow(operation=self._operation, timeout=left), heard=self._heard)

    def _hear(self, session: Session) -> Done | Started:
        self._hello = False
        for event in read_events(self._target, session, ReadLimits(SILENCE_SECONDS, NOISE_BYTES)):
            if self._hello and not isinstance(event, Hello | Started):
                self._news = time.monotonic()
            match event:
                case None:
                    continue
                case Hello():
                    self._hello = True
                case Done() as done:
                    return done
                case Failed(error):
                    raise error
                case Started(operation) as started:
                    if operation != self._operation:
                        self._operation, self._heard = operation, 0
                    self._listen(self._target.name, started)
                    if self._detach:
                        return started
                case Reached(mark):
                    self._mark = mark
                case _:
                    self._heard += bool(self._operation)
                    self._mark = event.mark if isinstance(event, LogLine) else self._mark
                    self._listen(self._target.name, event)
        raise ended_early(self._target, session.wait(SILENCE_SECONDS), greeted=self._hello)


def gateway_warning(url: str, seconds: float = GATEWAY_SECONDS) -> str | None:
    """Return a warning if `url` (http://HOST:PORT/v1) cannot be connected to from here, else None."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 80
    try:
        socket.create_connection((host, port), seconds).close()
    except OSError as error:
        return (
            f"{host}:{port} cannot be reached from this machine ({error.strerror or error}); if the gateway runs here, "
            "see address and bind in hosts.yaml, and the host's firewall"
        )
    return None
