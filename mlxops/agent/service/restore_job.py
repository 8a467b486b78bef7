"""Install `restore` as a job of the system: launchd on macOS, a systemd user unit on Linux.

Nothing here needs root. Commands that need root are printed for the operator and never run. The unit texts are pure
functions of a `RestoreJob`. Sources: launchd.plist(5), launchctl(1), systemd.service(5),
systemd.kill(5), systemd.timer(5). launchd was not available: the tests check its plist with a parser and its commands
with a stand-in that records them.
"""

from __future__ import annotations

import getpass
import os
import plistlib
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import field
from pathlib import Path
from typing import Protocol

from mlxops.agent.service.managers import ABSENT, ask_manager
from mlxops.core.errors import Refused
from mlxops.core.frozen import dataclass

LABEL = "org.mlxops.restore"
UNIT = "mlxops-restore"
KEEPER = "--keeper"
"""The argument with which the agent is the keeper."""
RESTART_SECONDS = 10
"""After so long, the system starts a keeper again that has ended."""
OLD_JOB_ENDING = 5
"""Exit status of `launchctl bootstrap` ("Input/output error") while an older job with that label is ending."""
DAEMONS = Path("/Library/LaunchDaemons")
JOB_VARIABLES = (
    *("PATH", "MLX_LAUNCH_CMD", "HF_ENDPOINT", "HF_HUB_OFFLINE"),
    *("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"),
)
"""The variables from which mlxops finds the cache, with the registry in it, and the engine.

launchd and systemd give a job a nearly empty environment. Without these variables, the job would use another registry
than the session that installed it. Absolute paths in host.json would be no replacement: they would not help to find the
engine, and two sessions of one host with different HF_HOME could never agree on the settings.
"""


@dataclass(frozen=True)
class RestoreJob:
    """The command that the system runs, and as which user."""

    argv: tuple[str, ...]
    log: Path
    home: Path
    user: str
    every: int | None = None
    """The interval in minutes; None: only at boot."""
    environ: Mapping[str, str] = field(default_factory=dict)
    keep: bool = False
    """The command is the keeper, which runs all the time."""


def make_job(state: Path, environ: Mapping[str, str], every: int | None, *, keep: bool = False) -> RestoreJob:
    """Return the job of this agent. It uses the link `<state>/venv`, so a deploy does not have to change the job."""
    linked = state / "venv" / "bin" / "python"
    is_linked = Path(sys.prefix).resolve() == (state / "venv").resolve()
    argv = (
        str(linked) if is_linked else sys.executable,
        "-P",
        "-m",
        "mlxops.agent",
        KEEPER if keep else "--restore",
        str(state),
    )
    home = environ.get("HOME") or str(Path.home())
    return RestoreJob(
        argv, state / "logs" / "restore.log", Path(home), getpass.getuser(), every, job_environment(environ), keep
    )


def job_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for the job. All users can read its file, so leave out an address with a password."""
    variables = {key: environ[key] for key in JOB_VARIABLES if environ.get(key, "\n").isprintable()}
    if "@" in variables.get("HF_ENDPOINT", ""):
        del variables["HF_ENDPOINT"]
    return variables


def launch_agent(job: RestoreJob) -> bytes:
    """Return the LaunchAgent, which runs when the user logs in at the screen."""
    return plistlib.dumps(_launchd(job, LABEL))


def launch_daemon(job: RestoreJob) -> bytes:
    """Return the LaunchDaemon, which runs at boot as the user. Only root can install it."""
    environment = {**job.environ, "HOME": str(job.home), "USER": job.user, "LOGNAME": job.user}
    return plistlib.dumps(
        _launchd(job, f"{LABEL}.daemon") | {"UserName": job.user, "EnvironmentVariables": environment}
    )


def _launchd(job: RestoreJob, label: str) -> dict[str, object]:
    keys: dict[str, object] = {
        "Label": label,
        "ProgramArguments": list(job.argv),
        "RunAtLoad": True,
        # Otherwise launchd kills the servers when the command that started them ends.
        "AbandonProcessGroup": True,
        # launchd.plist(5): by default a job gets "light resource limits", which throttle CPU and disk, and which the
        # servers would inherit.
        "ProcessType": "Interactive",
        "EnvironmentVariables": dict(job.environ),
        "StandardOutPath": str(job.log),
        "StandardErrorPath": str(job.log),
    }
    if job.keep:
        # Started again whenever it ends, but not more often than that: launchd's default is 10 s.
        return keys | {"KeepAlive": True, "ThrottleInterval": RESTART_SECONDS}
    return keys | ({"StartInterval": job.every * 60} if job.every else {})


def service(job: RestoreJob) -> str:
    """Return the systemd user unit of the job."""
    quoted = [_systemd_quoted(f"{key}={value}", dollar="$") for key, value in job.environ.items()]
    environment = "".join(f"Environment={text}\n" for text in quoted)
    return f"""\
