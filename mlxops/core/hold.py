"""How long LiteLLM lets a request wait for a server that is being swapped, and whether that is long enough. Pure.

The reference is LiteLLM 1.109: its source (`async_function_with_retries`, `calculate_retry_after`,
`get_num_retries_from_retry_policy`) and its behaviour in `tests/control/test_hold_live.py`. A refused connection, and
one that ends before the first byte, are an `InternalServerError` for it. So is a server's own status 500, and only
that: all other errors are other classes, and keep their own number of retries. Because of that 500, no port has a hold
unless hosts.yaml gives it one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field

from mlxops.core.frozen import dataclass
from mlxops.core.gateway import Entry, GatewayPaths, GatewayPort, Impact, Mismatch, SameHost, port_of, same_name
from mlxops.core.settings import MAX_HOLD

DEFAULT_RETRIES = 2
SUGGESTED_HOLD = 60
SWAP_SECONDS = 30.0
"""The length of a swap on a port that has had none: a large model takes at least so long."""
TWO_LOADS = 2
"""A swap that fails takes the time of two: of the model that does not load, and of the one that comes back."""
REFUSED, NOT_FOUND = "InternalServerErrorRetries", "NotFoundErrorRetries"
"""LiteLLM's names in a retry policy."""
SWAP_LOSES = "swap_loses_requests"
HOLD_DELAYS = "hold_delays_fallback"

_FIRST_PAUSE, _LONGEST_PAUSE, _JITTER = 0.5, 8.0, 0.75
_FEWEST = 4
_MOST = 10_000
"""More retries than anyone sets. A larger number would only take time to compute."""


def retries_for(hold: int) -> int:
    """Return how often LiteLLM must retry, so that the last retry comes no earlier than `hold` seconds. 0: never."""
    return max(_FEWEST, _FEWEST + math.ceil((hold - seconds_until_last(_FEWEST)) / _LONGEST_PAUSE)) if hold else 0


def seconds_until_last(retries: int, least: float = 0.0) -> float:
    """Return the earliest time of the last retry: pauses of min(0.5 x 2^n, 8) seconds, each at least `least`."""
    return sum(_pause(done, least) for done in range(min(retries, _MOST)))


def seconds_until_error(retries: int) -> float:
    """Return the latest time of the error. LiteLLM pauses once more after the last retry, and adds to each pause up to
    0.75 s."""
    return seconds_until_last(retries + 1) + _JITTER * (retries + 1)


def _pause(done: int, least: float) -> float:
    """Return the pause after this many retries, without what LiteLLM adds to it."""
    return min(max(_FIRST_PAUSE * float(1 << min(done, 8)), least), _LONGEST_PAUSE)


def policy(hold: int) -> dict[str, int]:
    """Return the retry policy of an alias for LiteLLM. A class that it does not name keeps LiteLLM's number.

    mlx-lm answers 404 from the moment at which it could not load its model until it is stopped. LiteLLM retries no 404
    by itself.
    """
    return dict.fromkeys((REFUSED, NOT_FOUND), retries_for(hold))


# -- what a configuration says ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RetryPolicy:
    """What a retry policy says about the two errors of a swap. None: nothing."""

    refused: int | None = None
    not_found: int | None = None
    """A 404. LiteLLM retries one only if a policy says so."""


@dataclass(frozen=True)
class RetrySettings:
    """The parts of LiteLLM's configuration that decide how long it retries a refused connection, or a 404."""

    retries: int = DEFAULT_RETRIES
    """`num_retries` of the router, else of the module."""
    policy: RetryPolicy = RetryPolicy()
    """`retry_policy`, for aliases without a policy of their own."""
    policies: Mapping[str, RetryPolicy] = field(default_factory=dict)
    """`model_group_retry_policy`, by alias."""
    least_pause: float = 0.0
    """`retry_after`."""
    fallbacks: frozenset[str] = frozenset()
    """The aliases that have fallbacks. `*`: all."""
    cooldowns: bool = True
    """LiteLLM sets a server aside after some failures."""

    def has_fallback(self, alias: str) -> bool:
        return bool(self.fallbacks & {alias, "*"})

    def policy_of(self, entry: Entry) -> RetryPolicy:
        """Return the policy of an entry. The name that the client uses selects it."""
        return self.policies.get(entry.alias, self.policy)

    def retries_of(self, entry: Entry) -> int:
        """Return the retries of a refused connection."""
        chosen = self.policy_of(entry).refused
        own = self.retries if entry.num_retries is None else entry.num_retries
        return own if chosen is None else chosen

    def seconds(self, entry: Entry) -> float:
        return seconds_until_last(self.retries_of(entry), self.least_pause)

    def seconds_after_404(self, entry: Entry) -> float:
        return seconds_until_last(self.policy_of(entry).not_found or 0, self.least_pause)


