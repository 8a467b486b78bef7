"""What comes back from a host. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from mlxops.core.errors import MlxopsError, Unreachable
from mlxops.core.frozen import dataclass
from mlxops.core.hints import Commands
from mlxops.core.wire import omitted

R = TypeVar("R", covariant=True)


@dataclass(frozen=True)
class HostReply(Generic[R]):
    """The outcome of a request to one host: a result, an error, or both if the result is a reason for the error.

    With `--detach` it is the operation that was started, and neither of them.
    """

    host: str
    result: R | None = None
    error: MlxopsError | None = None
    command: str = ""
    """The command that the result is of: with `follow` that of the operation; empty if an older agent did not say."""
    flags: str = ""
    """What a suggested command needs to go to this host, such as " --host studio2"."""
    operation: str = ""
    """The id of an operation that was only started."""

    @property
    def reachable(self) -> bool:
        return not isinstance(self.error, Unreachable)


Show = Callable[[Sequence[HostReply[R]]], str]


@dataclass(frozen=True)
class ErrorRow:
    """An error as a result carries it; the keys are those of `MlxopsError.to_wire`."""

    code: str
    exit: int
    message: str
    why: str = ""
    hint: str = ""
    commands: Commands = omitted(())
    """The commands that the hint names."""
    details: dict[str, object] | None = omitted(None)

    @classmethod
    def of(cls, error: MlxopsError) -> ErrorRow:
        return cls(
            error.code, int(error.exit), error.message, error.why, error.hint, error.commands, error.details or None
        )
