"""Where programs are timed: a homelab without what would distort the comparison.

- Key exchange: the hosts offer curve25519-sha256 only. OpenSSH and paramiko each prefer others, of other costs.
- Login-shell files: the sessions' home directories are empty.
- Bytecode: every Python here, ours and theirs, keeps its compiled files in one folder of the benchmark. The first
  turn, which does not count, fills it.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import yaml

from tests.benchmarks.contest import BenchFailed, Program
from tests.lab import cache
from tests.lab.builds import Build, NoHistory, earlier_build, this_build
from tests.lab.homelab import CHECKOUT, Homelab, Studio, _environment, script
from tests.lab.sshd import program

PORTS = 10
KEX = "curve25519-sha256"
_ONLY_KEX = f"KexAlgorithms {KEX},{KEX}@libssh.org"
FAIR = (
    f"key exchange: {KEX} for all; the hosts offer no other",
    "login-shell files: none, the sessions' home directories are empty",
    "bytecode: compiled before the first turn that counts, for all alike",
    "turns: each program runs once a turn, so that other load on the machine disturbs all alike; ratios are medians of "
    "the turns' own ratios, with their quartiles",
    "all hosts are this machine: their agents, servers and sshds use the same processors",
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


def builds(folder: Path) -> tuple[Build, Build]:
    """Install this build and the earlier one. Raises `BenchFailed` where the clone lacks the history."""
    try:
        return this_build(folder / "this"), earlier_build(folder / "earlier")
    except NoHistory as error:
        raise BenchFailed(str(error)) from error


def hosts_file(lab: Homelab, path: Path, amount: int, **changes: object) -> Path:
    """Write a hosts.yaml of the lab's first `amount` hosts, each with `changes`."""
    everything = yaml.safe_load((lab.mini.home / ".config" / "mlxops" / "hosts.yaml").read_text(encoding="utf-8"))
    hosts = {name: host | changes for name, host in list(everything["hosts"].items())[:amount]}
    # JSON is YAML, and has no aliases for a value that occurs twice.
    path.write_text(json.dumps({"default": "studio", "hosts": hosts}, indent=2), encoding="utf-8")
    return path


def inv(
    lab: Homelab, *arguments: str, status: int = 0, hosts: Path | None = None, build: Build | None = None
) -> Program:
    """`inv` on the control node: of the checkout, or of an installed build."""
    argv, cwd = [build.script("inv") if build else script("inv"), *arguments], build.folder if build else CHECKOUT
    env = lab.mini.env | _bytecode(lab.folder.parent) | ({"MLXOPS_HOSTS_FILE": str(hosts)} if hosts else {})
    return Program(argv, cwd, env, status)


def inv_local(studio: Studio, *arguments: str, build: Build | None = None) -> Program:
    """`inv` on the host itself."""
    argv, cwd = [build.script("inv") if build else script("inv"), *arguments], build.folder if build else CHECKOUT
    return Program([*argv, "--local"], cwd, host_environment(studio))


def python(studio: Studio, code: str, *arguments: str) -> Program:
    """A program of the interpreter that runs mlxops, on the host itself."""
    return Program([sys.executable, "-c", code, *arguments], studio.home, host_environment(studio))


def host_environment(studio: Studio) -> Mapping[str, str]:
    return _environment(studio.home, studio.folder / "tmp") | studio.env


def ssh(lab: Homelab, name: str = "studio", status: int = 0) -> Program:
    """A cold connection that runs `true`."""
    return Program(["ssh", "-o", f"KexAlgorithms={KEX}", name, "true"], lab.mini.elsewhere, lab.mini.env, status)


def fabric(lab: Homelab, build: Build | None = None) -> Program:
    """A plain Invoke task that has Fabric run `true`, with the same environment as `inv` of that build."""
    folder = lab.folder / "fabric"
    folder.mkdir(exist_ok=True)
    (folder / "tasks.py").write_text(_FABRIC_TASK, encoding="utf-8")
    own = build.script("inv") if build else script("inv")
    return Program([own, "true"], folder, lab.mini.env | _bytecode(lab.folder.parent))


def pyinfra(lab: Homelab, names: Sequence[str] = ("studio",)) -> Program:
    """pyinfra running `true` on these hosts. Raises `cache.BuildFailed`."""
    inventory = lab.folder / "inventory.py"
    inventory.write_text(f"hosts = {list(names)}\n", encoding="utf-8")
    command = [str(cache.peer_venv() / "bin" / "pyinfra"), "-y", str(inventory), "exec", "--", "true"]
    return Program(command, lab.mini.elsewhere, lab.mini.env | _bytecode(lab.folder.parent))


def machine() -> dict[str, object]:
    """What the numbers depend on."""
    openssh = subprocess.run([program("ssh"), "-V"], capture_output=True, text=True, check=True).stderr
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        "load": round(load(), 2),
        "python": platform.python_version(),
        "openssh": openssh.partition(",")[0].removeprefix("OpenSSH_"),
        **{name: version(name) for name in ("fabric", "paramiko", "invoke", "huggingface_hub")},
    }


def load() -> float:
    """The load average of the last minute."""
    return os.getloadavg()[0]


def _bytecode(folder: Path) -> dict[str, str]:
    return {"PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
