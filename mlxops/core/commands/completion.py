"""`completion`: the script with which a shell completes command lines of mlxctl. No host is asked."""

from __future__ import annotations

from mlxops.core.command import Group, Hosts, Request, option
from mlxops.core.errors import UsageError
from mlxops.core.frozen import dataclass
from mlxops.core.names import shown

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class CompletionResult:
    shell: str
    script: str


def _shell(text: str) -> str:
    """Raises `UsageError` (bad_shell)."""
    if text in SHELLS:
        return text
    why = "there are scripts for bash, zsh and fish"
    raise UsageError(
        "bad_shell", f"no completion for {shown(text)}", why=why, hint="for example: `mlxctl completion zsh`"
    )


@dataclass(frozen=True)
class Completion(Request[CompletionResult], group=Group.HOST, example="mlxctl completion zsh", hosts=Hosts.NONE):
    """Print the script with which bash, zsh or fish completes mlxctl."""

    shell: str = option("bash, zsh or fish", default="", position=0, parse=_shell, needed="completion zsh")
