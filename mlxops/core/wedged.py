"""Decide whether a server is wedged: it lives, and completes nothing. Pure.

A busy server must never be taken for a wedged one. So a completion without an answer counts only with evidence that the
server does not work on something else: it uses no processor time, and either nobody else is connected to it, or another
server of the host answers in the same round.
"""

from __future__ import annotations

from enum import Enum

from mlxops.core.frozen import dataclass

FAILURES = 3
"""Rounds in a row in which it completed nothing, and nobody else was connected."""
FAILURES_IN_USE = 12
"""The same while others are connected: with a very long prompt, a server may be silent for minutes."""
AGAIN = 10
BUSY_SHARE = 0.01
"""Share of a processor. A server that waits for requests uses a fifth of this or less."""


class Answer(Enum):
    """What became of a small completion within its time limit."""

    ANSWERED = "answered"
    """Also with an error: it is not silent."""
    PROGRESS = "progress"
    """Part of an answer."""
    SILENT = "silent"
    UNKNOWN = "unknown"
    """It could not be asked."""


@dataclass(frozen=True)
class Asked:
    """One server in one round."""

    answer: Answer
    in_use: bool = False
    """Others were connected to it."""
    share: float | None = None
    """The share of a processor that it used meanwhile; None: not known."""


def failures(before: int, asked: Asked, *, another_answered: bool) -> int:
    """Return how many rounds in a row a server has failed. `before`: until this one."""
    if asked.answer is Answer.UNKNOWN:
        return before
    if asked.answer is not Answer.SILENT or asked.share is None or asked.share >= BUSY_SHARE:
        return 0
    return before + 1 if another_answered or not asked.in_use else 0


def is_wedged(failed: int, *, in_use: bool) -> bool:
    return failed >= (FAILURES_IN_USE if in_use else FAILURES)


def is_reported(failed: int, reported: int | None, *, in_use: bool) -> bool:
    """Whether to act now on a wedged server: at once, and then every `AGAIN` rounds.

    `reported`: how often it had failed when this last returned true. Its clients may come and go from round to round.
    """
    return is_wedged(failed, in_use=in_use) and (reported is None or failed - reported >= AGAIN)
