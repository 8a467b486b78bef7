"""`set`: change a model's own settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from mlxops.core.command import Group, Plannable, option
from mlxops.core.commands.list import OptionRow, shown_options
from mlxops.core.frozen import dataclass
from mlxops.core.replies import HostReply
from mlxops.core.tables import each_host, one_line


@dataclass(frozen=True)
class SetResult:
    model: str
    changed: bool
    dry_run: bool
    revision: str | None
    """The pinned commit; None if it has none."""
    options: tuple[OptionRow, ...]
    """The options of the model after the change."""
    restart_needed_on: int | None
    """The port where the model still runs with its old settings."""


@dataclass(frozen=True)
class Set(
    Plannable[SetResult],
    group=Group.SERVE,
    example="mlxctl set --model jerry-xl --set context_length=32768",
    changes=True,
):
    """Change a model's own settings in the registry."""

    model: str | None = option("the registered model", needed="set --model jerry-xl --set context_length=32768")
    set: tuple[str, ...] = option(
        "KEY=VALUE; again for more; KEY= takes it out, KEY=null switches a family's default off", default=()
    )

    def checked(self) -> Self:
        from mlxops.core import model_options

        model_options.parse(self.set)
        return self


def show(replies: Sequence[HostReply[SetResult]]) -> str:
    return each_host(replies, _line)


def _line(result: SetResult) -> str:
    verb = "would change" if result.dry_run else "changed" if result.changed else "was so already"
    revision = f"revision {result.revision}" if result.revision else ""
    settings = ", ".join(filter(None, [shown_options(result.options), revision]))
    return one_line(f"{result.model} {verb}: {settings or 'no settings of its own'}")
