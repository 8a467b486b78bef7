"""One request to one host or to many: send it, pass on what is told meanwhile, return what came of it."""

from __future__ import annotations

import getpass
import ipaddress
import os
import re
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mlxops.common.build import build_id
from mlxops.control.channel import NOISE_BYTES, ConnectionLost, Ended, ReadLimits, Session, Transport, events
from mlxops.control.hints import aimed, aimed_event
from mlxops.core.errors import AgentProblem, MlxopsError, OutcomeUnknown, Unreachable
from mlxops.core.protocol import Done, Event, Failed, Hello, LogLine, Note, Reached, Request, Requester, Started
from mlxops.core.settings import Settings

if TYPE_CHECKING:
    from mlxops.control.deploy import DeployOptions

SILENCE_SECONDS = 30.0
"""The agent says something every five seconds while it follows an operation, and answers a question sooner."""
GATEWAY_SECONDS = 3.0
RECONNECT_SECONDS = 120.0
"""How long a connection that broke during a change, or while a log was followed, is tried again, after the last thing
that was heard."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0
"""Seconds between two tries."""
_SCARCE = re.compile(
    r"Too many open files|Cannot allocate memory|Resource temporarily unavailable|MemoryError|out of memory",
    re.IGNORECASE,
)
"""Last words of what there was no descriptor, memory or process for, as Python and shells say it."""
_NO_SHELL = re.compile(r"restricted|not available|sftp connections only", re.IGNORECASE)
"""Last words of login shells and forced commands that run nothing."""
PASSING = frozenset({"host_down", "connection_refused", "connection_timeout"})
"""Reasons why a host is not reached that may pass by themselves."""


@dataclass(frozen=True)
class HostTarget:
    """A host to ask. `ssh` None means this machine itself."""

    name: str
    ssh: str | None
    python: tuple[str, ...]
    settings: Settings
    agreed: bool = False
    """Nothing is configured here: the host's own agreed settings count."""
    flags: str = ""
    """What a command needs to go to this host as this one does, as " --host studio2"; "" where it does by itself."""


@dataclass(frozen=True)
class HostReply:
    """What came of a request to one host: a result or an error, and whether the host itself was reached."""

    host: str
    result: Mapping[str, object] | None = None
    error: MlxopsError | None = None
    flags: str = ""
    """Those of its target."""

    @property
    def reachable(self) -> bool:
        return not isinstance(self.error, Unreachable)


Listen = Callable[[str, Event], None]
"""Called with the host's name and what it tells, from the thread that asks that host."""


def local_python() -> tuple[str, ...]:
    return (sys.executable,)


def this_asker() -> Requester:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = "?"
    return Requester(user, socket.gethostname())


def ask(target: HostTarget, command: str, args: Mapping[str, object], listen: Listen) -> HostReply:
    """One request to one host. Never raises for what a host or a network can cause."""
    try:
        result = _Conversation(target, command, args, listen).result()
    except MlxopsError as error:
        return HostReply(target.name, error=error, flags=target.flags)
    return HostReply(target.name, result, flags=target.flags)


