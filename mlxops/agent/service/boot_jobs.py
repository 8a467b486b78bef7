"""Find the servers of hosts.yaml's boot jobs on this host, and whether the jobs are installed. Changes nothing.

A server belongs to a job if the service manager says so (launchd's pid for the label, systemd's control group), if its
environment has the variable that the manager sets, or if one of its ancestors runs the job's script. If the script ends
in `exec`, only the first two remain: the server has taken the script's pid, and its command does not name the script.

launchd was not available: its part is tested with recorded output. The tests run a real systemd.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

from mlxops.agent.host.system import Process, ProcessTable, System
from mlxops.agent.service import managers as service_managers
from mlxops.agent.service.managers import ABSENT, NO_DOMAIN, which
from mlxops.common import files
from mlxops.core.boot_jobs import (
    CARRIERS,
    SHELLS,
    Launched,
    bootout,
    in_user_manager,
    is_disabled,
    is_unit,
    launched,
    program_of,
    properties,
    same_label,
    standing_of_unit,
    systemctl,
    unit_of,
    words_in,
    words_of,
)
from mlxops.core.errors import Refused
from mlxops.core.frozen import dataclass
from mlxops.core.ports import BootClaim, JobState, Standing
from mlxops.core.settings import BootJob

_SHOWN = (
    "Id,LoadState,ActiveState,SubState,UnitFileState,FragmentPath,WantedBy,RequiredBy,TriggeredBy,InvocationID,MainPID"
)
_SOURCES = (
    *("/etc/crontab", "/etc/cron.d/*", "/etc/anacrontab", "/var/spool/cron/crontabs/*", "/var/spool/cron/*"),
    *("/usr/lib/cron/tabs/*", "/etc/rc.local", "/etc/rc.d/rc.local", "/etc/init.d/*"),
    *("/etc/supervisor/conf.d/*", "/etc/supervisord.d/*", "/etc/supervisord.conf", "/etc/service/*/run"),
)
"""Other files, in plain text, that start programs at boot on macOS and Linux."""
_SPOOLS = ("/var/spool/cron/crontabs", "/var/spool/cron", "/usr/lib/cron/tabs")
_MAX_SOURCE = 256 * 1024


@dataclass(frozen=True)
class Roots:
    """Where service managers keep their files; tests pass another root."""

    system: Path = Path("/")

    def plists(self, home: Path) -> tuple[tuple[str, Path], ...]:
        """Return the folders of property lists, each with the domain into which launchd loads them."""
        gui = f"gui/{os.getuid()}"
        return (
            ("system", self.system / "Library/LaunchDaemons"),
            (gui, home / "Library/LaunchAgents"),
            (gui, self.system / "Library/LaunchAgents"),
        )

    def units(self, home: Path, config: str) -> tuple[tuple[bool, Path], ...]:
        """Return the folders of systemd units, each with whether they are a user's."""
        own = Path(config) if config.startswith("/") else home / ".config"
        return (
            *((False, self.system / each / "systemd/system") for each in ("etc", "run", "usr/local/lib", "lib")),
            (True, own / "systemd/user"),
            *((True, self.system / each / "systemd/user") for each in ("etc", "usr/local/lib", "lib")),
        )

    def sources(self) -> Iterator[Path]:
        for pattern in _SOURCES:
            yield from self.system.glob(pattern.lstrip("/"))

    def closed(self) -> bool:
        """Return whether there may be crontabs that this user cannot read."""
        for spool in _SPOOLS:
            folder = self.system / spool.lstrip("/")
            if _exists(folder) is not False and not os.access(folder, os.R_OK | os.X_OK):
                return True
        return False


