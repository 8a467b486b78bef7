"""Which names may be probed through the gateway: those that every server behind them knows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlxops.core import probe_names
from mlxops.core.commands.gateway import ServedPort
from mlxops.core.gateway import Entry, same_base
from mlxops.core.probe_names import GatewayServer, plan_probes, server_of

XL, L = "http://studio:8100/v1", "http://studio:8101/v1"


def entry(alias: str, sends: str, base: str | None = XL) -> Entry:
    return Entry(alias, f"openai/{sends}", sends, base, has_key=True)


def ready(base: str = XL, *names: str, **fields: object) -> GatewayServer:
    return GatewayServer(base, "jerry-xl" if base == XL else "jerry-l", names=names, **fields)  # type: ignore[arg-type]


OURS = ready(XL, "jerry-xl", "default_model")
BESIDE = GatewayServer(L, "jerry-l", ready=False, names=("jerry-l",))


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        ([entry("jerry-xl", "jerry-xl")], {"jerry-xl"}),
        # The clients' name need not be the one that the gateway sends.
        ([entry("qwen-coder", "jerry-xl"), entry("gpt-4", "jerry-xl")], {"qwen-coder", "gpt-4"}),
        ([entry("jerry-xl", "default_model")], {"jerry-xl"}),
        # For another server, and for a server that is not ours.
        ([entry("jerry-l", "jerry-l", L), entry("gpt", "gpt", "https://api.openai.com/v1")], set()),
        ([entry("jerry-xl", "jerry-xl", None)], set()),
        # The same name in the cloud, too: it may answer, and knows its own names.
        ([entry("jerry-xl", "jerry-xl"), entry("jerry-xl", "gpt-4", "https://api.openai.com/v1")], {"jerry-xl"}),
        ([entry("jerry-xl", "jerry-xl"), entry("jerry-xl", "jerry-l", L)], {"jerry-xl"}),
    ],
)
def test_names_that_their_server_knows_are_probed(entries: list[Entry], names: set[str]) -> None:
    plan = plan_probes(entries, [OURS, BESIDE])
    assert set(plan.names) == names and not plan.skipped


@pytest.mark.parametrize(
    ("entries", "servers", "why"),
    [
        ([entry("jerry-xl", "other")], [OURS], "sends the name 'other', and port 8100 answers to jerry-xl"),
        ([entry("jerry-xl", "jerry-xl/")], [OURS], "sends the name 'jerry-xl/'"),
        ([entry("jerry-xl", "Jerry-XL")], [OURS], "sends the name 'Jerry-XL'"),
        ([entry("jerry-*", "jerry-*")], [OURS], "many names"),
        ([entry("*", "*")], [OURS], "many names"),
        ([Entry("jerry-xl", "jerry-xl", None, XL, has_key=True)], [OURS], "not known"),
        # The gateway would also send it to the server that does not know it.
        ([entry("a", "jerry-xl"), entry("a", "other")], [OURS], "'other'"),
        ([entry("a", "jerry-xl"), entry("a", "jerry-xl", L)], [OURS, BESIDE], "port 8101 answers to jerry-l"),
        ([entry("a", "jerry-xl")], [ready(XL, not_asked="started without --model")], "without --model"),
        ([entry("a", "jerry-xl")], [ready(XL)], "whether port 8100 answers"),
    ],
)
def test_name_that_a_server_may_not_know_is_skipped(
    entries: list[Entry], servers: list[GatewayServer], why: str
) -> None:
    plan = plan_probes(entries, servers)
    assert why in plan.skipped[entries[0].alias]


@pytest.mark.parametrize(
    "server",
    [
        ready(XL, "m", any_name=True),
        ready(XL, drops=False),
        GatewayServer(XL, None, names=("any",)),
    ],
    ids=["answers to any name", "loses nothing by a wrong one", "knows it"],
)
def test_server_that_no_name_can_harm_is_probed(server: GatewayServer) -> None:
    assert plan_probes([entry("any", "any")], [server]).skipped == {}


def test_idle_port_does_not_prevent_a_probe() -> None:
    idle = GatewayServer(L, None, ready=False, idle=True)
    plan = plan_probes([entry("a", "jerry-xl"), entry("a", "x", L)], [OURS, idle])
    assert (plan.skipped, plan.others["a"]) == ({}, (L,))


def test_unknown_entries_leave_slots_that_no_name_can_harm() -> None:
    plan = plan_probes(None, [OURS, ready(L, "jerry-l", drops=False)])
    assert (set(plan.names), set(plan.skipped)) == ({"jerry-xl", "jerry-l"}, {"jerry-xl"})


def test_server_has_the_names_that_its_agent_reported() -> None:
    row = ServedPort(
        *(8100, "jerry-xl", "ready", "mlxops", "tiny", "jerry-xl", ("default_model",), False, True, None),
        *((), None, True, ""),
    )
    server = server_of(row, XL, None)
    assert (server.names, server.ready, server.drops) == (("jerry-xl", "default_model"), True, True)
    assert server_of(replace(row, answers_to=None, also_answers_to=()), XL, None).names == ()


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        ([], ["jerry-xl"]),
        ([entry("qwen-coder", "jerry-xl")], ["qwen-coder"]),
        ([entry("qwen-coder", "jerry-xl"), entry("jerry-xl", "jerry-xl")], ["jerry-xl", "qwen-coder"]),
        ([entry("jerry-l", "jerry-l", L)], ["jerry-xl"]),
    ],
)
def test_names_of_a_port_are_those_of_its_clients(entries: list[Entry], names: list[str]) -> None:
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
def test_reported_entries_that_differ_from_the_files_are_detected(running: list[Entry], stale: bool) -> None:
    assert probe_names.entries_differ([entry("a", "jerry-xl"), entry("b", "x")], running, "a") is stale


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
def test_equal_addresses_have_several_spellings(one: str, other: str, same: bool) -> None:
    assert same_base(one, other) is same_base(other, one) is same
