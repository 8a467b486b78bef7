"""How the system is told to run `restore`: launchd on macOS, a systemd user unit on Linux. Nothing here needs root;
what would need it is printed for the operator and never run.

The unit texts are pure functions of a `Job`. Sources: launchd.plist(5), launchctl(1), systemd.service(5),
systemd.kill(5), systemd.timer(5). launchd itself was not at hand: its plist is checked by its parser, its command by
a recorded stand-in.
"""

from __future__ import annotations

import getpass
import os
import plistlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mlxops.core.errors import Refused
from mlxops.core.settings import BootJob

LABEL = "org.mlxops.restore"
UNIT = "mlxops-restore"
TIMEOUT = 30.0
_FOLDERS = "/bin:/usr/bin:/usr/local/bin:/sbin:/usr/sbin"


@dataclass(frozen=True)
class Job:
    """What the system is to run, as whom, and every how many minutes after the boot; None: only then."""

    argv: tuple[str, ...]
    log: Path
    home: Path
    user: str
    every: int | None = None


def job(state: Path, environ: Mapping[str, str], every: int | None) -> Job:
    """The job of this agent. It names `<state>/venv`, so that a deploy changes what is run, and not the job."""
    own = state / "venv" / "bin" / "python"
    here = Path(sys.prefix).resolve() == (state / "venv").resolve()
    argv = (str(own) if here else sys.executable, "-P", "-m", "mlxops.agent", "--restore", str(state))
    home = environ.get("HOME") or str(Path.home())
    return Job(argv, state / "logs" / "restore.log", Path(home), getpass.getuser(), every)


def launch_agent(job: Job) -> bytes:
    """A LaunchAgent: runs when the user logs in at the screen."""
    return plistlib.dumps(_launchd(job, LABEL))


def launch_daemon(job: Job) -> bytes:
    """A LaunchDaemon: runs at boot, as the user. Only root can install it."""
    environment = {"HOME": str(job.home), "USER": job.user, "LOGNAME": job.user}
    return plistlib.dumps(
        _launchd(job, f"{LABEL}.daemon") | {"UserName": job.user, "EnvironmentVariables": environment}
    )


def _launchd(job: Job, label: str) -> dict[str, object]:
    keys: dict[str, object] = {
        "Label": label,
        "ProgramArguments": list(job.argv),
        "RunAtLoad": True,
        # Without it launchd kills the servers when the command that has started them ends.
        "AbandonProcessGroup": True,
        "StandardOutPath": str(job.log),
        "StandardErrorPath": str(job.log),
    }
    return keys | ({"StartInterval": job.every * 60} if job.every else {})


def service(job: Job) -> str:
    """A systemd user unit."""
    return f"""\
[Unit]
Description=Start the MLX servers that the registry of mlxops assigns

[Service]
Type=oneshot
ExecStart={" ".join(map(_systemd_quoted, job.argv))}
# The servers outlive the command that starts them.
KillMode=process
TimeoutStartSec=infinity
StandardOutput=append:{_systemd_escaped(str(job.log))}
StandardError=inherit

[Install]
WantedBy=default.target
"""


def timer(job: Job) -> str:
    """Its timer: from the end of one run to the beginning of the next."""
    return f"""\
[Unit]
Description=Bring crashed MLX servers back

[Timer]
OnStartupSec={job.every}min
OnUnitInactiveSec={job.every}min

[Install]
WantedBy=timers.target
"""


def _systemd_escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("%", "%%")


def _systemd_quoted(text: str) -> str:
    return '"' + _systemd_escaped(text).replace('"', '\\"').replace("$", "$$") + '"'


class Manager(Protocol):
    """What runs jobs on this system."""

    def install(self, job: Job) -> list[str]:
        """Write its files and tell it. Returns what the operator has to know. Raises `Refused`, `OSError`."""

    def remove(self, job: Job) -> bool:
        """False if there was nothing. Raises `Refused`, `OSError`."""

    def files(self, job: Job) -> Mapping[Path, bytes]:
        """What `install` writes."""

    def places(self, job: Job) -> Sequence[Path]:
        """Where it may have written."""

    def state(self) -> str:
        """What the system says of the job, in a word or two."""


