"""Where things are timed: a homelab from which is taken, for all alike, what would distort the comparison.

- Key exchange: the hosts offer curve25519-sha256 only. OpenSSH and paramiko each prefer others, of other costs.
- Login-shell files: the sessions' home directories are empty.
- Bytecode: every Python here, ours and theirs, keeps its compiled files in one folder of the benchmark's own, which
  the first turn, that does not count, fills.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from tests.benchmarks.contest import Program
from tests.lab import cache
from tests.lab.homelab import CHECKOUT, Homelab, Studio, _environment, script
from tests.lab.sshd import program

PORTS = 10
KEX = "curve25519-sha256"
_ONLY_KEX = f"KexAlgorithms {KEX},{KEX}@libssh.org"
FAIR = (
    f"key exchange: {KEX} for all; the hosts offer no other",
    "login-shell files: none, the sessions' home directories are empty",
    "bytecode: compiled before the first turn that counts, for all alike",
    "all hosts are this machine: what their agents, servers and sshds do takes of the same processors",
)
_FABRIC_TASK = """\
from fabric import Connection
from invoke import task


@task
def true(c):
    Connection("studio").run("true", in_stream=False)
"""


@contextmanager
def homelab(folder: Path, *, studios: int = 1, hub_url: str | None = None) -> Iterator[Homelab]:
    lab = Homelab(folder / "lab", studios=studios, ports=PORTS, hub_url=hub_url)
    for studio in lab.studios:
        studio.env |= _bytecode(folder)
        studio.sshd_lines = _ONLY_KEX
    with lab:
        yield lab


def inv(lab: Homelab, *words: str, status: int = 0) -> Program:
    """On the control node, in the checkout."""
    return Program([script("inv"), *words], CHECKOUT, lab.mini.env | _bytecode(lab.folder.parent), status)


def inv_local(studio: Studio, *words: str) -> Program:
    """On the host itself."""
    env = _environment(studio.home, studio.folder / "tmp") | studio.env
    return Program([script("inv"), *words, "--local"], CHECKOUT, env)


def python(studio: Studio, code: str, *arguments: str) -> Program:
    """A program of the interpreter that runs mlxops, on the host itself."""
    env = _environment(studio.home, studio.folder / "tmp") | studio.env
    return Program([sys.executable, "-c", code, *arguments], studio.home, env)


def ssh(lab: Homelab, name: str = "studio", status: int = 0) -> Program:
    """A cold connection, and nothing done with it."""
    return Program(["ssh", "-o", f"KexAlgorithms={KEX}", name, "true"], lab.mini.elsewhere, lab.mini.env, status)


def fabric(lab: Homelab) -> Program:
    """What a plain Invoke task costs that has Fabric run `true`."""
    folder = lab.folder / "fabric"
    folder.mkdir(exist_ok=True)
    (folder / "tasks.py").write_text(_FABRIC_TASK, encoding="utf-8")
    return Program([script("inv"), "true"], folder, lab.mini.env | _bytecode(lab.folder.parent))


def pyinfra(lab: Homelab, names: Sequence[str] = ("studio",)) -> Program:
    """The same by pyinfra. Raises `cache.BuildFailed`."""
    inventory = lab.folder / "inventory.py"
    inventory.write_text(f"hosts = {list(names)}\n", encoding="utf-8")
    command = [str(cache.peer_venv() / "bin" / "pyinfra"), "-y", str(inventory), "exec", "--", "true"]
    return Program(command, lab.mini.elsewhere, lab.mini.env | _bytecode(lab.folder.parent))


def machine() -> dict[str, object]:
    """What the numbers depend on."""
    said = subprocess.run([program("ssh"), "-V"], capture_output=True, text=True, check=True).stderr
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        "load": round(load(), 2),
        "python": platform.python_version(),
        "openssh": said.partition(",")[0].removeprefix("OpenSSH_"),
        **{name: version(name) for name in ("fabric", "paramiko", "invoke", "huggingface_hub")},
    }


def load() -> float:
    """How many processes wanted a processor over the last minute, on average."""
    return os.getloadavg()[0]


def _bytecode(folder: Path) -> dict[str, str]:
    return {"PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
