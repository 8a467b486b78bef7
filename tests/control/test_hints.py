"""The commands in what a host tells, as they are typed where it is read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxops.control.hints import TASKS, aimed, aimed_event
from mlxops.core.errors import Refused
from mlxops.core.protocol import Done, Failed, Line, Note, Phase
from mlxops.program import with_flags
from mlxops.tasks import namespace
from tests.properties import PROPERTY

OTHER = " --host studio2"


@pytest.mark.parametrize(
    ("told", "typed"),
    [
        ("mlxctl unload 8100", "mlxctl unload --host studio2 8100"),
        ("first: mlxctl unload 8100 --force", "first: mlxctl unload --host studio2 8100 --force"),
        ("mlxctl unload-all", "mlxctl unload-all --host studio2"),
        ("agree anew: inv deploy", "agree anew: inv deploy --host studio2"),
        ("mlxctl load a 8100, or mlxctl reconcile", "mlxctl load{0} a 8100, or mlxctl reconcile{0}"),
        ("wait: mlxctl ops --follow x; or --cancel x", "wait: mlxctl ops --host studio2 --follow x; or --cancel x"),
        ("paste what `inv gateway --print` shows", "paste what `inv gateway{0} --print` shows"),
        ("see `mlxctl status`", "see `mlxctl status{0}`"),
        ("mlxctl ops", "mlxctl ops{0}"),
        ("(sizes: mlxctl list)", "(sizes: mlxctl list{0})"),
        # It says itself where it goes.
        ("run `mlxctl restore --local` there", "run `mlxctl restore --local` there"),
        ("inv deploy --host studio", "inv deploy --host studio"),
        ("inv ops --follow x --host studio; then inv deploy", "inv ops --follow x --host studio; then inv deploy{0}"),
        ("mlxctl status and mlxctl ops --host a", "mlxctl status{0} and mlxctl ops --host a"),
        # No command, or none that knows a host.
        ("inv --list; inv demo; inv test; inv bench", "inv --list; inv demo; inv test; inv bench"),
        ("inv faults --only KIND --at 1", "inv faults --only KIND --at 1"),
        ("mlxctl loads; mlxctl set-up", "mlxctl loads; mlxctl set-up"),
        ("my-mlxctl load; /x/inv load", "my-mlxctl load; /x/inv load"),
        ("add --force", "add --force"),
        ("", ""),
    ],
)
def test_a_command_goes_to_the_host_that_told_it(told: str, typed: str) -> None:
    assert aimed(told, OTHER) == typed.format(OTHER)
    assert aimed(told, "") == told


def test_what_is_aimed_is_understood() -> None:
    values = frozenset({"--host", "--model", "--port"})
    words = aimed("mlxctl load org/name 8100", OTHER).split()[1:]
    assert with_flags(words, values) == ["load", "--host", "studio2", "--model", "org/name", "--port", "8100"]
    words = aimed("mlxctl load org/name 8100", " --host studio2 --local").split()[1:]
    assert with_flags(words, values) == [
        "load",
        "--host",
        "studio2",
        "--local",
        "--model",
        "org/name",
        "--port",
        "8100",
    ]


def test_the_tasks_are_those_that_know_a_host() -> None:
    knowing = {
        name for name, task in namespace.tasks.items() if any(each.name == "host" for each in task.get_arguments())
    }
    assert set(TASKS) == knowing


def test_hints_are_aimed_wherever_they_stand_and_nothing_else_is() -> None:
    rows = [{"hint": "mlxctl restore", "message": "mlxctl restore", "port": 8100}]
    result = {"drift": rows, "skipped": [{"why": "or now: mlxctl load"}], "url": "x", "none": None}
    done = aimed_event(Done(result), OTHER)
    assert isinstance(done, Done)
    assert done.result["drift"] == [rows[0] | {"hint": "mlxctl restore --host studio2"}]
    assert done.result["skipped"] == [{"why": "or now: mlxctl load --host studio2"}]
    assert (done.result["url"], done.result["none"]) == ("x", None)
    error = Refused("x", "mlxctl ops", why="mlxctl ops", hint="mlxctl ops", details={"rows": rows, "pid": 1})
    failed = aimed_event(Failed(error), OTHER)
    assert isinstance(failed, Failed)
    assert (failed.error.message, failed.error.why) == ("mlxctl ops", "mlxctl ops")
    assert failed.error.hint == "mlxctl ops --host studio2" and failed.error.details["pid"] == 1
    assert aimed_event(Note("mlxctl ops", "warning"), OTHER) == Note("mlxctl ops --host studio2", "warning")
    for event in (Line("mlxctl ops"), Phase("start", "mlxctl ops")):
        assert aimed_event(event, OTHER) == event


@given(
    st.lists(
        st.sampled_from(["mlxctl", "inv", "--host", "--local", "a", "8100", ";", "`", ", or", *TASKS]), max_size=9
    ),
    st.sampled_from([" --host studio2", " --local", " --host studio2 --local"]),
)
@PROPERTY
def test_what_is_aimed_stays_so(words: list[str], flags: str) -> None:
    once = aimed(" ".join(words), flags)
    assert aimed(once, flags) == once
    assert once.replace(flags, "") == " ".join(words).replace(flags, "")
