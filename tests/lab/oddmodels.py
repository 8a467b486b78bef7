"""Make odd variants of a tiny model, and say which of them mlx-lm can load. The tests compare with that.

Run by an engine's own interpreter: `python oddmodels.py make TINY FOLDER`, and `python oddmodels.py try FOLDER`, which
prints a JSON object: the variant's name -> null, or the error. Nothing is trusted; code that runs writes a canary.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

WEIGHTS = "model.safetensors"
Weights = dict[str, mx.array]


def edit(folder: Path, name: str = "config.json", **changes: Any) -> None:
    """Change keys of a JSON file; `...` takes one out."""
    document = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))


def save(folder: Path, name: str, weights: Weights, written_by: str = "mlx") -> None:
    mx.save_safetensors(str(folder / name), weights, metadata={"format": written_by})


class Maker:
    def __init__(self, tiny: Path, folder: Path) -> None:
        self.tiny, self.folder = tiny, folder
        self.weights: Weights = mx.load(str(tiny / WEIGHTS))
        self.names = sorted(self.weights)

    def new(self, name: str, change: Callable[[Path], object] = lambda _: None) -> Path:
        made = self.folder / name
        shutil.copytree(self.tiny, made)
        change(made)
        return made

    def shards(self, name: str, *files: str, keep: bool = False) -> Path:
        made = self.new(name)
        half = len(self.names) // 2
        for file, part in zip(files, (self.names[:half], self.names[half:]), strict=True):
            save(made, file, {key: self.weights[key] for key in part})
        if not keep:
            (made / WEIGHTS).unlink()
        return made

    def quantized(self, name: str, mode: str, bits: int, group: int, **config: Any) -> Path:
        from mlx_lm.models import qwen3

        made = self.new(name)
        model = qwen3.Model(qwen3.ModelArgs.from_dict(json.loads((made / "config.json").read_text())))
        model.load_weights(list(self.weights.items()))
        nn.quantize(model, group_size=group, bits=bits, mode=mode)
        save(made, WEIGHTS, dict(tree_flatten(model.parameters())))
        edit(made, **config)
        return made

    def renamed_tensors(self, name: str, old: str, new: str, method: str, **more: Any) -> Path:
        made = self.quantized(name, "affine", 8, 64, quantization_config={"quant_method": method, **more})
        found: Weights = mx.load(str(made / WEIGHTS))
        kept = {key.replace(old, new): value for key, value in found.items() if not key.endswith(".biases")}
        mx.eval(kept)
        save(made, WEIGHTS, kept)
        return made

    def code(self, name: str, file: str, *, names_it: dict[str, dict[str, Any]], source: str) -> Path:
        made = self.new(name)
        canary = self.folder.with_name("canary")
        (made / file).write_text(f"open({str(canary)!r}, 'a').write({name!r} + chr(10))\n{source}")
        for target, changes in names_it.items():
            if not (made / target).exists():
                (made / target).write_text("{}")
            edit(made, target, **changes)
        return made


def make(tiny: Path, folder: Path) -> None:
    made = Maker(tiny, folder)
    numbered = "model-0000{}-of-0000{}.safetensors".format

    def renamed(name: str) -> Callable[[Path], object]:
        return lambda at: (at / WEIGHTS).rename(at / name)

    def written(name: str, content: str | bytes) -> Callable[[Path], object]:
        return lambda at: (at / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    # names
    made.new("plain")
    for name in ("weights.00", "consolidated", "MODEL", "pytorch_model", "model_fp16", "model.fp16"):
        made.new(f"named {name}", renamed(f"{name}.safetensors"))
    made.shards("two shards", numbered(1, 2), numbered(2, 2))
    made.shards("shards with six digits", "model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors")
    made.shards("shards of Kimi", "model-1-of-2.safetensors", "model-2-of-2.safetensors")
    made.shards(
        "shards of Qwen 3.5",
        "model.safetensors-00001-of-00002.safetensors",
        "model.safetensors-00002-of-00002.safetensors",
    )
    made.shards("shards from zero", numbered(0, 2), numbered(1, 2))
    (made.shards("a shard is gone", numbered(1, 2), numbered(2, 2)) / numbered(2, 2)).unlink()
    stale = made.shards("a stale index", numbered(1, 2), numbered(2, 2))
    written("model.safetensors.index.json", json.dumps({"weight_map": {"x": numbered(1, 9)}}))(stale)
    made.new("an index that is none", written("model.safetensors.index.json", "{no"))
    made.shards("the same twice", numbered(1, 2), numbered(2, 2), keep=True)
    first = {made.names[0]: made.weights[made.names[0]]}
    save(made.new("the rest of another conversion"), numbered(3, 9), first)
    save(made.new("a rest with a tensor of its own"), numbered(3, 9), {"no.such": mx.zeros((2, 2))})
    save(made.new("adapters beside"), "adapters.safetensors", {"x.lora_a": mx.zeros((2, 2))})
    made.new("an AppleDouble file beside", written("._model.safetensors", b"\0\5\26\7" + bytes(80)))
    save(made.new("PyTorch's format"), WEIGHTS, {k: v.astype(mx.float32) for k, v in made.weights.items()}, "pt")

    # configurations
    made.new("unknown architecture", lambda at: edit(at, model_type="qwen9"))
    made.new("no architecture", lambda at: edit(at, model_type=...))
    made.new(
        "a byte order mark", lambda at: written("config.json", b"\xef\xbb\xbf" + (at / "config.json").read_bytes())(at)
    )
    made.new("in UTF-16", lambda at: written("config.json", (at / "config.json").read_text().encode("utf-16"))(at))
    made.new("a comment", lambda at: written("config.json", "// mine\n" + (at / "config.json").read_text())(at))
    made.new("a number that is none", lambda at: edit(at, mine=float("nan")))
    made.new("a generation_config that is none", written("generation_config.json", "{"))
    made.new("a generation_config that is a list", written("generation_config.json", "[]"))
    made.new("a tokenizer_config that is a list", written("tokenizer_config.json", "[]"))
    made.new("no tokenizer_config", lambda at: (at / "tokenizer_config.json").unlink())
    made.new("special tokens that are cut off", written("special_tokens_map.json", "{"))
    made.new(
        "a tokenizer that is cut off",
        lambda at: written("tokenizer.json", (at / "tokenizer.json").read_bytes()[:999])(at),
    )
    made.new("no tokenizer", lambda at: (at / "tokenizer.json").unlink())

    # quantizations
    for mode, bits, group in (
        ("affine", 3, 32),
        ("affine", 4, 64),
        ("mxfp4", 4, 32),
        ("mxfp8", 8, 32),
        ("nvfp4", 4, 16),
    ):
        made.quantized(
            f"{mode} {bits}", mode, bits, group, quantization={"group_size": group, "bits": bits, "mode": mode}
        )
    made.quantized(
        "a mode of another engine", "affine", 4, 64, quantization={"group_size": 64, "bits": 4, "mode": "jang"}
    )
    made.quantized("a mode that is not used", "affine", 4, 64, quantization={"group_size": 64, "bits": 4})
    made.new("a mode of nothing", lambda at: edit(at, quantization={"group_size": 64, "bits": 4, "mode": "jang"}))
    made.new("no bits", lambda at: edit(at, quantization={"group_size": 64}))
    made.new("a quantization that is a list", lambda at: edit(at, quantization=[]))
    made.quantized("not said", "affine", 4, 64)
    made.quantized("as gpt-oss", "mxfp4", 4, 32, quantization_config={"quant_method": "mxfp4"})
    made.quantized("hqq", "affine", 4, 64, quantization_config={"quant_method": "hqq"})
    made.renamed_tensors("bitsandbytes", ".scales", ".weight.absmax", "bitsandbytes")
    made.renamed_tensors("fp8", ".scales", ".weight_scale_inv", "fp8")
    made.renamed_tensors(
        "FP8 in compressed-tensors", ".scales", ".weight_scale", "compressed-tensors", format="float-quantized"
    )
    made.new("gptq with 8 bits", lambda at: edit(at, quantization_config={"quant_method": "gptq", "bits": 8}))
    made.new("a method of nothing", lambda at: edit(at, quantization_config={"quant_method": "bitsandbytes"}))
    made.new("no method", lambda at: edit(at, quantization_config={"bits": 4}))

    # code
    made.code(
        "code for the configuration",
        "c.py",
        source="class X: pass\n",
        names_it={"config.json": {"auto_map": {"AutoConfig": "c.X", "AutoModelForCausalLM": "c.X"}}},
    )
    made.code(
        "code for a pipeline",
        "p.py",
        source="class P: pass\n",
        names_it={"config.json": {"custom_pipelines": {"x": {"impl": "p.P", "pt": ["AutoModel"]}}}},
    )
    made.code(
        "code for a processor",
        "p.py",
        source="class P: pass\n",
        names_it={
            "processor_config.json": {"auto_map": {"AutoProcessor": "p.P"}},
            "preprocessor_config.json": {"auto_map": {"AutoImageProcessor": "p.P"}},
        },
    )
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["t.T", None]}}
    source = "from transformers import PreTrainedTokenizerFast as T\n"
    made.code("code for a tokenizer that does without", "t.py", source=source, names_it={"tokenizer_config.json": own})
    needs = made.code(
        "code for a tokenizer that needs it", "t.py", source=source, names_it={"tokenizer_config.json": own}
    )
    (needs / "tokenizer.json").rename(needs / "own.tiktoken")
    made.code(
        "code for the model",
        "m.py",
        source="from mlx_lm.models.qwen3 import Model, ModelArgs\n",
        names_it={"config.json": {"model_file": "m.py"}},
    )


def attempt(folder: Path) -> str | None:
    """Load it as the engines do, with nothing trusted; the error, or None."""
    from mlx_lm.utils import load

    try:
        load(str(folder), tokenizer_config={"trust_remote_code": False})
    except Exception as error:  # noqa: BLE001 - any exception is the engine's answer
        return f"{type(error).__name__}: {error}"[:300]
    return None


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        json.dump({each.name: attempt(each) for each in sorted(Path(sys.argv[2]).iterdir())}, sys.stdout)
