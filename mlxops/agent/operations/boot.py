"""`boot`: have the system run `restore`."""

from __future__ import annotations

from collections.abc import Sequence

from mlxops.agent.context import Context
from mlxops.agent.host.system import ProcessTable
from mlxops.agent.service import restore_job
from mlxops.agent.service.boot_jobs import BootJobs
from mlxops.agent.service.restore_job import RestoreJob, ServiceManager
from mlxops.agent.state.store import state_unwritable
from mlxops.core.commands.boot import Boot, BootJobRow, BootResult
from mlxops.core.ports import JobState


def run(ctx: Context, request: Boot) -> BootResult:
    manager = restore_job.service_manager(ctx.environ)
    job = restore_job.make_job(ctx.paths.state, ctx.environ, request.every, keep=request.keep)
    if request.action == "show" and restore_job.kind_of(manager.job_paths(job)) == "keeper":
        job = restore_job.make_job(ctx.paths.state, ctx.environ, None, keep=True)
    changed, messages = False, list[str]()
    try:
        match request.action:
            case "install":
                changed = not _is_installed(manager, job)
                messages = manager.install(job)
            case "remove":
                changed, messages = manager.remove(job)
            case _:
                messages = manager.daemon_notes(job)
    except OSError as error:
        raise state_unwritable(ctx.paths.state, error) from None
    return _boot_result(ctx, manager, job, messages, changed=changed)


def _is_installed(manager: ServiceManager, job: RestoreJob) -> bool:
    return all(path.exists() and path.read_bytes() == data for path, data in manager.files(job).items())


def _boot_result(
    ctx: Context, manager: ServiceManager, job: RestoreJob, messages: Sequence[str], *, changed: bool
) -> BootResult:
    files = {str(path): path.read_text(errors="replace") if path.exists() else None for path in manager.job_paths(job)}
    own = BootJobs(ctx.paths.settings.boot, ctx.system, ctx.environ)
    table = ctx.system.process_table(()) if own.jobs else ProcessTable()
    rows = [_job_row(own.state(table, job)) for job in own.jobs]
    return BootResult(
        changed=changed,
        told=tuple(messages),
        state=manager.state() if any(files.values()) else "not installed",
        files=files,
        argv=tuple(job.argv),
        boot_job=rows[0] if rows else None,
        boot_jobs=tuple(rows),
        installed=restore_job.kind_of(manager.job_paths(job)),
        keeper=ctx.store.running_keeper(),
    )


def _job_row(state: JobState) -> BootJobRow:
    job, standing = state.job, state.standing
    return BootJobRow(job.port, job.script, job.label, standing.reserves, standing.value, state.detail)
