"""Check whether LiteLLM's retries outlast a swap, and whether its health checks reach the servers. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from mlxops.core.doctor.findings import Finding, FindingCode

DEFAULT_RETRIES = 2
SWAP_SECONDS = 30.0
"""A large model takes at least so long from the stop of the old server to the first answer of the new one."""
_LONGEST_PAUSE = 8.0
_MOST = 1e9


def retry_seconds(retries: int, least: float = 0.0) -> float:
    """Return how long LiteLLM 1.109 asks a single deployment again: pauses of min(0.5 x 2^n, 8) seconds, or `least`."""
    pauses = (min(0.5 * float(1 << min(number, 8)), _LONGEST_PAUSE) for number in range(min(retries, 1000)))
    return sum(max(least, pause) for pause in pauses)


def swap_findings(document: Mapping[object, object], aliases: Collection[str], config: str) -> Iterator[Finding]:
    """Yield what the configuration does to a swap of a server behind one of `aliases`."""
    router, module = _mapping(document.get("router_settings")), _mapping(document.get("litellm_settings"))
    listed = document.get("model_list")
    entries = [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    wrong: dict[str, list[str]] = {}
    for entry in entries:
        name = entry.get("model_name")
        if isinstance(name, str) and name in aliases:
            why = _gives_up(_mapping(entry.get("litellm_params")), router, module)
            wrong.setdefault(why, []).append(name)
    for why, names in wrong.items():
        if why:
            yield Finding.of(FindingCode.GATEWAY_RETRIES, f"{', '.join(dict.fromkeys(names))}: {why}", config=config)


def _gives_up(params: Mapping[object, object], router: Mapping[object, object], module: Mapping[object, object]) -> str:
    """Return why a request is lost in a swap; "" if it is not."""
    # An entry's own number beats the router's.
    retries = next(
        (number for each in (params, router, module) if (number := _number(each.get("num_retries"))) is not None),
        DEFAULT_RETRIES,
    )
    seconds = retry_seconds(int(retries), _number(router.get("retry_after")) or 0.0)
    if seconds < SWAP_SECONDS:
        return f"{retries:.0f} retries last {seconds:.0f} s, and a swap of a large model takes {SWAP_SECONDS:.0f} s"
    cooldowns = _number(params.get("cooldown_time", router.get("cooldown_time")))
    if router.get("disable_cooldowns") is not True and cooldowns != 0:
        return "LiteLLM sets its server aside after a failure, and then retries nothing"
    return ""


def health_check_findings(entries: Collection[str], config: str) -> Iterator[Finding]:
    """`entries`: the aliases whose servers LiteLLM's background health checks ask."""
    if entries:
        message = f"background_health_checks send requests to the servers of {', '.join(sorted(set(entries)))}"
        yield Finding.of(FindingCode.GATEWAY_HEALTH_CHECKS, message, config=config)


def _mapping(value: object) -> Mapping[object, object]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    """Return a number of the configuration; None for anything else, such as `.nan`, and for one beyond all sense."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MOST
    return float(value) if usable and isinstance(value, int | float) else None
