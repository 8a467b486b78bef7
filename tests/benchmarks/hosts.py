"""What asking hosts costs: one, many, a dead one among them."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

from mlxops.common.build import build_id
from mlxops.control import inventory
from tests.benchmarks.contest import BenchFailed, Contest, Cost, Program, Timed
from tests.benchmarks.place import fabric, homelab, inv, pyinfra, ssh
from tests.benchmarks.stats import Limit
from tests.lab.envelopes import envelope
from tests.lab.homelab import CHECKOUT, Homelab, Studio

FLEET = 32
AMOUNTS = (1, 8, FLEET)
DEAD_OF = 8
CONNECT_SECONDS = 3
"""The connect timeout in the SSH configuration while a host is dead; 10 without one."""
UNREACHABLE = 5
SSH_FAILED = 255
LONG = 300.0


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
        yield {"ssh": ssh(lab), "look": lambda: float(program.run()[1].stdout)}


@contextmanager
def _fleet(folder: Path) -> Iterator[Mapping[str, Timed]]:
    with homelab(folder, studios=FLEET) as lab:
        names = [studio.name for studio in lab.studios]
        yield {
            f"{FLEET} ssh": _all_ssh(lab, names),
            "inv status": inv(lab, "status"),
            "pyinfra": pyinfra(lab, names),
            # What is left for the control node to save: the agents of all hosts run on this one machine.
            f"{FLEET} ssh with an agent each": lambda: _together([_agent(lab, studio) for studio in lab.studios]),
        }


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


def _agent(lab: Homelab, studio: Studio) -> Program:
    """The same question to the same agent, by OpenSSH."""
    hosts = inventory.load(lab.mini.home / ".config" / "mlxops" / "hosts.yaml").hosts
    request = studio.folder / "request.json"
    if not request.exists():
        request.write_bytes(envelope("status", {}, hosts[studio.name].settings, build_id()).encode())
    plain = ssh(lab, studio.name)
    line = f"exec {sys.executable} -P -m mlxops.agent < {request}"
    return Program([*plain.argv[:-1], line], plain.cwd, plain.env)


def _all_ssh(lab: Homelab, names: Sequence[str]) -> Timed:
    return lambda: _together([ssh(lab, name) for name in names])


def _status_of(lab: Homelab, amount: int) -> Program:
    """`inv status` with a hosts.yaml of the first `amount` hosts."""
    everything = yaml.safe_load((lab.mini.home / ".config" / "mlxops" / "hosts.yaml").read_text(encoding="utf-8"))
    hosts = dict(list(everything["hosts"].items())[:amount])
    path = lab.folder / f"hosts-{amount}.yaml"
    path.write_text(yaml.safe_dump({"default": "studio", "hosts": hosts}, sort_keys=False), encoding="utf-8")
    made = inv(lab, "status")
    return Program(made.argv, made.cwd, {**made.env, "MLXOPS_HOSTS_FILE": str(path)})


def _together(programs: list[Program]) -> float:
    """Seconds until all of them have ended, all started at once."""
    null = subprocess.DEVNULL
    began = time.perf_counter()
    with ExitStack() as stack:
        running = [
            stack.enter_context(
                subprocess.Popen(each.argv, cwd=each.cwd, env=each.env, stdin=null, stdout=null, stderr=null)
            )
            for each in programs
        ]
        ended = [process.wait(LONG) for process in running]
    took = time.perf_counter() - began
    if any(ended):
        raise BenchFailed(f"{' '.join(programs[0].argv)} and its like ended with {ended}")
    return took


@contextmanager
def unanswered(address: str, port: int) -> Iterator[None]:
    """A host that answers nothing at all: a listener whose queue is full, so that no further connection is taken."""
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
    Contest("poll", "one more look on an open connection", "look", "ssh", Limit({"ssh": 0.25}), 7, _poll),
    Contest(
        "fleet", f"inv status, {FLEET} hosts", "inv status", f"{FLEET} ssh", Limit({f"{FLEET} ssh": 1.0}), 5, _fleet
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
