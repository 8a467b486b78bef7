"""Settings that can take a host down, each with its id."""

from __future__ import annotations

import pytest

from mlxops.core.dangers import limits_over_budget, metal_fast_synch, unbounded_servers, wired_limit
from mlxops.core.memory import Use

GB = 10**9
GIB = 1024**3


@pytest.mark.parametrize(
    ("environ", "dangerous"),
    [
        ({}, False),
        ({"MLX_METAL_FAST_SYNCH": ""}, False),
        ({"MLX_METAL_FAST_SYNCH": "0"}, False),
        ({"MLX_METAL_FAST_SYNCH": "1"}, True),
        ({"MLX_METAL_FAST_SYNCH": "2"}, True),
    ],
)
def test_fast_synch_is_dangerous_if_it_is_switched_on(environ: dict[str, str], dangerous: bool) -> None:
    danger = metal_fast_synch(environ, "env in hosts.yaml")
    assert (danger is not None) == dangerous
    assert danger is None or (danger.code == "metal_fast_synch" and "env in hosts.yaml" in danger.message)


@pytest.mark.parametrize(
    ("limit", "dangerous"),
    [(None, False), (0, False), (150 * GIB, False), (192 * GIB, False), (193 * GIB, True), (300 * GIB, True)],
)
def test_wired_limit_is_dangerous_above_the_default(limit: int | None, dangerous: bool) -> None:
    danger = wired_limit(limit, default=192 * GIB, memory=256 * GIB)
    assert (danger is not None) == dangerous
    assert danger is None or danger.code == "wired_limit_high"


def test_wired_limit_says_what_is_left_for_the_system() -> None:
    danger = wired_limit(241_644 * 1024**2, default=192 * GIB, memory=256 * GIB)
    assert danger is not None
    assert "leaves 21.5 GB of 275 GB for the system, and Apple's default leaves 68.7 GB" in danger.message


def use(port: int, *, unbounded: bool = False, limit: int | None = None, owner: str = "mlxops") -> Use:
    return Use(port, f"m{port}", owner, 10, 50 * GB, None, limit, unbounded)


def test_two_servers_without_a_bound_are_dangerous() -> None:
    assert unbounded_servers([use(1), use(2, unbounded=True), use(3)]) is None
    danger = unbounded_servers([use(1, unbounded=True, owner="hand"), use(2, unbounded=True), use(3)])
    assert (
        danger is not None and danger.code == "unbounded_servers" and danger.message.startswith("m2 on 2 and m1 on 1")
    )
    assert danger.hint.endswith("`mlxctl unload 2`, then `mlxctl load m2 2`"), "not the one that was started by hand"


def test_many_servers_are_counted_and_not_all_named() -> None:
    danger = unbounded_servers([use(port, unbounded=True) for port in range(30)])
    assert danger is not None and "m4 on 4 and 25 more have no limit" in danger.message and "m5" not in danger.message


def test_limits_are_compared_with_the_budget() -> None:
    assert limits_over_budget([use(1), use(2)], 60 * GB) is None, "none of them has limits"
    assert limits_over_budget([use(1, limit=70 * GB), use(2)], 120 * GB) is None
    danger = limits_over_budget([use(1, limit=70 * GB), use(2, limit=90 * GB), use(3)], 200 * GB)
    assert danger is not None and danger.code == "limits_over_budget"
    assert "m1 on 1 and m2 on 2 allow 210 GB" in danger.message and "`mlxctl load m2 2`" in danger.hint
