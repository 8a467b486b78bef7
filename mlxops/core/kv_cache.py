"""Compute the size of an engine's cache of a conversation from the model's config.json. Pure.

An unknown model type or an invalid configuration gets an upper estimate: every layer keeps full keys and values of
every token.
"""

from __future__ import annotations

from collections.abc import Mapping

from mlxops.core.frozen import dataclass
from mlxops.core.layers import HEADS, HIDDEN, LAYERS, MODEL_TYPES, MOST_LAYERS, Config, Layer, Unspecified, guess

_NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
"""Keys under which vision and audio models have the configuration of their language model."""
HALF, SINGLE = 2, 4
"""Bytes of one cached value."""
_WIDEST = 512
"""Values of one head. No published model has more."""


@dataclass(frozen=True)
class KVCache:
    """The caches of all layers."""

    layers: tuple[Layer, ...]
    value_bytes: int = HALF
    certain: bool = True
    """False for an upper estimate."""

    def context_bytes(self, tokens: int) -> int:
        """Return the bytes of keys and values, or of the engine's equivalent, for a number of tokens."""
        return sum(layer.width * min(tokens, layer.window or tokens) for layer in self.layers) * self.value_bytes

    @property
    def state_bytes(self) -> int:
        """The bytes of recurrent states, in 32 bits. They do not depend on the number of tokens."""
        return sum(layer.state for layer in self.layers) * 4


def kv_cache(config: Mapping[str, object]) -> KVCache | None:
    """Return the cache; None if the configuration lacks the number of layers or their width."""
    inner = language_model(config)
    for model_type in (config.get("model_type"), inner.get("model_type")):
        family = MODEL_TYPES.get(str(model_type)) or MODEL_TYPES.get(str(model_type).removesuffix("_text"))
        if family:
            try:
                return KVCache(tuple(family(Config(inner))), _value_bytes(config))
            except Unspecified:
                break
    return _upper_estimate(config)


def _upper_estimate(config: Mapping[str, object]) -> KVCache | None:
    inner = language_model(config)
    layers, width = guess(inner, *LAYERS), _at_most(inner)
    if not layers or layers > MOST_LAYERS or not width:
        return None
    return KVCache((Layer(width),) * layers, _value_bytes(config), certain=False)


def _value_bytes(config: Mapping[str, object]) -> int:
    dtypes = [part.get(key) for part in (language_model(config), config) for key in ("dtype", "torch_dtype")]
    return SINGLE if "float32" in dtypes else HALF


def seeing_cache(config: Mapping[str, object]) -> KVCache | None:
    """Return the cache of a vision model. mlx-vlm serves those, and keeps full keys and values where mlx-lm keeps a
    latent vector (read in mlx-vlm 0.4.4: kimi_vl, mistral4, deepseek_vl_v2)."""
    inner = language_model(config)
    return kv_cache(config) if not guess(inner, "kv_lora_rank") else _upper_estimate(config)


def language_model(config: Mapping[str, object]) -> Mapping[str, object]:
    """Return the part of a configuration that describes the language model. Often it is the whole."""
    nested = _parts(config)
    deeper = [part for outer in nested for part in _parts(outer)]
    layered = [part for part in (*deeper, *nested, config) if guess(part, *LAYERS)]
    return next(iter((*layered, *nested)), config)


def _parts(config: Mapping[str, object]) -> list[Mapping[str, object]]:
    return [part for key in _NESTED if isinstance(part := config.get(key), Mapping)]


def _at_most(values: Mapping[str, object]) -> int:
    """Return the values per token of a layer with full keys and values: the most that the configuration may mean."""
    heads, hidden = guess(values, *HEADS) or 0, guess(values, *HIDDEN) or 0
    shared = [key for key in values if key.endswith(("key_value_heads", "kv_heads", "attention_groups"))]
    dims = [key for key in values if key.endswith("head_dim") and not key.startswith(("index", "linear", "mamba"))]
    kept = (guess(values, *shared) if _readable(values, shared) else None) or heads
    width = max(guess(values, *dims) or (hidden // heads if heads else 0), 0 if _readable(values, dims) else _WIDEST)
    nope, rope, value = (guess(values, key) or 0 for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    return max(2 * kept * width, max(heads, kept) * (nope + rope + (value or width)) if rope else 0)


def _readable(values: Mapping[str, object], keys: list[str]) -> bool:
    return all(values[key] is None or guess(values, key) for key in keys)
