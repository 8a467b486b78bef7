"""What the integration tests do and look at, in words: asking, over SSH or locally, and seeing what came of it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.lab import leaks, models
from tests.lab.homelab import CHECKOUT, Completed, Homelab, Studio
from tests.lab.run import running, script
from tests.lab.world import Process, can_bind, listeners, wait_until

WAYS = ("ssh", "local")
FAKE = Path(__file__).with_name("lab") / "fakeengine.py"
REPO, OTHER, BROKEN = "tiny-org/tiny-qwen3", "tiny-org/tiny-llama", "tiny-org/tiny-broken"
_MODELS = {REPO: models.QWEN, OTHER: models.LLAMA, BROKEN: models.BROKEN}


@dataclass(frozen=True)
class Ask:
    """Asks the lab's studio: from the Mini, or on the studio itself. The command line is the same but for --local."""

    lab: Homelab
    way: str

    @property
    def studio(self) -> Studio:
        return self.lab.studio

    @property
    def port(self) -> int:
        """The first slot's; its alias is jerry-xl."""
        return self.lab.studio.ports[0]

    def __call__(self, *arguments: object, env: Mapping[str, str] | None = None, timeout: float = 60.0) -> Completed:
        words = [str(argument) for argument in arguments]
        if self.way == "ssh":
            return self.lab.mini.inv(*words, env=env, timeout=timeout)
        return self.studio.mlxctl(*words, env=env, timeout=timeout)

    def result(self, *arguments: object) -> Any:
        """What a change that succeeds came to."""
        return self.document(*arguments)["result"]

    def document(self, *arguments: object) -> Any:
        """The host's row of the JSON document of a command that succeeds."""
        answer = self(*arguments, "--json").ok()
        (host,) = answer.json["hosts"]
        assert answer.json["ok"] and host["reachable"] and host["error"] is None, str(answer)
        return host

    def error(self, status: int, *arguments: object, env: Mapping[str, str] | None = None) -> Any:
        """The error of a command that fails with this exit status."""
        answer = self(*arguments, "--json", env=env)
        assert answer.exit == status, str(answer)
        return error_of(answer)

    def row(self, port: int | None = None) -> Any:
        """What `status` says of a port (default: the first)."""
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
    """The one error of a JSON document: of the command, or of its host. It says what, why or what next, and its exit
    status is the command's."""
    document = answer.json
    assert document["schema"] == 1 and document["ok"] is False, str(answer)
    error = document.get("error") or next(host["error"] for host in document["hosts"] if host["error"])
    assert error["exit"] == answer.exit and error["code"] and error["message"] and error["hint"], str(answer)
    return error


def finish(process: subprocess.Popen[str], timeout: float = 30.0) -> Completed:
    """The end of what `Ask.running` started."""
    stdout, stderr = process.communicate(timeout=timeout)
    return Completed(tuple(map(str, process.args)), process.returncode, stdout, stderr)  # type: ignore[arg-type]


def with_fake(lab: Homelab, host: str = "studio") -> Homelab:
    """From now on this host of the lab has the misbehaving engine."""
    lab.configure(host, launch={"mlx-lm": [sys.executable, "-I", "-S", str(FAKE)]})
    return lab


def install(studio: Studio, *repos: str) -> None:
    for repo in repos or (REPO,):
        studio.install(repo, _MODELS[repo])


def register(studio: Studio, name: str, mode: str = "ok", *, repo: str = REPO, **how: object) -> None:
    """A hand-written entry of a model that is in the cache; the fake engine will serve it in this mode."""
    path = studio.install(repo, _MODELS[repo])
    entry = {"repo_id": repo, "model_id": repo, "cache_path": str(path), "format": "mlx", "port": None}
    document: Any = studio.registry() if studio.registry_path.exists() else {"version": 1, "models": {}}
    args = ["--act", mode] if mode != "ok" else []
    args += [word for key in ("until", "only") if key in how for word in (f"--{key}", str(how.pop(key)))]
    document["models"][name] = entry | ({"args": args} if args else {}) | how
    studio.registry_path.write_text(json.dumps(document, indent=2), encoding="utf-8")


def port_of(studio: Studio, name: str) -> int | None:
    """Where the registry on disk says that the model is."""
    port: int | None = studio.registry()["models"][name]["port"]
    return port


def assigned(studio: Studio) -> dict[str, int]:
    """The assignments that the registry on disk has."""
    return {name: entry["port"] for name, entry in studio.registry()["models"].items() if entry["port"] is not None}


def listener(studio: Studio, port: int) -> int | None:
    """The pid of the process of this host that listens on the port."""
    own = {process.pid for process in studio.processes()}
    return next((pid for address, at, pid in listeners(own) if (address, at) == (studio.address, port)), None)


def group_of(pgid: int) -> set[int]:
    """The living members of a process group; zombies hold nothing."""
    found = set()
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == pgid and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


def words_of(studio: Studio, port: int, alias: str) -> str:
    """What the model behind a port says when it is asked under the alias."""
    answer = studio.completion(port, alias, max_tokens=12)
    assert answer["model"] == alias
    message: str = answer["choices"][0]["message"]["content"]
    return message


def models_listed(studio: Studio, port: int) -> Any:
    with urllib.request.urlopen(f"http://{studio.address}:{port}/v1/models", timeout=10) as answer:
        return json.load(answer)


def nothing_runs(studio: Studio, *ports: int) -> None:
    """No process of this host is left, and its ports are free."""
    quiet(studio)
    for port in ports or studio.ports:
        assert can_bind(studio.address, port), f"port {port} is held"


def quiet(studio: Studio) -> None:
    """An SSH session's own processes end a moment after the command."""
    try:
        wait_until(lambda: not studio.processes(), 5, "no process")
    except TimeoutError:
        left: set[Process] = studio.processes()
        raise AssertionError(f"left behind: {'; '.join(map(str, left))}") from None


def servers(studio: Studio) -> set[Process]:
    """What runs there but agents, which end a moment after the command."""
    return {process for process in studio.processes() if "-m mlxops.agent" not in process.command}


def tree(folder: Path) -> dict[str, object]:
    """Everything below a folder, so that any change of it shows: times, sizes, modes, links, contents.

    Without the servers' own logs: each request to a server makes it write.
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
