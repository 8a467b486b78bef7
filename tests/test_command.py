"""One command on several hosts, Ctrl-C, confirmation, and one JSON document a line."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from mlxops import devtasks, tasks
from mlxops.cli.options import Common
from mlxops.cli.runner import Cli
from mlxops.control import client
from mlxops.control.client import HostTarget, Listen
from mlxops.core.command import Request, request_type
from mlxops.core.commands.cancel import Cancel, CancelResult
from mlxops.core.commands.follow import Follow
from mlxops.core.commands.load import PortResult
from mlxops.core.commands.reconcile import Reconcile
from mlxops.core.commands.restore import Restore, RestoreResult
from mlxops.core.commands.unload_all import UnloadAll, UnloadAllResult
from mlxops.core.errors import Exit, MlxopsError, Refused, UsageError
from mlxops.core.protocol import Started
from mlxops.core.replies import HostReply
from mlxops.core.settings import Settings
from mlxops.core.wire import decode
from tests.lab import wired
from tests.lab.envelopes import smallest
from tests.lab.homelab import Homelab
from tests.steps import Ask, error_of, register, with_fake

HOSTS = [HostTarget(name, name, (), Settings()) for name in ("a", "b", "c")]
Change = Callable[[HostTarget], HostReply[RestoreResult]]
Confirm = Callable[..., None]


class TestHostsInTurn:
    @pytest.fixture
    def cli(self) -> Cli:
        return Cli(request_type("restore"), Common(host="a,b,c", json=True))

    def test_failing_host_does_not_stop_the_others(self, cli: Cli) -> None:
        def change(target: HostTarget) -> HostReply[RestoreResult]:
            error = Refused("x", "x", why="x", hint="x") if target.name == "b" else None
            return HostReply(target.name, error=error)

        replies = cli.each(HOSTS, change)
        assert [(reply.host, reply.error is None) for reply in replies] == [("a", True), ("b", False), ("c", True)]

    @pytest.mark.parametrize("named", [True, False], ids=["after its operation began", "before its operation began"])
    def test_ctrl_c_skips_the_remaining_hosts(self, cli: Cli, named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def ask(target: HostTarget, request: object, listen: Listen) -> HostReply[object]:
            asked.append(target.name)
            if target.name == "a":
                return HostReply("a")
            if named:
                listen(target.name, Started("7f3a"))
            raise KeyboardInterrupt

        monkeypatch.setattr(client, "ask", ask)
        first, second, third = cli.change_each(HOSTS, Restore())
        assert asked == ["a", "b"] and first == HostReply("a")
        assert second.error is not None and second.error.code == "interrupted"
        assert ("7f3a was left running on b" in second.error.message) == named
        assert third.error is not None and third.error.code == "not_asked"
        assert third.error.exit is Exit.INTERRUPTED and "--host c" in third.error.hint

    def test_ctrl_c_before_any_reply_ends_the_command(self, cli: Cli) -> None:
        def change(target: HostTarget) -> HostReply[RestoreResult]:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cli.each(HOSTS, change)


class TestCtrlC:
    """Ctrl-C at a terminal, after the operation 7f3a began."""

    @pytest.fixture
    def interrupted(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Request[Any], bool], MlxopsError]:
        def run(answer: str, request: Request[Any], cancelled: bool) -> MlxopsError:
            def ask(target: HostTarget, request: object, listen: Listen) -> HostReply[object]:
                if isinstance(request, Cancel):
                    assert request.operation == "7f3a"
                    return HostReply(target.name, CancelResult("7f3a", cancelled=cancelled, changed=True))
                listen(target.name, Started("7f3a"))
                raise KeyboardInterrupt

            monkeypatch.setattr(client, "ask", ask)
            monkeypatch.setattr("sys.stdin", Terminal(answer))
            monkeypatch.setattr("sys.stderr", Terminal())
            cli = Cli(type(request), Common(host="a"))
            error = cli.change(HOSTS[0], request).error
            assert error is not None and cli.interrupted
            return error

        return run

    @pytest.mark.parametrize(
        ("answer", "request_", "cancelled", "code", "message"),
        [
            ("c\n", Restore(), True, "cancelled", "operation 7f3a was cancelled"),
            ("c\n", Restore(), False, "interrupted", "was done before it could be cancelled"),
            ("c\n", Follow("7f3a"), True, "cancelled", "operation 7f3a was cancelled"),
            ("\n", Restore(), True, "interrupted", "left running on a"),
            ("c\n", Reconcile(), True, "interrupted", "left running on a"),
        ],
    )
    def test_ctrl_c_cancels_only_what_may_be_cancelled(
        self,
        interrupted: Callable[[str, Request[Any], bool], MlxopsError],
        answer: str,
        request_: Request[Any],
        cancelled: bool,
        code: str,
        message: str,
    ) -> None:
        error = interrupted(answer, request_, cancelled)
        assert error.code == code and message in error.message and error.exit is Exit.INTERRUPTED


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestConfirmation:
    @pytest.fixture
    def confirm(self, monkeypatch: pytest.MonkeyPatch) -> Confirm:
        def run(answer: str, **errors: Refused) -> None:
            def ask_all(
                targets: Sequence[HostTarget], request: object, listen: Listen
            ) -> tuple[HostReply[UnloadAllResult], ...]:
                assert request == UnloadAll(dry_run=True)
                port = smallest(PortResult) | {"model": "m", "port": 8100, "dry_run": True, "plan": {"stops": ["m"]}}
                result = decode(UnloadAllResult, smallest(UnloadAllResult) | {"ports": [port]})
                return tuple(
                    HostReply(target.name, None if target.name in errors else result, errors.get(target.name))
                    for target in targets
                )

            monkeypatch.setattr(client, "ask_all", ask_all)
            monkeypatch.setattr("sys.stdin", Terminal(answer))
            tasks._confirm(Cli(UnloadAll, Common(host="a,b")), HOSTS[:2], UnloadAll())

        return run

    def test_confirmation_lists_the_servers_of_each_host(
        self, confirm: Confirm, capsys: pytest.CaptureFixture[str]
    ) -> None:
        confirm("y\n")
        lines = capsys.readouterr().err.splitlines()
        assert lines == ["a: m on 8100: unload", "a:   stop: m", "b: m on 8100: unload", "b:   stop: m", lines[-1]]
        assert lines[-1].strip() == "Unload all of this? [y/N]"
        with pytest.raises(UsageError, match="nothing was unloaded"):
            confirm("n\n")

    def test_unreachable_host_prevents_the_confirmation(
        self, confirm: Confirm, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(Refused, match="no"):
            confirm("y\n", b=Refused("x", "no"))
        messages = capsys.readouterr().err
        assert "b: warning: nothing is stopped" in messages and "[y/N]" not in messages


class TestDocumentLines:
    @pytest.fixture
    def ask(self, homelab: Homelab) -> Ask:
        return Ask(with_fake(homelab), "ssh")

    def test_followed_operation_ends_with_one_document(self, ask: Ask) -> None:
        register(ask.studio, "mine")
        ask("load", "--model", "mine", "--port", ask.port).ok()
        (operation,) = ask.document("ops")["operations"]
        assert operation["port"] == ask.port
        followed = ask("ops", "--follow", operation["operation"], "--json").ok()
        assert followed.stdout.count("\n") == 1 and followed.json["hosts"][0]["result"]["state"] == "ready"
        unknown = ask("ops", "--follow", "unknown", "--json")
        assert unknown.stdout.count("\n") == 1 and error_of(unknown)["code"] == "unknown_operation"

    def test_followed_log_has_one_document_a_line(self, ask: Ask) -> None:
        register(ask.studio, "mine")
        ask("load", "--model", "mine", "--port", ask.port).ok()
        with wired.client(ask.lab, "logs", str(ask.port), "--follow", "--json") as process:
            assert process.stdout is not None
            lines = [process.stdout.readline()]
            process.send_signal(signal.SIGINT)
            lines += process.stdout.read().splitlines()
            assert process.wait(30) == 130
        documents = [json.loads(line) for line in lines]
        assert documents[0]["host"] == "studio" and documents[0]["line"]
        error = documents[-1]["error"]
        assert documents[-1]["ok"] is False and error["code"] == "interrupted" and error["why"] and error["hint"]
        ask.studio.sshd.stop()
        down = ask("logs", "--port", ask.port, "--follow", "--json")
        assert down.stdout.count("\n") == 1 and error_of(down)["code"] == "connection_refused"
        ask.studio.sshd.start()


def test_checks_name_missing_tools_and_their_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MlxopsError, match="ruff, mypy, pytest") as refused:
        devtasks._checks([], types=False)
    assert "pip install -e '.[dev]'" in refused.value.hint
