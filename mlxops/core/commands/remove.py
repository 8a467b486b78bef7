"""`remove`: delete a model's files."""

from __future__ import annotations

from collections.abc import Sequence

from mlxops.core.command import Group, Plannable, option
from mlxops.core.frozen import dataclass
from mlxops.core.replies import HostReply
from mlxops.core.tables import each_host, one_line, size
from mlxops.core.wire import omitted


@dataclass(frozen=True)
class RemoveResult:
    model: str
    changed: bool
    freed_bytes: int
    """Bytes that the disk has back; in a dry run, would have."""
    dry_run: bool
    kept: tuple[str, ...] = ()
    """Other revisions of the repository."""
    repo_id: str | None = None
    revision: str | None = None
    path: str | None = omitted(None)
    """The folder of the files."""
    linked_bytes: int | None = omitted(None)
    """Bytes of files outside of the cache to which its links lead. They stay."""
    kept_files: tuple[str, ...] | None = omitted(None)
    """Files that no download put there."""


@dataclass(frozen=True)
class Remove(Plannable[RemoveResult], group=Group.FILES, example="mlxctl remove --model jerry-xl", changes=True):
    """Delete a model's files from the cache."""

    model: str | None = option("the model whose files go; its registry entry stays", needed="remove --model jerry-xl")


def show(replies: Sequence[HostReply[RemoveResult]]) -> str:
    return each_host(replies, line)


def line(result: RemoveResult) -> str:
    verb = "would free" if result.dry_run else "freed"
    rest = f"; {len(result.kept)} other revisions of it stay" if result.kept else ""
    return one_line(f"{result.model}: {verb} {size(result.freed_bytes)}{rest}")
