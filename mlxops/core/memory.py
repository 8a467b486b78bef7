"""Estimate the memory that a model takes, and choose the servers to stop for it. Pure. All sizes are bytes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

from mlxops.core.frozen import dataclass
from mlxops.core.kv_cache import KVCache
from mlxops.core.text import amount

CONTEXT_TOKENS = 32768
"""Tokens of context that an estimate allows for, unless the entry sets context_length. Servers keep one such cache for
each conversation. The allowance is one full conversation, not the worst case."""
ENGINE_BYTES = 500_000_000
"""The server program itself: interpreter, libraries, buffers."""
RELEASE_BYTES_PER_SECOND = 4e9
"""How fast a server that ends releases its memory at least."""
UNKNOWN_SHARE = 1.0
"""Share of the weights that is allowed for the context if the configuration does not specify it. A model with 8 billion
parameters in 4 bits takes about as much for 32768 tokens as for its weights; larger models take less."""


def release_seconds(held: int | None) -> float:
    """Return how long a server that holds so many bytes takes to release them; None: not known."""
    return (held or 0) / RELEASE_BYTES_PER_SECOND


@dataclass(frozen=True)
class Estimate:
    """The memory of one model: its weights, an allowance for the context, and the server program."""

    weight_bytes: int
    context_bytes: int
    context_tokens: int | None
    """Tokens of the allowance; None if it is a share of the weights."""
    state_bytes: int = 0
    """The states of recurrent layers. They have the same size for any context."""
    certain: bool = True
    """False if the configuration does not specify it. Then `context_bytes` is an upper estimate."""
    contexts: int = 1
    """Requests that are answered at once, each with its context and states."""
    cache_bytes: int = 0
    """Contexts that are kept for later requests."""

    @property
    def total(self) -> int:
        contexts = (self.context_bytes + self.state_bytes) * self.contexts
        return self.weight_bytes + contexts + self.cache_bytes + ENGINE_BYTES

    def __str__(self) -> str:
        what = f"{self.context_tokens} tokens of" if self.context_tokens else "an unknown"
        state = f", {amount(self.state_bytes)} for recurrent states" if self.state_bytes else ""
        doubt = "" if self.certain else " (upper estimate: how this model keeps its context is not known)"
        times = f", times {self.contexts} requests" if self.contexts > 1 else ""
        cache = f", {amount(self.cache_bytes)} for kept contexts" if self.cache_bytes else ""
        context = f"{amount(self.context_bytes)} for {what} context{doubt}{state}{times}{cache}"
        return f"{amount(self.weight_bytes)} weights, {context}"


def estimate(weight_bytes: int, cache: KVCache | None, longest: int | None, limit: int | None = None) -> Estimate:
    """`longest` is the context length that the model supports, `limit` the one that its entry sets; None if unknown."""
    if cache is None:
        return Estimate(weight_bytes, int(weight_bytes * UNKNOWN_SHARE), None, certain=False)
    tokens = limit or min(longest or CONTEXT_TOKENS, CONTEXT_TOKENS)
    return Estimate(weight_bytes, cache.context_bytes(tokens), tokens, cache.state_bytes, cache.certain)


STRANDED = "stranded"
"""The owner of memory that belongs to no process and did not return when its server was stopped."""


@dataclass(frozen=True)
class Use:
    """A server that takes memory now, or will in a moment; or stranded memory."""

    port: int | None
    model: str
    owner: str
    pid: int | None
    estimated_bytes: int | None
    resident_bytes: int | None
    limit_bytes: int | None = None
    """What it needs if it uses the limits of its command to the full; None if that sets no limits."""
    unbounded: bool = False
    """It is an engine's server, and no option limits how many contexts it keeps in memory."""
    limit: Estimate | None = None
    """The parts of `limit_bytes`, if they are known."""

    @property
    def possible(self) -> int:
        """What it may take, as far as that is known."""
        return max(self.counted, self.limit_bytes or 0)

    @property
    def counted(self) -> int:
        """The larger of the estimate and the memory that it holds now."""
        return max(self.estimated_bytes or 0, self.resident_bytes or 0)

    @property
    def known(self) -> bool:
        return self.counted > 0

    @property
    def removable(self) -> bool:
        return self.port is not None and self.owner in {"mlxops", "hand"}

    @property
    def unload(self) -> str:
        """The command that stops it."""
        return f"`mlxctl unload {self.port}{' --force' if self.owner == 'hand' else ''}`"

    def __str__(self) -> str:
        size = amount(self.counted) if self.known else "of unknown size"
        if self.owner == STRANDED:
            return f"{size} of stranded memory, which only a reboot returns"
        where = f" on {self.port}" if self.port is not None else ""
        return f"{self.model}{where} {size}" + ("" if self.owner == "mlxops" else f" ({self.owner})")


def smallest_room(uses: Iterable[Use], missing: int) -> tuple[Use, ...] | None:
    """Return the fewest servers that free `missing` bytes when they stop, and of equally few the ones that free least.
    None if all together do not free enough.

    All combinations are tried: a host has about ten ports.
    """
    movable = sorted((use for use in uses if use.removable and use.known), key=lambda use: -use.counted)[:16]
    for count in range(len(movable) + 1):
        enough = [group for group in combinations(movable, count) if sum(use.counted for use in group) >= missing]
        if enough:
            return min(enough, key=lambda group: sum(use.counted for use in group))
    return None