def read_retries(document: object) -> RetrySettings:
    """Read them from a loaded configuration. What LiteLLM could not read counts as not there."""
    whole = _mapping(document)
    router, module = _mapping(whole.get("router_settings")), _mapping(whole.get("litellm_settings"))
    groups = _mapping(router.get("model_group_retry_policy"))
    numbers = (found for each in (router, module) if (found := number(each.get("num_retries"))) is not None)
    return RetrySettings(
        next(numbers, DEFAULT_RETRIES),
        _policy(router.get("retry_policy")),
        {str(alias): _policy(each) for alias, each in groups.items()},
        float(number(router.get("retry_after")) or 0),
        frozenset(name for each in (router, module) for name in _fallbacks(each)),
        router.get("disable_cooldowns") is not True and number(router.get("cooldown_time")) != 0,
    )


def _policy(rules: object) -> RetryPolicy:
    section = _mapping(rules)
    refused, not_found, others = (number(section.get(key)) for key in (REFUSED, NOT_FOUND, "DefaultRetries"))
    return RetryPolicy(others if refused is None else refused, others if not_found is None else not_found)


def _fallbacks(section: Mapping[object, object]) -> Iterator[str]:
    if section.get("default_fallbacks"):
        yield "*"
    listed = section.get("fallbacks")
    for each in listed if isinstance(listed, list) else ():
        yield from (str(alias) for alias, others in _mapping(each).items() if others)


def number(value: object) -> int | None:
    """Return a number that is written as one, or as digits."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 10:
        return int(value)
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9 else None


def _mapping(value: object) -> Mapping[object, object]:
    return value if isinstance(value, dict) else {}


# -- the check ----------------------------------------------------------------------------------------------------


def findings(
    entries: Sequence[Entry],
    ports: Sequence[GatewayPort],
    retry: RetrySettings,
    files: GatewayPaths,
    same_host: SameHost = same_name,
) -> tuple[Mismatch, ...]:
    """Return a warning for each alias whose requests would be lost in a swap of its port, with the edit.

    Silent about a port whose hold is 0 in hosts.yaml: that is a decision. Silent about an alias of several
    servers: LiteLLM asks another one instead of waiting.
    """
    used = [entry for entry in entries if not (entry.out or entry.answers_itself)]
    routes = [(entry, port_of(entry, ports, same_host)) for entry in used]
    found = []
    for alias in dict.fromkeys(entry.alias for entry in used):
        same = [(entry, port) for entry, port in routes if entry.alias == alias]
        entry, port = same[0]
        if port and port.alias and all(other == port for _, other in same):
            check = _SwapCheck(entry, port, retry, files, tuple(entry.place for entry, _ in same))
            found.append(check.finding())
    return tuple(filter(None, found))


@dataclass(frozen=True)
class _SwapCheck:
    entry: Entry
    port: GatewayPort
    retry: RetrySettings
    files: GatewayPaths
    places: tuple[str, ...]
    """The places of all entries of its alias. They lead to this port, too."""

    @property
    def swap(self) -> float:
        return SWAP_SECONDS if self.port.swap_seconds is None else self.port.swap_seconds

    def finding(self) -> Mismatch | None:
        lasts = self.retry.seconds(self.entry)
        if self.retry.has_fallback(self.entry.alias):
            return self._delay(lasts) if self.port.hold and lasts > seconds_until_last(DEFAULT_RETRIES) else None
        if self.port.hold == 0:
            return None
        if len(self.places) > 1:
            message = (
                f"in a swap of port {self.port.port} requests are lost: LiteLLM does not wait between several entries"
            )
            return self._warning(
                SWAP_LOSES, message, f"keep one of {', '.join(self.places)}; then restart the gateway, once"
            )
        if lasts < self.swap:
            length = f"{self.swap:.0f} s" + (" or more with a large model" if self.port.swap_seconds is None else "")
            message = f"in a swap of port {self.port.port} requests are lost: LiteLLM retries them for {lasts:.0f} s"
            return self._warning(SWAP_LOSES, f"{message}, and a swap takes {length}", self._edit())
        if self.retry.seconds_after_404(self.entry) < self.swap:
            message = f"in a failed swap of port {self.port.port} requests may be lost: mlx-lm answers 404 then"
            return self._warning(SWAP_LOSES, f"{message}, and LiteLLM does not retry it for long enough", self._edit())
        if self.entry.cooldown and self.retry.cooldowns:
            message = f"in a swap of port {self.port.port} requests may be lost"
            why = "LiteLLM sets the server aside after a 404"
            return self._warning(SWAP_LOSES, f"{message}: {why}", self._edit())
        return None

    def _delay(self, lasts: float) -> Mismatch:
        message = f"LiteLLM uses the fallback only after {lasts:.0f} s of retries"
        hint = f"keep one of them: the fallback in {self.files.config}, or hold in hosts.yaml"
        return self._warning(HOLD_DELAYS, message, hint)

    def _warning(self, code: str, message: str, hint: str) -> Mismatch:
        alias, port = self.entry.alias, self.port
        return Mismatch(code, alias, port.port, Impact.WARNING, f"{alias}: {message}", hint, port.host)

    def _edit(self) -> str:
        """Return, as a sentence, the edits that make requests outlast a swap."""
        hold, first = self.port.hold or 0, ""
        if hold < self.swap:
            hold = min(max(SUGGESTED_HOLD, math.ceil(self.swap * TWO_LOADS / 10) * 10), MAX_HOLD)
            slot = f"slots: {{{self.port.port}: {{alias: {self.port.alias}, hold: {hold}}}}}"
            first = f"in hosts.yaml: {slot} (hold: 0 accepts the loss); "
        rules = ", ".join(f"{key}: {value}" for key, value in policy(hold).items())
        setting = f"router_settings: {{model_group_retry_policy: {{{self.entry.alias}: {{{rules}}}}}}}"
        place = f"{self.entry.place}: cooldown_time: 0"
        return f"{first}in {self.files.config}: {setting}; in {place}; then restart the gateway, once"


# -- what to paste ------------------------------------------------------------------------------------------------


def with_settings(
    document: Mapping[str, object], ports: Sequence[GatewayPort], holds: Mapping[str, int]
) -> dict[str, object]:
    """Add to the printed entries the settings of the names whose requests are to wait (`holds_of`)."""
    if not holds:
        return dict(document)
    listed = document["model_list"]
    assert isinstance(listed, list)
    held = {port.alias for port in ports if port.alias in holds}
    entries = [_without_cooldown(entry) if entry["model_name"] in held else entry for entry in listed]
    policies = {alias: policy(hold) for alias, hold in holds.items()}
    return {**document, "model_list": entries, "router_settings": {"model_group_retry_policy": policies}}


def _without_cooldown(entry: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    return {**entry, "litellm_params": {**entry["litellm_params"], "cooldown_time": 0}}


def holds_of(
    ports: Iterable[GatewayPort], retry: RetrySettings, other_names: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Return name of clients -> hold: for the aliases, and for the names that stand for them.

    Left out are aliases of several ports, between which LiteLLM does not pause, and names with a fallback, which would
    answer later.
    """
    slots = [port for port in ports if port.alias]
    aliases = [port.alias for port in slots]
    own = {port.alias: port.hold for port in slots if port.alias and port.hold and aliases.count(port.alias) == 1}
    names = dict(zip(own, own, strict=True)) | dict(other_names or {})
    return {name: own[alias] for name, alias in names.items() if alias in own and not retry.has_fallback(name)}


