"""`doctor` on the host: observe, and judge. Changes nothing.

Each check observes one thing and yields findings. All run at once, each within a time limit. A check that fails is a
finding itself, beside what it had found, and does not keep the others from being made.
"""

from __future__ import annotations

import getpass
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from mlxops.agent.context import Context
from mlxops.agent.engines import engine_named
from mlxops.agent.engines.installation import site_packages, version_in
from mlxops.agent.host import health
from mlxops.agent.operations.limits import host_dangers
from mlxops.agent.paths import HostPaths, missing_folder, settings_differ, settings_differences
from mlxops.agent.state.locks import NoLocks, is_locked, try_flock
from mlxops.agent.state.store import KEEPER
from mlxops.common import checks
from mlxops.common.build import build_id
from mlxops.common.parallel import reason, within
from mlxops.core import dangers
from mlxops.core.commands.doctor import Doctor, DoctorResult, FindingRow
from mlxops.core.doctor import engines
from mlxops.core.doctor.assumptions import Trial
from mlxops.core.doctor.findings import Finding, FindingCode, Level, worst_first
from mlxops.core.doctor.host import (
    TESTED_PYTHONS,
    Disk,
    Memory,
    disk_findings,
    memory_findings,
    power_findings,
    pressure_level,
)
from mlxops.core.doctor.incidents import incident
from mlxops.core.drift import DriftCode
from mlxops.core.errors import MlxopsError, Refused
from mlxops.core.text import amount

CHECK_SECONDS = 12.0
"""Less than the control node's limit for an agent's silence."""
QUIET_SECONDS = 3600.0
"""A download whose files did not change for so long has ended, unless one of them is open or locked."""
MOST_NAMED = 20
Check = Callable[[Context], Iterable[Finding]]


def run(ctx: Context, request: Doctor) -> DoctorResult:
    findings = checks.make(CHECK_SECONDS, {name: partial(check, ctx) for name, check in CHECKS.items()})
    ctx.beat()
    trials: tuple[Trial, ...] = ()
    if request.trials:
        from mlxops.agent.operations.assumptions import try_all

        trials = try_all(ctx)
    return DoctorResult(
        findings=tuple(FindingRow.of(each) for each in worst_first(findings)),
        checks=tuple(CHECKS),
        facts=_facts(ctx),
        build=build_id(),
        clock=time.time(),
        trials=trials,
    )


def _facts(ctx: Context) -> dict[str, str]:
    used = within(CHECK_SECONDS, {"engines": partial(_engines_used, ctx)})["engines"]
    ctx.beat()
    facts: dict[str, Callable[[], str]] = {
        "mlxops": build_id,
        "python": lambda: f"{platform.python_version()} ({sys.executable})",
        "system": health.system_name,
        "budget": partial(_budget, ctx),
        **{name: _version(ctx, name) for name in ([] if isinstance(used, Exception) else used)},
    }
    return {name: _fact(outcome) for name, outcome in within(CHECK_SECONDS, facts).items()}


def _fact(outcome: str | Exception) -> str:
    if isinstance(outcome, Exception):
        return "not found" if isinstance(outcome, Refused) else f"not known ({reason(outcome)})"
    return outcome


def _budget(ctx: Context) -> str:
    from mlxops.agent.serving.memory import budget

    limit = budget(ctx.paths)
    return f"{amount(limit.size)} ({limit.source})"


# -- interpreter, agreement, engines ------------------------------------------------------------------------------


def _interpreter(ctx: Context) -> Iterator[Finding]:
    if sys.version_info[:2] not in TESTED_PYTHONS:
        yield Finding.of(FindingCode.PYTHON_UNTESTED, f"the agent runs with Python {platform.python_version()}")
    if health.is_translated():
        yield Finding.of(FindingCode.INTERPRETER_TRANSLATED, f"{sys.executable} runs translated from Intel")
    if (0,) < health.macos_version() < (14,):
        yield Finding.of(FindingCode.MACOS_OLD, f"this is {health.system_name()}")