[Unit]
Description=Start the MLX servers that the registry of mlxops assigns

[Service]
{_KEPT if job.keep else "Type=oneshot"}
{environment}ExecStart={" ".join(map(_systemd_quoted, job.argv))}
# The servers outlive the command that starts them.
KillMode=process
TimeoutStartSec=infinity
StandardOutput=append:{_systemd_escaped(str(job.log))}
StandardError=inherit

[Install]
WantedBy=default.target
"""


_KEPT = f"""\
Type=exec
Restart=always
RestartSec={RESTART_SECONDS}"""


def timer(job: RestoreJob) -> str:
    """Return the systemd timer unit of the job. The interval is from the end of one run to the start of the next."""
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


class ServiceManager(Protocol):
    """The system's service manager."""

    def install(self, job: RestoreJob) -> list[str]:
        """Write the job's files and activate it. Return notes for the operator.

        Raises `Refused` and `OSError`, and then restores the files.
        """

    def remove(self, job: RestoreJob) -> tuple[bool, list[str]]:
        """Remove the job. Return whether it was installed, and notes for the operator. Raises `OSError`."""

    def files(self, job: RestoreJob) -> Mapping[Path, bytes]:
        """Return the files that `install` writes."""

    def job_paths(self, job: RestoreJob) -> Sequence[Path]:
        """Return the paths of the files that make the system run the job."""

    def state(self) -> str:
        """Return what the system reports about the job, in a word or two."""

    def daemon_notes(self, job: RestoreJob) -> list[str]:
        """Return notes about a job that the operator has installed as root."""


