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
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mlxops.agent.service.managers import ABSENT, ask_manager
from mlxops.core.errors import Refused

LABEL = "org.mlxops.restore"
UNIT = "mlxops-restore"
BUSY = 5
"""What `launchctl bootstrap` ends with ("Input/output error") while an older job of that label is just ending."""
DAEMONS = Path("/Library/LaunchDaemons")
KEPT = (
    *("PATH", "MLX_LAUNCH_CMD", "HF_ENDPOINT", "HF_HUB_OFFLINE"),
    *("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"),
)
"""What mlxops reads of its environment to find the cache, with the registry in it, and the engine. launchd and systemd
give a job next to nothing, so without these it would look at another registry than whoever installed it. They go into
the job, and no absolute paths into host.json: those would help only where the paths are the settings' own, would not
find the engine, and two sessions of one host that differ in HF_HOME would disagree for ever."""


@dataclass(frozen=True)
class Job:
    """What the system is to run, as whom, and every how many minutes after the boot; None: only then."""

    argv: tuple[str, ...]
    log: Path
    home: Path
    user: str
    every: int | None = None
    environ: Mapping[str, str] = field(default_factory=dict)


def job(state: Path, environ: Mapping[str, str], every: int | None) -> Job:
    """The job of this agent. It names `<state>/venv`, so that a deploy changes what is run, and not the job."""
    own = state / "venv" / "bin" / "python"
    here = Path(sys.prefix).resolve() == (state / "venv").resolve()
    argv = (str(own) if here else sys.executable, "-P", "-m", "mlxops.agent", "--restore", str(state))
    home = environ.get("HOME") or str(Path.home())
    return Job(argv, state / "logs" / "restore.log", Path(home), getpass.getuser(), every, kept(environ))


def kept(environ: Mapping[str, str]) -> dict[str, str]:
    """What of an environment goes into the job, which everybody may read: no address with a password in it either."""
    found = {key: environ[key] for key in KEPT if environ.get(key, "\n").isprintable()}
    if "@" in found.get("HF_ENDPOINT", ""):
        del found["HF_ENDPOINT"]
    return found


def launch_agent(job: Job) -> bytes:
    """A LaunchAgent: runs when the user logs in at the screen."""
    return plistlib.dumps(_launchd(job, LABEL))


def launch_daemon(job: Job) -> bytes:
    """A LaunchDaemon: runs at boot, as the user. Only root can install it."""
    environment = {**job.environ, "HOME": str(job.home), "USER": job.user, "LOGNAME": job.user}
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
        # launchd.plist(5): a job that says nothing here gets "light resource limits", which throttle its CPU and disk,
        # and the servers that it starts inherit them.
        "ProcessType": "Interactive",
        "EnvironmentVariables": dict(job.environ),
        "StandardOutPath": str(job.log),
        "StandardErrorPath": str(job.log),
    }
    return keys | ({"StartInterval": job.every * 60} if job.every else {})


