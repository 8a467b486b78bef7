"""What a worker has from whoever asked, with `--local` a shell or a job of theirs, and must not keep: its server, which
has it from the worker, outlives them all."""

from __future__ import annotations

import contextlib
import resource
import signal
import sys

KEPT_BY_PYTHON = frozenset({signal.SIGPIPE, signal.SIGXFSZ})
"""Those that every Python ignores for its own sake; `subprocess` and the gate see to it that no child does."""

RAISED = ("NOFILE", "FSIZE", "CPU", "AS", "DATA", "RSS", "NPROC", "MEMLOCK")
"""The limits of which a server can never have too much. Not CORE: a crash would write all of a model to the disk. Not
STACK: it decides where memory is mapped and how large the stacks of threads are."""

OPEN_MAX = 10240
"""<sys/syslimits.h> of macOS, which grants no "unlimited" files but so many (setrlimit(2), "compatibility")."""


def shed() -> None:
    """Before anything else is done, and before there are threads, each of which has a mask of its own."""
    _heed_signals()
    _raise_limits()


def _heed_signals() -> None:
    """No signal is held back or ignored. (One that is would stay so across exec(2), in the engine as well: a server
    that holds back SIGTERM ends by force only.)"""
    for number in signal.valid_signals() - KEPT_BY_PYTHON:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _raise_limits() -> None:
    """Each to what this user may have. A hard limit is the administrator's word, or a shell's that nobody can take
    back: it stays, and what it makes fail is told by whatever fails."""
    for name in RAISED:
        number = getattr(resource, f"RLIMIT_{name}", None)
        if number is None:
            continue
        soft, hard = resource.getrlimit(number)
        most = OPEN_MAX if sys.platform == "darwin" and (name, hard) == ("NOFILE", resource.RLIM_INFINITY) else hard
        if soft != resource.RLIM_INFINITY and (most == resource.RLIM_INFINITY or soft < most):
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(number, (most, hard))
