"""How much memory a model takes, and what would have to go to make room for it. Pure; all sizes are bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

from mlxops.core.kv_cache import KVCache
from mlxops.core.text import amount

CONTEXT_TOKENS = 32768
"""Tokens of context that a model is given room for, unless its entry's context_length says otherwise. Servers keep
one such cache for each conversation; one full conversation is the allowance, not the worst case."""
ENGINE_BYTES = 500_000_000
"""The server program itself: interpreter, libraries, buffers."""
UNKNOWN_SHARE = 1.0
"""Of the weights, for the context of a model whose configuration says nothing. A model with 8 billion parameters in
4 bits takes about as much for 32768 tokens as for its weights; larger ones take less."""


@dataclass(frozen=True)
class Estimate:
    """What one model takes: its weights, a stated allowance for the context, and the server itself."""

    weight_bytes: int
    context_bytes: int
    context_tokens: int | None
    """Tokens that the allowance is for; None where it is a share of the weights."""
    state_bytes: int = 0
    """What recurrent layers keep for a context of any length."""
    certain: bool = True
    """False if the configuration does not say: then `context_bytes` is an upper estimate."""

    @property
    def total(self) -> int:
        return self.weight_bytes + self.context_bytes + self.state_bytes + ENGINE_BYTES

    def __str__(self) -> str:
        what = f"{self.context_tokens} tokens of" if self.context_tokens else "an unknown"
        state = f", {amount(self.state_bytes)} for recurrent states" if self.state_bytes else ""
        doubt = "" if self.certain else " (upper estimate: how this model keeps its context is not known)"
        return f"{amount(self.weight_bytes)} weights, {amount(self.context_bytes)} for {what} context{doubt}{state}"

    def to_wire(self) -> dict[str, object]:
        return {
            "weight_bytes": self.weight_bytes,
            "context_bytes": self.context_bytes,
            "context_tokens": self.context_tokens,
            "state_bytes": self.state_bytes,
            "upper_estimate": not self.certain,
            "total_bytes": self.total,
        }


def estimate(weight_bytes: int, cache: KVCache | None, longest: int | None, asked: int | None = None) -> Estimate:
    """`longest` is what the model can, `asked` what its entry sets; None where that is not known."""
    if cache is None:
        return Estimate(weight_bytes, int(weight_bytes * UNKNOWN_SHARE), None, certain=False)
    tokens = asked or min(longest or CONTEXT_TOKENS, CONTEXT_TOKENS)
    return Estimate(weight_bytes, cache.context_bytes(tokens), tokens, cache.state_bytes, cache.certain)


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
