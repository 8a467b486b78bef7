"""Memory estimates, and the servers whose stop makes room."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from mlxops.core.kv_cache import KVCache, kv_cache
from mlxops.core.layers import Layer
from mlxops.core.memory import CONTEXT_TOKENS, ENGINE_BYTES, Use, estimate, smallest_room
from tests.lab.shapes import PUBLISHED
from tests.properties import PROPERTY

KILO = KVCache((Layer(500),))
"""A cache of 1000 bytes per token."""


def test_context_allowance_is_bounded_and_shown() -> None:
    assert estimate(10**9, KILO, 262144).context_tokens == CONTEXT_TOKENS
    assert estimate(10**9, KILO, 2048).context_bytes == 2048 * 1000
    assert estimate(10**9, KILO, 262144, 131072).context_bytes == 131072 * 1000, "the entry sets it"
    assert str(estimate(10**9, KILO, 262144)) == "1.0 GB weights, 32.8 MB for 32768 tokens of context"


def test_recurrent_state_does_not_depend_on_the_context() -> None:
    small, large = (estimate(10**9, KVCache((Layer(state=10**6),)), 262144, tokens) for tokens in (10, 100_000))
    assert small.total == large.total == 10**9 + 4 * 10**6 + ENGINE_BYTES
    assert str(large).endswith(", 0 bytes for 100000 tokens of context, 4.0 MB for recurrent states")


def test_upper_estimate_is_marked() -> None:
    unsure = estimate(10**9, KVCache((Layer(500),), certain=False), 262144)
    assert "(upper estimate: how this model keeps its context is not known)" in str(unsure)
    unknown = estimate(10**9, None, 262144)
    assert unknown.context_bytes == 10**9 and "an unknown context (upper estimate" in str(unknown)
    assert [item.certain for item in (unsure, unknown, estimate(1, KILO, 1))] == [False, False, True]


def test_two_largest_models_do_not_fit_together() -> None:
    budget = 241_644 * 1024 * 1024
    xl = estimate(190 * 10**9, kv_cache(PUBLISHED["Qwen/Qwen3-235B-A22B"][0]), 262144).total
    large = estimate(95 * 10**9, kv_cache(PUBLISHED["openai/gpt-oss-120b"][0]), 131072).total
    assert xl < budget and large < budget < xl + large


def use(port: int | None, size: int | None, owner: str = "mlxops", resident: int | None = None) -> Use:
    return Use(port, f"m{port}", owner, 100, size, resident)


def test_room_is_the_fewest_and_smallest_servers() -> None:
    uses = [use(8100, 190), use(8101, 95), use(8102, 75), use(8103, 34)]
    assert [server.port for server in smallest_room(uses, 80) or ()] == [8101]
    assert [server.port for server in smallest_room(uses, 30) or ()] == [8103]
    assert [server.port for server in smallest_room(uses, 200) or ()] == [8100, 8103]


def test_room_need_not_include_the_largest_server() -> None:
    uses = [use(1, 60), use(2, 50), use(3, 50)]
    assert [server.port for server in smallest_room(uses, 100) or ()] == [2, 3]


def test_servers_that_must_not_stop_make_no_room() -> None:
    uses = [use(8100, 190, "boot"), use(9000, 190, "foreign"), use(None, 190, "hand"), use(8103, None)]
    assert smallest_room(uses, 100) is None
    assert smallest_room([*uses, use(8104, 10, "hand", resident=120)], 100) == (use(8104, 10, "hand", resident=120),)


def test_unload_command_has_force_for_hand_servers() -> None:
    assert use(8101, 1).unload == "`mlxctl unload 8101`"
    assert use(8101, 1, "hand").unload == "`mlxctl unload 8101 --force`"


def test_room_for_nothing_is_empty() -> None:
    assert smallest_room([use(8100, 190)], 0) == ()
    assert estimate(0, KVCache(()), 1).total == ENGINE_BYTES


@given(st.lists(st.integers(1, 300), max_size=8), st.integers(1, 900))
@PROPERTY
def test_room_has_no_smaller_alternative(sizes: list[int], missing: int) -> None:
    uses = [use(8100 + index, size) for index, size in enumerate(sizes)]
    room = smallest_room(uses, missing)
    if room is None:
        assert sum(sizes) < missing
        return
    assert sum(server.counted for server in room) >= missing
    for count in range(len(room)):
        assert all(sum(server.counted for server in group) < missing for group in combinations(uses, count))
