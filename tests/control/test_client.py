"""Requests to one host or several, over a scripted transport."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from mlxops.common.build import build_id
from mlxops.control import client
from mlxops.control.channel import ConnectionLost, Ended, ReadLimits
from mlxops.control.client import HostReply, HostTarget, ask, ask_all, gateway_warning, local_python
from mlxops.control.output import exit_of
from mlxops.core.command import Group, decode_request, request_type
from mlxops.core.commands.follow import Follow
from mlxops.core.commands.load import Load
from mlxops.core.commands.status import DriftRow, Status, StatusResult
from mlxops.core.errors import Busy, Exit, MlxopsError, Refused, Unreachable
from mlxops.core.protocol import (
    Done,
    Event,
    Failed,
    Hello,
    LogLine,
    Note,
    Phase,
    Progress,
    Reached,
    Started,
    decode_envelope,
    encode_event,
)
from mlxops.core.settings import PortRange, Settings
from mlxops.core.wire import decode, encode
from mlxops.tasks import command_names
from tests.lab.envelopes import ANY_RESULT

HELLO = encode_event(Hello("0", "b"))
DONE = encode_event(Done(ANY_RESULT))
RESULT = decode(StatusResult, ANY_RESULT)
NAMES = [
    name for name in command_names() if request_type(name).group is not Group.HIDDEN and name not in {"help", "deploy"}
]
CHANGES = [name for name in NAMES if request_type(name)().acts]
READS = [name for name in NAMES if not request_type(name).changes]
NOISE = ["", "Last login: Mon", "\x1b[31mmotd", '{"mlxops":', "{}", "\ud83d not text"]


@dataclass
class Scripted:
    """A session that sends these lines, then ends or breaks."""

    words: Sequence[str]
    end: Ended | ConnectionLost = field(default_factory=lambda: Ended(0, ""))
    closed: int = 0

    def lines(self, limits: ReadLimits) -> Iterator[str]:
        # The host sends nothing twice. A new connection gets the hello and what is new.
        yield from self.words[:1] if self.closed else self.words
        if isinstance(self.end, ConnectionLost):
            raise self.end

    def wait(self, timeout: float) -> Ended:
        assert isinstance(self.end, Ended)
        return self.end

    def close(self) -> None:
        self.closed += 1


@dataclass
class Wire:
    """A transport that starts one scripted session, or fails."""

    session: Scripted | Exception
    started: list[tuple[list[str], bytes]] = field(default_factory=list)
    closed: int = 0

    def start(self, argv: Sequence[str], data: bytes) -> Scripted:
        self.started.append((list(argv), data))
        if isinstance(self.session, Exception):
            raise self.session
        return self.session

    def close(self) -> None:
        self.closed += 1


@dataclass
class Exchange:
    answer: HostReply[object]
    heard: list[tuple[str, Event]]
    wire: Wire


STUDIO = HostTarget("studio", "studio", ("~/.mlxops/venv/bin/python",), Settings(), flags=" --host studio")
Converse = Callable[..., Exchange]


@pytest.fixture
def converse(monkeypatch: pytest.MonkeyPatch) -> Converse:
    """Send a request to a host that follows a script."""

    def run(session: Scripted | Exception, command: str = "status", **args: object) -> Exchange:
        wire = Wire(session)
        # Retry a change with a lost connection once.
        monkeypatch.setattr(client, "RECONNECT_SECONDS", 0.0)
        monkeypatch.setattr(client, "FIRST_PAUSE", 0.0)
        connected: list[HostTarget] = []

        def connect(target: HostTarget) -> Wire:
            connected.append(target)
            return wire

        monkeypatch.setattr(client, "connect", connect)
        heard: list[tuple[str, Event]] = []
        answer = ask(STUDIO, decode_request(command, args), lambda host, event: heard.append((host, event)))
        assert wire.closed == len(connected), "each connection is closed once"
        assert not isinstance(session, Scripted) or session.closed == len(connected)
        return Exchange(answer, heard, wire)

    return run


def problem(exchange: Exchange) -> MlxopsError:
    assert exchange.answer.error is not None and exchange.answer.result is None
    assert exchange.answer.error.message and exchange.answer.error.hint
    return exchange.answer.error


def test_reply_has_the_result_of_the_request(converse: Converse) -> None:
    exchange = converse(Scripted([HELLO, DONE]))
    assert exchange.answer == HostReply("studio", RESULT, command="status", flags=STUDIO.flags)
    assert exchange.answer.reachable
    assert exit_of([exchange.answer]) is Exit.DONE


def test_agent_gets_the_request_as_data_without_a_shell(converse: Converse) -> None:
    ((argv, data),) = converse(Scripted([HELLO, DONE]), "load", model="$(id)", port="8100").wire.started
    assert argv == ["~/.mlxops/venv/bin/python", "-P", "-m", "mlxops.agent"]
    envelope = decode_envelope(data)
    assert envelope.request == Load(model="$(id)", port="8100")
    assert (envelope.settings, envelope.build) == (STUDIO.settings, build_id())
    assert envelope.asker.host == socket.gethostname()


def test_output_of_a_login_shell_is_ignored(converse: Converse) -> None:
    exchange = converse(Scripted([*NOISE, HELLO, *NOISE, encode_event(Note("x")), *NOISE, DONE, *NOISE]))
    assert exchange.answer.result == RESULT and exchange.heard == [("studio", Note("x"))]


def test_events_are_passed_on_in_order(converse: Converse) -> None:
    events: list[Event] = [Phase("start", "x"), Progress("w", 1, 2), Note("n", "warning")]
    exchange = converse(Scripted([HELLO, *map(encode_event, events), DONE]), "load")
    assert exchange.heard == [("studio", event) for event in events]


def test_suggested_commands_name_their_host(converse: Converse) -> None:
    row = DriftRow("orphan", 8100, None, "left over", "mlxctl unload 8100", (("mlxctl", "unload", "8100"),))
    done = encode_event(Done(encode(replace(RESULT, drift=(row,)))))
    exchange = converse(Scripted([HELLO, encode_event(Note.of("see `mlxctl ops`")), done]))
    assert exchange.heard == [("studio", Note.of("see `mlxctl ops --host studio`"))]
    command = ("mlxctl", "unload", "--host", "studio", "8100")
    assert exchange.answer.result == replace(
        RESULT, drift=(replace(row, hint=shlex.join(command), commands=(command,)),)
    )
    said = Busy("busy", "m", why="w", hint="wait for it: `mlxctl ops --follow op1`")
    refused = problem(converse(Scripted([HELLO, encode_event(Failed(said))], Ended(75, "")), "load"))
    assert refused.hint == "wait for it: mlxctl ops --host studio --follow op1"


def test_error_of_the_agent_arrives_unchanged(converse: Converse) -> None:
    said = Busy("busy", "another operation holds port 8100", why="w", hint="h", details={"operation": "op1"})
    exchange = converse(Scripted([HELLO, encode_event(Failed(said))], Ended(75, "")), "load")
    assert problem(exchange).to_wire() == said.to_wire() and type(problem(exchange)) is Busy
    assert exchange.answer.reachable and exit_of([exchange.answer]) is Exit.BUSY


@pytest.mark.parametrize("noise", [[], NOISE])
@pytest.mark.parametrize("command", ["status", "load"])
def test_missing_hello_means_a_missing_agent(converse: Converse, noise: list[str], command: str) -> None:
    exchange = converse(
        Scripted(noise, Ended(127, "warning: x\nbash: ~/.mlxops/venv/bin/python: No such file\n")), command
    )
    error = problem(exchange)
    assert (error.code, error.exit) == ("agent_missing", Exit.AGENT)
    assert "No such file" in error.why and "mlxctl deploy --host studio" in error.hint
    assert exchange.answer.reachable


@pytest.mark.parametrize(
    "said",
    [
        "/usr/bin/python3: Too many open files",
        "Traceback (most recent call last):\nOSError: [Errno 24] Too many open files: '/usr/lib/python3.11/json'",
        "MemoryError",
        "sh: fork: Resource temporarily unavailable",
        "sh: fork: Cannot allocate memory",
    ],
)
def test_shortage_on_the_host_is_not_a_missing_agent(converse: Converse, said: str) -> None:
    error = problem(converse(Scripted([], Ended(126, f"{said}\n")), "load"))
    assert (error.code, error.exit) == ("agent_not_started", Exit.AGENT)
    assert said.splitlines()[-1] in error.why and "deploy" not in error.hint


def test_shortage_of_descriptors_here_is_reported(tmp_path: Path) -> None:
    few = (
        "import resource, sys; from mlxops.control.client import *; from mlxops.core.commands.status import Status;"
        "settings = Settings(state=sys.argv[1]);"
        "target = HostTarget('here', None, local_python(), settings); "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (5, 5));"
        "print(ask(target, Status(), lambda host, event: None).error.code)"
    )
    argv = [sys.executable, "-c", few, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "agent_not_started\n", done.stderr


@pytest.mark.parametrize("encoding", ["utf-16", "ascii:strict", "cp500"])
def test_encoding_settings_of_the_environment_change_nothing(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    settings = Settings(hub=str(tmp_path / "hub"), state=str(tmp_path / "state"), ports=PortRange(1, 2))
    answer = ask(
        HostTarget("here", None, local_python(), settings), decode_request("status", {}), lambda host, event: None
    )
    assert answer.error is None


def test_silent_end_without_an_agent_is_reported_with_its_status(converse: Converse) -> None:
    assert "status 126" in problem(converse(Scripted([], Ended(126, "")))).why


LOSSES: dict[str, Callable[[], Scripted | Exception]] = {
    "before the hello": lambda: Scripted([], ConnectionLost("reset")),
    "after the hello": lambda: Scripted([HELLO], ConnectionLost("reset")),
    "in the middle": lambda: Scripted([HELLO, encode_event(Phase("start", "x"))], ConnectionLost("reset")),
    "by an end without a result": lambda: Scripted([HELLO], Ended(-1, "reset\n")),
    "by a truncated result": lambda: Scripted([HELLO, DONE[:-3]], Ended(-1, "reset\n")),
    "before the start": lambda: ConnectionLost("reset"),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("command", [*CHANGES, "follow"])
def test_change_with_a_lost_connection_has_an_unknown_outcome(converse: Converse, loss: str, command: str) -> None:
    error = problem(converse(LOSSES[loss](), command))
    assert (error.code, error.exit, error.why) == ("outcome_unknown", Exit.OUTCOME_UNKNOWN, "reset")
    assert "inv ops --host studio" in error.hint


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("command", "args"), [*((c, {}) for c in READS), ("load", {"dry_run": True})])
def test_read_with_a_lost_connection_can_be_repeated(
    converse: Converse, loss: str, command: str, args: dict[str, object]
) -> None:
    exchange = converse(LOSSES[loss](), command, **args)
    assert (problem(exchange).code, problem(exchange).exit) == ("connection_lost", Exit.UNREACHABLE)
    assert not exchange.answer.reachable


def test_unreachable_host_is_returned_as_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(target: HostTarget) -> Wire:
        raise Unreachable("host_down", "no route", hint="is it on?")

    monkeypatch.setattr(client, "connect", fail)
    answer = ask(STUDIO, decode_request("status", {}), lambda host, event: None)
    assert answer.error is not None and answer.error.code == "host_down" and not answer.reachable


def test_failing_listener_closes_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(session := Scripted([HELLO, encode_event(Note("x")), DONE]))
    monkeypatch.setattr(client, "connect", lambda target: wire)

    def fail(host: str, event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(STUDIO, decode_request("status", {}), fail)
    assert (wire.closed, session.closed) == (1, 1)


def test_local_server_on_every_interface_has_this_machines_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for bind in ("0.0.0.0", "::"):
        wire = Wire(Scripted([HELLO, DONE]))
        monkeypatch.setattr(client, "connect", lambda target, wire=wire: wire)
        ask(
            replace(STUDIO, ssh=None, settings=Settings(bind=bind)),
            decode_request("status", {}),
            lambda host, event: None,
        )
        assert decode_envelope(wire.started[0][1]).settings.address == socket.gethostname()


# -- several hosts --------------------------------------------------------------------------------------------------


def hosts(count: int) -> list[HostTarget]:
    return [replace(STUDIO, name=f"host{number}") for number in range(count)]


def test_hosts_are_asked_in_parallel_and_reply_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    all_connected = threading.Barrier(8, timeout=20)

    def connect(target: HostTarget) -> Wire:
        all_connected.wait()  # passes only when all hosts are being connected
        return Wire(Scripted([HELLO, encode_event(Done({**ANY_RESULT, "registry": target.name}))]))

    monkeypatch.setattr(client, "connect", connect)
    answers = ask_all(hosts(8), Status(), lambda host, event: None)
    assert [answer.result.registry for answer in answers if answer.result] == [f"host{number}" for number in range(8)]


def test_unreachable_host_does_not_affect_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(target: HostTarget) -> Wire:
        if target.name == "host1":
            raise Unreachable("host_down", "no route")
        return Wire(Scripted([HELLO, DONE]))

    monkeypatch.setattr(client, "connect", connect)
    answers = ask_all(hosts(3), decode_request("status", {}), lambda host, event: None)
    assert [(answer.host, answer.reachable) for answer in answers] == [
        ("host0", True),
        ("host1", False),
        ("host2", True),
    ]
    assert exit_of(answers) is Exit.UNREACHABLE


def test_bug_in_one_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(target: HostTarget) -> Wire:
        if target.name == "host1":
            raise RuntimeError("a bug")
        return Wire(Scripted([HELLO, DONE]))

    monkeypatch.setattr(client, "connect", connect)
    with pytest.raises(RuntimeError, match="a bug"):
        ask_all(hosts(2), decode_request("status", {}), lambda host, event: None)


@pytest.mark.parametrize(
    ("errors", "status"),
    [
        ([None, None], Exit.DONE),
        ([None, Refused("a", "b")], Exit.REFUSED),
        ([Refused("a", "b"), Unreachable("a", "b")], Exit.UNREACHABLE),
        ([MlxopsError("a", "b"), Busy("a", "b"), None], Exit.BUSY),
    ],
)
def test_exit_status_is_the_worst_of_the_replies(errors: list[MlxopsError | None], status: Exit) -> None:
    assert exit_of([HostReply("h", {} if error is None else None, error) for error in errors]) is status


# -- the gateway ----------------------------------------------------------------------------------------------------


def test_unreachable_server_is_a_gateway_warning() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        refused = gateway_warning(f"http://127.0.0.1:{port}/v1")
        assert refused is not None and f"127.0.0.1:{port} cannot be reached" in refused and "hosts.yaml" in refused
        listener.listen()
        assert gateway_warning(f"http://127.0.0.1:{port}/v1") is None


def script_connections(monkeypatch: pytest.MonkeyPatch, *sessions: Scripted) -> list[Wire]:
    """Give each connection the next session. The last session is repeated."""
    wires: list[Wire] = []

    def connect(target: HostTarget) -> Wire:
        wires.append(Wire(sessions[min(len(wires), len(sessions) - 1)]))
        return wires[-1]

    monkeypatch.setattr(client, "connect", connect)
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(client, "RECONNECT_SECONDS", 0.0)
    return wires


def broken(*events: Event, words: Sequence[str] = ()) -> Scripted:
    return Scripted([HELLO, *map(encode_event, events), *words], ConnectionLost("cut"))


def test_reconnected_log_continues_after_the_last_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    wires = script_connections(
        monkeypatch, broken(Reached("1-0-0")), broken(LogLine("one", "1-4-a"), LogLine("two", "1-8-b")), broken()
    )
    heard: list[Event] = []
    answer = ask(
        STUDIO, decode_request("logs", {"port": "8100", "follow": True}), lambda host, event: heard.append(event)
    )
    asked = [getattr(decode_envelope(wire.started[0][1]).request, "after", None) for wire in wires]
    assert asked == [None, "1-0-0", "1-8-b"]
    assert [event.text for event in heard if isinstance(event, LogLine)] == ["one", "two"]
    assert answer.error is not None and (answer.error.code, answer.error.exit) == ("connection_lost", 5)


@pytest.mark.parametrize("beat", ["", encode_event(Note("still running"))])
def test_sign_of_life_restarts_the_time_to_reconnect(monkeypatch: pytest.MonkeyPatch, beat: str) -> None:
    started = Started("20260101T000000-00000000")
    quiet = [broken(started, words=[beat]) for _ in range(3)]
    wires = script_connections(monkeypatch, broken(started), *quiet, Scripted([HELLO, DONE]))
    assert ask(STUDIO, decode_request("init", {}), lambda host, event: None).error is None and len(wires) == 5


def test_agent_that_ends_without_an_event_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    wires = script_connections(monkeypatch, broken(Started("20260101T000000-00000000")))
    answer = ask(STUDIO, decode_request("init", {}), lambda host, event: None)
    assert answer.error is not None and answer.error.exit is Exit.OUTCOME_UNKNOWN and len(wires) == 2


def test_noise_is_no_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    started = Started("20260101T000000-00000000")
    wires = script_connections(monkeypatch, broken(started), *(broken(started, words=["noise"]) for _ in range(3)))
    answer = ask(STUDIO, decode_request("init", {}), lambda host, event: None)
    assert answer.error is not None and answer.error.exit is Exit.OUTCOME_UNKNOWN and len(wires) == 2


def test_events_of_a_followed_operation_arrive_exactly_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Events of the request's own record do not count for the followed record."""
    own, other = "20260101T000000-00000000", "20260101T000000-11111111"
    begun: list[Event] = [Started(own), Phase("check", "x"), Note(f"this is running already ({other}); following it")]
    wires = script_connections(
        monkeypatch,
        broken(*begun, Started(other), Phase("download", "one")),
        broken(Started(other), Phase("download", "two"), Phase("start", "three")),
        Scripted([HELLO, encode_event(Started(other)), encode_event(Phase("proof", "four")), DONE]),
    )
    heard: list[Event] = []
    answer = ask(
        STUDIO, decode_request("load", {"model": "m", "port": "8100"}), lambda host, event: heard.append(event)
    )
    assert answer.error is None
    envelopes = [decode_envelope(wire.started[0][1]) for wire in wires]
    assert [(each.request.name, each.heard) for each in envelopes] == [("load", 0), ("follow", 1), ("follow", 3)]
    assert [each.request for each in envelopes[1:]] == [Follow(other), Follow(other)]
    assert [event.message for event in heard if isinstance(event, Phase)] == ["x", "one", "two", "three", "four"]


@pytest.mark.parametrize(("ended", "tries"), [(True, 3), (False, 2)])
def test_only_an_interrupted_login_is_retried(monkeypatch: pytest.MonkeyPatch, ended: bool, tries: int) -> None:
    sessions = [broken(Started("20260101T000000-00000000")), None, Scripted([HELLO, DONE])]
    tried: list[HostTarget] = []

    def connect(target: HostTarget) -> Wire:
        tried.append(target)
        session = sessions[len(tried) - 1]
        if session is None:
            raise Unreachable("authentication_failed", "refused", details={"ended": True} if ended else None)
        return Wire(session)

    monkeypatch.setattr(client, "connect", connect)
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.0)
    answer = ask(STUDIO, decode_request("init", {}), lambda host, event: None)
    assert len(tried) == tries and (answer.error is None) is ended
    assert ended or (answer.error is not None and answer.error.exit is Exit.OUTCOME_UNKNOWN)
