"""The cache of a conversation: published models, every model type, and invalid configurations."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator

import pytest

from mlxops.core.kv_cache import kv_cache, seeing_cache
from mlxops.core.layers import MODEL_TYPES
from tests.lab.shapes import EVERY_TYPE, MLA, PUBLISHED, F, Fields, N, S, nested, plain

MB = 10**6
LLAMA = plain("llama", 80, 64, 8, 8192)


@pytest.mark.parametrize("repo", PUBLISHED)
def test_published_model_has_the_expected_cache(repo: str) -> None:
    config, values = PUBLISHED[repo]
    cache = kv_cache(config)
    assert cache is not None and cache.certain
    assert cache.context_bytes(N) == values * 2


def test_vision_model_keeps_a_latent_vector_expanded() -> None:
    """moonshotai/Kimi-VL-A3B: 27 layers, 16 heads. mlx-vlm expands the vector that mlx-lm keeps compressed."""
    kimi = nested("kimi_vl", plain("deepseek_v3", 27, 16, 16, 2048, **MLA))
    compressed, full = kv_cache(kimi), seeing_cache(kimi)
    assert compressed is not None and compressed.context_bytes(1) == 27 * (512 + 64) * 2
    assert full is not None and full.context_bytes(1) == 27 * 16 * (128 + 64 + 128) * 2 and not full.certain


def test_vision_model_without_latent_vector_keeps_the_same() -> None:
    for repo in ("google/gemma-3-27b-it", "Qwen/Qwen2.5-VL-7B-Instruct", "deepseek-ai/DeepSeek-V2.5"):
        config, values = PUBLISHED[repo]
        cache = seeing_cache(config)
        assert cache is not None and cache.context_bytes(N) == values * 2, repo


def test_window_is_limited_by_the_conversation() -> None:
    gemma, _ = PUBLISHED["google/gemma-3-27b-it"]
    cache = kv_cache(gemma)
    assert cache is not None
    assert cache.context_bytes(100) == 62 * 100 * 16 * 128 * 4
    assert cache.context_bytes(1024) == 62 * 1024 * 16 * 128 * 4
    assert cache.context_bytes(1025) - cache.context_bytes(1024) == 10 * 16 * 128 * 4


@pytest.mark.parametrize(
    ("repo", "state"),
    [
        ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", 23 * 64 * 64 * 128 * 4),
        ("nvidia/Nemotron-H-56B-Base-8K", 54 * 256 * 64 * 256 * 4),
        ("ibm-granite/granite-4.0-h-tiny", 36 * 48 * 64 * 128 * 4),
        ("ai21labs/Jamba-v0.1", 28 * 2 * 4096 * 16 * 4),
        ("Qwen/Qwen3.5-27B", 48 * 48 * 128 * 128 * 4),
        ("tiiuae/Falcon-H1-7B-Instruct", 44 * 24 * 128 * 256 * 4),
        ("moonshotai/Kimi-Linear-48B-A3B-Instruct", 20 * 32 * 128 * 128 * 4),
        ("tiiuae/falcon-mamba-7b", 64 * 8192 * 16 * 4),
        ("meta-llama/Meta-Llama-3.1-8B", 0),
    ],
)
def test_recurrent_state_has_the_expected_size(repo: str, state: int) -> None:
    cache = kv_cache(PUBLISHED[repo][0])
    assert cache is not None and cache.state_bytes == state


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mistral3", "text_config": LLAMA, "vision_config": {"num_hidden_layers": 24}},
        {"model_type": "internvl_chat", "llm_config": LLAMA, "num_hidden_layers": 1},
        {"model_type": "some_vl", "language_config": LLAMA},
        {"model_type": "some_omni", "thinker_config": {"text_config": LLAMA, "audio_config": {"n_layer": 1}}},
        LLAMA | {"text_config": {}},
        LLAMA | {"text_config": None},
        LLAMA | {"text_config": "llama"},
    ],
)
def test_language_model_is_found_in_a_larger_model(config: dict[str, object]) -> None:
    cache = kv_cache(config)
    assert cache is not None and cache.certain
    assert cache.context_bytes(1) == 80 * 8 * 128 * 2 * 2


def test_deeply_nested_configuration_gives_no_cache() -> None:
    config: dict[str, object] = LLAMA
    for _ in range(5000):
        config = {"text_config": config}
    assert kv_cache(config) is None


@pytest.mark.parametrize(
    ("field", "dtype", "size"),
    [("torch_dtype", "float32", 4), ("dtype", "float32", 4)]
    + [("torch_dtype", other, 2) for other in ("bfloat16", "float16", None, ["float32"])],
)
def test_32_bit_model_keeps_32_bit_values(field: str, dtype: object, size: int) -> None:
    for config in (LLAMA | {field: dtype}, {"model_type": "llava", "text_config": LLAMA, field: dtype}):
        cache = kv_cache(config)
        assert cache is not None and cache.context_bytes(1) == 80 * 8 * 128 * 2 * size


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (LLAMA | {"model_type": "brand_new"}, 80 * 8 * 128 * 2),
        (LLAMA | {"model_type": None}, 80 * 8 * 128 * 2),
        (LLAMA | {"model_type": "brand_new", "sliding_window": 128, "layer_types": [S] * 80}, 80 * 8 * 128 * 2),
        (plain("brand_new", 61, 128, 128, 7168, **MLA), 61 * 128 * (128 + 64 + 128)),
        (plain("brand_new", 48, 64, 4, 4096, head_dim=128, swa_num_key_value_heads=8), 48 * 8 * 128 * 2),
        (LLAMA | {"num_key_value_heads": [8, 8, 4] * 20}, 80 * 8 * 128 * 2),
        (LLAMA | {"num_key_value_heads": "eight"}, 80 * 64 * 128 * 2),
        (LLAMA | {"num_key_value_heads": -8}, 80 * 64 * 128 * 2),
        (LLAMA | {"num_key_value_heads": "8"}, 80 * 8 * 128 * 2),
        (LLAMA | {"num_hidden_layers": 80.0}, 80 * 8 * 128 * 2),
        (LLAMA | {"head_dim": True}, 80 * 8 * 512 * 2),
        (LLAMA | {"layer_types": [F] * 79}, 80 * 8 * 128 * 2),
        (LLAMA | {"layer_types": [S] * 80, "sliding_window": None}, 80 * 8 * 128 * 2),
        (LLAMA | {"layer_types": [S] * 80, "sliding_window": 0}, 80 * 8 * 128 * 2),
        (LLAMA | {"model_type": "gemma3_text", "sliding_window_pattern": "LLG"}, 80 * 8 * 128 * 2),
        (LLAMA | {"model_type": "nemotron-nas", "block_configs": [{}] * 3}, 80 * 8 * 128 * 2),
        (LLAMA | {"model_type": "nanbeige", "num_loops": 10**8}, 80 * 8 * 128 * 2),
    ],
)
def test_unknown_configuration_gets_an_upper_estimate(config: dict[str, object], values: int) -> None:
    cache = kv_cache(config)
    assert cache is not None and not cache.certain
    assert cache.context_bytes(1) == values * 2


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "llama"},
        {"model_type": "whisper", "d_model": 1280, "decoder_layers": 32},
        LLAMA | {"num_hidden_layers": "many"},
        LLAMA | {"num_hidden_layers": -1},
        LLAMA | {"num_hidden_layers": 10**8},
        LLAMA | {"hidden_size": None, "num_attention_heads": True},
    ],
)
def test_configuration_without_shape_gives_no_cache(config: dict[str, object]) -> None:
    assert kv_cache(config) is None


ODD: tuple[object, ...] = ("many", -1, 0, True, 10**30, 1.5, float("nan"), [[]], [None], {"a": 1})
HARMLESS = {
    "model_type",
    "attention_k_eq_v",  # any value that is not false is true, for the engine too
    "num_loops",  # the engine does not load the model
    *("sparse_attention_config", "sparse_index_dim", "sparse_block_size", "sparse_attention_freq"),  # a tenth at most
}
"""Fields whose odd values may lower the estimate."""


def odd_configurations(config: dict[str, object]) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield (field, configuration) with each field replaced by each odd value."""
    for field, value in config.items():
        if isinstance(value, dict):
            for inner, changed in odd_configurations(value):
                yield inner, config | {field: changed}
        for odd in ODD:
            yield field, config | {field: copy.deepcopy(odd)}


