"""The gate of `load --require`, and what a swap that it undoes leaves in the history. In this process."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from mlxops.agent.engines import ENGINES
from mlxops.agent.operations import probe, required
from mlxops.agent.operations.verdicts import last_verdicts
from mlxops.common.chat import TimeLimits
from mlxops.core.commands.load import Load
from mlxops.core.conformance import Check
from mlxops.core.errors import NotStarted, Refused
from mlxops.core.planner import swap_seconds
from tests.agent.test_ending import Host, notes
from tests.agent.test_ending import host as host  # the fixture

LM, OPENAI = "mlx-lm", "mlx-openai-server"


@pytest.mark.parametrize(
    ("check", "engine", "version", "words"),
    [
        ("json", LM, "0.32.2", "mlx-lm does not follow a JSON schema, so --require json cannot pass"),
        ("json", OPENAI, "1.8.1", ""),
        ("length", LM, "0.32.2", ""),
        ("length", OPENAI, "1.8.1", "mlx-openai-server 1.8.1 does not say that an answer is cut, so --require length"),
        ("length", OPENAI, "1.4.2", "cannot pass"),
        ("length", OPENAI, "1.8.2", ""),
        ("length", OPENAI, None, ""),
    ],
)
def test_check_that_an_engine_cannot_pass_is_refused(check: str, engine: str, version: str | None, words: str) -> None:
    request = Load(model="m", port="8100", require=("tools", check))
    if not words:
        return required.refuse_impossible(request, ENGINES[engine], version)
    with pytest.raises(Refused, match=words) as refused:
        required.refuse_impossible(request, ENGINES[engine], version)
    assert refused.value.code == "not_checkable"


@pytest.fixture
def quick(host: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host whose gate gives a busy server seconds. `mine` serves; the next servers have flaws."""
    monkeypatch.setattr(required, "LIMITS", TimeLimits(answer=2.0, busy=0.2))
    monkeypatch.setattr(required, "BUSY_SECONDS", 1.0)
    monkeypatch.setattr(required, "PAUSE_SECONDS", 0.1)
    flaws = {"busy": "busy-later", "twice": "busy-twice", "mute": "no-call"}
    host.register(mine=[], **{name: ["--fake-flaw", flaw] for name, flaw in flaws.items()})
    swap(host, "mine")
    return host


def swap(host: Host, model: str, *require: str, port: int | None = None) -> Any:
    return host("load", model=model, port=str(port or host.first), force=True, require=list(require))


def kept(host: Host) -> dict[str, str]:
    record = last_verdicts(host.store, host.run())
    return {row.check: row.verdict for row in record.verdicts} if record else {}


def test_swap_to_a_server_that_stays_busy_stands_with_a_warning(quick: Host) -> None:
    result = swap(quick, "busy", "tools", "markup")
    assert result.changed and quick.view().model == "busy"
    said = notes(quick)
    assert any("the checks are tried again for 1 s" in each for each in said), said
    assert f"check it when it is less busy: mlxctl probe {quick.first}" in said[-1], said
    assert said[-1].startswith("not checked: tools, markup: the server is busy: it answered 429")
    assert kept(quick) == {"tools": "skip", "markup": "skip"}


def test_checks_of_a_server_that_was_busy_for_a_while_are_made(quick: Host) -> None:
    assert swap(quick, "twice", "tools", "stream").changed
    assert kept(quick) == {"tools": "pass", "stream": "pass"}
    assert not any("not checked" in each for each in notes(quick))


def test_failed_check_undoes_the_swap_and_the_downtime_is_in_the_history(quick: Host) -> None:
    with pytest.raises(NotStarted, match="does not pass: tools"):
        swap(quick, "mute", "tools")
    assert quick.view().model == "mine" and kept(quick) == {}
    (line,) = [each for each in quick.store.history() if each["command"] == "swap_undone"]
    assert (line["model"], line["port"], line["restored"]) == ("mute", quick.first, "mine")
    assert swap_seconds(quick.store.history()) == {quick.first: line["downtime_seconds"]}


def test_gate_keeps_the_verdicts_that_it_does_not_make(quick: Host) -> None:
    quick("probe", port=str(quick.first))
    full = kept(quick)
    assert len(full) == len(Check) and full["tools"] == "pass"
    (quick.store.run_folder(quick.first) / "flaw").write_text("no-call", encoding="utf-8")
    with pytest.raises(NotStarted):
        quick("load", model="mine", port=str(quick.first), require=["tools"])
    assert kept(quick) == full | {"tools": "fail"}, "the family promises it"
    record = last_verdicts(quick.store, quick.run())
    assert record and record.lost == ("tools",)


def test_skipped_check_keeps_the_verdict_and_the_loss_of_this_server(quick: Host) -> None:
    flaw = quick.store.run_folder(quick.first) / "flaw"
    quick("probe", port=str(quick.first))
    flaw.write_text("bad-call", encoding="utf-8")
    quick("probe", port=str(quick.first))
    before = kept(quick)
    assert before["tools"] == "fail"
    flaw.write_text("busy", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "check_server", partial(probe.check_server, limits=required.LIMITS))
        (row,) = quick("probe", port=str(quick.first)).ports
    assert {each.verdict for each in row.verdicts} == {"skip"}, "what this probe found"
    assert kept(quick) == before
    record = last_verdicts(quick.store, quick.run())
    assert record and record.lost == ("tools",) == row.lost


def test_downtime_of_a_move_is_that_of_its_port(quick: Host) -> None:
    moved = swap(quick, "mine", port=quick.second)
    assert moved.changed and moved.downtime_seconds is None, "nothing served there before"
    swap(quick, "twice")
    taken = swap(quick, "mine")
    assert taken.changed and taken.downtime_seconds > 0
    assert swap_seconds(quick.store.history()) == {quick.first: pytest.approx(taken.downtime_seconds, abs=0.001)}
