"""Steps of the integration tests: run commands over SSH or locally, and check their effects."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.lab import leaks, models
from tests.lab.homelab import CHECKOUT, Completed, Homelab, Studio
from tests.lab.quick import with_fake as with_fake
from tests.lab.run import running, script
from tests.lab.world import Process, can_bind, listeners, wait_until

WAYS = ("ssh", "local")
REPO, OTHER, BROKEN = "tiny-org/tiny-qwen3", "tiny-org/tiny-llama", "tiny-org/tiny-broken"
ENDED_BY_SIGINT = {0, -signal.SIGINT, -signal.SIGABRT}
"""How a real mlx_lm.server ends: by itself, or with SIGABRT while it cleans up."""
_MODELS = {REPO: models.QWEN, OTHER: models.LLAMA, BROKEN: models.BROKEN}


@dataclass(frozen=True)
class Ask:
    """Run commands for the lab's studio, from the Mini or on the studio itself with --local."""

    lab: Homelab
    way: str

    @property
    def studio(self) -> Studio:
        return self.lab.studio

    @property
    def port(self) -> int:
        """The port of the first slot. Its alias is jerry-xl."""
        return self.lab.studio.ports[0]

    def __call__(self, *arguments: object, env: Mapping[str, str] | None = None, timeout: float = 60.0) -> Completed:
        words = [str(argument) for argument in arguments]
        if self.way == "ssh":
            return self.lab.mini.inv(*words, env=env, timeout=timeout)
        return self.studio.mlxctl(*words, env=env, timeout=timeout)

    def result(self, *arguments: object) -> Any:
        """Return the result of a change that must succeed."""
        return self.document(*arguments)["result"]

    def document(self, *arguments: object) -> Any:
        """Return the host's row of the JSON document. The command must succeed."""
        answer = self(*arguments, "--json").ok()
        (host,) = answer.json["hosts"]
        assert answer.json["ok"] and host["reachable"] and host["error"] is None, str(answer)
        return host

    def error(self, status: int, *arguments: object, env: Mapping[str, str] | None = None) -> Any:
        """Return the error of a command that must fail with this exit status."""
        answer = self(*arguments, "--json", env=env)
        assert answer.exit == status, str(answer)
        return error_of(answer)

    def row(self, port: int | None = None) -> Any:
        """Return the row of `status` for a port (default: the first)."""
        rows = self.document("status")["ports"]
        return next(row for row in rows if row["port"] == (port or self.port))

    @contextmanager
    def running(self, *arguments: object) -> Iterator[subprocess.Popen[str]]:
        """Start the same command. It is killed at the end of the block."""
        words = [str(argument) for argument in arguments]
        if self.way == "ssh":
            argv, cwd, env = [script("inv"), *words], CHECKOUT, self.lab.mini.env
        else:
            argv, cwd = [script("mlxctl"), *words, "--local"], self.studio.home
            env = {"PATH": os.defpath, "TMPDIR": str(self.studio.folder / "tmp"), **self.studio.env}
        with running(argv, cwd, env) as process:
            yield process


def error_of(answer: Completed) -> Any:
    """Return the error of a JSON document, and check that it is complete and has the command's exit status."""
    document = answer.json
    assert document["schema"] == 1 and document["ok"] is False, str(answer)
    error = document.get("error") or next(host["error"] for host in document["hosts"] if host["error"])
    assert error["exit"] == answer.exit and error["code"] and error["message"] and error["hint"], str(answer)
    return error


def finish(process: subprocess.Popen[str], timeout: float = 30.0) -> Completed:
    """Wait for the end of a command that `Ask.running` started."""
    stdout, stderr = process.communicate(timeout=timeout)
    return Completed(tuple(map(str, process.args)), process.returncode, stdout, stderr)  # type: ignore[arg-type]


def install(studio: Studio, *repos: str) -> None:
    for repo in repos or (REPO,):
        studio.install(repo, _MODELS[repo])


