"""How much a model takes, and which unloads make room."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxops.core.memory import CONTEXT_TOKENS, ENGINE_BYTES, Use, cache_bytes_per_token, estimate, smallest_room
from tests.properties import PROPERTY

QWEN3_235B = {"num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128}
LLAMA_70B = {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 8192}
GPT_OSS_120B = {
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
}
DEEPSEEK_V3 = {"num_hidden_layers": 61, "num_attention_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
QWEN3_NEXT = {
    "num_hidden_layers": 48,
    "full_attention_interval": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (QWEN3_235B, 94 * 4 * 128 * 4),
        (LLAMA_70B, 80 * 8 * 128 * 4),
        ({"text_config": LLAMA_70B, "num_hidden_layers": 1}, 80 * 8 * 128 * 4),
        (GPT_OSS_120B, 18 * 8 * 64 * 4),
        (DEEPSEEK_V3, 61 * (512 + 64) * 2),
        (QWEN3_NEXT, 12 * 2 * 256 * 4),
        (QWEN3_NEXT | {"num_hidden_layers": 4}, 1 * 2 * 256 * 4),
        (QWEN3_NEXT | {"num_hidden_layers": 3}, 3 * 2 * 256 * 4),
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}, 2 * 4 * 16 * 4),
        ({}, None),
        ({"num_hidden_layers": "80", "num_attention_heads": True}, None),
        ({"num_hidden_layers": -1, "num_attention_heads": 4, "hidden_size": 64}, None),
    ],
)
def test_the_cache_of_a_token_follows_the_configuration(config: dict[str, object], expected: int | None) -> None:
    assert cache_bytes_per_token(config) == expected


def test_the_allowance_for_the_context_is_stated_and_bounded() -> None:
    assert estimate(10**9, 1000, 262144).context_tokens == CONTEXT_TOKENS
    assert estimate(10**9, 1000, 2048).context_bytes == 2048 * 1000
    assert estimate(10**9, 1000, 262144, 131072).context_bytes == 131072 * 1000, "the entry says otherwise"
    assert estimate(10**9, None, 262144).context_bytes == 10**8
    assert "32768 tokens" in str(estimate(10**9, 1000, 262144))


def test_the_homelabs_two_largest_do_not_fit_together() -> None:
    budget = 241_644 * 1024 * 1024
    xl = estimate(190 * 10**9, cache_bytes_per_token(QWEN3_235B), 262144).total
    large = estimate(95 * 10**9, cache_bytes_per_token(GPT_OSS_120B), 131072).total
    assert xl < budget and large < budget < xl + large


def use(port: int | None, size: int | None, owner: str = "mlxops", resident: int | None = None) -> Use:
    return Use(port, f"m{port}", owner, 100, size, resident)


def test_one_that_suffices_is_better_than_two_and_the_smallest_such_is_chosen() -> None:
    uses = [use(8100, 190), use(8101, 95), use(8102, 75), use(8103, 34)]
    assert [each.port for each in smallest_room(uses, 80) or ()] == [8101]
    assert [each.port for each in smallest_room(uses, 30) or ()] == [8103]
    assert [each.port for each in smallest_room(uses, 200) or ()] == [8100, 8103]


def test_taking_the_largest_first_is_not_the_smallest_set() -> None:
    uses = [use(1, 60), use(2, 50), use(3, 50)]
    assert [each.port for each in smallest_room(uses, 100) or ()] == [2, 3]


def test_what_must_not_be_stopped_makes_no_room() -> None:
    uses = [use(8100, 190, "boot"), use(9000, 190, "foreign"), use(None, 190, "hand"), use(8103, None)]
    assert smallest_room(uses, 100) is None
    assert smallest_room([*uses, use(8104, 10, "hand", resident=120)], 100) == (use(8104, 10, "hand", resident=120),)


def test_the_command_that_makes_room_is_the_one_to_type() -> None:
    assert use(8101, 1).unload == "mlxctl unload 8101"
    assert use(8101, 1, "hand").unload == "mlxctl unload 8101 --force"


def test_nothing_missing_needs_nothing_to_go() -> None:
    assert smallest_room([use(8100, 190)], 0) == ()
    assert estimate(0, 0, 1).total == ENGINE_BYTES


@given(st.lists(st.integers(1, 300), max_size=8), st.integers(1, 900))
@PROPERTY
def test_no_smaller_set_would_do(sizes: list[int], missing: int) -> None:
    uses = [use(8100 + index, size) for index, size in enumerate(sizes)]
    room = smallest_room(uses, missing)
    if room is None:
        assert sum(sizes) < missing
        return
    assert sum(each.counted for each in room) >= missing
    for count in range(len(room)):
        assert all(sum(each.counted for each in chosen) < missing for chosen in combinations(uses, count))
