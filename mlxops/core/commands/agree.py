"""`agree`: make these settings the host's own. `deploy` asks for it."""

from __future__ import annotations

from mlxops.core.command import Request
from mlxops.core.frozen import dataclass


@dataclass(frozen=True)
class AgreeResult:
    agreed: bool
    """Always true: the host has recorded the settings."""


@dataclass(frozen=True)
class Agree(Request[AgreeResult]):
    pass
