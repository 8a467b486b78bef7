"""`follow`: pass on the events of an operation, and its end. `ops --follow` asks for it, and lost connections do."""

from __future__ import annotations

from mlxops.core.command import Request
from mlxops.core.frozen import dataclass


@dataclass(frozen=True)
class Follow(Request[object], nested=True):
    """The result is that of the operation's command."""

    operation: str = ""