def other_names(
    entries: Iterable[Entry], synonyms: Mapping[str, str], ports: Sequence[GatewayPort], same_host: SameHost = same_name
) -> dict[str, str]:
    """Return the other names that clients can use for a slot -> its alias.

    LiteLLM looks for the retry policy of the name that the client used. `synonyms`: see `LiteLLMConfig`. `entries` have
    the names that clients use; those of an alias are replaced by what is pasted.
    """
    aliases = {port.alias for port in ports}
    routes: dict[str, list[GatewayPort | None]] = {}
    for entry in entries:
        if entry.alias not in aliases:
            routes.setdefault(entry.alias, []).append(port_of(entry, ports, same_host))
    found = {name: each[0].alias for name, each in routes.items() if len(each) == 1 and each[0] and each[0].alias}
    return found | {name: alias for name, alias in synonyms.items() if alias in aliases}


def notes(ports: Sequence[GatewayPort], retry: RetrySettings, holds: Mapping[str, int]) -> Iterator[str]:
    """Yield what the printed settings do, and why an alias with a hold has none."""
    for name, seconds in holds.items():
        retries = retries_for(seconds)
        last, error = math.floor(seconds_until_last(retries)), math.ceil(seconds_until_error(retries))
        yield f"{name}: a request waits {last} s for a server; without one, its error comes by {error} s."
    for alias in dict.fromkeys(port.alias for port in ports if port.alias and port.hold and port.alias not in holds):
        why = "it has a fallback" if retry.has_fallback(alias) else "it has several ports, between which nothing waits"
        yield f"{alias}: no hold, because {why}."