class BootJobs:
    """The boot jobs, for one observation of the host. Service managers are asked last, and at most once."""

    def __init__(
        self, jobs: tuple[BootJob, ...], system: System, environ: Mapping[str, str], roots: Roots | None = None
    ) -> None:
        self.jobs = jobs
        self._system = system
        self._environ = environ
        self._roots = roots or Roots()
        self._managers = {job: _Managers(job, environ, self._roots) for job in jobs}

    # -- the owner of a server -----------------------------------------------------------------------------------

    def claim(self, table: ProcessTable, port: int, pids: Collection[int]) -> BootClaim | None:
        """Return the boot job to which one of these processes belongs: the port's own job first, then any other.

        A script that starts several servers owns all of them, also those on ports that hosts.yaml does not name for it.
        """
        chains = [list(table.ancestors(pid)) for pid in sorted(pids)]
        for job in sorted(self.jobs, key=lambda each: each.port != port):
            for chain in chains:
                claim = self._by_marks(job, [job.label], chain) or self._by_script(job, table, chain)
                # The slower ways come last.
                claim = claim or self._by_marks(job, self._managers[job].names_in_files, chain)
                claim = claim or self._by_query(job, chain, port)
                if claim:
                    return claim
        return None

    def unseen(self, table: ProcessTable, port: int) -> BootClaim | None:
        """Return the boot job of a port whose listener belongs to another user and cannot be seen by this one."""
        state = next((self.state(table, job) for job in self.jobs if job.port == port), None)
        if state is None or not state.standing.reserves:
            return None
        return BootClaim(state.job, f"another user's process listens; boot job: {state.detail}", self._stop(state))

    def _stop(self, state: JobState) -> str:
        return state.stop or self._managers[state.job].stop()

    def _by_marks(self, job: BootJob, names: Collection[str], chain: list[Process]) -> BootClaim | None:
        """Search the control groups and the service managers' variables of the processes for one of these names."""
        for process in chain if any(names) else ():
            units = self._system.units(process.pid)
            unit = next((unit for unit in units if any(is_unit(name, unit) for name in names)), None)
            if unit:
                user = in_user_manager(units, (ancestor.argv for ancestor in chain))
                stop = systemctl("stop", unit, user=user)
                return BootClaim(job, f"systemd's {'user ' if user else ''}unit {unit} started it", stop)
            variables = self._system.variables(process.pid)
            label = variables.get("XPC_SERVICE_NAME", "")
            if any(same_label(name, label) for name in names):
                return BootClaim(job, f"launchd's job {label} started it", self._managers[job].stop(label))
            program = variables.get("SUPERVISOR_PROCESS_NAME", "")
            if any(same_label(name, program) for name in names):
                return BootClaim(job, f"supervisord's program {program} started it", f"supervisorctl stop {program}")
        return None

    def _by_script(self, job: BootJob, table: ProcessTable, chain: list[Process]) -> BootClaim | None:
        if not job.script or not chain:
            return None
        script = _Script(job.script, self._environ)
        for process in chain:
            if script.is_named_by(words_of(process.argv), self._folders(table, process)):
                how = f"{job.script} runs above it (pid {process.pid})"
                return BootClaim(job, how, self._stop_by_file(job, chain))
        # pm2 sets pm_exec_path. Other process supervisors often have the script in some variable.
        variables = self._system.variables(chain[0].pid)
        if script.is_named_by([variables.get("pm_exec_path", "")], []):
            return BootClaim(
                job, f"pm2 started it from {job.script}", f"pm2 stop {variables.get('name') or job.script}"
            )
        for process in chain[1:]:
            if process.pid not in self._own and self._carries(script, process, chain[0].pid):
                how = f"pid {process.pid}, which runs {job.script}, started it"
                return BootClaim(job, how, self._stop_by_file(job, chain))
        return None

    def _stop_by_file(self, job: BootJob, chain: list[Process]) -> str:
        """Return the stop command of the service manager whose file runs the script, if it started these processes."""
        marked = self._by_marks(job, self._managers[job].names_in_files, chain)
        return marked.stop if marked else self._managers[job].stop()

    def _by_query(self, job: BootJob, chain: list[Process], port: int) -> BootClaim | None:
        if not job.label or not chain:
            return None
        managers = self._managers[job]
        pids = {process.pid for process in chain if process.pid != 1}
        if managers.launchd and managers.launchd.pid in pids:
            return BootClaim(job, f"launchd's job {managers.domain}/{managers.label} started it", managers.stop())
        units = self._system.units(chain[0].pid)
        if units and not (units[-1].endswith(".scope") and not units[-1].startswith("session-")):
            return None
        # `systemd-run --scope` gives a server a group of its own, and in a container the groups are hidden.
        mark = self._system.variables(chain[0].pid).get("INVOCATION_ID", "")
        mark = "" if mark == self._environ.get("INVOCATION_ID") else mark
        for user, info in managers.units if units or mark else ():
            main = info.get("MainPID", "")
            if (main.isdecimal() and int(main) in pids) or (mark and mark == info.get("InvocationID")):
                unit = info.get("Id") or unit_of(job.label)
                return BootClaim(job, f"systemd's unit {unit} started it", systemctl("stop", unit, user=user))
        if units or not mark or port != job.port or any(info.get("InvocationID") for _, info in managers.units):
            return None
        how = "a systemd unit started it (INVOCATION_ID), but which one cannot be seen from here"
        return BootClaim(job, how, managers.stop())

    def _carries(self, script: _Script, process: Process, child: int | None = None) -> bool:
        """Return whether a variable of a process that is not a shell or terminal names the script.

        Relative paths are tried in its folder and in the folder of `child`.
        """
        if program_of(process.argv) in SHELLS | CARRIERS or process.pid == 1:
            return False
        values = [value for value in self._system.variables(process.pid).values() if script.may_be_in(value)]
        folders = [self._system.folder(pid) for pid in (process.pid, child) if pid is not None] if values else []
        return any(script.is_named_by(words_in(value), filter(None, folders)) for value in values)

    @cached_property
    def _own(self) -> frozenset[int]:
        """This process and its ancestors. Every server started from here inherits their variables."""
        pids = set()
        process = self._system.process(os.getpid())
        while process is not None and process.pid not in pids:
            pids.add(process.pid)
            process = self._system.process(process.ppid) if process.ppid > 0 else None
        return frozenset(pids)

    def _folders(self, table: ProcessTable, process: Process) -> list[str]:
        """Return the folders that a relative path in its command may refer to: a process may change its folder."""
        parent = self._system.folder(process.ppid) if process.ppid in table.processes else None
        initial = self._system.variables(process.pid).get("PWD")
        return [folder for folder in (self._system.folder(process.pid), initial, parent) if folder]

    # -- the state of a job --------------------------------------------------------------------------------------

    def state(self, table: ProcessTable, job: BootJob) -> JobState:
        """Return whether the system will start the job, as far as can be seen without root."""
        managers = self._managers[job]
        known = managers.state()
        if known is not None and known.standing not in {Standing.UNKNOWN, Standing.DISABLED}:
            return known
        runner = self._runner(table, job)
        if runner is not None:
            return JobState(job, Standing.ACTIVE, f"pid {runner.pid} runs {job.script}", managers.stop())
        source = self._source(job)
        if source is not None:
            return JobState(job, Standing.INSTALLED, f"{source} runs {job.script}", f"take it out of {source}")
        return known or self._absent(job)

    def _runner(self, table: ProcessTable, job: BootJob) -> Process | None:
        """Return a living process that runs the script, or keeps it running."""
        if not job.script:
            return None
        script = _Script(job.script, self._environ)
        for process in table.processes.values():
            if process.zombie or process.pid in self._own:
                continue
            if any(map(script.may_be_in, process.argv)):
                if script.is_named_by(words_of(process.argv), self._folders(table, process)):
                    return process
            elif self._carries(script, process):
                return process
        return None

    def _source(self, job: BootJob) -> str | None:
        if not job.script:
            return None
        script = _Script(job.script, self._environ)
        for path in self._roots.sources():
            if any(map(script.is_in, _lines(path))):
                return str(path)
        return "this user's crontab" if any(map(script.is_in, _plain_lines(_own_crontab(self._environ)))) else None

    def _absent(self, job: BootJob) -> JobState:
        """Return the state of a job that no service manager knows and whose script no visible process runs."""
        managers = self._managers[job]
        exists = _exists(Path(_Script(job.script, self._environ).path)) if job.script else False
        if exists is None or (exists and not job.label and self._roots.closed()):
            why = f"{job.script} exists, this user cannot see what runs it, and hosts.yaml has no label for it"
            return JobState(job, Standing.UNKNOWN, why, managers.stop())
        return JobState(job, Standing.MISSING, "; ".join(self._absences(job, exists)))

    def _absences(self, job: BootJob, exists: bool) -> Iterator[str]:
        if job.label:
            names = self._managers[job].available
            negation = f"{' and '.join(names)} know no" if len(names) > 1 else f"{names[0]} knows no" if names else ""
            yield f"{negation} {job.label}" if negation else f"no service manager that could know {job.label} runs here"
        if job.script:
            yield f"nothing runs {job.script}" if exists else f"{job.script} is not there"


