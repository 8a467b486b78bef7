"""Makes the tiny models of the lab: real MLX models that load, tokenize and answer, with random weights.

Run by an engine's own interpreter, which has mlx_lm: `python tinymodel.py FOLDER`. Each model becomes a directory
of that folder. Equal versions of mlx make equal bytes: the weights come from a seed, the tokenizer from the text
below.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama, qwen3
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = """
The gateway sends every request to a port. Behind the port stands a model, and the model may change.
One port, one model; one model, one port. An alias never moves, whatever is behind it.
Say hello to the studio. Say it again, in other words. What is the capital of the country of numbers?
user assistant system question answer load unload status ready idle failed 0 1 2 3 4 5 6 7 8 9
"""
TURN, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[PAD, TURN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS.splitlines(), trainer)
    return made


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_frame(folder: Path, config: dict[str, Any], words: Tokenizer) -> None:
    """Everything of a model repository but its weights."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    words.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            # The class that transformers 4 and 5 both know.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "eos_token": END,
            "pad_token": PAD,
            "model_max_length": config["max_position_embeddings"],
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    (folder / "README.md").write_text(
        "---\nlibrary_name: mlx\npipeline_tag: text-generation\ntags:\n- mlx\n---\n\n"
        f"# {folder.name}\n\nRandom weights, made for tests.\n",
        encoding="utf-8",
    )


def weights_of(model: Any) -> dict[str, mx.array]:
    return {name: value.astype(mx.bfloat16) for name, value in tree_flatten(model.parameters())}


def save(path: Path, weights: dict[str, mx.array]) -> None:
    mx.save_safetensors(str(path), weights, metadata={"format": "mlx"})


def save_sharded(folder: Path, weights: dict[str, mx.array]) -> None:
    """Two shards and the index that names them."""
    names = sorted(weights)
    half = len(names) // 2
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:half], names[half:]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save(folder / file, {name: weights[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    total = sum(value.nbytes for value in weights.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def make_qwen3(folder: Path, seed: int, *, broken: bool = False) -> None:
    """`broken`: the file is whole and says so, but one of the tensors that the architecture needs is not in it."""
    words = tokenizer()
    config = {
        **SIZES,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": words.get_vocab_size(),
        "tie_word_embeddings": True,
        "eos_token_id": words.token_to_id(END),
        "torch_dtype": "bfloat16",
    }
    write_frame(folder, config, words)
    mx.random.seed(seed)
    weights = weights_of(qwen3.Model(qwen3.ModelArgs.from_dict(config)))
    if broken:
        del weights["model.layers.1.mlp.down_proj.weight"]
    save(folder / "model.safetensors", weights)


def make_llama(folder: Path, seed: int) -> None:
    words = tokenizer()
    config = {
        **SIZES,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": words.get_vocab_size(),
        "tie_word_embeddings": False,
        "eos_token_id": words.token_to_id(END),
        "torch_dtype": "bfloat16",
    }
    write_frame(folder, config, words)
    mx.random.seed(seed)
    save_sharded(folder, weights_of(llama.Model(llama.ModelArgs.from_dict(config))))


def main(folder: Path) -> None:
    make_qwen3(folder / "tiny-qwen3", seed=1)
    make_qwen3(folder / "tiny-qwen3-b", seed=2)
    make_llama(folder / "tiny-llama", seed=3)
    make_qwen3(folder / "tiny-broken", seed=4, broken=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