def _agreement(ctx: Context) -> Iterator[Finding]:
    from mlxops.agent.paths import host_paths

    try:
        agreed = ctx.store.agreed_settings()
    except Refused as error:
        yield Finding.because(FindingCode.AGREEMENT_UNUSABLE, error)
        return
    if agreed is None:
        yield Finding.of(FindingCode.NOT_AGREED, f"there is no {ctx.store.state / 'host.json'} yet")
    elif differences := settings_differences(host_paths(agreed, ctx.environ), ctx.paths):
        yield Finding.because(FindingCode.SETTINGS_DIFFER, settings_differ(differences))


def _engines_used(ctx: Context) -> list[str]:
    """Return the engines that hosts.yaml and the registry name."""
    names = [ctx.paths.settings.engine]
    try:
        names += [model.engine for model in ctx.registry().models.values() if model.engine]
    except (OSError, MlxopsError):
        pass  # another check reports it
    return list(dict.fromkeys(names))


def _version(ctx: Context, name: str) -> Callable[[], str]:
    def version() -> str:
        engine = engine_named(name)
        command = engine.find_command(ctx.paths.settings.launch.get(name, ()), ctx.engine_environ)
        return version_in(site_packages(command.argv, engine.distribution), engine.distribution) or "of unknown version"

    return version


def _engines(ctx: Context) -> Iterator[Finding]:
    for name in _engines_used(ctx):
        try:
            engine = engine_named(name)
            command = engine.find_command(ctx.paths.settings.launch.get(name, ()), ctx.engine_environ)
        except Refused as error:
            yield Finding.because(FindingCode.ENGINE_MISSING, error)
            continue
        site = site_packages(command.argv, engine.distribution)
        if version_in(site, engine.distribution) is None:
            message = f"the version of {name} cannot be read from {command.argv[0]}"
            yield Finding.of(FindingCode.ENGINE_VERSION_UNKNOWN, message, engine=name)
        packages = (*engines.PACKAGES, engine.distribution)
        found = {package: version for package in packages if (version := version_in(site, package))}
        yield from engines.engine_findings(name, found)


# -- files --------------------------------------------------------------------------------------------------------


def _files(ctx: Context) -> Iterator[Finding]:
    yield from _hub(ctx.paths.hub)
    registry = ctx.registry()
    if registry.unwritable:
        yield Finding.because(FindingCode.REGISTRY_UNUSABLE, ctx.store.registry.refusal(registry))


def _locks(ctx: Context) -> Iterator[Finding]:
    for folder in dict.fromkeys((ctx.paths.registry.parent, ctx.paths.state)):
        if folder.is_dir() and not _has_locks(folder):
            yield Finding.of(FindingCode.NO_LOCKS, f"the file system of {folder} has no locks")


def _hub(hub: Path) -> Iterator[Finding]:
    try:
        missing = missing_folder(hub)
    except Refused as error:
        yield Finding.because(FindingCode.HUB_CLOSED, error)
        return
    if missing is not None:
        yield Finding.of(FindingCode.HUB_MISSING, missing)
    elif hub.is_dir() and not os.access(hub, os.W_OK | os.X_OK):
        yield Finding.of(FindingCode.HUB_READ_ONLY, f"{hub} is not writable", path=shlex.quote(str(hub)))


def _state(ctx: Context) -> Iterator[Finding]:
    state = ctx.paths.state
    path = shlex.quote(str(state))
    if not os.path.lexists(state):
        return
    if not state.is_dir():
        yield Finding.of(FindingCode.STATE_UNWRITABLE, f"{state} is not a folder", path=path)
        return
    mode = state.stat().st_mode & 0o777
    if mode & 0o077:
        yield Finding.of(FindingCode.STATE_OPEN, f"{state} is open to other users (mode {mode:o})", path=path)
    closed = [folder for folder in (state, *_folders_in(state)) if not os.access(folder, os.R_OK | os.W_OK | os.X_OK)]
    if closed:
        message = f"this account may not read and change {', '.join(map(str, sorted(closed)))}"
        yield Finding.of(FindingCode.STATE_UNWRITABLE, message, path=path)


