"""`schema`: the JSON Schema of what `--json` prints. No host is asked."""

from __future__ import annotations

from collections.abc import Mapping

from mlxops.core.command import Group, Hosts, Request, option
from mlxops.core.frozen import dataclass


@dataclass(frozen=True)
class SchemaResult:
    command: str | None
    document: Mapping[str, object]
    """JSON Schema, draft 2020-12."""


@dataclass(frozen=True)
class Schema(Request[SchemaResult], group=Group.LOOK, example="mlxctl schema load", hosts=Hosts.NONE):
    """Print the JSON Schema of what --json prints."""

    command: str | None = option("command whose documents to describe; left out: all", position=0)
