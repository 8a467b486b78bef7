"""What mlx-lm itself keeps of a conversation. Runs with the interpreter of an engine's venv, not with ours.

Reads `{name: config}` from standard input and writes `{name: answer}`. An answer is `[[width, window, state bytes],
...]`, a row for each cache, or the reason why the engine does not take the configuration. Nothing is computed: an array
of MLX has a shape before it has values, so that a model of 400 billion parameters takes no memory here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import sys

import mlx.core as mx
from mlx_lm.models import base
from mlx_lm.models import cache as caches
from mlx_lm.utils import MODEL_REMAPPING

TOKENS = 8

NEEDED = {
    "activation_sparsity_pattern": None,
    "altup_num_inputs": 4,
    "attention_method": "MLA",
    "block_ffn_dim_multiplier": 1.0,
    "cla_share_factor": 2,
    "conv1d_width": 4,
    "conv_L_cache": 3,
    "conv_kernel": 4,
    "decoder_sparse_step": 1,
    "dim_model_base": 64,
    "expert_layer_period": 2,
    "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    "gegelu_limit": 20.0,
    "hidden_act": "relu2",
    "is_moe_layer": [True] * 1000,
    "linear_conv_kernel_dim": 4,
    "mamba_d_conv": 4,
    "max_position_embeddings": 4096,
    "mlp_only_layers": [],
    "model_max_length": 4096,
    "moe_layer_freq": 1,
    "n_positions": 4096,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "moe_topk": 2,
    "partial_rotary_factor": 0.5,
    "q_lora_rank": 32,
    "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
    "rope_scaling": None,
    "rotary_dim": 16,
    "rotary_emb_base": 10_000,
    "rotary_pct": 0.5,
    "scoring_func": "sigmoid",
    "time_step_limit": (0.0, 100.0),
    "topk_method": "noaux_tc",
    "use_qkv_bias": False,
    "zero_expert_type": "identity",
    **dict.fromkeys(("rope_theta", "rope_local_base_freq", "swa_rope_theta"), 10_000.0),
}
"""What the engine wants of a configuration and what says nothing of the cache, so that a table can leave it out."""

BY_TYPE = {bool: False, "bool": False, float: 1.0, "float": 1.0, int: 64, "int": 64}


@classmethod  # type: ignore[misc]
def from_dict(cls, params: dict, original=base.BaseModelArgs.from_dict.__func__):
    missing = dataclasses.MISSING
    wanted = [each for each in dataclasses.fields(cls) if each.default is missing and each.default_factory is missing]
    filled = {each.name: NEEDED.get(each.name, BY_TYPE.get(each.type)) for each in wanted}
    return original(cls, {**filled, **params})


base.BaseModelArgs.from_dict = from_dict


def kept(config: dict) -> list[list[int | None]]:
    module = importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(config['model_type'], config['model_type'])}")
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    made = caches.make_prompt_cache(model)
    model(mx.zeros((1, TOKENS), dtype=mx.int32), cache=made)
    return [row for each in made for row in rows(each)]


def rows(each: object) -> list[list[int | None]]:
    if isinstance(each, caches.CacheList):
        return [row for inner in each.caches for row in rows(inner)]
    if isinstance(each, caches.ArraysCache):
        return [[0, None, sum(array.nbytes for array in each.cache if array is not None)]]
    if hasattr(each, "compress_kv"):  # DeepSeek-V4.1's
        compressed = [array.size for array in (each.compress_kv, each.index_k) if array is not None]
        return [[each.window.shape[-1], each.window_size, 0], [sum(compressed) // TOKENS, None, 0]]
    if each.keys is None:
        return []
    window = getattr(each, "max_size", None) or getattr(each, "chunk_size", None)
    return [[sum(array.shape[1] * array.shape[3] for array in (each.keys, each.values)), window, 0]]


def main() -> None:
    answers: dict = {}
    for name, config in json.load(sys.stdin).items():
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                answers[name] = kept(config)
        except Exception as error:  # noqa: BLE001 - whatever the engine says of a configuration is its answer
            answers[name] = f"{type(error).__name__}: {error}"
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
