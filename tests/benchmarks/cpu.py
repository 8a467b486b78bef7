"""Processor time: what a command computes, however long it waits. Compared with an earlier build of mlxops.

Both builds are installed in the same way, with the same dependencies and with bytecode.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.contest import Contest, Program, Timed
from tests.benchmarks.recording import record
from tests.benchmarks.scene import builds, fabric, homelab, host_environment, hosts_file, inv, inv_local
from tests.benchmarks.stats import Limit
from tests.lab.builds import EARLIER_COMMIT, Build
from tests.lab.homelab import Homelab, Studio

TURNS = 21
NOISE = 1.03
"""The medians of equal programs differ by up to this factor after `TURNS` turns."""
BOUND = Limit({EARLIER_COMMIT: NOISE})
FABRIC, PASS = "bare Fabric task", "python -c pass"


@dataclass(frozen=True)
class ProcessorTime:
    """User and system seconds of a program and of the processes below it that it waited for.

    No other child of this process may end while it runs.
    """

    program: Program

    def __call__(self) -> float:
        before = _children_seconds()
        self.program()
        return _children_seconds() - before


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def _against_fabric(folder: Path, program: Callable[[Homelab, Build], Program]) -> Iterator[Mapping[str, Timed]]:
    """The same command of both builds, and a Fabric task that does nothing."""
    this, earlier = builds(folder)
    with homelab(folder) as lab:
        yield {
            FABRIC: ProcessorTime(fabric(lab, this)),
            "inv status": ProcessorTime(program(lab, this)),
            EARLIER_COMMIT: ProcessorTime(program(lab, earlier)),
        }


def _over_ssh(lab: Homelab, build: Build) -> Program:
    """The agent is below sshd, not below `inv`: only the control node's time counts."""
    hosts = hosts_file(lab, build.folder / "hosts.yaml", amount=1, python=[build.python])
    return inv(lab, "status", hosts=hosts, build=build)


def _locally(lab: Homelab, build: Build) -> Program:
    return inv_local(lab.studio, "status", build=build)


@contextmanager
def _agent(folder: Path) -> Iterator[Mapping[str, Timed]]:
    """The agent of each build, answering its own control node's `status`."""
    this, earlier = builds(folder)
    with homelab(folder) as lab:
        yield {
            PASS: ProcessorTime(_python(lab.studio, this, "-c", "pass")),
            "agent": ProcessorTime(_answering(lab, this)),
            EARLIER_COMMIT: ProcessorTime(_answering(lab, earlier)),
        }


def _answering(lab: Homelab, build: Build) -> Program:
    recording = record(lab, inv(lab, "status", build=build), build.python, build.folder / "recording")
    return _python(lab.studio, build, "-P", "-m", "mlxops.agent", stdin=recording.request.read_text(encoding="utf-8"))


def _python(studio: Studio, build: Build, *arguments: str, stdin: str | None = None) -> Program:
    return Program([build.python, *arguments], studio.home, host_environment(studio), stdin=stdin)


CONTESTS = (
    Contest(
        "status-cpu",
        "processor time of inv status over SSH, on the control node; aim 0.85",
        "inv status",
        FABRIC,
        BOUND,
        TURNS,
        lambda folder: _against_fabric(folder, _over_ssh),
    ),
    Contest(
        "status-local-cpu",
        "processor time of inv status --local, with its agent",
        "inv status",
        FABRIC,
        BOUND,
        TURNS,
        lambda folder: _against_fabric(folder, _locally),
    ),
    Contest("agent-cpu", "processor time of an agent that answers status; aim 4", "agent", PASS, BOUND, TURNS, _agent),
)