class Launchd:
    def __init__(
        self,
        environ: Mapping[str, str],
        *,
        daemons: Path = DAEMONS,
        pause: Callable[[], None] = lambda: time.sleep(0.25),
        tries: int = 40,
    ) -> None:
        """launchd may need time for a request: try it up to `tries` times, with a `pause` in between."""
        self._environ = environ
        self._daemons = daemons
        self._pause = pause
        self._tries = tries
        self._domain = f"gui/{os.getuid()}"
        self._job = f"{self._domain}/{LABEL}"

    def files(self, job: RestoreJob) -> Mapping[Path, bytes]:
        (plist,) = self.job_paths(job)
        return {plist: launch_agent(job), self._daemon(job): launch_daemon(job)}

    def install(self, job: RestoreJob) -> list[str]:
        (plist,) = self.job_paths(job)
        with _writing(self.files(job)):
            self._run("bootout", self._job)  # fails if there is no older job
            self._wait_until_gone()
            done = self._bootstrap(plist)
        notes = self.daemon_notes(job) or [
            "it runs when this user logs in at the screen; to run it at boot, without a login, as an administrator:",
            *self._daemon_installation(job),
        ]
        if done.returncode != 0:
            notes.insert(0, f"launchd loads it at the next login; now it reports: {_last_line(done)}")
        return notes

    def _wait_until_gone(self) -> None:
        """Wait until the old job has ended: `bootout` returns before that."""
        for _ in range(self._tries):
            if self._run("print", self._job).returncode != 0:
                return
            self._pause()

    def _bootstrap(self, plist: Path) -> subprocess.CompletedProcess[str]:
        for _ in range(self._tries - 1):
            done = self._run("bootstrap", self._domain, str(plist))
            if done.returncode != OLD_JOB_ENDING:
                return done
            self._pause()
        return self._run("bootstrap", self._domain, str(plist))

    def remove(self, job: RestoreJob) -> tuple[bool, list[str]]:
        notes = []
        try:
            self._run("bootout", self._job)
        except Refused as error:
            notes.append(f"{error.message}: the job ends with the login session at the latest")
        existing = [path for path in self.files(job) if path.exists()]
        for path in existing:
            path.unlink()
        installed = self._installed()
        if installed.exists():
            notes += [f"{installed} still runs it at each boot; to remove that, as an administrator:"]
            notes += self._daemon_removal()
        return bool(existing), notes

    def job_paths(self, job: RestoreJob) -> Sequence[Path]:
        return [job.home / "Library" / "LaunchAgents" / f"{LABEL}.plist"]

    def state(self) -> str:
        try:
            done = self._run("print", self._job)
        except Refused as error:
            return f"unknown: {error.message}"
        if done.returncode == ABSENT:
            return "not loaded"
        return "loaded" if done.returncode == 0 else f"unknown: launchctl failed ({_last_line(done)})"

    def daemon_notes(self, job: RestoreJob) -> list[str]:
        installed = self._installed()
        if not installed.exists():
            return []
        try:
            same = installed.read_bytes() == launch_daemon(job)
        except OSError as error:
            return [f"{installed} exists but cannot be read: {error.strerror}"]
        if same:
            return [f"{installed} is installed and up to date: it runs at boot, without a login"]
        return [
            f"{installed} is installed but out of date; to renew it, as an administrator:",
            *self._daemon_removal()[:1],
            *self._daemon_installation(job),
        ]

    def _daemon(self, job: RestoreJob) -> Path:
        """Return the path of our copy, which the operator may install."""
        return job.log.parent.parent / f"{LABEL}.daemon.plist"

    def _installed(self) -> Path:
        return self._daemons / f"{LABEL}.daemon.plist"

    def _daemon_installation(self, job: RestoreJob) -> list[str]:
        ours, system = shlex.quote(str(self._daemon(job))), shlex.quote(str(self._installed()))
        return [
            f"  sudo install -o root -g wheel -m 644 {ours} {system}",
            f"  sudo launchctl bootstrap system {system}",
        ]

    def _daemon_removal(self) -> list[str]:
        return [
            f"  sudo launchctl bootout system/{LABEL}.daemon",
            f"  sudo rm {shlex.quote(str(self._installed()))}",
        ]

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return ask_manager(self._environ, "launchctl", *arguments)


