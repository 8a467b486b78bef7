"""A busy server is never taken for a wedged one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mlxops.core.deaths import MEMORY, UNKNOWN, Death, Wedged, cause_of, from_text, memory_deaths
from mlxops.core.wedged import BUSY_SHARE, FAILURES, FAILURES_IN_USE, Answer, Asked, failures, is_reported, is_wedged

SILENT = Answer.SILENT
ROUNDS = {
    # what was asked, whether another server answered -> failures after two
    "it answers": (Asked(Answer.ANSWERED), False, 0),
    "a part of an answer": (Asked(Answer.PROGRESS), True, 0),
    "it could not be asked": (Asked(Answer.UNKNOWN), True, 2),
    "silent, alone, idle": (Asked(SILENT, False, 0.0), False, 3),
    "silent, alone, another one answers": (Asked(SILENT, False, 0.0), True, 3),
    "silent, in use, another one answers": (Asked(SILENT, True, 0.0), True, 3),
    "silent, in use, and no other one answers": (Asked(SILENT, True, 0.0), False, 0),
    "silent, and it works": (Asked(SILENT, False, BUSY_SHARE), True, 0),
    "silent, and its processor time is not known": (Asked(SILENT, False, None), True, 0),
}


@pytest.mark.parametrize("case", ROUNDS)
def test_silent_round_counts_only_with_evidence(case: str) -> None:
    asked, another, expected = ROUNDS[case]
    assert failures(2, asked, another_answered=another) == expected


def test_server_in_use_is_given_more_rounds() -> None:
    assert is_wedged(FAILURES, in_use=False) and not is_wedged(FAILURES - 1, in_use=False)
    assert not is_wedged(FAILURES_IN_USE - 1, in_use=True) and is_wedged(FAILURES_IN_USE, in_use=True)


def told(rounds: int, *, in_use: Callable[[int], bool]) -> list[int]:
    """Return in which rounds a server that completes nothing is told."""
    found: list[int] = []
    for failed in range(1, rounds):
        if is_reported(failed, found[-1] if found else None, in_use=in_use(failed)):
            found.append(failed)
    return found


def test_wedged_server_is_reported_at_once_and_then_seldom_also_if_its_clients_come_and_go() -> None:
    assert told(30, in_use=lambda failed: False) == [3, 13, 23]
    assert told(30, in_use=lambda failed: True) == [12, 22]
    assert told(30, in_use=lambda failed: failed <= 3) == [4, 14, 24]


DEATH = Death(8100, 17, "x", 0.0)


def test_death_of_memory_needs_evidence() -> None:
    assert cause_of(DEATH, last_words=None, jetsam=None).cause == UNKNOWN
    evidence = {
        "macOS killed it (JetsamEvent-1.ips)": cause_of(DEATH, last_words="x", jetsam="JetsamEvent-1.ips"),
        "the kernel killed a process of its control group": cause_of(
            Death(8100, 17, "x", 0.0, oom_killed=True), last_words=None, jetsam=None
        ),
        "MemoryError": cause_of(DEATH, last_words="MemoryError", jetsam=None),
    }
    assert {text: each.evidence for text, each in evidence.items()} == {text: text for text in evidence}
    assert {each.cause for each in evidence.values()} == {MEMORY}


def test_what_a_pass_is_about_is_read_back() -> None:
    for about in (DEATH, Wedged(8100, 17, "123")):
        assert from_text(about.to_text()) == about


def test_lack_of_memory_is_remembered_until_a_person_acts() -> None:
    at = {"model": "m", "port": 8100}
    died = {"command": "died", "cause": "memory", "held_bytes": 5, **at}
    restarted = {"command": "load", "restore": True, **at}
    assert memory_deaths([died, restarted]) == {("m", 8100): 5}
    for line in (
        {"command": "load", "restore": False, **at},
        {"command": "unload", **at},
        {"command": "lasted", **at},
        {"command": "died", "cause": "unknown", "held_bytes": 9, **at},
    ):
        assert memory_deaths([died, line]) == {}
    assert memory_deaths([{"command": "died", "model": 1, "port": "x"}, died | {"held_bytes": None}]) == {}
