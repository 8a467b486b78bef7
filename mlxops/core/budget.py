"""Choose the limits of a server from the memory that is left: requests at once, and bytes of contexts. Pure.

The limits are chosen once, at the load. They stay in the server's command and in its run record, and are left out when
settings are compared: the next load on another port finds less memory left, which must not make drift here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mlxops.core.frozen import dataclass

if TYPE_CHECKING:
    from mlxops.core.memory import Estimate

MOST_REQUESTS, MOST_PROMPTS = 32, 8
"""The engines' own defaults (mlx-lm 0.32, mlx-openai-server 1.8). A budget only lowers them."""
MOST_CACHES = 10
"""Contexts that the engines keep for later requests, by default (`--prompt-cache-size`)."""


@dataclass(frozen=True)
class Limits:
    """How far a server may grow beyond its weights. None: not limited."""

    requests: int | None = None
    """Requests that are answered at once, each with its context."""
    prompts: int | None = None
    """Prompts that are read at once. The engines answer as many requests at once, even if `requests` is less."""
    cache_bytes: int | None = None
    """Bytes of all contexts, of open requests and of those that are kept for later requests."""

    @property
    def contexts(self) -> int:
        """The contexts of open requests that count in an estimate."""
        return max(self.requests or 1, self.prompts or 1)


@dataclass(frozen=True)
class LimitOptions:
    """The options of an engine that set its limits. Empty: it has none."""

    requests: str = ""
    prompts: str = ""
    cache_bytes: str = ""

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.requests, self.prompts, self.cache_bytes)))

    def only(self, known: Collection[str]) -> LimitOptions:
        """Return these options without those that are not in `known`."""
        return LimitOptions(*(each if each in known else "" for each in self._named))

    def read(self, options: Mapping[str, str]) -> Limits:
        """Return the limits in the options of a command. A value that is no size counts as no limit."""
        return Limits(*(_number(options.get(each, "")) for each in self._named))

    def words(self, limits: Limits) -> tuple[str, ...]:
        """Return the words of a command that set these limits."""
        values = zip(self._named, (limits.requests, limits.prompts, limits.cache_bytes), strict=True)
        return tuple(word for each, value in values if each and value is not None for word in (each, str(value)))

    @property
    def _named(self) -> tuple[str, str, str]:
        return (self.requests, self.prompts, self.cache_bytes)


_UNITS = {"M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9, "": 1}
"""The units of `--prompt-cache-bytes` (`_parse_size` of mlx-lm 0.32.2)."""


def _number(text: str) -> int | None:
    digits = text.rstrip("MGBmgb ")
    unit = _UNITS.get(text[len(digits) :].strip().upper())
    try:
        return int(float(digits) * unit) if unit is not None else None
    except (ValueError, OverflowError):
        return None


def choose(need: Estimate, spare: int, own: Limits, *, cached: bool) -> Limits:
    """Choose the limits of a new server.

    `need` is its estimate with one context, `spare` is what would then be left of the budget, `own` are the limits that
    its entry sets. `cached`: contexts that are kept for later requests stay in memory.

    At most half of what is left is given away, so that the next model finds room: half of that to further requests, the
    rest to kept contexts. With nothing left, it is one request and one context, which is what `need` counts.
    """
    one = need.context_bytes + need.state_bytes
    share = max(0, spare) // 2
    most = 1 + share // 2 // one if one else MOST_REQUESTS
    requests = own.requests or max(own.prompts or 1, min(MOST_REQUESTS, most))
    prompts = own.prompts or min(MOST_PROMPTS, requests)
    contexts = max(requests, prompts)
    left = share - (contexts - 1) * one if cached else MOST_CACHES * one
    kept = max(0, min(MOST_CACHES * one, left))
    return Limits(requests, prompts, own.cache_bytes or contexts * one + kept or None)


def limited(need: Estimate, limits: Limits, *, cached: bool) -> Estimate:
    """Return the estimate of a server that uses its limits to the full. `cached` as in `choose`."""
    one = need.context_bytes + need.state_bytes
    kept = (limits.cache_bytes or 0) - limits.contexts * one
    return replace(need, contexts=limits.contexts, cache_bytes=max(0, kept) if cached else 0)


def limits_at_end(argv: Sequence[str], options: Collection[str]) -> tuple[str, ...]:
    """Return the words at the end of a command that set some of these options, `--option number` each."""
    first = len(argv)
    while first >= 2 and argv[first - 2] in options and argv[first - 1].isdecimal():
        first -= 2
    return tuple(argv[first:])


def without_limits(argv: Sequence[str], options: Collection[str]) -> tuple[str, ...]:
    """Return a command without the words of `limits_at_end`."""
    return tuple(argv[: len(argv) - len(limits_at_end(argv, options))])
