"""Run a program that prints something and ends; build the environment of every program that the agent starts."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

MARK = "MLXOPS_RUN"
"""The variable of a server's environment that names the run it belongs to."""

_KEPT = ("HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "TZ", "HF_HOME", "HF_HUB_CACHE")
_FOLDERS = "/opt/homebrew/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


def environment(environ: Mapping[str, str], extra: Mapping[str, str], run_id: str) -> dict[str, str]:
    """A server's environment: built from these, so that no token and nothing of the asker's shell is in it."""
    built = {key: environ[key] for key in _KEPT if key in environ}
    built |= {"PATH": _FOLDERS, "PYTHONUNBUFFERED": "1"}
    built |= {key: value for key, value in extra.items() if "TOKEN" not in key.upper()}
    return built | {MARK: run_id}


def ask(argv: Sequence[str], env: Mapping[str, str], seconds: float) -> tuple[int | None, str]:
    """Run a program that only prints something and ends: (its status, what it printed), None if it took too long.

    It gets a session of its own, and nothing of it is left in the end.
    """
    try:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env={key: value for key, value in env.items() if key != MARK},
            start_new_session=True,
            text=True,
            errors="replace",
        )
    except OSError as error:
        return 127, error.strerror or str(error)
    try:
        said, _ = child.communicate(timeout=seconds)
        return child.returncode, said
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        if child.returncode is None:
            # Not reaped yet, so its pid is still its own.
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
