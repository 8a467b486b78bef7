"""How long LiteLLM lets a request wait, what a configuration says about it, and what is printed for it.

`tests/control/test_hold_live.py` compares the numbers with a real LiteLLM.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxops.core import gateway, hold, litellm
from mlxops.core.gateway import GatewayPaths, GatewayPort, Mismatch
from mlxops.core.hold import RetrySettings, retries_for, seconds_until_error, seconds_until_last
from mlxops.core.litellm import Environ
from mlxops.core.planner import recent_models, swap_seconds
from mlxops.core.ports import Owner, State
from mlxops.core.settings import MAX_HOLD
from tests.properties import PROPERTY, json_values

FILES = GatewayPaths("router.yaml", "local.env")
HOST = "studio.local"


def item(alias: str = "jerry-xl", port: int = 8100, **params: Any) -> dict[str, Any]:
    base = f"http://{HOST}:{port}/v1"
    return {"model_name": alias, "litellm_params": {"model": "openai/x", "api_base": base, "api_key": "none", **params}}


def port(number: int = 8100, alias: str | None = "jerry-xl", **changes: Any) -> GatewayPort:
    facts: dict[str, Any] = {"state": State.READY, "owner": Owner.MLXOPS} | changes
    return GatewayPort("studio", facts.pop("address", HOST), number, alias, **facts)


def findings(document: dict[str, Any], *ports: GatewayPort) -> tuple[Mismatch, ...]:
    config = litellm.parse(document, Environ(), FILES)
    aliases = [each.alias for each in ports if each.alias]
    return hold.findings(config.concrete(aliases), ports, config.retry, FILES)


def codes(document: dict[str, Any], *ports: GatewayPort) -> list[str]:
    return [each.code for each in findings(document, *ports)]


# -- the schedule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "retries"), [(0, 0), (1, 4), (7, 4), (8, 5), (15, 5), (16, 6), (60, 11), (120, 19), (3600, 454)]
)
def test_hold_becomes_the_fewest_retries_that_reach_it(seconds: int, retries: int) -> None:
    assert retries_for(seconds) == retries


@given(st.integers(1, MAX_HOLD))
def test_last_retry_comes_after_the_hold_and_not_a_pause_too_late(seconds: int) -> None:
    retries = retries_for(seconds)
    assert seconds_until_last(retries) >= seconds
    assert retries == 4 or seconds_until_last(retries - 1) < seconds
    assert seconds_until_last(retries) + 8 <= seconds_until_error(retries) <= seconds_until_last(retries) * 1.1 + 12


def test_pauses_are_those_of_litellm() -> None:
    assert [seconds_until_last(retries) for retries in range(7)] == [0, 0.5, 1.5, 3.5, 7.5, 15.5, 23.5]
    assert seconds_until_last(3, least=1.0) == 4.0
    assert seconds_until_last(10**9) > 10_000


# -- what a configuration says ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "retries"),
    [
        ({}, 2),
        ({"litellm_settings": {"num_retries": 7}}, 7),
        ({"litellm_settings": {"num_retries": 7}, "router_settings": {"num_retries": 5}}, 5),
        ({"router_settings": {"num_retries": "os.environ/RETRIES"}}, 2),
        ({"router_settings": {"retry_policy": {"InternalServerErrorRetries": 9}}}, 9),
        ({"router_settings": {"retry_policy": {"TimeoutErrorRetries": 9}}}, 2),
        ({"router_settings": {"model_group_retry_policy": {"jerry-xl": {"DefaultRetries": 8}}}}, 8),
        ({"router_settings": {"model_group_retry_policy": {"other": {"DefaultRetries": 8}}}}, 2),
        (
            {
                "router_settings": {
                    "retry_policy": {"DefaultRetries": 9},
                    "model_group_retry_policy": {"jerry-xl": {"NotFoundErrorRetries": 4}},
                }
            },
            2,
        ),
    ],
)
def test_retries_of_a_refused_connection_are_found(document: dict[str, Any], retries: int) -> None:
    config = litellm.parse({"model_list": [item()], **document}, Environ(), FILES)
    assert config.retry.retries_of(config.entries[0]) == retries


def test_policy_beats_the_entry_and_the_entry_the_router() -> None:
    document = {"model_list": [item(num_retries="12")], "router_settings": {"num_retries": 5}}
    config = litellm.parse(document, Environ(), FILES)
    assert config.retry.retries_of(config.entries[0]) == 12
    document["router_settings"] = {"retry_policy": {"InternalServerErrorRetries": 1}}
    config = litellm.parse(document, Environ(), FILES)
    assert config.retry.retries_of(config.entries[0]) == 1


@pytest.mark.parametrize(
    "document",
    [
        {"router_settings": {"fallbacks": [{"jerry-xl": ["gpt"]}]}},
        {"litellm_settings": {"fallbacks": [{"other": ["x"]}, {"jerry-xl": ["gpt"]}]}},
        {"router_settings": {"fallbacks": [{"*": ["gpt"]}]}},
        {"litellm_settings": {"default_fallbacks": ["gpt"]}},
    ],
)
def test_fallbacks_of_an_alias_are_found(document: dict[str, Any]) -> None:
    assert hold.read_retries(document).has_fallback("jerry-xl")
    assert not hold.read_retries({"router_settings": {"fallbacks": [{"jerry-l": ["gpt"]}]}}).has_fallback("jerry-xl")


@given(st.fixed_dictionaries({"router_settings": json_values, "litellm_settings": json_values}))
@PROPERTY
def test_any_settings_are_read(document: dict[str, object]) -> None:
    assert isinstance(hold.read_retries(document), RetrySettings)


# -- the check ----------------------------------------------------------------------------------------------------

LOSES, DELAYS = ["swap_loses_requests"], ["hold_delays_fallback"]
POLICY: dict[str, Any] = {"router_settings": {"model_group_retry_policy": {"jerry-xl": hold.policy(60)}}}


def by_hand(**rules: int) -> dict[str, Any]:
    return {"router_settings": {"model_group_retry_policy": {"jerry-xl": rules}}}


PASTED = {"model_list": [item(cooldown_time=0)], **POLICY}


@pytest.mark.parametrize(
    ("document", "state", "found"),
    [
        ({"model_list": [item()]}, port(), LOSES),
        ({"model_list": [item()]}, port(hold=60), LOSES),
        ({"model_list": [item()]}, port(hold=0), []),
        ({"model_list": [item()]}, port(swap_seconds=1.2), LOSES),
        ({"model_list": [item(cooldown_time=0)]}, port(swap_seconds=1.2), LOSES),
        ({"model_list": [item(cooldown_time=0)], **by_hand(NotFoundErrorRetries=4)}, port(swap_seconds=1.2), []),
        ({"model_list": [item(cooldown_time=0)], **by_hand(InternalServerErrorRetries=60)}, port(hold=60), LOSES),
        ({"model_list": [item(cooldown_time=0)], **by_hand(DefaultRetries=60)}, port(hold=60), []),
        (
            {
                "model_list": [item(cooldown_time=0)],
                **by_hand(DefaultRetries=60, NotFoundErrorRetries=4),
            },
            port(hold=60),
            LOSES,
        ),
        ({"model_list": [item()]}, port(state=None), LOSES),
        ({"model_list": [item()]}, port(alias=None), []),
        ({"model_list": [item()]}, port(state=State.IDLE, owner=None), LOSES),
        (PASTED, port(hold=60), []),
        (PASTED, port(), []),
        (PASTED, port(hold=60, swap_seconds=100.0), LOSES),
        ({"model_list": [item()], **POLICY}, port(hold=60), LOSES),
        ({"model_list": [item()], "router_settings": {"num_retries": 60, "disable_cooldowns": True}}, port(), LOSES),
        ({"model_list": [item(num_retries=40, cooldown_time=0)]}, port(), LOSES),
        ({"model_list": [item(), item(port=8101)]}, port(), []),
        ({"model_list": [item(), item(cooldown_time=0)], **POLICY}, port(hold=60), LOSES),
        ({"model_list": [item(), item()]}, port(hold=0), []),
        ({"model_list": [item(mock_response="hi")]}, port(), []),
        ({"model_list": [item()], "litellm_settings": {"default_fallbacks": ["gpt"]}}, port(), []),
        ({"model_list": [item()], "litellm_settings": {"default_fallbacks": ["gpt"]}}, port(hold=60), []),
        ({**PASTED, "litellm_settings": {"fallbacks": [{"jerry-xl": ["gpt"]}]}}, port(hold=60), DELAYS),
    ],
    ids=[
        *("defaults", "hold that is not pasted", "loss accepted", "short swaps and cooldowns", "short swaps, no 404"),
        *("short swaps", "policy without a 404", "policy for all errors", "policy with too few for a 404"),
        *("host not reached", "no slot", "idle", "pasted", "pasted earlier", "pasted, too short", "cooldown forgotten"),
        *(
            "settings of the router",
            "settings of the entry",
            "several servers",
            "pasted beside the old entry",
            "several entries, loss accepted",
            "mock",
            "fallback",
            "fallback and hold",
        ),
        "hold before the fallback",
    ],
)
def test_alias_that_would_lose_requests_is_named(
    document: dict[str, Any], state: GatewayPort, found: list[str]
) -> None:
    assert codes(document, state) == found


@pytest.mark.parametrize("rules", [by_hand(InternalServerErrorRetries=60), {"router_settings": {"num_retries": 60}}])
def test_404_of_a_failed_swap_is_named(rules: dict[str, Any]) -> None:
    (found,) = findings({"model_list": [item(cooldown_time=0)], **rules}, port(hold=60))
    assert "in a failed swap of port 8100 requests may be lost: mlx-lm answers 404" in found.message
    assert "NotFoundErrorRetries: 11" in found.hint


def test_other_providers_are_left_alone() -> None:
    other = {"model_name": "gpt", "litellm_params": {"model": "openai/gpt-4o", "api_key": "x"}}
    assert codes({"model_list": [item(cooldown_time=0), other], **POLICY}, port()) == []


def test_synonym_needs_a_policy_of_its_own() -> None:
    document = {**PASTED, "router_settings": {**POLICY["router_settings"], "model_group_alias": {"best": "jerry-xl"}}}
    (found,) = findings(document, port(hold=60))
    assert found.alias == "best" and "model_group_retry_policy: {best: " in found.hint


@pytest.mark.parametrize(
    ("state", "hint"),
    [
        (
            port(),
            "in hosts.yaml: slots: {8100: {alias: jerry-xl, hold: 60}} (hold: 0 accepts the loss); in router.yaml: ",
        ),
        (port(hold=60), "in router.yaml: router_settings: {model_group_retry_policy: {jerry-xl: "),
        (port(swap_seconds=100.0), "in hosts.yaml: slots: {8100: {alias: jerry-xl, hold: 200}}"),
        (port(swap_seconds=9000.0), "in hosts.yaml: slots: {8100: {alias: jerry-xl, hold: 3600}}"),
        (port(hold=60, swap_seconds=100.0), "in hosts.yaml: slots: {8100: {alias: jerry-xl, hold: 200}}"),
    ],
)
def test_warning_has_the_edit(state: GatewayPort, hint: str) -> None:
    (found,) = findings({"model_list": [item()]}, state)
    assert found.hint.startswith(hint) and "cooldown_time: 0; then restart the gateway, once" in found.hint
    assert (found.port, found.host, found.severity) == (8100, "studio", "warning")


def test_entries_that_keep_litellm_from_waiting_are_named() -> None:
    (found,) = findings({"model_list": [item(), item(cooldown_time=0)], **POLICY}, port(hold=60))
    assert found.hint == "keep one of router.yaml, item 1, router.yaml, item 2; then restart the gateway, once"


@pytest.mark.parametrize(("swap", "text"), [(None, "30 s or more with a large model"), (41.4, "41 s")])
def test_warning_says_how_long_a_swap_takes(swap: float | None, text: str) -> None:
    (found,) = findings({"model_list": [item()]}, port(swap_seconds=swap))
    assert found.message.endswith(f"LiteLLM retries them for 2 s, and a swap takes {text}")


# -- what to paste ------------------------------------------------------------------------------------------------


def printed(*ports: GatewayPort, fallbacks: frozenset[str] = frozenset()) -> dict[str, Any]:
    holds = hold.holds_of(ports, RetrySettings(fallbacks=fallbacks))
    return hold.with_settings(gateway.document_with_values(ports), ports, holds)


def test_hold_touches_its_own_alias_only() -> None:
    held, plain = port(hold=60), port(8101, "jerry-l")
    document = printed(held, plain)
    assert document["router_settings"] == {
        "model_group_retry_policy": {"jerry-xl": {"InternalServerErrorRetries": 11, "NotFoundErrorRetries": 11}}
    }
    first, second = document["model_list"]
    assert first["litellm_params"]["cooldown_time"] == 0
    assert second == printed(plain)["model_list"][0] and "cooldown_time" not in second["litellm_params"]


@pytest.mark.parametrize("ports", [[port()], [port(hold=0)], [port(hold=60), port(hold=60, address="b")]])
def test_without_a_hold_nothing_but_the_entries_is_printed(ports: list[GatewayPort]) -> None:
    assert list(printed(*ports)) == ["model_list"]


def test_alias_with_a_fallback_keeps_it_fast() -> None:
    fallbacks = frozenset({"jerry-xl"})
    assert list(printed(port(hold=60), fallbacks=fallbacks)) == ["model_list"]
    first = next(hold.notes([port(hold=60)], RetrySettings(fallbacks=fallbacks), {}))
    assert first == "jerry-xl: no hold, because it has a fallback."


@pytest.mark.parametrize(("seconds", "last", "error"), [(7, 7, 20), (60, 63, 81), (120, 127, 151)])
def test_note_promises_no_more_than_litellm_keeps(seconds: int, last: int, error: int) -> None:
    (note,) = hold.notes([port(hold=seconds)], RetrySettings(), {"jerry-xl": seconds})
    assert note == f"jerry-xl: a request waits {last} s for a server; without one, its error comes by {error} s."


@given(st.integers(1, MAX_HOLD))
@PROPERTY
def test_what_is_printed_passes_the_check(seconds: int) -> None:
    slot = port(hold=seconds, swap_seconds=float(seconds))
    assert findings(printed(slot), slot) == ()


# -- the history --------------------------------------------------------------------------------------------------


def test_longest_of_the_latest_swaps_counts() -> None:
    def swap(number: int, seconds: object, command: str = "load") -> dict[str, object]:
        return {"command": command, "port": number, "downtime_seconds": seconds}

    latest = [swap(8100, seconds) for seconds in (5, 41.5, *range(1, 9))]
    history = [swap(8100, 900.0), *latest, swap(8101, None), swap(8102, 7), swap(8102, -1), swap(8102, "x")]
    history += [swap(8104, 2), swap(8104, 8, "swap_undone")]
    assert swap_seconds([*history, swap(8103, 3, "restore"), {"command": "load"}]) == {8100: 41.5, 8102: 7.0, 8104: 8.0}


def test_latest_models_of_a_port_are_found() -> None:
    load: dict[str, object] = {"command": "load", "port": 8100, "model": "x"}
    lines = [load | {"model": str(number)} for number in range(12)]
    odd: list[dict[str, object]] = [
        load | {"port": "8101"},
        load | {"port": 8101, "model": None},
        load | {"port": True},
        load | {"command": "swap_undone"},
        {},
    ]
    assert recent_models([*lines, *odd]) == {8100: tuple(map(str, range(2, 12)))}
