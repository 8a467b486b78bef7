"""What mlx-lm itself keeps of a conversation. Runs with the interpreter of an engine's venv, not with ours.

Reads `{name: config}` from standard input and writes `{name: answer}`. An answer is `[[width, window, state bytes],
...]`, a row for each cache, or the reason why the engine does not take the configuration. Nothing is computed: an array
of MLX has a shape before it has values, so that a model of 400 billion parameters takes no memory here.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
import io
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import mlx.core as mx

# The models alone: all of mlx_lm imports transformers, which takes longer than everything else here.
_SPEC = importlib.util.find_spec("mlx_lm")
_FOLDER = Path(_SPEC.origin if _SPEC and _SPEC.origin else "").parent
sys.modules["mlx_lm"] = types.ModuleType("mlx_lm")
sys.modules["mlx_lm"].__path__ = [str(_FOLDER)]

from mlx_lm.models import base  # noqa: E402
from mlx_lm.models import cache as caches  # noqa: E402

_REMAPPING = re.search(r"^MODEL_REMAPPING = (\{.*?^\})", (_FOLDER / "utils.py").read_text(), re.DOTALL | re.MULTILINE)
MODEL_REMAPPING: dict[str, str] = ast.literal_eval(_REMAPPING[1]) if _REMAPPING else {}

TOKENS = 8

_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "original_max_position_embeddings": 64}
_SCALED = {"type": "linear", "factor": 1.0, "original_max_position_embeddings": 64} | {
    "short_factor": [1.0],
    "long_factor": [1.0],
}

NEEDED = {
    "altup_num_inputs": 4,
    "attention_method": "MLA",
    "block_ffn_dim_multiplier": 1.0,
    "cla_share_factor": 2,
    "conv1d_width": 4,
    "conv_L_cache": 3,
    "conv_kernel": 4,
    "conv_window": 2,
    "decoder_sparse_step": 1,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    "gegelu_limit": 20.0,
    "hidden_act": "relu2",
    "linear_conv_kernel_dim": 4,
    "mamba_d_conv": 4,
    "mlp_only_layers": [],
    "n_group": 1,
    "partial_rotary_factor": 0.5,
    "rotary_dim": 16,
    "rotary_pct": 0.5,
    "scoring_func": "sigmoid",
    "time_step_limit": (0.0, 100.0),
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "zero_expert_type": "identity",
    **dict.fromkeys(("moe_num_experts", "n_routed_experts", "num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("moe_topk", "num_experts_per_tok"), 2),
}
"""What the engine wants of every configuration and what says nothing of the cache, so that a table can leave it out."""

NEEDED_BY: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"rope_scaling": _SCALED},
    "deepseek_v41": {"o_lora_rank": 16},
    "exaone_moe": {"is_moe_layer": [False] * 1000},
    "falcon_h1": {"mamba_d_conv": 4},
    "glm_moe_dsa": {"rope_parameters": _ROPE},
    "gemma3n": {"activation_sparsity_pattern": [0.0] * 1000, "altup_active_idx": 0},
    "granitemoehybrid": {"mamba_d_conv": 4, "mamba_conv_bias": False, "mamba_proj_bias": False}
    | {"shared_intermediate_size": 64},
    "hunyuan": {"rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"}},
    "kimi_k3": {"attn_res_block_size": 4, "routed_expert_hidden_size": 64, "q_lora_rank": 32},
    "llama4": {"num_experts_per_tok": 1, "interleave_moe_layer_step": 2},
    "llama4_text": {"no_rope_layers": [1] * 1000},
    "mamba2": {"time_step_rank": 8, "expand": 2},
    "mellum": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "mimo_v2_flash": {"moe_layer_freq": [0] * 1000},
    "minicpm3": {"rope_scaling": _SCALED},
    "ministral3": {"rope_parameters": _ROPE | {"llama_4_scaling_beta": 0.1}},
    "mistral4": {"rope_parameters": _ROPE | {"llama_4_scaling_beta": 0.1}},
    "nemotron_h": {"n_shared_experts": 1, "moe_shared_expert_intermediate_size": 64, "norm_topk_prob": True}
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
    | {"time_step_min": 0.001, "time_step_max": 0.1, "moe_intermediate_size": 64},
    "phimoe": {"rope_scaling": _SCALED | {"short_mscale": 1.0, "long_mscale": 1.0}},
    "qwen3": {"rope_theta": 10_000.0},
    "recurrent_gemma": {"lru_width": 128},
    "spark2_5": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
}
NEEDED_BY["hunyuan_v1_dense"] = NEEDED_BY["hunyuan"]

BY_TYPE: dict[object, object] = {bool: False, "bool": False, float: 1.0, "float": 1.0, int: 64, "int": 64}


_from_dict = base.BaseModelArgs.from_dict.__func__


def _filled(cls: Any, params: dict[str, Any]) -> Any:
    missing = dataclasses.MISSING
    wanted = [each for each in dataclasses.fields(cls) if each.default is missing and each.default_factory is missing]
    filled = {each.name: NEEDED.get(each.name, BY_TYPE.get(each.type)) for each in wanted}
    return _from_dict(cls, {**filled, **NEEDED_BY.get(cls.__module__.rpartition(".")[2], {}), **params})


base.BaseModelArgs.from_dict = classmethod(_filled)


def kept(config: dict[str, Any]) -> list[list[int | None]]:
    module = importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(config['model_type'], config['model_type'])}")
    model = module.Model(module.ModelArgs.from_dict(config))
    made = caches.make_prompt_cache(model)
    model(mx.zeros((1, TOKENS), dtype=mx.int32), cache=made)
    return [row for each in made for row in rows(each)]


def rows(each: Any) -> list[list[int | None]]:
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
    answers: dict[str, object] = {}
    for name, config in json.load(sys.stdin).items():
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                answers[name] = kept(config)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - what the engine says is the answer
            answers[name] = f"{type(error).__name__}: {error}"
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
