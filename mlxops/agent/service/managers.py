"""Ask launchd and systemd through their command line programs, with a timeout."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping

from mlxops.core.errors import Refused

TIMEOUT_SECONDS = 30.0
STATUS_TIMEOUT_SECONDS = 5.0
"""The timeout of a query for which `status` waits."""
ABSENT = 113
"""Exit status of `launchctl print` for a job that does not exist ("Could not find service"). Any other failure leaves
open whether the job exists."""
NO_DOMAIN = 112
"""Its exit status for a domain that does not exist, such as gui/UID without a login at the screen."""
FOLDERS = "/bin:/usr/bin:/usr/local/bin:/sbin:/usr/sbin"


def which(program: str, environ: Mapping[str, str]) -> str | None:
    return shutil.which(program, path=f"{environ.get('PATH', '')}:{FOLDERS}")


def ask_manager(
    environ: Mapping[str, str], program: str, *arguments: str, seconds: float = TIMEOUT_SECONDS
) -> subprocess.CompletedProcess[str]:
    """Run a service manager's program. Raises `Refused` (no_service_manager), and `OSError`."""
    path = which(program, environ)
    if path is None:
        raise Refused(
            "no_service_manager",
            f"{program} is not on this host",
            why="a job at boot needs launchd or systemd",
            hint="make the host's own init system run `mlxctl restore --local`",
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
