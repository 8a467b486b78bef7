"""What the agent tells the control node about a port for the gateway's entries."""

from __future__ import annotations

import pytest

from mlxops.agent.operations.gateway import _smallest_context
from mlxops.core.ports import Owner, PortView, State
from mlxops.core.registry import Model, Registry

MODELS = {
    "large": Model("large", context_length=131072, port=8101),
    "middle": Model("middle", context_length=32768),
    "small": Model("small", context_length=8192),
    "unknown": Model("unknown"),
}


@pytest.mark.parametrize(
    ("port", "serves", "recent", "context"),
    [
        (8100, None, (), None),
        (8100, "middle", (), 32768),
        (8101, None, (), 131072),
        (8101, "middle", (), 32768),
        (8100, "middle", ("small", "large"), 8192),
        (8100, None, ("small", "removed", "unknown"), 8192),
        (8100, "unknown", ("removed",), None),
    ],
    ids=["nothing", "served", "assigned", "served and assigned", "had lately", "removed since", "not known"],
)
def test_smallest_context_is_that_of_any_model_of_the_port(
    port: int, serves: str | None, recent: tuple[str, ...], context: int | None
) -> None:
    view = PortView(port, None, State.READY, Owner.MLXOPS, serves)
    assert _smallest_context(view, Registry({}, MODELS), recent) == context
