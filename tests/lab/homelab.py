"""The homelab in a box: a control node and managed hosts on loopback, made of the real parts.

A `Studio` is a managed host: an sshd on a loopback address of its own, a home directory, a Hugging Face cache. The
`Mini` is the control node: a home directory with an SSH configuration and a hosts.yaml. All of it lies in one
folder; nothing is shared with the user who runs the tests but the accounts' names.

    with Homelab(tmp_path) as lab:
        lab.studio.install("tiny-org/tiny-qwen3", models.QWEN)
        lab.mini.inv("load", "--model", "tiny-org/tiny-qwen3", "--port", str(lab.studio.ports[0]))
"""

from __future__ import annotations

import getpass
import itertools
import json
import os
import signal
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.lab import cache, models
from tests.lab.run import TIMEOUT
from tests.lab.run import Completed as Completed
from tests.lab.run import TimedOut as TimedOut
from tests.lab.run import run as run
from tests.lab.run import script as script
from tests.lab.service import Service
from tests.lab.sshd import SshClient, Sshd, keygen
from tests.lab.world import (
    Process,
    alive,
    can_bind,
    end,
    free_ports,
    listeners,
    listening,
    processes_below,
    wait_until,
)

CHECKOUT = Path(__file__).resolve().parents[2]
ALIASES = ("jerry-xl", "jerry-l", "jerry-m")
"""The slots' aliases; ports after these have none."""
PORTS = 4
PATIENCE = 20.0
"""Seconds that the end of a lab waits for what is just about to end."""

_numbers = itertools.count(1)


class LabUnavailable(Exception):
    """This machine cannot hold such a lab; the message says what to do about it."""


