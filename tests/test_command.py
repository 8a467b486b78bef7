"""One command of several hosts, and of one whose end is Ctrl-C."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable, Mapping

import pytest

from mlxops import devtasks, tasks
from mlxops.cli import runner
from mlxops.cli.runner import Call, LeftError
from mlxops.control.client import HostReply, HostTarget
from mlxops.control.output import Console
from mlxops.core.errors import Exit, Interrupted, MlxopsError, Refused, UsageError
from mlxops.core.settings import Settings
from tests.lab.homelab import Homelab
from tests.lab.wired import client
from tests.steps import Ask, error_of, register, with_fake

HOSTS = [HostTarget(name, name, (), Settings()) for name in ("a", "b", "c")]
CALL = Call("restore", "a,b,c", local=False, json=True, debug=False)


class TestInTurn:
    @staticmethod
    def run(one: Callable[[HostTarget], HostReply], targets: list[HostTarget] = HOSTS) -> tuple[HostReply, ...]:
        return runner.in_turn(CALL, targets, Console(many=False), one)

    def test_one_that_fails_keeps_nobody_else(self) -> None:
        def one(target: HostTarget) -> HostReply:
            error = Refused("x", "x", why="x", hint="x") if target.name == "b" else None
            return HostReply(target.name, {}, error)

        assert [(each.host, each.error is None) for each in self.run(one)] == [("a", True), ("b", False), ("c", True)]

    @pytest.mark.parametrize("left", [True, False])
    def test_ctrl_c_ends_the_whole_and_tells_of_each(self, left: bool) -> None:
        asked = []

        def one(target: HostTarget) -> HostReply:
            asked.append(target.name)
            if target.name == "a":
                return HostReply("a", {})
            raise LeftError(HostReply("b", error=Interrupted("left", "l"))) if left else KeyboardInterrupt

        first, second, third = self.run(one)
        assert asked == ["a", "b"] and first == HostReply("a", {})
        assert second.error is not None and second.error.code == ("left" if left else "interrupted")
        assert third.error is not None and third.error.code == "not_asked"
        assert third.error.exit is Exit.INTERRUPTED and "--host c" in third.error.hint

    def test_before_anything_was_done_it_is_the_commands_own_end(self) -> None:
        def one(target: HostTarget) -> HostReply:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.run(one)


class TestUnloadAllAsks:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        def run(said: str, **errors: Refused) -> None:
            def ask_all(
                targets: list[HostTarget], name: str, args: Mapping[str, object], listen: object
            ) -> list[HostReply]:
                assert (name, args) == ("unload-all", {"dry_run": True})
                rows = [{"model": "m", "port": 8100, "dry_run": True, "plan": {"stops": ["m"]}}]
                return [
                    HostReply(each.name, None if each.name in errors else {"ports": rows}, errors.get(each.name))
                    for each in targets
                ]

            monkeypatch.setattr(tasks, "ask_all", ask_all)
            monkeypatch.setattr("sys.stdin", Terminal(said))
            tasks._confirm(HOSTS[:2], Console(many=False))

        return run

    def test_once_for_all_hosts_and_lists_what_goes_on_each(
        self, asked: Callable[..., None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        asked("y\n")
        lines = capsys.readouterr().err.splitlines()
        assert lines == ["a: m on 8100: unload", "a:   stop: m", "b: m on 8100: unload", "b:   stop: m", lines[-1]]
        assert lines[-1].strip() == "Unload all of this? [y/N]"
        with pytest.raises(UsageError, match="nothing was unloaded"):
            asked("n\n")

    def test_not_where_one_cannot_be_shown(
        self, asked: Callable[..., None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(Refused, match="no"):
            asked("y\n", b=Refused("x", "no"))
        said = capsys.readouterr().err
        assert "b: warning: it cannot be shown" in said and "[y/N]" not in said


class TestOneDocumentALine:
    @pytest.fixture
    def ask(self, homelab: Homelab) -> Ask:
        return Ask(with_fake(homelab), "ssh")

    def test_of_an_operation_that_is_followed(self, ask: Ask) -> None:
        register(ask.studio, "mine")
        ask("load", "--model", "mine", "--port", ask.port).ok()
        (operation,) = ask.document("ops")["operations"]
        assert operation["port"] == ask.port
        followed = ask("ops", "--follow", operation["operation"], "--json").ok()
        assert followed.stdout.count("\n") == 1 and followed.json["hosts"][0]["result"]["state"] == "ready"
        unknown = ask("ops", "--follow", "nobody", "--json")
        assert unknown.stdout.count("\n") == 1 and error_of(unknown)["code"] == "unknown_operation"

    def test_of_a_log_that_is_followed_until_it_ends(self, ask: Ask) -> None:
        register(ask.studio, "mine")
        ask("load", "--model", "mine", "--port", ask.port).ok()
        with client(ask.lab, "logs", str(ask.port), "--follow", "--json") as process:
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


def test_the_checks_say_how_to_get_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MlxopsError, match="ruff, mypy, pytest") as refused:
        devtasks._checks([], types=False)
    assert "pip install -e '.[dev]'" in refused.value.hint
