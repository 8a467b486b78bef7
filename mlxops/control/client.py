"""One request to one host or to many: send it, pass on what is told meanwhile, return what came of it."""

from __future__ import annotations

import getpass
import ipaddress
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from mlxops.build import build_id
from mlxops.control.session import ConnectionLost, Ended, Session, Transport
from mlxops.core.errors import AgentProblem, MlxopsError, OutcomeUnknown, Unreachable
from mlxops.core.protocol import CHANGES, Asker, Done, Event, Failed, Hello, Note, Request, decode_event
from mlxops.core.settings import Settings

SILENCE_SECONDS = 30.0
"""The agent says something every five seconds while it follows an operation, and answers a question sooner."""
GATEWAY_SECONDS = 3.0


@dataclass(frozen=True)
class Target:
    """A host to ask. `ssh` None means this machine itself."""

    name: str
    ssh: str | None
    python: tuple[str, ...]
    settings: Settings
    agreed: bool = False
    """Nothing is configured here: the host's own agreed settings count."""


@dataclass(frozen=True)
class Answer:
    """What came of a request to one host: a result or an error, and whether the host itself was reached."""

    host: str
    result: Mapping[str, object] | None = None
    error: MlxopsError | None = None

    @property
    def reachable(self) -> bool:
        return not isinstance(self.error, Unreachable)


Listen = Callable[[str, Event], None]
"""Called with the host's name and what it tells, from the thread that asks that host."""


def local_python() -> tuple[str, ...]:
    return (sys.executable,)


def this_asker() -> Asker:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = "?"
    return Asker(user, socket.gethostname())


def ask(target: Target, command: str, args: Mapping[str, object], listen: Listen) -> Answer:
    """One request to one host. Never raises for what a host or a network can cause."""
    try:
        transport = connect(target)
    except MlxopsError as error:
        return Answer(target.name, error=error)
    try:
        settings = _with_address(target)
        request = Request(command, args, settings, build_id(), this_asker(), target.agreed)
        return Answer(target.name, result=_converse(transport, target, request, listen))
    except MlxopsError as error:
        return Answer(target.name, error=error)
    finally:
        transport.close()


def ask_all(targets: Sequence[Target], command: str, args: Mapping[str, object], listen: Listen) -> tuple[Answer, ...]:
    """The same request to every host at once; answers in the order of `targets`."""
    if len(targets) == 1:
        return (ask(targets[0], command, args, listen),)
    answers: dict[int, Answer] = {}
    broken: list[BaseException] = []

    def one(index: int, target: Target) -> None:
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


def deploy(target: Target, listen: Listen) -> Answer:
    """Install this tree's agent on the host, then agree with it on the host's settings."""
    from mlxops.control.deploy import install
    from mlxops.control.inventory import Host

    host = Host(target.name, target.ssh or target.name, target.python, target.settings)
    try:
        transport = connect(target)
        try:
            installed = install(transport, host, lambda text: listen(target.name, Note(text)))
        finally:
            transport.close()
    except MlxopsError as error:
        return Answer(target.name, error=error)
    agreed = ask(target, "agree", {}, listen)
    return Answer(target.name, {**installed, **(agreed.result or {})}, agreed.error)


def connect(target: Target) -> Transport:
    """Raises `Unreachable`."""
    if target.ssh is None:
        from mlxops.control.local import LocalTransport

        return LocalTransport()
    from mlxops.control.transport import open_ssh

    return open_ssh(target.ssh)


def _with_address(target: Target) -> Settings:
    """Where servers listen on every interface, the gateway's way to them is the host's name, as SSH resolves it."""
    settings = target.settings
    if settings.address is not None or not _is_wildcard(settings.bind):
        return settings
    return replace(settings, address=reached_at(target))


def reached_at(target: Target) -> str:
    """The host name or IP address at which the gateway reaches the host's servers. Raises `Unreachable`."""
    settings = target.settings
    if settings.address is not None or not _is_wildcard(settings.bind):
        return settings.address or settings.bind
    if target.ssh is None:
        return socket.gethostname()
    from mlxops.control.ssh_config import resolve

    return resolve(target.ssh, 10.0).hostname


def _is_wildcard(address: str) -> bool:
    return ipaddress.ip_address(address).is_unspecified


def _converse(transport: Transport, target: Target, request: Request, listen: Listen) -> Mapping[str, object]:
    hello = False
    try:
        session = transport.start([*target.python, "-P", "-m", "mlxops.agent"], request.encode())
        try:
            for line in session.lines(SILENCE_SECONDS):
                match decode_event(line):
                    case None:
                        continue
                    case Hello():
                        hello = True
                    case Done(result):
                        return result
                    case Failed(error):
                        raise error
                    case event:
                        listen(target.name, event)
            raise _ended_early(target, request, hello, _end_of(session))
        finally:
            session.close()
    except ConnectionLost as lost:
        raise _lost(target, request, hello, str(lost)) from None


def _end_of(session: Session) -> Ended:
    return session.wait(SILENCE_SECONDS)


def _ended_early(target: Target, request: Request, hello: bool, ended: Ended) -> MlxopsError:
    """The command ended without a result. Without the agent's first words there was no agent."""
    words = [line.strip() for line in ended.stderr.splitlines() if line.strip()]
    if not hello:
        return AgentProblem(
            "agent_missing",
            f"there is no mlxops agent on {target.name}",
            why=f"{' '.join(target.python)}: {words[-1] if words else f'status {ended.status}'}"[:300],
            hint=f"install it: inv deploy --host {target.name}",
        )
    return _lost(target, request, hello, words[-1] if words else f"the agent ended with status {ended.status}")


def _lost(target: Target, request: Request, hello: bool, why: str) -> MlxopsError:
    if request.command in CHANGES and request.changes:
        return OutcomeUnknown(
            "outcome_unknown",
            f"the connection to {target.name} was lost; what was asked may be going on there",
            why=why,
            hint=f"see: inv status --host {target.name}; asking for the same thing again is safe",
        )
    return Unreachable(
        "connection_lost",
        f"the connection to {target.name} was lost",
        why=why,
        hint="try again",
    )


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
