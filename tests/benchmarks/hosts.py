"""The cost of `status`: of one host, of many, and with a dead one among them."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.benchmarks.contest import BenchFailed, Contest, Cost, Program, Timed
from tests.benchmarks.recording import record
from tests.benchmarks.scene import builds, fabric, homelab, hosts_file, inv, pyinfra, ssh
from tests.benchmarks.stats import Limit
from tests.lab.builds import EARLIER_COMMIT
from tests.lab.homelab import CHECKOUT, Homelab, Studio

FLEET = 32
AMOUNTS = (1, 8, FLEET)
DEAD_OF = 8
CONNECT_SECONDS = 3
"""The connect timeout in the SSH configuration for the row with a dead host; the default is 10."""
UNREACHABLE = 5
SSH_FAILED = 255
TOGETHER_TIMEOUT = 300.0


@contextmanager
def _one(folder: Path) -> Iterator[Mapping[str, Timed]]:
    with homelab(folder) as lab:
        yield {
            "ssh": ssh(lab),
            "inv status": inv(lab, "status"),
            "bare Fabric task": fabric(lab),
            "pyinfra": pyinfra(lab),
        }


@contextmanager
def _poll(folder: Path) -> Iterator[Mapping[str, Timed]]:
    with homelab(folder) as lab:
        env = inv(lab).env
        program = Program([sys.executable, "-m", "tests.benchmarks.poll"], CHECKOUT, env)
        yield {"ssh": ssh(lab), "poll": lambda: float(program.run()[1].stdout)}


@contextmanager
def _fleet(folder: Path) -> Iterator[Mapping[str, Timed]]:
    with homelab(folder, studios=FLEET) as lab:
        names = [studio.name for studio in lab.studios]
        recording = record(lab, inv(lab, "status"), sys.executable, folder / "recording")
        agents = [_agent(lab, studio, recording.request) for studio in lab.studios]
        yield {
            f"{FLEET} ssh": _all_ssh(lab, names),
            "inv status": inv(lab, "status"),
            "pyinfra": pyinfra(lab, names),
            # The control node cannot be faster than this: the agents of all hosts run on this one machine.
            f"{FLEET} ssh with an agent each": lambda: _together(agents),
        }


@contextmanager
def _recorded_fleet(folder: Path) -> Iterator[Mapping[str, Timed]]:
    """Hosts whose agents cost nothing here: each host plays a recorded answer after the delay of a real agent."""
    installed = dict(zip(("inv status", EARLIER_COMMIT), builds(folder), strict=True))
    with homelab(folder, studios=FLEET) as lab:
        names = [studio.name for studio in lab.studios]
        contestants: dict[str, Timed] = {"pyinfra": pyinfra(lab, names), f"{FLEET} ssh": _all_ssh(lab, names)}
        recordings = [
            record(lab, inv(lab, "status", build=build), build.python, build.folder / "recording")
            for build in installed.values()
        ]
        delay = min(recording.seconds for recording in recordings)  # the same for both builds
        for (name, build), recording in zip(installed.items(), recordings, strict=True):
            hosts = hosts_file(lab, build.folder / "hosts.yaml", amount=FLEET, python=recording.player(delay))
            contestants[name] = inv(lab, "status", hosts=hosts, build=build)
        yield contestants


@contextmanager
def _one_dead(folder: Path) -> Iterator[Mapping[str, Timed]]:
    with homelab(folder, studios=DEAD_OF) as lab:
        dead = lab.studios[-1]
        dead.sshd.stop()
        with lab.mini.ssh.config.open("a") as config:
            config.write(f"Host *\n  ConnectTimeout {CONNECT_SECONDS}\n")
        with unanswered(dead.address, dead.sshd.port):
            yield {"ssh": ssh(lab, dead.name, SSH_FAILED), "inv status": inv(lab, "status", status=UNREACHABLE)}


@contextmanager
def _growing(folder: Path) -> Iterator[Mapping[str, Mapping[int, Timed]]]:
    with homelab(folder, studios=FLEET) as lab:
        names = [studio.name for studio in lab.studios]
        yield {
            "inv status": {amount: _status_of(lab, amount) for amount in AMOUNTS},
            "ssh, in parallel": {amount: _all_ssh(lab, names[:amount]) for amount in AMOUNTS},
        }


def _agent(lab: Homelab, studio: Studio, request: Path) -> Program:
    """The agent that `inv status` starts, with the same request, but over OpenSSH."""
    plain = ssh(lab, studio.name)
    line = f"exec {sys.executable} -P -m mlxops.agent < {request}"
    return Program([*plain.argv[:-1], line], plain.cwd, plain.env)


def _all_ssh(lab: Homelab, names: Sequence[str]) -> Timed:
    return lambda: _together([ssh(lab, name) for name in names])


def _status_of(lab: Homelab, amount: int) -> Program:
    """`inv status` of the first `amount` hosts."""
    return inv(lab, "status", hosts=hosts_file(lab, lab.folder / f"hosts-{amount}.yaml", amount))


def _together(programs: list[Program]) -> float:
    """Start all of them at once; return the seconds until all have ended."""
    null = subprocess.DEVNULL
    began = time.perf_counter()
    with ExitStack() as stack:
        running = [
            stack.enter_context(
                subprocess.Popen(each.argv, cwd=each.cwd, env=each.env, stdin=null, stdout=null, stderr=null)
            )
            for each in programs
        ]
        statuses = [process.wait(TOGETHER_TIMEOUT) for process in running]
    took = time.perf_counter() - began
    if any(statuses):
        raise BenchFailed(f"{' '.join(programs[0].argv)} and the others ended with {statuses}")
    return took


@contextmanager
def unanswered(address: str, port: int) -> Iterator[None]:
    """A host that never answers: a listener whose queue is full, so that it takes no further connection."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(0)
        while True:
            filler = stack.enter_context(socket.socket())
            filler.settimeout(0.3)
            try:
                filler.connect((address, port))
            except TimeoutError:
                break
        yield


CONTESTS = (
    Contest("status", "inv status, one host", "inv status", "ssh", Limit({"ssh": 2.5}), 15, _one),
    Contest("poll", "one more status over an open connection", "poll", "ssh", Limit({"ssh": 0.25}), 7, _poll),
    Contest(
        "fleet", f"inv status, {FLEET} hosts", "inv status", f"{FLEET} ssh", Limit({f"{FLEET} ssh": 1.0}), 5, _fleet
    ),
    Contest(
        "fleet-recorded",
        f"inv status, {FLEET} hosts that play a recorded answer",
        "inv status",
        "pyinfra",
        Limit({"pyinfra": 1.0}),
        7,
        _recorded_fleet,
    ),
    Contest(
        "dead",
        f"inv status, one dead host of {DEAD_OF}, connect timeout {CONNECT_SECONDS} s",
        "inv status",
        "ssh",
        Limit({}, plus=CONNECT_SECONDS + 1.0),
        3,
        _one_dead,
    ),
)
COSTS = (Cost("hosts", "host", 5, _growing),)