def ask_all(
    targets: Sequence[HostTarget], command: str, args: Mapping[str, object], listen: Listen
) -> tuple[HostReply, ...]:
    """The same request to every host at once; answers in the order of `targets`."""
    if len(targets) == 1:
        return (ask(targets[0], command, args, listen),)
    answers: dict[int, HostReply] = {}
    broken: list[BaseException] = []

    def one(index: int, target: HostTarget) -> None:
        try:
            answers[index] = ask(target, command, args, listen)
        except BaseException as error:  # noqa: BLE001 - carried to the main thread, which is the boundary
            broken.append(error)

    threads = [threading.Thread(target=one, args=row, daemon=True) for row in enumerate(targets)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if broken:
        raise broken[0]
    return tuple(answers[index] for index in range(len(targets)))


def deploy(target: HostTarget, listen: Listen, wish: DeployOptions) -> HostReply:
    """Install this tree's agent on the host, then agree with it on the host's settings; or go back to the build that
    was there before, which agrees with its own control node only."""
    from mlxops.control.deploy import install
    from mlxops.control.inventory import Host

    host = Host(target.name, target.ssh or target.name, target.python, target.settings)
    try:
        transport = connect(target)
        try:
            by = replace(wish, by=str(this_asker()))
            installed = install(transport, host, lambda text: listen(target.name, Note(text)), wish=by)
        finally:
            transport.close()
    except MlxopsError as error:
        return HostReply(target.name, error=error)
    if wish.dry_run or (wish.rollback and installed.get("build") != build_id()):
        return HostReply(target.name, installed)
    agreed = ask(target, "agree", {}, listen)
    return HostReply(target.name, {**installed, **(agreed.result or {})}, agreed.error)


def connect(target: HostTarget) -> Transport:
    """Raises `Unreachable`."""
    if target.ssh is None:
        from mlxops.control.local import LocalTransport

        return LocalTransport()
    from mlxops.control.ssh.connection import open_ssh

    return open_ssh(target.ssh)


def with_address(target: HostTarget) -> Settings:
    """Where servers listen on every interface, the gateway's way to them is the host's name, as SSH resolves it."""
    settings = target.settings
    if settings.address is not None or not _is_wildcard(settings.bind):
        return settings
    return replace(settings, address=reached_at(target))


def reached_at(target: HostTarget) -> str:
    """The host name or IP address at which the gateway reaches the host's servers. Raises `Unreachable`."""
    settings = target.settings
    if settings.address is not None or not _is_wildcard(settings.bind):
        return settings.address or settings.bind
    if target.ssh is None:
        return socket.gethostname()
    from mlxops.control.ssh.config import resolve

    return resolve(target.ssh, 10.0).hostname


def _is_wildcard(address: str) -> bool:
    return ipaddress.ip_address(address).is_unspecified


def request_of(target: HostTarget, command: str, args: Mapping[str, object]) -> Request:
    build, asker = build_id(), this_asker()
    return Request(command, args, target.settings, build, asker, target.agreed, ticket=os.urandom(4).hex())


def agent_argv(target: HostTarget) -> list[str]:
    return [*target.python, "-P", "-m", "mlxops.agent"]


def ended_early(target: HostTarget, ended: Ended, *, greeted: bool) -> Exception:
    """The agent's end without a result. Without its first words (`greeted`) there was no agent."""
    words = [line.strip() for line in ended.stderr.splitlines() if line.strip()]
    if greeted:
        return ConnectionLost(words[-1] if words else f"the agent ended with status {ended.status}")
    if words and _SCARCE.search(words[-1]):
        return AgentProblem(
            "agent_not_started",
            f"the mlxops agent could not be started on {target.name}",
            why=f"{' '.join(target.python)}: {words[-1]}"[:300],
            hint="raise the limit (ulimit -a shows it), or free what is short, then try again; nothing was asked yet",
        )
    if _NO_SHELL.search(words[-1]) if words else ended.status == 1:
        # nologin prints its words to standard output, and false prints none; Python would have said something.
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
        hint=aimed("install it: inv deploy", target.flags),
    )


def heard(target: HostTarget, session: Session, patience: ReadLimits) -> Iterator[Event | None]:
    """What a host tells, in terms of here: its commands go to it. None: it is there. Raises `ConnectionLost`."""
    for event in events(session, patience):
        yield event and aimed_event(event, target.flags)


def lost(target: HostTarget, why: object) -> Unreachable:
    """A connection that broke while something was only looked at."""
    message = f"the connection to {target.name} was lost"
    return Unreachable("connection_lost", message, why=str(why), hint="try again")


