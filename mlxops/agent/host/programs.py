"""Run a program that prints something and ends; build the environment of every program that the agent starts."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence

MARK = "MLXOPS_RUN"
"""The environment variable of a server that contains its run id."""

_KEPT_VARIABLES = ("HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "TZ", "HF_HOME", "HF_HUB_CACHE")
_PATH = "/opt/homebrew/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


def environment(environ: Mapping[str, str], extra: Mapping[str, str], run_id: str) -> dict[str, str]:
    """Return the environment for a server: selected variables only, without tokens and the rest of the user's shell."""
    built = {key: environ[key] for key in _KEPT_VARIABLES if key in environ}
    built |= {"PATH": _PATH, "PYTHONUNBUFFERED": "1"}
    built |= {key: value for key, value in extra.items() if "TOKEN" not in key.upper()}
    return built | {MARK: run_id}


def run_program(argv: Sequence[str], env: Mapping[str, str], seconds: float) -> tuple[int | None, str]:
    """Run a program until it ends. Return its exit status (None after `seconds`) and its output.

    It runs in its own session. If it takes too long, its process group is killed.
    """
    import subprocess

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
        output, _ = child.communicate(timeout=seconds)
        return child.returncode, output
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        if child.returncode is None:
            # It is not reaped yet, so its pid cannot belong to another process.
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
