"""`pull`: bring a model's files into the cache."""

from __future__ import annotations

from collections.abc import Sequence

from mlxops.core.command import Group, Hosts, Plannable, option, switch
from mlxops.core.frozen import dataclass
from mlxops.core.replies import HostReply
from mlxops.core.tables import each_host, one_line, size
from mlxops.core.wire import omitted


@dataclass(frozen=True)
class PullResult:
    repo_id: str
    revision: str | None
    """The commit of the files; in a dry run of those that are here, or None."""
    changed: bool
    """False if this revision was here already."""
    path: str | None = omitted(None)
    """The folder of the files."""
    size_bytes: int | None = omitted(None)
    verified_files: int | None = None
    """Files whose content was compared with the hub; None without `--verify`."""
    seconds: float | None = omitted(None)
    """How long it took."""
    dry_run: bool = omitted(False)


@dataclass(frozen=True)
class Pull(
    Plannable[PullResult],
    group=Group.FILES,
    example="mlxctl pull --repo mlx-community/Qwen3-0.6B-4bit",
    hosts=Hosts.SEVERAL,
    changes=True,
    cancellable=True,
):
    """Download a model, or refresh it; nothing is started."""

    repo: str | None = option("org/name[@revision] to download, or to refresh", needed="pull --repo org/name")
    verify: bool = switch("compare the content of every file with the hub's hashes")


def show(replies: Sequence[HostReply[PullResult]]) -> str:
    return each_host(replies, line)


def line(result: PullResult) -> str:
    if result.dry_run:
        return one_line(f"would ask the hub for {result.repo_id}; here: {result.revision or 'nothing'}")
    verb = "is here" if result.changed else "was here already"
    checked = result.verified_files
    proof = f", the content of {checked} files verified" if checked is not None else ""
    what = f"{result.repo_id} at {(result.revision or '')[:12]} {verb}"
    return one_line(f"{what}: {size(result.size_bytes)}{proof} ({result.seconds} s)")