class _Managers:
    """The reports of launchd and systemd about one job. Each is asked at most once, when needed."""

    def __init__(self, job: BootJob, environ: Mapping[str, str], roots: Roots) -> None:
        self._job = job
        self._roots = roots
        self._home = Path(environ.get("HOME") or Path.home())
        self._environ = {"XDG_RUNTIME_DIR": f"/run/user/{os.getuid()}", **environ}
        self._script = _Script(job.script, environ) if job.script else None
        self.domain = ""
        """launchd's domain in which the job was found."""
        self.label = job.label

    @property
    def available(self) -> list[str]:
        """The service managers that can be asked about the label."""
        systemd = which("systemctl", self._environ) is not None
        return [name for name, here in (("launchd", self.asks_launchd), ("systemd", systemd)) if here]

    @property
    def asks_launchd(self) -> bool:
        return sys.platform == "darwin" or which("launchctl", self._environ) is not None

    def state(self) -> JobState | None:
        """Return the job's state; None if neither knows the job."""
        states = [*self._of_launchd(), *self._of_systemd()]
        if self._unanswered:
            states.append(
                JobState(self._job, Standing.UNKNOWN, "; ".join(dict.fromkeys(self._unanswered)), self.stop())
            )
        order = [*(each for each in Standing if each is not Standing.DISABLED), Standing.DISABLED]
        return min(states, key=lambda state: order.index(state.standing), default=None)

    def stop(self, label: str = "") -> str:
        """Return the command that stops the job, or launchd's job `label` that runs the same script."""
        if label and not same_label(label, self._job.label):
            return bootout(self._domain_of(label), label)
        if self.asks_launchd and (self._job.label or self._own_plist):
            self._find_domain()
            return bootout(self.domain or "system", self.label)
        for user, info in self._known_units():
            return systemctl("stop", info.get("Id") or unit_of(self._job.label), user=user)
        if self._job.label:
            # Neither launchd nor systemd knows it: another program starts it, and has its own stop command.
            return f"stop what starts it (under launchd: {bootout('system', self._job.label)})"
        return f"stop what runs {self._job.script}"

    # -- launchd -------------------------------------------------------------------------------------------------

    def _domain_of(self, label: str) -> str:
        domains = (plist.domain for plist in self._plists if same_label(label, plist.label))
        return next(domains, self.domain or "system")

    def _find_domain(self) -> None:
        """Set domain and label from the property list, else ask launchd."""
        if not self.domain and self._own_plist:
            self.domain, self.label = self._own_plist.domain, self._own_plist.label
        elif not self.domain:
            _ = self.launchd

    @cached_property
    def launchd(self) -> Launched | None:
        """The job as launchd shows it; None if launchd does not know the label or could not be asked."""
        if not self.asks_launchd:
            return None
        uid = os.getuid()
        domains = ["system", f"gui/{uid}", f"user/{uid}"]
        if self._own_plist:
            self.label = self._own_plist.label
            domains.insert(0, self._own_plist.domain)
        for domain in dict.fromkeys(domains if self.label else []):
            try:
                done = _ask(self._environ, "launchctl", "print", f"{domain}/{self.label}")
            except (Refused, OSError):
                self._unanswered.append("launchd did not answer")
                break
            if done.returncode == 0:
                self.domain = domain
                return launched(done.stdout)
            if done.returncode not in {ABSENT, NO_DOMAIN}:
                self._unanswered.append(f"launchctl print {domain}/{self.label} ended with {done.returncode}")
        return None

    @cached_property
    def _unanswered(self) -> list[str]:
        return []

    def _of_launchd(self) -> Iterator[JobState]:
        info, own = self.launchd, self._own_plist
        if info is not None:
            name = f"launchd has it as {self.domain}/{self.label}"
            standing = Standing.ACTIVE if info.active else Standing.LOADED
            pid = f", pid {info.pid}" if info.pid else f", {info.state or 'loaded'}"
            yield JobState(self._job, standing, name + pid, bootout(self.domain, self.label))
        elif own is not None:
            off = self._disabled(own.domain, own.label)
            if own.keys.get("Disabled") is True if off is None else off:
                again = f"{'sudo ' if own.domain == 'system' else ''}launchctl enable {own.domain}/{own.label}"
                yield JobState(self._job, Standing.DISABLED, f"launchd does not load {own.path}", enable=again)
            else:
                when = "boot" if own.domain == "system" else "login"
                why = f"{own.path} exists, and launchd loads it at the next {when}"
                yield JobState(self._job, Standing.INSTALLED, why, bootout(own.domain, own.label))

    def _disabled(self, domain: str, label: str) -> bool | None:
        try:
            return is_disabled(_ask(self._environ, "launchctl", "print-disabled", domain).stdout, label)
        except (Refused, OSError):
            return None

    @cached_property
    def _plists(self) -> list[_Plist]:
        return [
            _Plist(domain, path, _keys_of(path))
            for domain, folder in self._roots.plists(self._home)
            for path in sorted(folder.glob("*.plist"))
        ]

    @cached_property
    def _own_plist(self) -> _Plist | None:
        """The property list with the job's label, else the one that runs the script."""
        # The file nearly always has the label's name: try that before parsing dozens of others.
        for domain, folder in self._roots.plists(self._home) if self._job.label else ():
            path = folder / f"{self._job.label}.plist"
            if path.exists() and same_label(self._job.label, str((keys := _keys_of(path)).get("Label", ""))):
                return _Plist(domain, path, keys)
        named = (plist for plist in self._plists if same_label(self._job.label, plist.label))
        return next(named, None) or next((plist for plist in self._plists if self._runs(plist.keys)), None)

    def _runs(self, keys: Mapping[str, object]) -> bool:
        arguments = keys.get("ProgramArguments")
        argv = tuple(map(str, arguments)) if isinstance(arguments, list) else ()
        words = [*words_of(argv), str(keys.get("Program", ""))]
        folder = keys.get("WorkingDirectory")
        return self._script is not None and self._script.is_named_by(words, [str(folder)] if folder else [])

    # -- systemd -------------------------------------------------------------------------------------------------

    @cached_property
    def units(self) -> tuple[tuple[bool, Mapping[str, str]], ...]:
        """What each running systemd shows of the job's unit, with whether it is the user's systemd."""
        if which("systemctl", self._environ) is None:
            return ()
        names = [unit_of(self._job.label)] if self._job.label else []
        names += [path.name for _, path in self._unit_files if path.name not in names]
        infos = []
        for user in (False, True):
            for name in names[:2]:
                info = self._show(user, name)
                if info:
                    infos.append((user, info))
                if standing_of_unit(info) not in {Standing.MISSING, Standing.UNKNOWN}:
                    return tuple(infos)
        return tuple(infos)

    def _known_units(self) -> list[tuple[bool, Mapping[str, str]]]:
        return [(user, info) for user, info in self.units if standing_of_unit(info) is not Standing.MISSING]

    def _show(self, user: bool, unit: str) -> Mapping[str, str]:
        scope = ("--user",) if user else ()
        if "@." in unit:
            # systemctl cannot show a template, only an instance of it.
            pattern = unit.replace("@.", "@*.")
            listed = self._systemctl(*scope, "list-units", "--all", "--plain", "--no-legend", "--full", pattern)
            unit = next(iter(listed.split()), "")
        return properties(self._systemctl(*scope, "show", f"--property={_SHOWN}", unit)) if unit else {}

    def _systemctl(self, *arguments: str) -> str:
        try:
            done = _ask(self._environ, "systemctl", *arguments)
            if done.returncode == 0:
                return done.stdout
        except (Refused, OSError):
            pass
        # Without a running systemd, systemctl fails, too: that means "no such unit", not "no answer".
        runtime = Path(self._environ["XDG_RUNTIME_DIR"])
        user = arguments[:1] == ("--user",)
        if (runtime / "systemd/private" if user else self._roots.system / "run/systemd/private").exists():
            self._unanswered.append(f"systemd{' --user' if user else ''} did not answer")
        return ""

    def _of_systemd(self) -> Iterator[JobState]:
        for user, info in self._known_units():
            unit = info.get("Id") or unit_of(self._job.label)
            standing = standing_of_unit(info)
            activity = "/".join(filter(None, (info.get("ActiveState"), info.get("SubState"))))
            state = info.get("UnitFileState") or info.get("LoadState")
            detail = f"systemd{' --user' if user else ''} has {unit}: {activity}, {state}"
            verb = "unmask" if "masked" in (info.get("LoadState"), state) else "enable --now"
            again = systemctl(verb, unit, user=user) if standing is Standing.DISABLED else ""
            yield JobState(self._job, standing, detail, systemctl("stop", unit, user=user), again)
        if not self._known_units():
            for user, path in self._unit_files:
                stop = systemctl("stop", path.name, user=user)
                yield JobState(self._job, Standing.INSTALLED, f"{path} exists, but systemd does not run", stop)

    @cached_property
    def _unit_files(self) -> list[tuple[bool, Path]]:
        """The unit files with the job's name, else those that run the script: (is it a user unit, path)."""
        unit_files = [
            (user, path)
            for user, folder in self._roots.units(self._home, self._environ.get("XDG_CONFIG_HOME", ""))
            for path in sorted(folder.glob("*.service"))
        ]
        named = [(user, path) for user, path in unit_files if self._job.label and is_unit(self._job.label, path.name)]
        return named or [(user, path) for user, path in unit_files if self._is_run_by(path)]

    @cached_property
    def names_in_files(self) -> tuple[str, ...]:
        """The labels and units of the files that run the script."""
        labels = [plist.label for plist in self._plists if self._runs(plist.keys)]
        return (*labels, *(path.name for _, path in self._unit_files))

    def _is_run_by(self, unit: Path) -> bool:
        if self._script is None or "lib" in unit.parts[:4]:  # skip the hundreds of units of a distribution
            return False
        return any(self._script.is_in(line) for line in _lines(unit) if line.lstrip().startswith("ExecStart"))


