"""`help`: show the manual. No host is asked."""

from __future__ import annotations

from mlxops.core.command import Group, Hosts, Request, option
from mlxops.core.frozen import dataclass


@dataclass(frozen=True)
class HelpResult:
    topic: str | None
    text: str
    """Markdown; without a topic one line for each page."""


@dataclass(frozen=True)
class Help(Request[HelpResult], group=Group.LOOK, example="mlxctl help status", hosts=Hosts.NONE):
    """Show a page of the manual."""

    topic: str | None = option("page to show; left out: list the pages", position=0)
