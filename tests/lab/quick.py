"""Hosts whose servers start at once: the fake engine, and models without weights for it, which loads nothing."""

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

from tests.lab.homelab import Completed, Homelab
from tests.lab.run import running, script

ENGINE = "mlx_lm.server"
"""The engine's name, and so a word in the command of each of its processes."""
MODELS = ("org/alpha", "org/beta", "org/gamma")


def install_engine(folder: Path) -> Path:
    """Install the fake engine as a program. Return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / ENGINE
    if program.exists():
        return program  # it may run just now
    source = Path(__file__).with_name("engine.py").read_text(encoding="utf-8")
    program.write_text(f"#!{sys.executable} -IS\n{source}", encoding="utf-8")
    program.chmod(0o755)
    return program


def with_fake(lab: Homelab, host: str = "studio", *options: str) -> Homelab:
    """Give this host the fake engine, with these options, for all servers that are started later."""
    studio = next(studio for studio in lab.studios if studio.name == host)
    lab.configure(host, launch={"mlx-lm": [str(install_engine(studio.folder / "bin")), *options]})
    return lab


class HeldEngine:
    """The fake engine on the first host. A server listens once its port is let."""

    def __init__(self, lab: Homelab) -> None:
        self._folder = lab.studio.folder
        with_fake(lab, lab.studio.name, "--fake-until", str(self._folder / "let-{port}"))

    def let(self, *ports: int) -> None:
        for port in ports:
            (self._folder / f"let-{port}").touch()

    def hold(self, *ports: int) -> None:
        """Hold those that start from now on."""
        for port in ports:
            (self._folder / f"let-{port}").unlink()


class QuickHost:
    """A host with the fake engine and three models for it."""

    def __init__(self, lab: Homelab) -> None:
        self.lab = lab
        self.studio = lab.studio
        self.ports = lab.studio.ports
        self.program = self.studio.folder / "bin" / ENGINE
        self.snapshots = {name: snapshot(self.studio.hub, name) for name in MODELS}
        self.engine()

    def engine(self, *options: str) -> None:
        """Set the behaviour of all servers that are started later; see engine.py."""
        with_fake(self.lab, self.studio.name, *options)

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


def snapshot(hub: Path, repo_id: str) -> Path:
    """A complete MLX snapshot without a model in it."""
    repo = hub / f"models--{repo_id.replace('/', '--')}"
    sha = repo_id.encode().hex().ljust(40, "0")[:40]
    folder = repo / "snapshots" / sha
    folder.mkdir(parents=True)
    header = json.dumps({"w": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    config = {"model_type": "qwen3", "architectures": ["X"], "quantization": {"group_size": 64, "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    (folder / "README.md").write_text("---\nlibrary_name: mlx\ntags:\n- mlx\n---\n", encoding="utf-8")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(sha, encoding="utf-8")
    return folder
