"""One conversation with a real agent, recorded: the request, the answer, and how long the agent took.

The recorder stands in for the host's Python, so this works for any build and any wire form.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.contest import Program
from tests.benchmarks.scene import hosts_file
from tests.lab.homelab import Homelab

RECORDINGS = 3
"""The fastest of these counts: the others waited for something else."""
_RECORDER = """\
import json, subprocess, sys, time
folder, python, *arguments = sys.argv[1:]
request = sys.stdin.buffer.readline()
began = time.perf_counter()
agent = subprocess.run([python, *arguments], input=request, stdout=subprocess.PIPE, check=True)
seconds = time.perf_counter() - began
for name, data in (("request", request), ("answer", agent.stdout), ("seconds", json.dumps(seconds).encode())):
    with open(f"{folder}/{name}", "wb") as file:
        file.write(data)
sys.stdout.buffer.write(agent.stdout)
"""


@dataclass(frozen=True)
class Recording:
    """`request` and `answer` are files; `seconds` is the agent's wall time, from its start to its end."""

    request: Path
    answer: Path
    seconds: float

    def player(self, seconds: float) -> list[str]:
        """Write a program that gives the answer after this delay; return its argv, for `python:`."""
        path = self.answer.with_name("player.sh")
        # A shell, because it starts in about a millisecond. It ignores the request.
        path.write_text(f"sleep {seconds:.3f}\nexec cat {shlex.quote(str(self.answer))}\n", encoding="utf-8")
        return ["/bin/sh", str(path)]


def record(lab: Homelab, status: Program, agent_python: str, folder: Path) -> Recording:
    """Run `status`, an `inv status` of one host, over SSH with the agent of `agent_python`, and record it."""
    folder.mkdir()
    recorder = folder / "recorder.py"
    recorder.write_text(_RECORDER, encoding="utf-8")
    python = [sys.executable, "-S", str(recorder), str(folder), agent_python]
    hosts = hosts_file(lab, folder / "hosts.yaml", amount=1, python=python)
    program = Program(status.argv, status.cwd, {**status.env, "MLXOPS_HOSTS_FILE": str(hosts)})
    seconds = []
    for _ in range(RECORDINGS + 1):  # the first one fills caches
        program()
        seconds.append(float(json.loads((folder / "seconds").read_text())))
    return Recording(folder / "request", folder / "answer", min(seconds))