def _folders_in(folder: Path) -> list[Path]:
    """Return the folders in a folder that may be read; none of one that may not."""
    if not os.access(folder, os.R_OK | os.X_OK):
        return []
    return [each for each in folder.iterdir() if each.is_dir()]


def _has_locks(folder: Path) -> bool:
    """Try a shared lock on the folder for an instant, as every reader of a lock does."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try_flock(descriptor, shared=True)
        return True
    except NoLocks:
        return False
    finally:
        os.close(descriptor)


def _disks(ctx: Context) -> Iterator[Finding]:
    for disk in disks(ctx.paths):
        yield from disk_findings(disk)


def disks(paths: HostPaths) -> Iterator[Disk]:
    """Yield the file systems of our folders, each once."""
    folders = {"the models": paths.hub, "the state folder": paths.state, "the registry": paths.registry.parent}
    seen = set()
    for what, folder in folders.items():
        there = next(each for each in (folder, *folder.parents) if os.path.exists(each))
        if (device := there.stat().st_dev) not in seen:
            seen.add(device)
            figures = os.statvfs(there)
            inodes = figures.f_favail if figures.f_files else None
            yield Disk(what, str(there), figures.f_bavail * figures.f_frsize, inodes)


def _cache(ctx: Context) -> Iterator[Finding]:
    from mlxops.agent.hub.cache import roots, scan
    from mlxops.agent.operations.status import downloads

    running = {operation.repo for operation in downloads(ctx)}
    parts = {repo: _parts(repo) for root in roots(ctx.paths.hub) for repo in sorted(root.glob("models--*"))}
    opened = ctx.system.opened([part for each in parts.values() for part in each])
    busy = set()
    for repo, each in parts.items():
        if _repo_id(repo) in running or opened & set(each) or any(map(_may_go_on, each)) or _is_recent(repo / "blobs"):
            busy.add(repo)
        elif each:
            yield _litter(repo, each)
    for skipped in scan(ctx.paths.hub).skipped:
        if skipped.incomplete and skipped.path not in busy:
            message, path = f"{skipped.repo_id}: {skipped.why}", shlex.quote(str(skipped.path))
            yield Finding.of(FindingCode.CACHE_INCOMPLETE, message, repo=skipped.repo_id, path=path)


def _repo_id(repo: Path) -> str:
    return repo.name.removeprefix("models--").replace("--", "/")


def _parts(repo: Path) -> list[Path]:
    return sorted((repo / "blobs").glob("*.incomplete"))


def _may_go_on(part: Path) -> bool:
    """Return whether a download, by any program of huggingface_hub's, may still write a part."""
    lock = part.parents[2] / ".locks" / part.parents[1].name / f"{part.name.partition('.')[0]}.lock"
    return _is_recent(part) or is_locked(lock)