BEHAVIOUR = {
    "exit0": ("--fake-exit", "0", "--fake-words", "Application startup failed. Exiting."),
    "exit1": ("--fake-exit", "1", "--fake-words", r"\e[31mValueError: Missing 1 parameters\e[0m\a"),
    "stubborn": ("--fake-ignore", "int,term"),
    "heavy": ("--fake-memory", "1000"),
    "heavy-child": ("--fake-act", "family", "--fake-memory", "1000"),
}
"""Names for options of the fake engine (lab/engine.py); any other name is one of its acts."""


def register(studio: Studio, name: str, behaviour: str = "ok", *, repo: str = REPO, **how: object) -> None:
    """Write a registry entry of a cached model. The fake engine serves it with this behaviour."""
    path = studio.install(repo, _MODELS[repo])
    entry = {"repo_id": repo, "model_id": repo, "cache_path": str(path), "format": "mlx", "port": None}
    document: Any = studio.registry() if studio.registry_path.exists() else {"version": 1, "models": {}}
    args = list(BEHAVIOUR.get(behaviour, ("--fake-act", behaviour))) if behaviour != "ok" else []
    args += [word for key in ("until", "only") if key in how for word in (f"--fake-{key}", str(how.pop(key)))]
    document["models"][name] = entry | ({"args": args} if args else {}) | how
    studio.registry_path.write_text(json.dumps(document, indent=2), encoding="utf-8")


def port_of(studio: Studio, name: str) -> int | None:
    """Return the port of the model in the registry on disk."""
    port: int | None = studio.registry()["models"][name]["port"]
    return port


def assigned(studio: Studio) -> dict[str, int]:
    """Return the assignments of the registry on disk."""
    return {name: entry["port"] for name, entry in studio.registry()["models"].items() if entry["port"] is not None}


def listener(studio: Studio, port: int) -> int | None:
    """Return the pid of the host's process that listens on the port."""
    own = {process.pid for process in studio.processes()}
    return next((pid for address, at, pid in listeners(own) if (address, at) == (studio.address, port)), None)


def group_of(pgid: int) -> set[int]:
    """Return the living members of a process group, without zombies."""
    found = set()
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == pgid and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


def words_of(studio: Studio, port: int, alias: str) -> str:
    """Return the text of a completion under the alias."""
    answer = studio.completion(port, alias, max_tokens=12)
    assert answer["model"] == alias
    message: str = answer["choices"][0]["message"]["content"]
    return message


def models_listed(studio: Studio, port: int) -> Any:
    with urllib.request.urlopen(f"http://{studio.address}:{port}/v1/models", timeout=10) as answer:
        return json.load(answer)


def nothing_runs(studio: Studio, *ports: int) -> None:
    """Check that no process of this host is left, and that its ports are free."""
    quiet(studio)
    for port in ports or studio.ports:
        assert can_bind(studio.address, port), f"port {port} is held"


def quiet(studio: Studio) -> None:
    """Wait until no process of this host is left. Those of an SSH session end a moment after the command."""
    try:
        wait_until(lambda: not studio.processes(), 30, "no process")
    except TimeoutError:
        left: set[Process] = studio.processes()
        raise AssertionError(f"left behind: {'; '.join(map(str, left))}") from None


def servers(studio: Studio) -> set[Process]:
    """Return the host's processes without agents, which end a moment after the command."""
    return {process for process in studio.processes() if "-m mlxops.agent" not in process.command}


def tree(folder: Path) -> dict[str, object]:
    """Return times, modes, links and contents of everything below a folder, so that any change shows.

    The servers' logs are left out: each request to a server adds to them.
    """
    return {
        str(path.relative_to(folder)): _seen(path)
        for path in leaks.walk(folder)
        if not (path.parent.name == "logs" and path.suffix == ".log")
    }


def _seen(path: Path) -> object:
    status = path.lstat()
    seen: list[object] = [status.st_mtime_ns, status.st_mode, status.st_ino]
    if path.is_symlink():
        seen.append(os.readlink(path))
    elif path.is_file():
        seen.append(hashlib.sha256(path.read_bytes()).hexdigest())
    return seen


def argv_of(pid: int) -> Sequence[str]:
    return psutil.Process(pid).cmdline()
