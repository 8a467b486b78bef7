"""`boot`: have the host start its models at boot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Self

from mlxops.core.command import Group, Hosts, Request, option, switch, whole
from mlxops.core.errors import UsageError
from mlxops.core.frozen import dataclass
from mlxops.core.replies import HostReply
from mlxops.core.tables import each_host, harmless, one_line


@dataclass(frozen=True)
class BootJobRow:
    """A job of the host itself that starts a server."""

    port: int
    script: str | None
    """The program that the job starts; None if it is not known."""
    label: str | None
    """The job's name in launchd or systemd."""
    there: bool
    """Whether the port is reserved for the job."""
    standing: str
    """running, loaded, installed, disabled, not installed or unknown."""
    detail: str
    """The service manager's answer, or why the job is missing or unknown."""


@dataclass(frozen=True)
class BootResult:
    changed: bool
    told: tuple[str, ...]
    """What the user should know or do."""
    state: str
    """The service manager's state of the restore job, or `not installed`."""
    files: Mapping[str, str | None]
    """Path -> content; None: it does not exist."""
    argv: tuple[str, ...]
    """The command that the restore job runs."""
    boot_job: BootJobRow | None
    """The first of `boot_jobs`."""
    boot_jobs: tuple[BootJobRow, ...]
    """The host's own jobs, as `boot_jobs` in hosts.yaml declares them."""
    installed: str | None = None
    """What the restore job is: `keeper`, `timer` or `boot` (only at boot); None if there is none."""
    keeper: str | None = None
    """The running keeper; None if none runs."""


@dataclass(frozen=True)
class Boot(
    Request[BootResult],
    group=Group.HOST,
    example="mlxctl boot --install --keep",
    hosts=Hosts.SEVERAL,
    changes=True,
):
    """Have the host start its models at boot."""

    install: bool = switch("make the system run restore at boot", sent=False)
    every: int | None = option(
        "minutes; also run restore that often, to start crashed servers again (implies --install)",
        parse=whole("--every", 1, 1440),
    )
    keep: bool = switch("have a keeper run, which starts a server again as soon as it has ended (implies --install)")
    remove: bool = switch("stop the system from running restore", sent=False)
    show: bool = switch("show what is installed; the default", sent=False)
    action: str = "show"
    dry_run: bool = False

    def checked(self) -> Self:
        given = (("every", self.every), ("keep", self.keep), ("remove", self.remove), ("show", self.show))
        actions = [name for name, on in given if on] or ["install" if self.install else "show"]
        if self.install and actions[0] in {"remove", "show"}:
            actions = ["install", *actions]
        if len(actions) > 1:
            raise UsageError(
                "one_action",
                f"--{actions[0]} and --{actions[1]} cannot be used together",
                why="each of them is another action",
                hint="use one at a time",
            )
        action = "install" if actions[0] in {"every", "keep"} else actions[0]
        return replace(self, action=action, dry_run=action == "show")


def show(replies: Sequence[HostReply[BootResult]]) -> str:
    return each_host(replies, _lines)


def _lines(result: BootResult) -> str:
    what = {"keeper": ", a keeper", "timer": ", with a timer"}.get(result.installed or "", "")
    lines = [f"restore at boot: {one_line(result.state)}{what}"]
    if result.installed == "keeper" or result.keeper:
        lines.append(f"keeper: {one_line(result.keeper or 'not running')}")
    lines += [f"{'' if text else 'not '}there: {one_line(path)}" for path, text in result.files.items()]
    for job in result.boot_jobs:
        what = f"the host's own boot job {job.label or job.script} of port {job.port}"
        lines.append(one_line(f"{what}: {job.standing}; {job.detail}"))
    return "\n".join([*lines, *map(harmless, result.told)])