class _Script:
    """The script of a boot job, recognised in each way in which a command may spell its path."""

    def __init__(self, path: str, environ: Mapping[str, str]) -> None:
        if path.startswith("~/"):
            path = os.path.join(environ.get("HOME") or str(Path.home()), path[2:])
        self.path = path.rstrip("/") or "/"
        self._real = os.path.realpath(self.path)
        self._file = _file(self.path)
        self._folder, _, self._name = self.path.rpartition("/")
        names = {self.path, self._real}
        home = (environ.get("HOME") or "").rstrip("/")
        if home and self.path.startswith(f"{home}/"):
            names |= {f"{short}{self.path[len(home) :]}" for short in ("~", "$HOME", "${HOME}")}
        self._spelled = re.compile("|".join(rf"(?<![\w./-]){re.escape(name)}(?![\w./-])" for name in names))

    def is_named_by(self, words: Iterable[str], folders: Iterable[str]) -> bool:
        """Return whether one of the words is the script's path. Relative words are tried in each of the folders."""
        folders = list(folders)
        return any(
            self._is(os.path.join(folder, word))
            for word in words
            if word and len(word) < 4096 and "\0" not in word
            for folder in ([""] if word.startswith("/") else folders)
        )

    def _is(self, path: str) -> bool:
        if os.path.realpath(path) == self._real:
            return True
        return self._file is not None and _file(path) == self._file

    def may_be_in(self, text: str) -> bool:
        """Return whether a text may name the script: a quick check before `is_named_by`."""
        return self._name in text

    def is_in(self, line: str) -> bool:
        """Return whether a line of configuration contains the script's path, or its name and folder."""
        return self._name in line and (bool(self._spelled.search(line)) or self._folder in line)


