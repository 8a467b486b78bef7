"""Ask launchd and systemd through their command line programs, with a timeout."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping

from mlxops.core.errors import Refused

TIMEOUT = 30.0
LOOK_SECONDS = 5.0
"""For a question that `status` waits for."""
ABSENT = 113
"""What `launchctl print` ends with for a job that is not there ("Could not find service"); all else says nothing."""
NO_DOMAIN = 112
"""Its exit status for a domain that is not there, such as gui/UID without a login at the screen."""
FOLDERS = "/bin:/usr/bin:/usr/local/bin:/sbin:/usr/sbin"


def which(program: str, environ: Mapping[str, str]) -> str | None:
    return shutil.which(program, path=f"{environ.get('PATH', '')}:{FOLDERS}")


def ask_manager(
    environ: Mapping[str, str], program: str, *arguments: str, seconds: float = TIMEOUT
) -> subprocess.CompletedProcess[str]:
    """Run a service manager's program. Raises `Refused` (no_service_manager), and `OSError`."""
    path = which(program, environ)
    if path is None:
        raise Refused(
            "no_service_manager",
            f"{program} is not on this host",
            why="a job at boot needs launchd, or systemd",
            hint="have the host's own init system run `mlxctl restore --local`",
        )
    try:
        return subprocess.run(
            [path, *arguments],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Refused(
            "no_service_manager", f"{program} did not answer", why=f"within {seconds:.0f} s", hint="try again"
        ) from None
