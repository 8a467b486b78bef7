"""`rollback`: go back to the model that a port served before."""

from __future__ import annotations

from mlxops.core.command import Group, option
from mlxops.core.commands.load import Loading
from mlxops.core.commands.load import show as show
from mlxops.core.frozen import dataclass


@dataclass(frozen=True)
class Rollback(
    Loading,
    group=Group.SERVE,
    example="mlxctl rollback 8100",
    changes=True,
    cancellable=True,
):
    """Go back to the model that a port served before."""

    port: str | None = option("the port to bring back", position=0, needed="rollback --port 8100")