def service(job: Job) -> str:
    """A systemd user unit."""
    quoted = [_systemd_quoted(f"{key}={value}", dollar="$") for key, value in job.environ.items()]
    environment = "".join(f"Environment={each}\n" for each in quoted)
    return f"""\
[Unit]
Description=Start the MLX servers that the registry of mlxops assigns

[Service]
Type=oneshot
{environment}ExecStart={" ".join(map(_systemd_quoted, job.argv))}
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


def _systemd_quoted(text: str, dollar: str = "$$") -> str:
    """`dollar`: how a `$` is written; in Environment= it has no meaning."""
    return '"' + _systemd_escaped(text).replace('"', '\\"').replace("$", dollar) + '"'


class Manager(Protocol):
    """What runs jobs on this system."""

    def install(self, job: Job) -> list[str]:
        """Write its files and tell it. Returns what the operator has to know. Raises `Refused` and `OSError`, and then
        the files are as they were."""

    def remove(self, job: Job) -> tuple[bool, list[str]]:
        """Whether there was anything, and what the operator has to know. Raises `OSError`."""

    def files(self, job: Job) -> Mapping[Path, bytes]:
        """What `install` writes."""

    def places(self, job: Job) -> Sequence[Path]:
        """Where it may have written what has the job run."""

    def state(self) -> str:
        """What the system says of the job, in a word or two."""

    def beside(self, job: Job) -> list[str]:
        """What the operator has installed besides, and what became of it."""


class Launchd:
    def __init__(
        self,
        environ: Mapping[str, str],
        *,
        daemons: Path = DAEMONS,
        pause: Callable[[], None] = lambda: time.sleep(0.25),
        tries: int = 40,
    ) -> None:
        """`pause` comes between two of the `tries` that launchd gets for what it does in its own time."""
        self._environ = environ
        self._daemons = daemons
        self._pause = pause
        self._tries = tries
        self._domain = f"gui/{os.getuid()}"
        self._job = f"{self._domain}/{LABEL}"

    def files(self, job: Job) -> Mapping[Path, bytes]:
        (plist,) = self.places(job)
        return {plist: launch_agent(job), self._daemon(job): launch_daemon(job)}

    def install(self, job: Job) -> list[str]:
        (plist,) = self.places(job)
        with _writing(self.files(job)):
            self._run("bootout", self._job)  # an older one; mostly there is none
            self._wait_until_gone()
            done = self._bootstrap(plist)
        told = self.beside(job) or [
            "it runs when this user logs in at the screen; to have it at boot, without a login, as an administrator:",
            *self._put_daemon(job),
        ]
        if done.returncode != 0:
            told.insert(0, f"launchd loads it at the next login; now it says: {_said(done)}")
        return told

    def _wait_until_gone(self) -> None:
        """`bootout` returns before the job has ended."""
        for _ in range(self._tries):
            if self._run("print", self._job).returncode != 0:
                return
            self._pause()

    def _bootstrap(self, plist: Path) -> subprocess.CompletedProcess[str]:
        for _ in range(self._tries - 1):
            done = self._run("bootstrap", self._domain, str(plist))
            if done.returncode != BUSY:
                return done
            self._pause()
        return self._run("bootstrap", self._domain, str(plist))

    def remove(self, job: Job) -> tuple[bool, list[str]]:
        told = []
        try:
            self._run("bootout", self._job)
        except Refused as error:
            told.append(f"{error.message}: the job ends with the login session at the latest")
        found = [path for path in self.files(job) if path.exists()]
        for path in found:
            path.unlink()
        installed = self._installed()
        if installed.exists():
            told += [f"{installed} still has it run at each boot; to remove that, as an administrator:"]
            told += self._take_daemon()
        return bool(found), told

    def places(self, job: Job) -> Sequence[Path]:
        return [job.home / "Library" / "LaunchAgents" / f"{LABEL}.plist"]

    def state(self) -> str:
        try:
            done = self._run("print", self._job)
        except Refused as error:
            return f"unknown: {error.message}"
        if done.returncode == ABSENT:
            return "not loaded"
        return "loaded" if done.returncode == 0 else f"unknown: launchd could not be asked ({_said(done)})"

    def beside(self, job: Job) -> list[str]:
        installed = self._installed()
        if not installed.exists():
            return []
        try:
            same = installed.read_bytes() == launch_daemon(job)
        except OSError as error:
            return [f"{installed} is there and cannot be read: {error.strerror}"]
        if same:
            return [f"{installed} is there, and as it would be now: it runs at boot, without a login"]
        return [
            f"{installed} is there, and another than it would be now; to renew it, as an administrator:",
            *self._take_daemon()[:1],
            *self._put_daemon(job),
        ]

    def _daemon(self, job: Job) -> Path:
        """Ours, for the operator to install."""
        return job.log.parent.parent / f"{LABEL}.daemon.plist"

    def _installed(self) -> Path:
        return self._daemons / f"{LABEL}.daemon.plist"

    def _put_daemon(self, job: Job) -> list[str]:
        ours, system = shlex.quote(str(self._daemon(job))), shlex.quote(str(self._installed()))
        return [
            f"  sudo install -o root -g wheel -m 644 {ours} {system}",
            f"  sudo launchctl bootstrap system {system}",
        ]

    def _take_daemon(self) -> list[str]:
        return [
            f"  sudo launchctl bootout system/{LABEL}.daemon",
            f"  sudo rm {shlex.quote(str(self._installed()))}",
        ]

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return ask_manager(self._environ, "launchctl", *arguments)


class Systemd:
    def __init__(self, environ: Mapping[str, str]) -> None:
        # A session over SSH may come without the way to the user's manager.
        self._environ = {"XDG_RUNTIME_DIR": f"/run/user/{os.getuid()}", **environ}

    def files(self, job: Job) -> Mapping[Path, bytes]:
        units = {f"{UNIT}.service": service(job)} | ({f"{UNIT}.timer": timer(job)} if job.every else {})
        return {self._folder(job) / name: text.encode() for name, text in units.items()}

    def install(self, job: Job) -> list[str]:
        old = self._folder(job) / f"{UNIT}.timer"
        had = {path.name for path in self.places(job) if path.exists()}
        with _writing(self.files(job)):
            try:
                self._systemctl("daemon-reload")
                self._systemctl("enable", f"{UNIT}.service")
                if job.every:
                    self._systemctl("enable", "--now", f"{UNIT}.timer")
                elif old.exists():
                    self._systemctl("disable", "--now", f"{UNIT}.timer")
                    old.unlink()
                    self._systemctl("daemon-reload")
            except BaseException:
                for name in self.files(job):
                    if name.name not in had:
                        self._forget(name)
                raise
        if Path("/var/lib/systemd/linger", job.user).exists():
            return []
        return [
            "it runs when this user logs in, and the servers end with the last session; to have it at boot:",
            f"  sudo loginctl enable-linger {shlex.quote(job.user)}",
        ]

    def remove(self, job: Job) -> tuple[bool, list[str]]:
        """Whatever systemd says: without its files it runs nothing any more, once it looks."""
        units = [path for path in self.places(job) if path.exists()]
        told = [said for unit in units if (said := self._forget(unit))]
        for unit in units:
            unit.unlink()
        if units:
            with suppress(Refused):
                self._systemctl("daemon-reload")
        return bool(units), told[:1]

    def _forget(self, unit: Path) -> str:
        """Have it neither run nor be run any more; returns what keeps systemd from being told, if anything does."""
        said = ""
        try:
            self._systemctl("disable", *(["--now"] if unit.suffix == ".timer" else []), unit.name)
        except Refused as error:
            said = f"systemd could not be told, and knows it until this user's systemd ends: {error.why}"
        target = "timers" if unit.suffix == ".timer" else "default"
        (unit.parent / f"{target}.target.wants" / unit.name).unlink(missing_ok=True)
        return said

    def places(self, job: Job) -> Sequence[Path]:
        return [self._folder(job) / f"{UNIT}.{kind}" for kind in ("service", "timer")]

    def state(self) -> str:
        try:
            done = ask_manager(self._environ, "systemctl", "--user", "is-enabled", f"{UNIT}.service")
        except Refused as error:
            return f"unknown: {error.message}"
        return done.stdout.strip() or f"unknown: this user's systemd could not be asked ({_said(done)})"

    def beside(self, job: Job) -> list[str]:
        return []

    def _folder(self, job: Job) -> Path:
        config = self._environ.get("XDG_CONFIG_HOME", "")
        return (Path(config) if config.startswith("/") else job.home / ".config") / "systemd" / "user"

    def _systemctl(self, *arguments: str) -> None:
        done = ask_manager(self._environ, "systemctl", "--user", *arguments)
        if done.returncode != 0:
            raise Refused(
                "boot_not_installed",
                f"systemctl --user {shlex.join(arguments)} failed",
                why=_said(done),
                hint="is this user's systemd running? see: systemctl --user status",
            )


def manager(environ: Mapping[str, str]) -> Manager:
    return Launchd(environ) if sys.platform == "darwin" else Systemd(environ)


def _said(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1][:300] if lines else f"it ended with {done.returncode}"


@contextmanager
def _writing(files: Mapping[Path, bytes]) -> Iterator[None]:
    """Written; and put back as they were if what follows fails: then nothing is installed."""
    before = {path: path.read_bytes() if path.exists() else None for path in files}
    try:
        _write(files)
        yield
    except BaseException:
        for path, data in before.items():
            with suppress(OSError):
                if data is None:
                    path.unlink(missing_ok=True)
                else:
                    _write({path: data})
        raise


def _write(files: Mapping[Path, bytes]) -> None:
    for path, data in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new")
        new.write_bytes(data)
        new.chmod(0o644)  # launchd refuses files that others can write
        new.replace(path)