@pytest.mark.parametrize("model_type", EVERY_TYPE)
def test_odd_value_neither_fails_nor_lowers_the_estimate(model_type: str) -> None:
    cache = kv_cache(EVERY_TYPE[model_type])
    assert cache is not None
    for field, config in odd_configurations(EVERY_TYPE[model_type]):
        odd = kv_cache(config)
        assert odd is None or odd.state_bytes >= 0
        assert odd is None or field in HARMLESS or odd.context_bytes(N) >= cache.context_bytes(N), (field, config)


@pytest.mark.parametrize(
    "config",
    [
        EVERY_TYPE["jamba"] | {"attn_layer_period": 10**9 - 1, "attn_layer_offset": 1.5},
        EVERY_TYPE["kimi_linear"]
        | {"num_hidden_layers": 10_000, "linear_attn_config": {"kda_layers": list(range(-(10**6), 0))}},
        EVERY_TYPE["nanbeige"] | {"num_hidden_layers": 10_000, "num_loops": 10**9 - 1},
        EVERY_TYPE["nemotron_h"] | {"hybrid_override_pattern": "M" * 10**6},
        EVERY_TYPE["llama"] | {"num_hidden_layers": "9" * 5000},
    ],
    ids=["period", "numbers", "loops", "letters", "digits"],
)
def test_hostile_configuration_takes_little_time(config: Fields) -> None:
    began = time.monotonic()
    kv_cache(config)
    assert time.monotonic() - began < 5


def test_every_model_type_is_tested() -> None:
    assert MODEL_TYPES.keys() == EVERY_TYPE.keys() - {"gemma4_text"}
