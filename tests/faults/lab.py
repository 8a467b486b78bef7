"""A Studio of the lab with the quick fake engine: whole commands, and servers that start at once."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.faults.snapshots import MODELS, snapshot
from tests.lab.homelab import Completed, Homelab
from tests.lab.run import running, script

__all__ = ["MODELS", "QuickHost"]


class QuickHost:
    def __init__(self, lab: Homelab) -> None:
        self.lab = lab
        self.studio = lab.studio
        self.ports = lab.studio.ports
        self.program = install_engine(self.studio.folder / "bin")
        self.snapshots = {name: snapshot(self.studio.hub, name) for name in MODELS}
        self.engine()

    def engine(self, *options: str) -> None:
        """Set the behaviour of all servers that are started later; see engine.py."""
        self.lab.configure(launch={"mlx-lm": [str(self.program), *options]}, memory="1000 GB")

    def mlxctl(self, *words: str) -> Completed:
        return self.studio.mlxctl(*words)

    def status(self, *flags: str) -> Any:
        return self.mlxctl("status", "--json", *flags).ok().json["hosts"][0]

    @contextmanager
    def start(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        """Run `mlxctl ... --local` while the block runs."""
        with self.running(script("mlxctl"), *words, "--local") as process:
            yield process

    @contextmanager
    def running(self, *argv: str) -> Iterator[subprocess.Popen[str]]:
        """Run a program of this host while the block runs. Discard its output."""
        null = subprocess.DEVNULL
        with running(argv, self.studio.home, self.studio.environment, stdout=null, stderr=null) as process:
            yield process

    def by_hand(self, model: str, port: int, *options: str) -> str:
        """Return a shell command that starts a server in the background, as a person would."""
        argv = [str(self.program), "--model", str(self.snapshots[model]), "--host", self.studio.address]
        return shlex.join([*argv, "--port", str(port), *options]) + " &"

    def process(self, words: str) -> psutil.Process | None:
        """Return a process of this host with these words in its command."""
        for seen in self.studio.processes():
            if words in seen.command:
                return psutil.Process(seen.pid)
        return None

    def edit(self, model: str, **fields: object) -> None:
        """Edit the registry as a person does in an editor."""
        document = json.loads(self.studio.registry_path.read_text(encoding="utf-8"))
        document["models"][model] |= fields
        self.studio.registry_path.write_text(json.dumps(document, indent=2), encoding="utf-8")


def install_engine(folder: Path) -> Path:
    """Install the fake engine as a program. Return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "mlx_lm.server"
    source = Path(__file__).with_name("engine.py").read_text(encoding="utf-8")
    program.write_text(f"#!{sys.executable} -IS\n{source}", encoding="utf-8")
    program.chmod(0o755)
    return program