def _is_recent(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime < QUIET_SECONDS
    except FileNotFoundError:
        return False


def _litter(repo: Path, parts: Sequence[Path]) -> Finding:
    size = sum(part.stat().st_size for part in parts)
    message = (
        f"interrupted downloads of {_repo_id(repo)} left {len(parts)} part{'s'[: len(parts) != 1]}, {amount(size)}"
    )
    # The names, and no pattern: a download that starts later makes parts of its own.
    files = " ".join(shlex.quote(str(part)) for part in parts[:MOST_NAMED])
    return Finding.of(FindingCode.CACHE_LITTER, message, repo=_repo_id(repo), files=files)


# -- memory -------------------------------------------------------------------------------------------------------


def _memory(ctx: Context) -> Iterator[Finding]:
    from mlxops.agent.serving.memory import budget

    limit = budget(ctx.paths)
    seen = ctx.system.host_memory()
    memory = Memory(
        total=seen.total or None,
        pressure=pressure_level(seen.pressure, seen.stalled_percent),
        swapped=seen.swap_used,
    )
    yield from memory_findings(memory, limit.size, configured=ctx.paths.settings.memory is not None)


def _incidents(ctx: Context) -> Iterator[Finding]:
    for path in health.recent_reports(health.report_folders(ctx.environ)):
        try:
            finding = incident(path.name, health.read_report(path))
        except (OSError, ValueError, RecursionError) as error:
            message = f"{path} is not in the form of macOS's reports: {reason(error)}"
            hint = "read it, if its time is that of a crash; if not, leave it: doctor forgets reports after a week"
            finding = Finding(FindingCode.NOT_CHECKED, FindingCode.NOT_CHECKED.level, message, hint)
        if finding is not None:
            yield finding


# -- ports --------------------------------------------------------------------------------------------------------

_DRIFT_ERRORS = frozenset(
    {
        *(DriftCode.ASSIGNED_NOT_SERVED, DriftCode.FOREIGN, DriftCode.MISMATCH, DriftCode.WEDGED, DriftCode.FAILED),
        DriftCode.REBOOTED,
    }
)
"""Drift because of which requests fail now."""
_OWN_CODES: Mapping[str, FindingCode] = {
    DriftCode.MEMORY_STRANDED: FindingCode.MEMORY_STRANDED,
    DriftCode.DANGEROUS_SETTING: FindingCode.METAL_FAST_SYNCH,
}
"""Drift that is a finding of its own."""
_REPORTED = frozenset({DriftCode.REGISTRY_UNUSABLE, DriftCode.REGISTRY_MISSING})
"""Drift that the check of files reports."""


def _ports(ctx: Context) -> Iterator[Finding]:
    from mlxops.agent.operations import status
    from mlxops.core.commands.status import Status
    from mlxops.core.hints import mark

    result = status.run(ctx, Status())
    for row in result.drift:
        code = _OWN_CODES.get(row.code, FindingCode.DRIFT)
        level = Level.ERROR if row.code in _DRIFT_ERRORS else code.level
        what = f"{row.code}: " if code is FindingCode.DRIFT else ""
        if row.code not in _REPORTED:
            message = what + row.message.removeprefix(f"{row.port}: ")
            yield Finding(code, level, message, mark(row.hint, row.commands), row.port)
    yield from _servers(ctx)


def _servers(ctx: Context) -> Iterator[Finding]:
    from mlxops.agent.serving.memory import budget, in_use

    world = ctx.observe(ctx.registry())
    uses, limit = in_use(world, ctx.system, ctx.reserved()), budget(ctx.paths)
    used = sum(use.counted for use in uses)
    removable = [use for use in uses if use.removable and use.port in ctx.paths.settings.ports]
    if removable and used > limit.size:
        largest = max(removable, key=lambda use: use.counted)
        message = f"the servers need {amount(used)}, and the budget is {amount(limit.size)} ({limit.source})"
        yield Finding.of(FindingCode.OVERCOMMITTED, message, port=largest.port)
    elif used <= limit.size and (danger := dangers.limits_over_budget(uses, limit.size)):
        yield danger
    if danger := dangers.unbounded_servers(uses):
        yield danger


def _exposure(ctx: Context) -> Iterator[Finding]:
    settings = ctx.paths.settings
    if settings.exposure is not None:
        return
    from mlxops.core.settings import is_loopback

    listeners = [
        each for each in ctx.system.process_table(served_ports(ctx)).listeners if not is_loopback(each.address)
    ]
    probes = {f"{each.address} {each.port}": _answering(each.address, each.port) for each in listeners}
    outcomes = within(CHECK_SECONDS - 2, probes)
    open_ports = sorted({each.port for each in listeners if outcomes[f"{each.address} {each.port}"] is True})
    if open_ports:
        addresses = ", ".join(sorted({each.address for each in listeners if each.port in open_ports}))
        ports = ", ".join(map(str, open_ports))
        yield Finding.of(FindingCode.EXPOSED, f"servers answer without a key on {addresses}: {ports}")
    elif not is_loopback(settings.bind):
        yield Finding.of(FindingCode.BIND_OPEN, f"`bind` in hosts.yaml is {settings.bind}")


def served_ports(ctx: Context) -> frozenset[int]:
    """Return the ports of hosts.yaml, and those of the servers that run on other ports."""
    from mlxops.agent.serving.servers import find_servers

    found = set(ctx.paths.settings.ports)
    for server in find_servers(ctx.system.process_table(())):
        listening = {port for pid in server.family for port in ctx.system.ports_of(pid) or ()}
        # Another user's ports may be hidden. Then its arguments say where it listens.
        found |= listening or {port for port in [server.detected.port] if port is not None}
    return frozenset(found)


def _answering(address: str, port: int) -> Callable[[], bool]:
    """Ask for the list of models, which makes no server load or drop anything."""
    from mlxops.common.http import NotHttp, send_request

    def answers() -> bool:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
        try:
            return send_request("http", host, port, "GET", "/v1/models", timeout=3.0).status == 200
        except (OSError, NotHttp):
            return False

    return answers


# -- boot and power -----------------------------------------------------------------------------------------------


def _boot(ctx: Context) -> Iterator[Finding]:
    from mlxops.agent.service import restore_job

    job = restore_job.make_job(ctx.paths.state, ctx.environ, None)
    manager = restore_job.service_manager(ctx.environ)
    daemon = manager.daemon_notes(job)
    installed = [path for path in manager.job_paths(job) if path.exists()]
    if not installed:
        return
    program = restore_job.installed_program(installed[0])
    if program is not None and not os.access(program, os.X_OK):
        yield Finding.of(FindingCode.RESTORE_JOB_BROKEN, f"{installed[0]} runs {program}, which is not there")
    kind = restore_job.kind_of(installed)
    if kind == "keeper" and ctx.store.holder(KEEPER) is None:
        message = f"{installed[0]} runs a keeper, and none is running"
        yield Finding.of(FindingCode.KEEPER_NOT_RUNNING, message, log=shlex.quote(str(job.log)))
    elif kind == "timer":
        yield Finding.of(FindingCode.RESTORE_TIMER, f"{installed[-1]} starts servers again that have ended")
    state = manager.state()
    if state in {"not loaded", "disabled", "masked"} and not daemon:
        yield Finding.of(FindingCode.RESTORE_JOB_OFF, f"the restore job is installed, and {state}")
    elif state.startswith("unknown"):
        yield Finding.of(FindingCode.NOT_CHECKED, f"whether the restore job runs is {state}")
    if isinstance(manager, restore_job.Launchd) and not daemon:
        yield Finding.of(FindingCode.RESTORE_NEEDS_LOGIN, f"{installed[0]} is a LaunchAgent, which starts at a login")
    if isinstance(manager, restore_job.Systemd) and not manager.lingers(job):
        message = f"systemd starts the jobs of {job.user} at a login (no lingering)"
        yield Finding.of(FindingCode.NO_LINGERING, message, user=shlex.quote(getpass.getuser()))


def _power(ctx: Context) -> Iterator[Finding]:
    from mlxops.agent.service import restore_job

    job = restore_job.make_job(ctx.paths.state, ctx.environ, None)
    jobs = any(path.exists() for path in restore_job.service_manager(ctx.environ).job_paths(job))
    unattended = jobs or bool(ctx.paths.settings.boot)
    pmset = health.output_of(ctx.environ, "pmset", "-g")
    filevault = health.output_of(ctx.environ, "fdesetup", "status")
    yield from power_findings(pmset, filevault, unattended=unattended)


CHECKS: dict[str, Check] = {
    "interpreter": _interpreter,
    "agreement": _agreement,
    "engines": _engines,
    "files": _files,
    "state folder": _state,
    "locks": _locks,
    "disks": _disks,
    "cache": _cache,
    "memory": _memory,
    "dangerous settings": host_dangers,
    "panics and jetsam": _incidents,
    "ports": _ports,
    "exposure": _exposure,
    "boot": _boot,
    "power": _power,
}