def _file(path: str) -> tuple[int, int] | None:
    """Return device and inode, which identify a regular file under any path or spelling; None for others."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None


def _exists(path: Path) -> bool | None:
    """Return whether the path exists; None if that cannot be seen, as in a folder that may not be entered."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return None
    return True


@dataclass(frozen=True)
class _Plist:
    domain: str
    """launchd's domain into which the list is loaded."""
    path: Path
    keys: Mapping[str, object]

    @property
    def label(self) -> str:
        return str(self.keys.get("Label", ""))


def _keys_of(path: Path) -> Mapping[str, object]:
    import plistlib  # 10 ms, and only macOS has such files

    try:
        with open(files.open_file(path), "rb") as stream:
            keys = plistlib.load(stream)
    except (OSError, ValueError, plistlib.InvalidFileException):
        return {}
    return keys if isinstance(keys, dict) else {}


def _lines(path: Path) -> list[str]:
    try:
        with open(files.open_file(path), "rb") as stream:
            return _plain_lines(stream.read(_MAX_SOURCE).decode(errors="replace"))
    except OSError:
        return []


def _plain_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.lstrip().startswith(("#", ";"))]


def _ask(environ: Mapping[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return service_managers.ask_manager(environ, *command, seconds=service_managers.STATUS_TIMEOUT_SECONDS)


def _own_crontab(environ: Mapping[str, str]) -> str:
    try:
        return _ask(environ, "crontab", "-l").stdout
    except (Refused, OSError):
        return ""