class Systemd:
    def __init__(self, environ: Mapping[str, str]) -> None:
        # A session over SSH may lack this variable, which leads to the user's systemd.
        self._environ = {"XDG_RUNTIME_DIR": f"/run/user/{os.getuid()}", **environ}

    def files(self, job: RestoreJob) -> Mapping[Path, bytes]:
        units = {f"{UNIT}.service": service(job)} | ({f"{UNIT}.timer": timer(job)} if job.every else {})
        return {self._folder(job) / name: text.encode() for name, text in units.items()}

    def install(self, job: RestoreJob) -> list[str]:
        old = self._folder(job) / f"{UNIT}.timer"
        kept = kind_of(self.job_paths(job)) == "keeper"
        had = {path.name for path in self.job_paths(job) if path.exists()}
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
                if job.keep:
                    self._systemctl("restart", f"{UNIT}.service")
                elif kept:
                    self._systemctl("stop", f"{UNIT}.service")
            except BaseException:
                for name in self.files(job):
                    if name.name not in had:
                        self._disable(name, now=name.suffix == ".timer")
                raise
        if self.lingers(job):
            return []
        return [
            "it runs when this user logs in, and the servers end with the last session; to run it at boot:",
            f"  sudo loginctl enable-linger {shlex.quote(job.user)}",
        ]

    def remove(self, job: RestoreJob) -> tuple[bool, list[str]]:
        """Remove the files even if systemctl fails: without them systemd runs nothing after its next start."""
        units = [path for path in self.job_paths(job) if path.exists()]
        kept = kind_of(units) == "keeper"
        notes = [note for unit in units if (note := self._disable(unit, now=kept or unit.suffix == ".timer"))]
        for unit in units:
            unit.unlink()
        if units:
            with suppress(Refused):
                self._systemctl("daemon-reload")
        return bool(units), notes[:1]

    def _disable(self, unit: Path, *, now: bool) -> str:
        """Disable a unit, and stop it (`now`). Return a note if systemctl fails, else an empty string."""
        note = ""
        try:
            self._systemctl("disable", *(["--now"] if now else []), unit.name)
        except Refused as error:
            note = f"systemctl failed, so systemd keeps the job until this user's systemd ends: {error.why}"
        target = "timers" if unit.suffix == ".timer" else "default"
        (unit.parent / f"{target}.target.wants" / unit.name).unlink(missing_ok=True)
        return note

    def job_paths(self, job: RestoreJob) -> Sequence[Path]:
        return [self._folder(job) / f"{UNIT}.{kind}" for kind in ("service", "timer")]

    def state(self) -> str:
        try:
            done = ask_manager(self._environ, "systemctl", "--user", "is-enabled", f"{UNIT}.service")
        except Refused as error:
            return f"unknown: {error.message}"
        return done.stdout.strip() or f"unknown: systemctl failed ({_last_line(done)})"

    def daemon_notes(self, job: RestoreJob) -> list[str]:
        return []

    def lingers(self, job: RestoreJob) -> bool:
        """Return whether systemd runs the user's jobs without a login."""
        return Path("/var/lib/systemd/linger", job.user).exists()

    def _folder(self, job: RestoreJob) -> Path:
        config = self._environ.get("XDG_CONFIG_HOME", "")
        return (Path(config) if config.startswith("/") else job.home / ".config") / "systemd" / "user"

    def _systemctl(self, *arguments: str) -> None:
        done = ask_manager(self._environ, "systemctl", "--user", *arguments)
        if done.returncode != 0:
            raise Refused(
                "boot_not_installed",
                f"systemctl --user {shlex.join(arguments)} failed",
                why=_last_line(done),
                hint="check whether this user's systemd runs: systemctl --user status",
            )


def installed_program(file: Path) -> str | None:
    """Return the program that an installed job runs; None if its file does not say. Raises `OSError`."""
    data = file.read_bytes()
    if file.suffix == ".plist":
        try:
            return str(plistlib.loads(data)["ProgramArguments"][0])
        except (plistlib.InvalidFileException, ValueError, LookupError, TypeError):
            return None
    found = re.search(r'^ExecStart="((?:[^"\\]|\\.)*)"', data.decode(errors="replace"), re.MULTILINE)
    return re.sub(r"\\(.)", r"\1", found[1]).replace("%%", "%").replace("$$", "$") if found else None


def kind_of(paths: Sequence[Path]) -> str | None:
    """Return what the installed job is: `keeper`, `timer` or `boot`; None if none of its files exists.

    Raises `OSError`.
    """
    texts = [path.read_bytes() for path in paths if path.exists()]
    if not texts:
        return None
    if any(KEEPER.encode() in text for text in texts):
        return "keeper"
    return "timer" if len(texts) > 1 or b"StartInterval" in texts[0] else "boot"


def service_manager(environ: Mapping[str, str]) -> ServiceManager:
    return Launchd(environ) if sys.platform == "darwin" else Systemd(environ)


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1][:300] if lines else f"it ended with {done.returncode}"


@contextmanager
def _writing(files: Mapping[Path, bytes]) -> Iterator[None]:
    """Write the files. Restore them if the body fails."""
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
