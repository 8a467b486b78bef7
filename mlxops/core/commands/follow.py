"""`follow`: pass on the events of an operation, and its end. `ops --follow` asks for it, and lost connections do."""

from __future__ import annotations

from mlxops.core.command import Request
from mlxops.core.frozen import dataclass
from mlxops.core.wire import omitted


@dataclass(frozen=True)
class Follow(Request[object], nested=True):
    """The result is that of the operation's command."""

    operation: str = ""
    timeout: float | None = omitted(None)
    """Seconds after which the answer is the operation's row of `ops`, if it still runs. Builds up to 0.3.0 have no
    limit."""
