"""`deploy`: install or upgrade the agent on a host. The control node does it itself, over SSH."""

from __future__ import annotations

from collections.abc import Sequence

from mlxops.core.command import Group, Hosts, Plannable, option, switch
from mlxops.core.frozen import dataclass
from mlxops.core.replies import HostReply
from mlxops.core.tables import each_host, joined
from mlxops.core.wire import omitted


@dataclass(frozen=True)
class DeployResult:
    build: str
    """The build that the host has now; in a dry run the build that it would have."""
    changed: bool
    """False if the build was there already."""
    path: str
    """The folder of the installed agent."""
    seconds: float
    """How long it took."""
    own_build: str
    """The build of this control node."""
    python: str | None = omitted(None)
    """The interpreter that the agent runs with."""
    pruned: tuple[str, ...] = ()
    """Older builds that were removed."""
    mlxctl: str | None = None
    """The path of the program `mlxctl` on the host, if it is installed there."""
    dry_run: bool = omitted(False)
    agreed: bool | None = omitted(None)
    """True if the host recorded its settings."""


@dataclass(frozen=True)
class Deploy(Plannable[DeployResult], group=Group.HOST, example="mlxctl deploy", hosts=Hosts.SEVERAL, nested=True):
    """Install or upgrade the agent on a host."""

    rollback: bool = switch("go back to the previous build")
    wheels: str | None = option("folder with all needed wheels, for a host without a package index")
    mlxctl: bool = switch("also install mlxctl there, linked into ~/.local/bin")


def show(replies: Sequence[HostReply[DeployResult]]) -> str:
    return each_host(replies, _lines)


def _lines(result: DeployResult) -> str:
    verb = "installed" if result.changed else "already installed"
    if result.dry_run:
        verb = "would be installed" if result.changed else "is installed"
    lines = [f"agent {result.build} {verb} at {result.path}"]
    if result.pruned:
        lines.append(f"removed older builds: {', '.join(result.pruned)}")
    if result.build != result.own_build:
        own, other = result.own_build, result.build
        lines.append(f"this mlxops is {own}: changes need the control node of {other}, or another deploy")
    return joined(lines)
