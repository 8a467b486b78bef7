"""Decide from file names and config.json whether mlx-lm, or an engine that loads through it, can load a repository.

The rules are read in mlx_lm/utils.py (`load_model`) and tested with 0.31.3 and 0.32.2. They refuse only what must
fail. The engine decides about the rest.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from mlxops.core.frozen import dataclass

_TOKENIZERS = re.compile(
    r"[^/]*(tokenizer[^/]*\.json|vocab[^/]*|\.model|\.tiktoken|tekken\.json|merges\.txt|tokenization[^/]*\.py)"
)
"""Including Kimi's tiktoken.model, RWKV's rwkv_vocab, Mistral's tekken.json, T5's spiece.model."""
_NOT_ALONE = ("tokenizer_config.json",)
_OTHERS = {
    "model_index.json": "it is a pipeline of several models, for images or sound (model_index.json)",
    "adapter_config.json": "it is an adapter, which needs the model that it was made for (adapter_config.json)",
}
_PACKED = re.compile(r"\.(scales|qweight|qzeros|weight_scale\w*|weight_packed|absmax|SCB|quant_state\S*|trellis)$")


@dataclass(frozen=True)
class Abilities:
    """What the installed mlx-lm can load, read from its source without running it."""

    version: str
    quantizations: str
    """The source that handles quantizations of other tools. It names each supported method and format."""
    modes: str
    """The source of MLX's quantized layers. It names each mode."""
    model: str
    """The source of the model's architecture. Some architectures unpack weights themselves."""


def no_model(names: Collection[str]) -> str | None:
    """Return why a repository holds no model; None if it may hold one."""
    if "config.json" in names:
        return None
    return next((why for name, why in _OTHERS.items() if name in names), "it has no config.json")


def no_tokenizer(names: Collection[str]) -> str | None:
    """Return a sentence if no file can be a tokenizer; else None."""
    has_tokenizer = any(_TOKENIZERS.fullmatch(name) and name not in _NOT_ALONE for name in names)
    return None if has_tokenizer else "no tokenizer (tokenizer.json, tokenizer.model, vocab.json)"


def is_packed(tensors: Mapping[str, str]) -> bool:
    """Whether weights (name -> dtype) are quantized in any way, by the weights alone."""
    return any(_PACKED.search(name) or not re.fullmatch(r"B?F(16|32)", dtype) for name, dtype in tensors.items())


def unsaid_quantization(config: Mapping[str, object], tensors: Collection[str]) -> str | None:
    """Return a sentence if MLX quantized the weights and config.json does not specify how; else None. Such weights
    cannot be loaded."""
    text = config.get("text_config")
    places = (config, text if isinstance(text, dict) else {})
    specified = any(place.get(key) for place in places for key in ("quantization", "quantization_config"))
    packed = next((name for name in tensors if name.endswith(".scales") and f"{name[:-6]}biases" in tensors), None)
    return (
        f"its weights are quantized ({packed[:80]}), and its config.json does not say how"
        if packed and not specified
        else None
    )


def unknown_quantization(config: Mapping[str, object], known: Abilities, *, packed: bool) -> str | None:
    """Return why the weights cannot be unpacked; None if they can be, or are not packed. `packed` is True while that is
    unknown."""
    ours = config.get("quantization")
    if ours is not None:
        if not isinstance(ours, dict):
            return "`quantization` in its config.json is not an object"
        lacking = [key for key in ("group_size", "bits") if key not in ours]
        if lacking:
            return f"`quantization` in its config.json has no {lacking[0]}"
        mode = ours.get("mode", "affine")
        inferred = "infer_quant_config" in known.quantizations  # since 0.32 from the weights, not from the mode
        if packed and not inferred and mode != "affine" and f'"{mode}"' not in known.modes:
            return f"it is quantized in the mode {str(mode)[:40]!r}, which the installed MLX does not know"
        return None
    theirs = config.get("quantization_config")
    return _unknown_method(theirs, known, packed) if theirs else None


def _unknown_method(theirs: object, known: Abilities, packed: bool) -> str | None:
    if not isinstance(theirs, dict) or not isinstance(theirs.get("quant_method"), str):
        return "`quantization_config` in its config.json names no quant_method"
    method = theirs["quant_method"]
    named = f'"{method}"' in known.quantizations
    if method in ("awq", "gptq") and theirs.get("bits", 4) != 4:
        return f"it is quantized by {method} to {str(theirs.get('bits'))[:10]} bits, and only 4 can be loaded"
    if method == "compressed-tensors":
        form = str(theirs.get("format"))[:40]
        fits = f'"{form}"' in known.quantizations or form == "pack-quantized"
        sure = packed or "unsupported compressed-tensors" in known.quantizations
        return f"its format is compressed-tensors {form!r}, which mlx-lm does not unpack" if sure and not fits else None
    if method == "modelopt" and named and theirs.get("quant_algo", "NVFP4") != "NVFP4":
        return f"it is quantized by modelopt as {str(theirs.get('quant_algo'))[:20]!r}, and only NVFP4 can be loaded"
    unpacks = named if method != "fp8" else "weight_scale_inv" in known.model or _is_mxfp8(theirs, known)
    return None if unpacks or not packed else f"it is quantized by {method[:40]!r}, which mlx-lm does not unpack"


def _is_mxfp8(theirs: Mapping[str, object], known: Abilities) -> bool:
    """Whether the scales are powers of two, over blocks of 32: mlx-lm loads those unchanged since 0.32."""
    return theirs.get("scale_fmt") == "ue8m0" and '"ue8m0"' in known.quantizations