class _Conversation:
    """One request and what comes of it, over as many connections as that takes."""

    def __init__(self, target: HostTarget, command: str, args: Mapping[str, object], listen: Listen) -> None:
        self._target = target
        self._listen = listen
        self._request = request_of(target, command, args)
        self._hello = False
        self._operation = ""
        """The record that is followed, and how many of its events were heard."""
        self._heard = 0
        self._mark = ""
        """How far a log that is followed was read."""
        self._news = 0.0
        """When (monotonic) the host last told anything but who it is."""

    @property
    def _lasting(self) -> bool:
        """It goes on without us, so that we can come back to it."""
        return self._request.changes or self._request.command == "follow"

    @property
    def _resumable(self) -> bool:
        return self._lasting or bool(self._mark)

    def result(self) -> Mapping[str, object]:
        """Raises `MlxopsError`: what the host says, `Unreachable`, or `OutcomeUnknown` when nothing is heard of what
        goes on there for `RECONNECT_SECONDS`."""
        try:
            return self._over_one_connection()
        except ConnectionLost as why:
            if not self._resumable:
                raise lost(self._target, why) from None
            return self._attached_again(str(why))

    def _attached_again(self, why: str) -> Mapping[str, object]:
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
                # A login that was cut off looks like one that was ended for too many keys, which it was not before.
                if error.code not in PASSING and not error.details.get("ended"):
                    raise self._given_up(why) from None
            if self._news > news:
                # It was there again, and broke anew: it has its time anew.
                self._say_lost(why)
                pause, news, since = FIRST_PAUSE, self._news, time.monotonic()
            elif time.monotonic() - since > RECONNECT_SECONDS:
                raise self._given_up(why)

    def _say_lost(self, why: str) -> None:
        goes_on = "the operation goes on; " if self._lasting else ""
        self._listen(self._target.name, Note(f"the connection was lost ({why}); {goes_on}reconnecting", "warning"))

    def _given_up(self, why: str) -> MlxopsError:
        return self._unknown(why) if self._lasting else lost(self._target, why)

    def _unknown(self, why: str) -> OutcomeUnknown:
        name = self._target.name
        follow = f"inv ops --follow {self._operation}" if self._operation else "inv ops"
        return OutcomeUnknown(
            "outcome_unknown",
            f"the connection to {name} was lost; what was asked may be going on there",
            why=why,
            hint=aimed(f"later: {follow}; asking for the same thing again is safe", self._target.flags),
            details={"operation": self._operation} if self._operation else None,
        )

    def _over_one_connection(self) -> Mapping[str, object]:
        transport = connect(self._target)
        try:
            request = replace(self._next_request(), settings=with_address(self._target))
            session = transport.start(agent_argv(self._target), request.encode())
            try:
                return self._hear(session)
            finally:
                session.close()
        finally:
            transport.close()

    def _next_request(self) -> Request:
        """The request itself, until the host has named its record; then the rest of that record, or of the log."""
        if self._mark:
            return replace(self._request, args={**self._request.args, "after": self._mark})
        if not self._operation:
            return self._request
        return replace(self._request, command="follow", args={"operation": self._operation}, heard=self._heard)

    def _hear(self, session: Session) -> Mapping[str, object]:
        self._hello = False
        for event in heard(self._target, session, ReadLimits(SILENCE_SECONDS, NOISE_BYTES)):
            if self._hello and not isinstance(event, Hello | Started):
                self._news = time.monotonic()
            match event:
                case None:
                    continue
                case Hello():
                    self._hello = True
                case Done(result):
                    return result
                case Failed(error):
                    raise error
                case Started(operation) as started:
                    if operation != self._operation:
                        self._operation, self._heard = operation, 0
                    self._listen(self._target.name, started)
                case Reached(mark):
                    self._mark = mark
                case _:
                    self._heard += bool(self._operation)
                    self._mark = event.mark if isinstance(event, LogLine) else self._mark
                    self._listen(self._target.name, event)
        raise ended_early(self._target, session.wait(SILENCE_SECONDS), greeted=self._hello)


def gateway_warning(url: str, seconds: float = GATEWAY_SECONDS) -> str | None:
    """Whether `url` (http://HOST:PORT/v1) can be connected to from here; if not, a sentence that says so."""
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
