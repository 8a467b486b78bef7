"""`setup`: what a host has, as an entry of hosts.yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field

from mlxops.core.command import Group, Hosts, Request, option
from mlxops.core.errors import UsageError
from mlxops.core.frozen import dataclass
from mlxops.core.names import shown
from mlxops.core.replies import HostReply
from mlxops.core.tables import harmless


@dataclass(frozen=True)
class SetupResult:
    yaml: str
    """The entry, with what could not be determined as comments."""
    entry: Mapping[str, object] = field(default_factory=dict)
    """The same entry as data."""
    notes: tuple[str, ...] = ()
    """The comments."""


def _destination(text: str) -> str:
    """Raises `UsageError` (bad_destination)."""
    if not text or text.startswith("-") or not text.isprintable() or " " in text:
        raise UsageError(
            "bad_destination",
            f"{shown(text)} is not a destination",
            why="it is one word, as typed after ssh; a leading '-' would be an option",
            hint="use a Host alias of ~/.ssh/config, or user@name",
        )
    return text


@dataclass(frozen=True)
class Setup(
    Request[SetupResult],
    group=Group.HOST,
    example="mlxctl setup studio",
    hosts=Hosts.NONE,
):
    """Look at a host over SSH, and print its entry for hosts.yaml."""

    ssh: str = option(
        "what you type after ssh",
        default="",
        position=0,
        parse=_destination,
        needed="setup studio",
        sent=False,
    )


def show(replies: Sequence[HostReply[SetupResult]]) -> str:
    return "\n".join(harmless(reply.result.yaml) for reply in replies if reply.result is not None)
