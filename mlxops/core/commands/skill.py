"""`skill`: a page that teaches an agent to operate mlxops. No host is asked."""

from __future__ import annotations

from mlxops.core.command import Group, Hosts, Request
from mlxops.core.frozen import dataclass


@dataclass(frozen=True)
class SkillResult:
    text: str
    """Markdown, with a head of `name` and `description`."""


@dataclass(frozen=True)
class Skill(Request[SkillResult], group=Group.LOOK, example="mlxctl skill", hosts=Hosts.NONE):
    """Print a page that teaches an agent to use mlxctl."""