class Studio:
    """A managed host. Its folder holds everything that runs on it except its sshd."""

    def __init__(self, name: str, folder: Path, address: str, ports: range, aliases: Sequence[str]) -> None:
        self.name = name
        self.folder = folder
        self.address = address
        self.ports = ports
        self.slots = dict(zip(ports, aliases, strict=False))
        self.home = folder / "home"
        self.hub = folder / "models" / "hub"
        self.registry_path = self.hub / "registry.json"
        self.state = folder / "state"
        self.env = {"HOME": str(self.home)}
        """What sessions and commands get on this host; add to it before `start`."""
        self.sshd_lines = ""
        """More of its sshd's configuration, which wins; set it before `start`."""
        self.sshd: Sshd
        for part in (self.home, self.hub, folder / "tmp"):
            part.mkdir(parents=True)
        self.home.chmod(0o700)

    def start(self, client_key: Path) -> None:
        self.sshd = Sshd(
            self.folder.with_name(f"{self.folder.name}-sshd"),
            address=self.address,
            env=self.env,
            extra=self.sshd_lines,
            client_key=client_key,
        )
        self.sshd.start()

    @property
    def settings(self) -> dict[str, object]:
        """Its entry of hosts.yaml."""
        return {
            "ssh": self.name,
            "address": self.address,
            "bind": self.address,
            "hub": str(self.hub),
            "registry": str(self.registry_path),
            "state": str(self.state),
            # The tests' own interpreter, in which mlxops is installed: nothing has to be deployed first.
            "python": [sys.executable],
            "engine": "mlx-lm",
            "launch": {"mlx-lm": [str(cache.engine_venv("mlx-lm") / "bin" / "mlx_lm.server")]},
            "ports": f"{self.ports[0]}-{self.ports[-1]}",
            "slots": dict(self.slots),
            # More than there is: servers of other tests, which run at the same time, count on this machine.
            "memory": "1000 GB",
        }

    @property
    def environment(self) -> dict[str, str]:
        """What commands get on this host: built, not inherited."""
        return _environment(self.home, self.folder / "tmp") | self.env

    def install(self, repo_id: str, model: str, **how: Any) -> Path:
        """Put one of the tiny models into its cache, as a finished download; returns the snapshot's folder."""
        return models.install_snapshot(self.hub, repo_id, models.tiny_models() / model, **how)

    def mlxctl(
        self,
        *arguments: str,
        stdin: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = TIMEOUT,
    ) -> Completed:
        """Run `mlxctl ... --local` on this host: without SSH, with its home directory and its hosts.yaml."""
        own = self.environment | dict(env or {})
        return run([script("mlxctl"), *arguments, "--local"], self.home, own, stdin, timeout)

    def registry(self) -> Any:
        """The registry as it is on disk."""
        return json.loads(self.registry_path.read_text(encoding="utf-8"))

    def completion(
        self, port: int, model: str, *, prompt: str = "say hello", max_tokens: int = 4, timeout: float = 30.0
    ) -> Any:
        """The answer to one small chat completion, as the gateway would ask for it."""
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens}
        request = urllib.request.Request(
            f"http://{self.address}:{port}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)

    def listening(self, port: int) -> bool:
        return listening(self.address, port)

    def processes(self) -> set[Process]:
        """Everything alive that belongs to this host's folder; not its sshd."""
        return processes_below(self.folder)

    def sweep(self) -> set[Process]:
        """Kill everything that runs on it; returns what there was."""
        found = self.processes()
        end(found)
        return found

    def stop(self, patience: float = PATIENCE) -> None:
        """Turn it off. A server on a port that the registry assigns may be running; anything else that is still
        there a moment later was left behind: it is killed, and `AssertionError` names it."""
        try:
            for server in self._served():
                _kill_group(server)
            wait_until(lambda: not self.processes(), patience, "quiet")
        except TimeoutError:
            left = self.sweep()
            assert not left, f"left behind on {self.name}: {'; '.join(map(str, left))}"
        finally:
            # Last: it ends what its sessions started, and would hide what should not have been there.
            if hasattr(self, "sshd"):
                self.sshd.stop()

    def _served(self) -> set[Process]:
        """The listeners on the ports that the registry assigns."""
        try:
            entries = self.registry()["models"].values()
            assigned = {entry.get("port") for entry in entries}
        except (OSError, ValueError, LookupError, AttributeError, TypeError):
            return set()
        own = {process.pid: process for process in self.processes()}
        return {own[pid] for address, port, pid in listeners(own) if address == self.address and port in assigned}


class Mini:
    """The control node."""

    def __init__(self, folder: Path, studios: Sequence[Studio], key: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.elsewhere = folder / "elsewhere"
        """A directory that has nothing to do with mlxops."""
        for part in (self.home, self.elsewhere, folder / "tmp"):
            part.mkdir(parents=True)
        self.key = key
        self.ssh = SshClient(self.home / ".ssh")
        for studio in studios:
            self.ssh.host(studio.name, studio.sshd)

    @property
    def env(self) -> dict[str, str]:
        """What commands get here: built, not inherited. `ssh` is the one that knows the lab's hosts."""
        env = _environment(self.home, self.folder / "tmp")
        return env | {"PATH": f"{self.ssh.bin}:{env['PATH']}"}

    def inv(
        self,
        *arguments: str,
        stdin: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = TIMEOUT,
    ) -> Completed:
        """Run `inv ...` in the checkout."""
        return run([script("inv"), *arguments], CHECKOUT, self.env | dict(env or {}), stdin, timeout)

    def mlxctl(
        self,
        *arguments: str,
        stdin: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = TIMEOUT,
    ) -> Completed:
        """Run `mlxctl ...` in a directory that has nothing to do with mlxops."""
        return run([script("mlxctl"), *arguments], self.elsewhere, self.env | dict(env or {}), stdin, timeout)

    def run(self, *argv: str, stdin: str | None = None, timeout: float = TIMEOUT) -> Completed:
        """Run any program as the control node's user would: `ssh studio true`, for instance."""
        return run(argv, self.elsewhere, self.env, stdin, timeout)


class Homelab(Service):
    """A Mini and its Studios. `hub_url` is where the Studios download from; without one they cannot."""

    def __init__(
        self,
        folder: Path,
        *,
        hub_url: str | None = None,
        studios: int = 1,
        ports: int = PORTS,
        aliases: Sequence[str] = ALIASES,
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        addresses = loopback_addresses(studios)
        block = free_ports(addresses, ports)
        names = ["studio", *(f"studio{number}" for number in range(2, studios + 1))]
        self.studios = [
            Studio(name, folder / name, address, block, aliases) for name, address in zip(names, addresses, strict=True)
        ]
        for studio in self.studios:
            # Port 9 is "discard", and nothing listens there: a forgotten download fails at once, without the internet.
            studio.env["HF_ENDPOINT"] = hub_url or "http://127.0.0.1:9"
        self._changes: dict[str, dict[str, object]] = {}
        self._gateway: dict[str, object] | None = None
        self.mini: Mini

    @property
    def studio(self) -> Studio:
        """The first one, which is also the default host."""
        return self.studios[0]

    def configure(self, host: str = "studio", **changes: object) -> None:
        """Change a host's entry of hosts.yaml, for the Mini and for the host itself. None removes a key."""
        self._changes.setdefault(host, {}).update(changes)
        self._write_hosts()

    def configure_gateway(self, **section: object) -> None:
        """The `gateway` section of hosts.yaml, for the Mini and for every host."""
        self._gateway = section
        self._write_hosts()

    def start(self) -> None:
        key = keygen(self.folder / "client_key")
        for studio in self.studios:
            studio.start(key)
        self.mini = Mini(self.folder / "mini", self.studios, key)
        self._write_hosts()

    def stop(self) -> None:
        """Turn everything off. Raises `AssertionError` if anything ran that should not have."""
        problems = []
        for studio in self.studios:
            try:
                studio.stop()
            except AssertionError as error:
                problems.append(str(error))
        if hasattr(self, "mini") and (left := processes_below(self.mini.folder)):
            end(left)
            problems.append(f"left behind on the Mini: {'; '.join(map(str, left))}")
        assert not problems, "\n".join(problems)

    def _write_hosts(self) -> None:
        hosts = {studio.name: self._entry(studio) for studio in self.studios}
        gateway = {"gateway": self._gateway} if self._gateway is not None else {}
        _write_yaml(self.mini.home, {"default": self.studio.name, "hosts": hosts, **gateway})
        for studio in self.studios:
            _write_yaml(studio.home, {"default": studio.name, "hosts": {studio.name: hosts[studio.name]}, **gateway})

    def _entry(self, studio: Studio) -> dict[str, object]:
        entry = studio.settings | self._changes.get(studio.name, {})
        if self._gateway is not None and entry.get("slots") == studio.slots:
            # Without a hold, `gateway` would warn of every alias. Builds up to 0.3.0 know only aliases.
            entry["slots"] = {port: {"alias": alias, "hold": 0} for port, alias in studio.slots.items()}
        return {key: value for key, value in entry.items() if value is not None}


def _kill_group(process: Process) -> None:
    try:
        if alive(process):
            os.killpg(os.getpgid(process.pid), signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has just ended


def _environment(home: Path, tmp: Path) -> dict[str, str]:
    user = getpass.getuser()
    return {
        "HOME": str(home),
        "TMPDIR": str(tmp),
        "USER": user,
        "LOGNAME": user,
        "SHELL": "/bin/sh",
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "LANG": "C.UTF-8" if sys.platform != "darwin" else "en_US.UTF-8",
    }


def loopback_addresses(count: int) -> list[str]:
    """Loopback addresses for `count` hosts, of which no two labs that run at the same time have one in common.

    Linux has all of 127/8. macOS has 127.0.0.1 and what the administrator added: enough for one host.
    """
    if can_bind("127.1.2.3"):
        pid = os.getpid()
        return [f"127.{1 + pid // 256 % 254}.{pid % 256}.{1 + next(_numbers) % 254}" for _ in range(count)]
    wanted = ["127.0.0.1", *(f"127.0.0.{number}" for number in range(2, count + 1))]
    for address in wanted:
        if not can_bind(address):
            raise LabUnavailable(f"the loopback address {address} (macOS: sudo ifconfig lo0 alias {address} up)")
    return wanted


def _write_yaml(home: Path, document: Mapping[str, object]) -> None:
    path = home / ".config" / "mlxops" / "hosts.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
