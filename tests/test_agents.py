"""What an agent needs that operates mlxops: to start and come back later, to be named, and to change what it saw."""

from __future__ import annotations

import re
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from mlxops.core.protocol import MAX_NAME, Requester, short_name
from tests.lab.homelab import Homelab
from tests.lab.quick import HeldEngine
from tests.lab.run import run, script
from tests.steps import OTHER, REPO, Ask, assigned, error_of, finish, install, listener, register

ID = re.compile(r"[0-9]{8}T[0-9]{6}-[0-9a-f]{8}")


class TestDetach:
    def test_detached_load_goes_on_and_can_be_followed(self, ask: Ask) -> None:
        engine = HeldEngine(ask.lab)
        register(ask.studio, "mine")
        answer = ask("load", "--model", "mine", "--port", ask.port, "--detach", "--json").ok()
        (host,) = answer.json["hosts"]
        operation = host["operation"]
        assert ID.fullmatch(operation) and answer.json["ok"] and host["result"] is None and host["error"] is None
        assert f"--follow {operation}" in answer.stderr
        late = ask("ops", "--follow", operation, "--timeout", "0", "--json")
        assert (late.exit, error_of(late)["code"]) == (9, "still_running"), str(late)
        (row,) = late.json["hosts"][0]["result"]["operations"]
        assert (row["operation"], row["state"], row["command"]) == (operation, "running", "load")
        table = ask("ops", "--follow", operation, "--timeout", "0.1")
        assert table.exit == 9 and operation in table.stdout and "still runs" in table.stderr
        engine.let(*ask.studio.ports)
        done = ask("ops", "--follow", operation, "--timeout", "60", "--json").ok()
        result = done.json["hosts"][0]["result"]
        assert (result["model"], result["state"]) == ("mine", "ready")
        again = ask("ops", "--follow", operation, "--timeout", "0", "--json").ok()
        assert again.json["hosts"][0]["result"] == result

    def test_text_is_the_bare_id(self, remote: Ask) -> None:
        register(remote.studio, "mine")
        answer = remote("unload", "--port", remote.port, "--detach").ok()
        assert ID.fullmatch(answer.stdout.strip()), str(answer)
        remote("ops", "--follow", answer.stdout.strip()).ok()

    def test_refused_change_has_an_error_and_no_operation(self, remote: Ask) -> None:
        answer = remote("load", "--model", "mine", "--port", "1", "--detach", "--json")
        assert error_of(answer)["code"] == "bad_port" and "operation" not in answer.stdout


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("load --model jerry-xl --port 8100 --dry-run --detach", "nothing_to_detach"),
        ("boot --detach", "nothing_to_detach"),
        ("ops --timeout 5", "follow_missing"),
        ("ops --follow 7f3a --timeout soon", "bad_duration"),
        ("load --model jerry-xl --port 8100 --expect ../x", "bad_name"),
    ],
)
def test_flags_that_make_no_sense_are_refused(words: str, code: str, tmp_path: Path) -> None:
    answer = run([script("mlxctl"), *words.split(), "--local", "--json"], tmp_path, {"HOME": str(tmp_path)})
    assert (answer.exit, error_of(answer)["code"]) == (2, code), str(answer)


class TestAsker:
    def test_name_travels_with_the_request(self, ask: Ask) -> None:
        register(ask.studio, "mine")
        ask("load", "--model", "mine", "--port", ask.port, env={"MLXOPS_BY": "night job"}).ok()
        asker = ask.document("ops")["operations"][0]["asker"]
        assert asker.endswith(" (night job)"), asker
        assert " (night job)" in (ask.studio.state / "history.jsonl").read_text()

    @pytest.mark.parametrize(
        ("given", "recorded"),
        [
            ("claude", "claude"),
            ("two\nlines\tand  spaces", "two lines and spaces"),
            ("\x1b[31mred\u202e\udcff", r"\x1b[31mred\u202e\udcff"),
            ("x" * 1000, "x" * MAX_NAME),
            ("", ""),
        ],
    )
    def test_name_is_bounded_and_harmless(self, given: str, recorded: str) -> None:
        assert short_name(given) == recorded
        assert Requester.from_wire({"user": "jan", "host": "mini", "by": given}).by == recorded

    def test_asker_of_an_older_control_node_is_read(self) -> None:
        assert str(Requester.from_wire({"user": "jan", "host": "mini"})) == "jan@mini"
        assert str(Requester.from_wire({"by": 1})) == "?@?"
        assert Requester("jan", "mini").to_wire() == {"user": "jan", "host": "mini"}


class TestExpect:
    def test_swap_needs_the_expected_model(self, remote: Ask) -> None:
        for name, repo in (("first", REPO), ("second", OTHER), ("third", OTHER)):
            register(remote.studio, name, repo=repo)
        swap = ("--port", remote.port, "--force", "--expect", "first")
        error = remote.error(3, "load", "--model", "second", *swap)
        assert (error["code"], error["details"]["held"]) == ("unexpected_model", [])
        remote("load", "--model", "first", "--port", remote.port).ok()
        assert remote.result("load", "--model", "second", *swap)["changed"]
        pid = listener(remote.studio, remote.port)
        error = remote.error(3, "load", "--model", "third", *swap, "--dry-run")
        assert (error["code"], error["details"]["held"]) == ("unexpected_model", ["second"])
        assert remote.error(3, "load", "--model", "third", *swap)["code"] == "unexpected_model"
        assert not remote.result("load", "--model", "second", *swap)["changed"], "a repeated request changes nothing"
        assert listener(remote.studio, remote.port) == pid

    def test_one_of_several_swaps_at_once_wins(self, homelab: Homelab) -> None:
        local = Ask(homelab, "local")
        HeldEngine(homelab).let(*homelab.studio.ports)
        install(local.studio)
        names = ("first", "a", "b", "c")
        for name in names:
            register(local.studio, name)
        local("load", "--model", "first", "--port", local.port).ok()
        processes: list[subprocess.Popen[str]] = []
        with ExitStack() as stack:
            for name in names[1:]:
                words = ("load", "--model", name, "--port", local.port, "--force", "--expect", "first")
                processes.append(stack.enter_context(local.running(*words)))
            ends = [finish(process, 60).exit for process in processes]
        assert sorted(ends)[0] == 0 and set(sorted(ends)[1:]) <= {3, 75}, ends
        (winner,) = assigned(local.studio)
        assert winner == names[1 + ends.index(0)]
