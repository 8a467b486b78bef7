"""`unload`: stop a port's server and clear its assignment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from mlxops.core.command import Draining, Group, option, switch
from mlxops.core.commands.load import PortResult, plan_lines
from mlxops.core.errors import UsageError
from mlxops.core.frozen import dataclass
from mlxops.core.names import is_model_name, shown
from mlxops.core.replies import HostReply
from mlxops.core.tables import each_host, joined, one_line


@dataclass(frozen=True)
class Unload(Draining[PortResult], group=Group.SERVE, example="mlxctl unload 8100", changes=True):
    """Stop a port's server and clear its assignment."""

    port: str | None = option("the port to unload", position=0)
    model: str | None = option("the model to unload, on whichever port it is")
    force: bool = switch("also stop a server that was started by hand")

    def checked(self) -> Self:
        if self.port is not None and self.model is not None:
            why = "they may name two different servers"
            raise UsageError(
                "port_or_model", "--port and --model cannot be used together", why=why, hint="leave one out"
            )
        if self.port is None and self.model is None:
            raise UsageError(
                "missing_argument",
                "either --port or --model is needed",
                why="there is no default for it",
                hint="for example: `mlxctl unload --port 8100`",
            )
        if self.port is not None and not self.port.isdecimal() and is_model_name(self.port):
            raise UsageError(
                "bad_port",
                f"{shown(self.port)} is not a port",
                why="without a flag, unload takes a port",
                hint=f"for the port of a model: `mlxctl unload --model {self.port}`",
            )
        return self


def show(replies: Sequence[HostReply[PortResult]]) -> str:
    return each_host(replies, line)


def line(result: PortResult) -> str:
    if result.dry_run:
        return plan_lines(result)
    place = f"port {result.port}" if result.port else f"{result.model}"
    if result.changed and result.state == "idle":
        done = f"{place} is idle; {result.model or 'its server'} is unloaded ({result.seconds} s)"
        return joined([done, *result.notes])
    return one_line("; ".join(result.notes) or f"{place} had nothing to unload")
