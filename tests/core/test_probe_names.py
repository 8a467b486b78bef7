"""Which names are asked for through the gateway: only those that every server behind them is known to know."""

from __future__ import annotations

import pytest

from mlxops.core import probe_names
from mlxops.core.gateway import Entry, same_base
from mlxops.core.probe_names import GatewayServer, server_of, to_ask

XL, L = "http://studio:8100/v1", "http://studio:8101/v1"


def entry(alias: str, sends: str, base: str | None = XL) -> Entry:
    return Entry(alias, f"openai/{sends}", sends, base, has_key=True)


def ready(base: str = XL, *known: str, **how: object) -> GatewayServer:
    return GatewayServer(base, "jerry-xl" if base == XL else "jerry-l", known=known, **how)  # type: ignore[arg-type]


OURS = ready(XL, "jerry-xl", "default_model")
BESIDE = GatewayServer(L, "jerry-l", ready=False, known=("jerry-l",))


@pytest.mark.parametrize(
    ("entries", "asked"),
    [
        ([entry("jerry-xl", "jerry-xl")], {"jerry-xl"}),
        # What clients say need not be what the server is asked for.
        ([entry("qwen-coder", "jerry-xl"), entry("gpt-4", "jerry-xl")], {"qwen-coder", "gpt-4"}),
        ([entry("jerry-xl", "default_model")], {"jerry-xl"}),
        # Of another server, and of none of ours.
        ([entry("jerry-l", "jerry-l", L), entry("gpt", "gpt", "https://api.openai.com/v1")], set()),
        ([entry("jerry-xl", "jerry-xl", None)], set()),
        # The same name in the cloud, too: it may answer, and knows its own names.
        ([entry("jerry-xl", "jerry-xl"), entry("jerry-xl", "gpt-4", "https://api.openai.com/v1")], {"jerry-xl"}),
        ([entry("jerry-xl", "jerry-xl"), entry("jerry-xl", "jerry-l", L)], {"jerry-xl"}),
    ],
)
def test_names_that_lead_to_a_server_which_knows_them_are_asked_for(entries: list[Entry], asked: set[str]) -> None:
    plan = to_ask(entries, [OURS, BESIDE])
    assert set(plan.names) == asked and not plan.skipped


@pytest.mark.parametrize(
    ("entries", "servers", "why"),
    [
        ([entry("jerry-xl", "other")], [OURS], "sends the name 'other', and port 8100 answers to jerry-xl"),
        ([entry("jerry-xl", "jerry-xl/")], [OURS], "sends the name 'jerry-xl/'"),
        ([entry("jerry-xl", "Jerry-XL")], [OURS], "sends the name 'Jerry-XL'"),
        ([entry("jerry-*", "jerry-*")], [OURS], "many names"),
        ([entry("*", "*")], [OURS], "many names"),
        ([Entry("jerry-xl", "jerry-xl", None, XL, has_key=True)], [OURS], "not known"),
        # By turns it would be asked of the server that does not know it.
        ([entry("a", "jerry-xl"), entry("a", "other")], [OURS], "'other'"),
        ([entry("a", "jerry-xl"), entry("a", "jerry-xl", L)], [OURS, BESIDE], "port 8101 answers to jerry-l"),
        ([entry("a", "jerry-xl")], [ready(XL, not_asked="started without --model")], "without --model"),
        ([entry("a", "jerry-xl")], [ready(XL)], "whether port 8100 answers"),
    ],
)
def test_a_name_that_a_server_may_not_know_is_not_asked_for(
    entries: list[Entry], servers: list[GatewayServer], why: str
) -> None:
    plan = to_ask(entries, servers)
    assert why in plan.skipped[entries[0].alias]


@pytest.mark.parametrize(
    "server",
    [
        ready(XL, "m", any_name=True),
        ready(XL, drops=False),
        GatewayServer(XL, None, known=("any",)),
    ],
    ids=["answers to any name", "loses nothing by a wrong one", "knows it"],
)
def test_a_server_that_a_name_cannot_harm_is_asked(server: GatewayServer) -> None:
    assert to_ask([entry("any", "any")], [server]).skipped == {}


def test_an_idle_port_beside_keeps_no_name_from_being_asked_for() -> None:
    idle = GatewayServer(L, None, ready=False, idle=True)
    plan = to_ask([entry("a", "jerry-xl"), entry("a", "x", L)], [OURS, idle])
    assert (plan.skipped, plan.others["a"]) == ({}, (L,))


def test_where_nothing_is_known_of_the_gateway_slots_are_asked_for_that_it_cannot_harm() -> None:
    plan = to_ask(None, [OURS, ready(L, "jerry-l", drops=False)])
    assert (set(plan.names), set(plan.skipped)) == ({"jerry-xl", "jerry-l"}, {"jerry-xl"})


def test_what_an_agent_tells_is_read_whatever_it_is() -> None:
    told = {"answers_to": "jerry-xl", "also_answers_to": ["default_model", 7], "state": "ready", "not_asked": None}
    found = server_of(told, XL, None)
    assert (found.known, found.ready, found.any_name, found.drops) == (("jerry-xl", "default_model"), True, False, True)
    assert server_of({"also_answers_to": 7, "answers_to": []}, XL, None).known == ()


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        ([], ["jerry-xl"]),
        ([entry("qwen-coder", "jerry-xl")], ["qwen-coder"]),
        ([entry("qwen-coder", "jerry-xl"), entry("jerry-xl", "jerry-xl")], ["jerry-xl", "qwen-coder"]),
        ([entry("jerry-l", "jerry-l", L)], ["jerry-xl"]),
    ],
)
def test_a_port_is_called_what_clients_say(entries: list[Entry], names: list[str]) -> None:
    assert probe_names.names_for(entries, XL, "jerry-xl") == names


@pytest.mark.parametrize(
    ("running", "stale"),
    [
        ([entry("a", "jerry-xl", "http://STUDIO.:8100/v1/")], False),
        ([entry("a", "other")], True),
        ([entry("a", "jerry-xl", L)], True),
        ([], True),
        ([entry("a", "jerry-xl"), entry("a", "jerry-xl", L)], True),
    ],
)
def test_a_gateway_that_runs_with_other_entries_than_its_files_have_is_found(running: list[Entry], stale: bool) -> None:
    assert probe_names.differ([entry("a", "jerry-xl"), entry("b", "x")], running, "a") is stale


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("http://studio:8100/v1", "http://studio:8100/v1/", True),
        ("http://studio:8100", "http://Studio.:8100/v1", True),
        ("http://studio/v1", "http://studio:80/v1", True),
        ("https://studio/v1", "https://studio:443", True),
        ("http://[::1]:8100/v1", "http://[::1]:8100", True),
        ("http://studio:8100/v1", "http://studio:8101/v1", False),
        ("http://studio:8100/v1", "http://other:8100/v1", False),
        ("http://studio:8100/v1", "http://studio:8100/other/v1", False),
        ("http://studio:99999/v1", "http://studio:8100/v1", False),
        ("", "http://studio:8100/v1", False),
    ],
)
def test_addresses_are_compared_by_what_they_mean(one: str, other: str, same: bool) -> None:
    assert same_base(one, other) is same_base(other, one) is same
