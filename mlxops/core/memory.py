"""How much memory a model takes, and what would have to go to make room for it. Pure; all sizes are bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

from mlxops.core.units import amount

CONTEXT_TOKENS = 32768
"""Tokens of context that a model is given room for, unless its entry's context_length says otherwise. Servers keep
one such cache for each conversation; one full conversation is the allowance, not the worst case."""
ENGINE_BYTES = 500_000_000
"""The server program itself: interpreter, libraries, buffers."""
UNKNOWN_SHARE = 0.1
"""Of the weights, for the context of a model whose configuration does not tell what its cache takes."""


@dataclass(frozen=True)
class Estimate:
    """What one model takes: its weights, a stated allowance for the context, and the server itself."""

    weight_bytes: int
    context_bytes: int
    context_tokens: int | None
    """Tokens that the allowance is for; None where it is a share of the weights."""

    @property
    def total(self) -> int:
        return self.weight_bytes + self.context_bytes + ENGINE_BYTES

    def __str__(self) -> str:
        what = f"{self.context_tokens} tokens of" if self.context_tokens else "an unknown"
        return f"{amount(self.weight_bytes)} weights, {amount(self.context_bytes)} for {what} context"

    def to_wire(self) -> dict[str, object]:
        return {
            "weight_bytes": self.weight_bytes,
            "context_bytes": self.context_bytes,
            "context_tokens": self.context_tokens,
            "total_bytes": self.total,
        }


def estimate(
    weight_bytes: int, cache_bytes_per_token: int | None, longest: int | None, asked: int | None = None
) -> Estimate:
    """`longest` is what the model can, `asked` what its entry sets; None where that is not known."""
    if cache_bytes_per_token is None:
        return Estimate(weight_bytes, int(weight_bytes * UNKNOWN_SHARE), None)
    tokens = asked or min(longest or CONTEXT_TOKENS, CONTEXT_TOKENS)
    return Estimate(weight_bytes, cache_bytes_per_token * tokens, tokens)


def cache_bytes_per_token(config: Mapping[str, object]) -> int | None:
    """What a token takes in the key-value cache, in 16 bits, after config.json as transformers names its fields.

    Layers with a sliding window or a state of fixed size take next to nothing more per token and do not count.
    """
    text = config.get("text_config")
    source = text if isinstance(text, Mapping) else config
    layers = _caching_layers(source)
    if layers is None:
        return None
    latent = _number(source, "kv_lora_rank")
    if latent:  # multi-head latent attention: one compressed vector and the rotary part, for all heads together
        return layers * (latent + (_number(source, "qk_rope_head_dim") or 0)) * 2
    heads = _number(source, "num_attention_heads")
    hidden = _number(source, "hidden_size")
    width = _number(source, "head_dim") or (hidden // heads if hidden and heads else None)
    shared = _number(source, "num_key_value_heads") or heads
    return layers * shared * width * 2 * 2 if shared and width else None


def _caching_layers(source: Mapping[str, object]) -> int | None:
    layers = _number(source, "num_hidden_layers")
    kinds = source.get("layer_types")
    if layers and isinstance(kinds, list) and len(kinds) == layers:
        return sum(1 for kind in kinds if kind == "full_attention") or layers
    every = _number(source, "full_attention_interval")
    return layers // every if layers and every and every <= layers else layers


def _number(source: Mapping[str, object], key: str) -> int | None:
    value = source.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**9 else None


@dataclass(frozen=True)
class Use:
    """A server that takes memory now. `counted` is what it is reckoned with: what it holds, or is expected to."""

    port: int | None
    model: str
    owner: str
    pid: int | None
    estimated_bytes: int | None
    resident_bytes: int | None

    @property
    def counted(self) -> int:
        return max(self.estimated_bytes or 0, self.resident_bytes or 0)

    @property
    def known(self) -> bool:
        return self.counted > 0

    @property
    def removable(self) -> bool:
        return self.port is not None and self.owner in {"mlxops", "hand"}

    @property
    def unload(self) -> str:
        """The command that makes it go."""
        return f"mlxctl unload {self.port}" + (" --force" if self.owner == "hand" else "")

    def __str__(self) -> str:
        size = amount(self.counted) if self.known else "of unknown size"
        where = f" on {self.port}" if self.port is not None else ""
        return f"{self.model}{where} {size}" + ("" if self.owner == "mlxops" else f" ({self.owner})")

    def to_wire(self) -> dict[str, object]:
        return {
            "port": self.port,
            "model": self.model,
            "owner": self.owner,
            "pid": self.pid,
            "estimated_bytes": self.estimated_bytes,
            "resident_bytes": self.resident_bytes,
            "counted_bytes": self.counted,
        }


def smallest_room(uses: Iterable[Use], missing: int) -> tuple[Use, ...] | None:
    """The fewest servers whose end frees `missing` bytes, and of those the ones that free least; None: none do.

    A host has about ten ports, so every choice is looked at.
    """
    movable = sorted((use for use in uses if use.removable and use.known), key=lambda use: -use.counted)[:16]
    for count in range(len(movable) + 1):
        enough = [chosen for chosen in combinations(movable, count) if sum(use.counted for use in chosen) >= missing]
        if enough:
            return min(enough, key=lambda chosen: sum(use.counted for use in chosen))
    return None
