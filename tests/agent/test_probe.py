"""`probe`, what it keeps, the promises of an entry, and `load --require`."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.lab.world import wait_until
from tests.steps import Ask, assigned, nothing_runs, register, servers


def set_flaw(ask: Ask, flaw: str) -> None:
    """Give the server on the first port a flaw, or take it away."""
    file = ask.studio.state / "run" / str(ask.port) / "flaw"
    if flaw:
        file.write_text(flaw, encoding="utf-8")
    else:
        file.unlink(missing_ok=True)


def verdicts(ask: Ask, *flags: str, exit: int = 0) -> dict[str, Any]:
    """Return the verdicts of `probe` on the first port, by check."""
    answer = ask("probe", "--port", ask.port, "--json", *flags)
    assert answer.exit == exit, str(answer)
    (row,) = answer.json["hosts"][0]["ports"]
    return {each["check"]: each for each in row["verdicts"]}


def drift(ask: Ask) -> list[Any]:
    return [row for row in ask.document("status")["drift"] if row["code"] == "conformance_lost"]


def loaded(ask: Ask, name: str = "jerry", **entry: object) -> Ask:
    register(ask.studio, name, **entry)  # type: ignore[arg-type]
    ask("load", "--model", name, "--port", ask.port).ok()
    return ask


def test_verdicts_are_shown_kept_and_compared(ask: Ask) -> None:
    loaded(ask, checks=["tools", "reasoning"])
    assert ask.row()["checks"] is None and "checks:" not in ask("status").ok().stdout

    found = verdicts(ask)
    assert {each["verdict"] for check, each in found.items() if check != "json"} == {"pass"}, found
    assert found["json"]["verdict"] == "skip"
    assert ask.row()["checks"] == "pass" and drift(ask) == []

    set_flaw(ask, "bad-call")
    answer = ask("probe", "--json")
    assert answer.exit == 3 and answer.json["hosts"][0]["error"]["code"] == "check_failed"
    assert ask.row()["checks"] == "fail" and "checks: fail" in ask("status").ok().stdout
    (lost,) = drift(ask)
    assert (lost["port"], lost["model"]) == (ask.port, "jerry") and lost["message"].endswith(": tools")
    assert ask(*lost["commands"][0][1:]).exit == 3, "the hint works"

    assert verdicts(ask, exit=3)["tools"]["verdict"] == "fail" and drift(ask), "the second time is as bad"
    set_flaw(ask, "")
    assert verdicts(ask)["tools"]["verdict"] == "pass" and drift(ask) == []


def test_last_verdicts_are_shown_without_asking(remote: Ask, tmp_path: Path) -> None:
    names = tmp_path / "names"
    loaded(remote, args=["--fake-names", str(names)])
    verdicts(remote)
    asked = names.read_text()
    assert verdicts(remote, "--last")["tools"]["verdict"] == "pass"
    assert names.read_text() == asked and set(asked.split()) == {"jerry-xl"}, "only its own name is asked for"


def test_last_verdicts_of_a_server_that_died_are_shown(remote: Ask) -> None:
    loaded(remote)
    verdicts(remote)
    (before,) = remote("probe", "--last", "--json").ok().json["hosts"][0]["ports"]
    os.kill(remote.row()["pid"], signal.SIGKILL)
    wait_until(lambda: remote.row()["state"] == "failed", 30, "the end of the server")
    (after,) = remote("probe", "--last", "--json").ok().json["hosts"][0]["ports"]
    assert (after["pid"], after["since"], after["verdicts"]) == (None, before["since"], before["verdicts"])


def test_next_server_has_no_verdicts(remote: Ask) -> None:
    loaded(remote)
    verdicts(remote)
    remote("load", "--model", "jerry", "--port", remote.port, "--force").ok()
    remote("unload", "--port", remote.port).ok()
    remote("load", "--model", "jerry", "--port", remote.port).ok()
    assert remote.row()["checks"] is None
    assert "it was not checked since it started" in remote("probe", "--last").ok().stdout


@pytest.mark.parametrize(
    ("promise", "verdict", "exit"), [("tools", "fail", 3), ("reasoning", "warn", 0), ("null", "warn", 0)]
)
def test_promise_makes_a_missing_capability_a_failure(remote: Ask, promise: str, verdict: str, exit: int) -> None:
    loaded(remote)
    remote("set", "--model", "jerry", "--set", f"checks={promise}").ok()
    set_flaw(remote, "no-call")
    found = verdicts(remote, exit=exit)["tools"]
    assert found["verdict"] == verdict and ("promises it" in found["detail"]) == (verdict == "fail")


def test_family_promises_what_its_models_can_do(remote: Ask) -> None:
    loaded(remote)  # a Qwen3
    set_flaw(remote, "no-call")
    assert verdicts(remote, exit=3)["tools"]["verdict"] == "fail"


def test_unknown_check_is_refused_before_any_connection(remote: Ask) -> None:
    assert remote.error(2, "load", "--model", "jerry", "--port", remote.port, "--require", "tool")["code"] == (
        "unknown_check"
    )
    assert remote.error(2, "set", "--model", "jerry", "--set", "checks=stream")["code"] == "bad_value"


def test_port_that_is_not_ready_is_said(remote: Ask) -> None:
    assert "no server is ready" in remote("probe").ok().stdout
    assert "not asked: the port is idle" in remote("probe", "--port", remote.port).ok().stdout


# -- load --require ---------------------------------------------------------------------------------------------------


def test_swap_whose_server_fails_a_required_check_is_undone(ask: Ask) -> None:
    loaded(ask)
    register(ask.studio, "silent", args=["--fake-flaw", "no-call"])
    words = ("load", "--model", "silent", "--port", ask.port, "--force")

    error = ask.error(4, *words, "--require", "tools,stream")

    assert error["code"] == "check_failed" and "tools: the model called no tool" in error["why"]
    assert "jerry serves port" in error["why"] and error["details"]["checks"] == {"tools": "warn", "stream": "pass"}
    assert assigned(ask.studio) == {"jerry": ask.port} and ask.row()["state"] == "ready"
    assert ask.result(*words, "--require", "stream")["changed"]


def test_check_that_the_engine_cannot_pass_is_refused_before_anything_is_stopped(ask: Ask) -> None:
    loaded(ask)
    register(ask.studio, "other")
    before = ask.row()["pid"]
    error = ask.error(3, "load", "--model", "other", "--port", ask.port, "--force", "--require", "tools,json")
    assert error["code"] == "not_checkable" and "mlx-lm does not follow a JSON schema" in error["message"]
    assert ask.row()["pid"] == before and assigned(ask.studio) == {"jerry": ask.port}


def test_load_that_fails_a_required_check_leaves_nothing(remote: Ask) -> None:
    register(remote.studio, "jerry", args=["--fake-flaw", "no-done"])
    error = remote.error(4, "load", "--model", "jerry", "--port", remote.port, "--require", "stream")
    assert error["code"] == "check_failed" and assigned(remote.studio) == {}
    nothing_runs(remote.studio, remote.port)


def test_running_server_that_fails_a_required_check_stays(remote: Ask) -> None:
    loaded(remote)
    words = ("load", "--model", "jerry", "--port", remote.port, "--require", "tools")
    assert remote.result(*words)["changed"] is False
    set_flaw(remote, "no-call")
    assert remote.error(4, *words)["code"] == "check_failed"
    assert remote.row()["state"] == "ready"


def test_required_check_uses_the_name_that_the_server_knows(remote: Ask, tmp_path: Path) -> None:
    names = tmp_path / "names"
    loaded(remote, args=["--fake-names", str(names)])
    remote.lab.configure(slots={remote.port: "other-alias"})
    (remote.studio.state / "host.json").unlink()  # the next change agrees on the new alias
    answer = remote("load", "--model", "jerry", "--port", remote.port, "--require", "tools").ok()
    assert "checks: tools, as jerry-xl" in answer.stderr
    assert set(names.read_text().split()) == {"jerry-xl"}


# -- the proof --------------------------------------------------------------------------------------------------------


def test_empty_answer_proves_nothing(remote: Ask) -> None:
    register(remote.studio, "jerry", args=["--fake-flaw", "empty"])
    error = remote.error(4, "load", "--model", "jerry", "--port", remote.port)
    assert error["code"] == "server_did_not_start" and "no generated token" in error["message"]
    assert assigned(remote.studio) == {} and not servers(remote.studio)


def test_first_tokens_without_text_are_asked_for_again(remote: Ask) -> None:
    loaded(remote, args=["--fake-flaw", "hidden"])
    assert remote.row()["state"] == "ready"