class Launchd:
    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._domain = f"gui/{os.getuid()}"

    def files(self, job: Job) -> Mapping[Path, bytes]:
        return {job.home / "Library" / "LaunchAgents" / f"{LABEL}.plist": launch_agent(job)}

    def install(self, job: Job) -> list[str]:
        (plist,) = _write(self.files(job))
        daemon = job.log.parent.parent / f"{LABEL}.daemon.plist"
        _write({daemon: launch_daemon(job)})
        _run(self._environ, "launchctl", "bootout", f"{self._domain}/{LABEL}")  # an older one; mostly there is none
        done = _run(self._environ, "launchctl", "bootstrap", self._domain, str(plist))
        system = f"/Library/LaunchDaemons/{daemon.name}"
        told = [
            "it runs when this user logs in at the screen; to have it at boot, without a login, as an administrator:",
            f"  sudo install -o root -g wheel -m 644 {shlex.quote(str(daemon))} {system}",
            f"  sudo launchctl bootstrap system {system}",
        ]
        if done.returncode != 0:
            told.insert(0, f"launchd loads it at the next login; now it says: {_said(done)}")
        return told

    def remove(self, job: Job) -> bool:
        _run(self._environ, "launchctl", "bootout", f"{self._domain}/{LABEL}")
        found = [path for path in self.places(job) if path.exists()]
        for path in found:
            path.unlink()
        return bool(found)

    def places(self, job: Job) -> Sequence[Path]:
        return list(self.files(job))

    def state(self) -> str:
        done = _run(self._environ, "launchctl", "print", f"{self._domain}/{LABEL}")
        return "loaded" if done.returncode == 0 else "not loaded"


class Systemd:
    def __init__(self, environ: Mapping[str, str]) -> None:
        # A session over SSH may come without the way to the user's manager.
        self._environ = {"XDG_RUNTIME_DIR": f"/run/user/{os.getuid()}", **environ}

    def files(self, job: Job) -> Mapping[Path, bytes]:
        units = {f"{UNIT}.service": service(job)} | ({f"{UNIT}.timer": timer(job)} if job.every else {})
        return {self._folder(job) / name: text.encode() for name, text in units.items()}

    def install(self, job: Job) -> list[str]:
        if not job.every and (self._folder(job) / f"{UNIT}.timer").exists():
            self._systemctl("disable", "--now", f"{UNIT}.timer")
            (self._folder(job) / f"{UNIT}.timer").unlink()
        _write(self.files(job))
        self._systemctl("daemon-reload")
        self._systemctl("enable", f"{UNIT}.service")
        if job.every:
            self._systemctl("enable", "--now", f"{UNIT}.timer")
        if Path("/var/lib/systemd/linger", job.user).exists():
            return []
        return [
            "it runs when this user logs in, and the servers end with the last session; to have it at boot:",
            f"  sudo loginctl enable-linger {shlex.quote(job.user)}",
        ]

    def remove(self, job: Job) -> bool:
        units = [path for path in self.places(job) if path.exists()]
        for unit in units:
            self._systemctl("disable", *(["--now"] if unit.suffix == ".timer" else []), unit.name)
            unit.unlink()
        if units:
            self._systemctl("daemon-reload")
        return bool(units)

    def places(self, job: Job) -> Sequence[Path]:
        return [self._folder(job) / f"{UNIT}.{kind}" for kind in ("service", "timer")]

    def state(self) -> str:
        try:
            done = _run(self._environ, "systemctl", "--user", "is-enabled", f"{UNIT}.service")
        except Refused:
            return "unknown: systemctl is not here"
        return done.stdout.strip() or _said(done)

    def _folder(self, job: Job) -> Path:
        config = self._environ.get("XDG_CONFIG_HOME", "")
        return (Path(config) if config.startswith("/") else job.home / ".config") / "systemd" / "user"

    def _systemctl(self, *arguments: str) -> None:
        done = _run(self._environ, "systemctl", "--user", *arguments)
        if done.returncode != 0:
            raise Refused(
                "boot_not_installed",
                f"systemctl --user {shlex.join(arguments)} failed",
                why=_said(done),
                hint="is this user's systemd running? see: systemctl --user status",
            )


def manager(environ: Mapping[str, str]) -> Manager:
    return Launchd(environ) if sys.platform == "darwin" else Systemd(environ)


def job_is_there(boot: BootJob, environ: Mapping[str, str]) -> bool:
    """Whether the system's own boot job of hosts.yaml is still in force: then its port is left to it, also while it
    has not come up. Where that cannot be asked it is believed to be."""
    launchctl = _which("launchctl", environ)
    if launchctl is None or not boot.label:
        return True
    return _run(environ, "launchctl", "print", f"system/{boot.label}").returncode == 0


def _which(program: str, environ: Mapping[str, str]) -> str | None:
    return shutil.which(program, path=f"{environ.get('PATH', '')}:{_FOLDERS}")


def _run(environ: Mapping[str, str], program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Raises `Refused` (no_service_manager)."""
    path = _which(program, environ)
    if path is None:
        raise Refused(
            "no_service_manager",
            f"{program} is not on this host",
            why="a job at boot needs launchd, or systemd",
            hint="run `mlxctl restore --local` by whatever starts things there",
        )
    try:
        return subprocess.run(
            [path, *arguments],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Refused(
            "no_service_manager", f"{program} did not answer", why=f"within {TIMEOUT:.0f} s", hint="try again"
        ) from None


def _said(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1][:300] if lines else f"it ended with {done.returncode}"


def _write(files: Mapping[Path, bytes]) -> Sequence[Path]:
    for path, data in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new")
        new.write_bytes(data)
        new.chmod(0o644)  # launchd refuses files that others can write
        new.replace(path)
    return list(files)
