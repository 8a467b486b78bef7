"""Reset the signal handling and the limits that a worker inherits, with `--local` from a user's shell or job.

The worker's server inherits them in turn, and runs longer than that shell.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import sys

IGNORED_BY_PYTHON = frozenset({signal.SIGPIPE, signal.SIGXFSZ})
"""Signals that each Python process ignores. `subprocess` and the gate reset them in children."""

RAISED_LIMITS = ("NOFILE", "FSIZE", "CPU", "AS", "DATA", "RSS", "NPROC", "MEMLOCK")
"""Limits that are safe to raise. Not CORE: a crash would write the whole model to disk. Not STACK: it determines where
memory is mapped and the stack size of threads."""

OPEN_MAX = 10240
"""The highest file limit of macOS: "unlimited" is not allowed (<sys/syslimits.h>; setrlimit(2), COMPATIBILITY)."""


def reset_inherited_settings() -> None:
    """Reset signals and raise limits. Call it before any thread exists: each thread has its own signal mask."""
    _reset_signals()
    _raise_limits()


def _reset_signals() -> None:
    """Unblock all signals and ignore none.

    exec(2) passes blocked and ignored signals on to the engine. A server that blocks SIGTERM can only be killed."""
    for number in signal.valid_signals() - IGNORED_BY_PYTHON:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _raise_limits() -> None:
    """Raise each soft limit to its hard limit.

    Hard limits stay: an administrator or shell set them, and they cannot be raised. If one is too low, the operation
    that exceeds it reports the error."""
    for name in RAISED_LIMITS:
        number = getattr(resource, f"RLIMIT_{name}", None)
        if number is None:
            continue
        soft, hard = resource.getrlimit(number)
        most = OPEN_MAX if sys.platform == "darwin" and (name, hard) == ("NOFILE", resource.RLIM_INFINITY) else hard
        if soft != resource.RLIM_INFINITY and (most == resource.RLIM_INFINITY or soft < most):
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(number, (most, hard))
