"""`init`: register what the cache holds."""

from __future__ import annotations

from collections.abc import Sequence

from mlxops.core.command import Group, Hosts, Plannable
from mlxops.core.frozen import dataclass
from mlxops.core.replies import HostReply
from mlxops.core.tables import each_host, joined


@dataclass(frozen=True)
class SkippedRow:
    repo_id: str | None
    path: str
    """Its folder in the cache."""
    why: str
    """Why it is not registered."""


@dataclass(frozen=True)
class InitResult:
    added: tuple[str, ...]
    """Names of new registry entries; in a dry run of entries that would be added."""
    existing: tuple[str, ...]
    """Repositories that had an entry already."""
    skipped: tuple[SkippedRow, ...]
    """Folders of the cache without a complete MLX model."""
    changed: bool
    """The registry was written."""
    dry_run: bool
    hub: str
    """The path of the cache."""


@dataclass(frozen=True)
class Init(Plannable[InitResult], group=Group.FILES, example="mlxctl init", hosts=Hosts.SEVERAL, changes=True):
    """Register every complete MLX model of the host's cache."""


def show(replies: Sequence[HostReply[InitResult]]) -> str:
    return each_host(replies, _lines)


def _lines(result: InitResult) -> str:
    verb = "would add" if result.dry_run else "added"
    counts = f"already registered {len(result.existing)}, skipped {len(result.skipped)}"
    return joined(
        [
            *(f"{verb} {name}" for name in result.added),
            *(f"skipped {row.repo_id}: {row.why}" for row in result.skipped),
            f"{verb} {len(result.added)}, {counts} ({result.hub})",
        ]
    )
