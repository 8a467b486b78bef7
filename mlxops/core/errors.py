"""The error tree, with an exit status for each class.

An error has a stable `code` for programs, one line of *what* happened (`message`), one of *why*, and one of
what to do next (`hint`). It travels from agent to control node as data, so both sides render the same thing.
"""

from __future__ import annotations

from collections.abc import Mapping

from mlxops.core.described import DescribedNumber
from mlxops.core.hints import commands_from_wire, mark, split


class Exit(DescribedNumber):
    """Process exit statuses. With several hosts the largest counts, but a bug (1) wins over all."""

    DONE = 0, "The command did what it says."
    BUG = 1, "mlxops has a bug; --debug shows the traceback."
    USAGE = 2, "The command line or a setting is wrong."
    REFUSED = 3, "The state of the host does not allow it, a check failed, or --strict found drift or faults."
    NOT_STARTED = 4, "The server did not start."
    UNREACHABLE = 5, "The host cannot be reached."
    AGENT = 6, "The agent is missing on the host, has another version, or could not be started."
    OUTCOME_UNKNOWN = 7, "The outcome is unknown: the connection was lost, or the worker does not respond."
    DOWNLOAD = 8, "The download failed."
    STILL_RUNNING = 9, "The time of --timeout is up, and the operation goes on."
    OUTPUT = 74, "The result could not be written to standard output."
    BUSY = 75, "The host is busy or changed during the command, or a server has not ended yet."
    INTERRUPTED = 130, "The command was interrupted, for example with Ctrl-C."


class MlxopsError(Exception):
    """An error that a user, a host or a network causes. Never a bug in mlxops, except for `Bug`."""

    exit: Exit = Exit.REFUSED

    def __init__(
        self,
        code: str,
        message: str,
        *,
        why: str = "",
        hint: str = "",
        details: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.why = why
        self.hint, self.commands = split(hint)
        """The commands of the hint, which its author wrote in backticks."""
        self.details: dict[str, object] = dict(details or {})

    @property
    def marked_hint(self) -> str:
        """The hint as an author writes it, with its commands in backticks: to make a longer hint of it."""
        return mark(self.hint, self.commands)

    def set_hint(self, hint: str) -> None:
        """Replace the hint. Its commands are in backticks."""
        self.hint, self.commands = split(hint)

    def to_wire(self) -> dict[str, object]:
        """Return `{"code", "exit", "message", "why", "hint"}` and, if there are any, `commands` and `details`."""
        wire: dict[str, object] = {
            "code": self.code,
            "exit": int(self.exit),
            "message": self.message,
            "why": self.why,
            "hint": self.hint,
        }
        if self.commands:
            wire["commands"] = [list(command) for command in self.commands]
        if self.details:
            wire["details"] = self.details
        return wire


class UsageError(MlxopsError):
    exit = Exit.USAGE


class Refused(MlxopsError):
    exit = Exit.REFUSED


class NotStarted(MlxopsError):
    exit = Exit.NOT_STARTED


class Unreachable(MlxopsError):
    """`code` is the class: host_down, connection_refused, host_key_unknown, host_key_changed,
    authentication_failed, host_locked, connection_timeout, no_common_algorithm."""

    exit = Exit.UNREACHABLE


class AgentProblem(MlxopsError):
    exit = Exit.AGENT


class OutcomeUnknown(MlxopsError):
    exit = Exit.OUTCOME_UNKNOWN


class DownloadFailed(MlxopsError):
    exit = Exit.DOWNLOAD


class StillRunning(MlxopsError):
    exit = Exit.STILL_RUNNING


class Busy(MlxopsError):
    exit = Exit.BUSY


class OutputFailed(MlxopsError):
    """The command did its work, and its result could not be written. The status is sysexits.h's EX_IOERR."""

    exit = Exit.OUTPUT


class Interrupted(MlxopsError):
    exit = Exit.INTERRUPTED


class Bug(MlxopsError):
    """An unexpected exception, caught at the outermost boundary; `details` may hold the traceback."""

    exit = Exit.BUG


def bug(error: BaseException, traceback: str) -> Bug:
    """Return the error for an unexpected exception."""
    return Bug(
        "bug",
        f"mlxops failed: {type(error).__name__}: {str(error)[:300]}",
        why="this is a bug in mlxops, not something that you did",
        hint="run it again with --debug and report what it prints",
        details={"traceback": traceback},
    )


_BY_EXIT: dict[int, type[MlxopsError]] = {
    int(kind.exit): kind
    for kind in (
        UsageError,
        OutputFailed,
        Refused,
        NotStarted,
        Unreachable,
        AgentProblem,
        OutcomeUnknown,
        DownloadFailed,
        StillRunning,
        Busy,
        Interrupted,
        Bug,
    )
}


def error_from_wire(wire: Mapping[str, object]) -> MlxopsError:
    """Return the error that `to_wire` described. An unknown exit status becomes a `Bug`."""
    exit_status = wire.get("exit")
    kind = _BY_EXIT.get(exit_status, Bug) if isinstance(exit_status, int) else Bug
    details = wire.get("details")
    error = kind(
        str(wire.get("code", "bug")),
        str(wire.get("message", "the agent reported an error without a message")),
        why=str(wire.get("why", "")),
        details=details if isinstance(details, dict) else None,
    )
    error.hint, error.commands = str(wire.get("hint", "")), commands_from_wire(wire.get("commands"))
    return error


def worst(exits: list[Exit]) -> Exit:
    """Return the exit status of a command on several hosts."""
    if Exit.BUG in exits:
        return Exit.BUG
    return max(exits, default=Exit.DONE)
