"""Real OpenSSH servers and a client configuration of their own, in a folder that the test throws away."""

from __future__ import annotations

import getpass
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import pytest

from tests.lab.ports import free_port
from tests.lab.service import Service
from tests.lab.world import descendants, wait_until, with_variable

START_SECONDS = 20.0


def missing(what: str) -> NoReturn:
    """Report that a part which a test needs is missing: skip the test, or fail it in CI, which promises every part."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing, and CI=true promises it")
    pytest.skip(f"{what} is missing")


def program(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin:/usr/bin")
    return found or missing(f"{name} (Debian and Ubuntu: apt-get install openssh-server openssh-client)")


def keygen(path: Path, kind: str = "ed25519", *, passphrase: str = "", replace: bool = False) -> Path:
    """A new private key at `path`, the public one beside it."""
    if replace:
        path.unlink(missing_ok=True)
    command = [program("ssh-keygen"), "-q", "-t", kind, "-N", passphrase, "-C", "lab", "-f", str(path)]
    if kind == "rsa":
        command += ["-b", "2048"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    return path


def public(path: Path) -> str:
    """`ssh-ed25519 AAAA...`, without the comment."""
    return " ".join(path.with_name(f"{path.name}.pub").read_text().split()[:2])


def certify(authority: Path, key: Path, names: str, *options: str, to: Path) -> Path:
    """Write a certificate for `key` to `to`; `-h` among the options makes it one for hosts. "" means all names."""
    named = ["-n", names] if names else []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "key.pub"
        copy.write_bytes(key.with_name(f"{key.name}.pub").read_bytes())
        command = [program("ssh-keygen"), "-q", "-s", str(authority), "-I", "lab", *named, *options, str(copy)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
        to.write_bytes((Path(folder) / "key-cert.pub").read_bytes())
    return to


class Sshd(Service):
    """One sshd on a port that the system chose.

    `env` is set for every session, over what the account says: HOME, for instance. `extra` goes to the top of
    its configuration, where OpenSSH lets the first value win. `shell` is the account's login shell on it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        address: str = "127.0.0.1",
        env: Mapping[str, str] = {},
        extra: str = "",
        client_key: Path | None = None,
        shell: str | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.address = address
        self.port = 0
        self.user = getpass.getuser()
        self.log = folder / "log"
        self.env = dict(env)
        self.extra = extra
        self.shell = shell
        self.key_file = folder / "host_key"
        self.client_key = client_key or keygen(folder / "client_key")
        if not self.key_file.exists():
            keygen(self.key_file)
        self._mark = ("LAB_SSHD", secrets.token_hex(8))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def host_key(self) -> str:
        """The public line: `ssh-ed25519 AAAA...`."""
        return public(self.key_file)

    @property
    def known_hosts(self) -> str:
        """The line that a client's known_hosts would have."""
        return f"[{self.address}]:{self.port} {self.host_key}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Listen, on the same port as before if there was one. Returns when connections are accepted."""
        if os.geteuid() == 0 and Path("/run").is_dir():
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # the compiled-in privilege separation directory
        for _ in range(10):
            port = self.port or free_port(self.address)
            if self._start_on(port):
                self.port = port
                return
        raise AssertionError(f"sshd does not start:\n{self.log.read_text()}")

    def stop(self) -> None:
        """End it and everything that its sessions started: what is below it, and orphans by their environment.

        A process that built an environment of its own is not found; who tests one cleans it up.
        """
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGSTOP)  # no new sessions while the old ones are counted
        children = {*{below.pid for below in descendants(process.pid)}, *with_variable(*self._mark)}
        process.kill()
        process.wait()
        for pid in children:
            _kill(pid)

    def rekey(self) -> None:
        """The same address with another host key, as after a reinstallation, or with an impostor."""
        self.stop()
        keygen(self.key_file, replace=True)
        self.start()

    def kill_sessions(self) -> None:
        """SIGKILL to everything below the listener: connections break off, the listener goes on."""
        for process in descendants(self.pid):
            _kill(process.pid)

    def kill_connections(self) -> None:
        """SIGKILL to the processes that hold the connections, and not to what runs in them."""
        for process in descendants(self.pid):
            if "sshd" in process.command.split()[0]:  # it names itself after its session
                _kill(process.pid)

    def _start_on(self, port: int) -> bool:
        config = self.folder / "sshd_config"
        authorized = self.folder / "authorized_keys"
        authorized.write_text(public(self.client_key) + "\n")
        authorized.chmod(0o600)
        lines = [
            self.extra,
            f"ListenAddress {self.address}",
            f"Port {port}",
            f"HostKey {self.key_file}",
            f"AuthorizedKeysFile {authorized}",
            "PidFile none",
            "StrictModes no",
            "UsePAM no",
            "UseDNS no",
            "PermitRootLogin prohibit-password",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PrintLastLog no",
            "LogLevel VERBOSE",
            "MaxStartups 200",
            "MaxAuthTries 20",
        ]
        lines.append("SetEnv " + " ".join(f'"{key}={value}"' for key, value in [*self.env.items(), self._mark]))
        config.write_text("\n".join(lines) + "\n")
        self.log.write_text("")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._with_shell(), program("sshd"), "-D", "-f", str(config), "-E", str(self.log)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while "Server listening on" not in self.log.read_text():
            if self._process.poll() is not None:
                if "Address already in use" in self.log.read_text():
                    return False
                raise AssertionError(f"sshd does not start:\n{self.log.read_text()}")
            if time.monotonic() > deadline:
                self.stop()
                raise AssertionError(f"sshd does not listen:\n{self.log.read_text()}")
            time.sleep(0.005)
        return True

    def _with_shell(self) -> list[str]:
        """A command in front of sshd for which the account has another login shell; this machine's has not."""
        if self.shell is None:
            return []
        if os.geteuid() != 0 or shutil.which("unshare") is None:
            pytest.skip("another login shell for an account takes root and a mount namespace")
        passwd = self.folder / "passwd"
        lines = Path("/etc/passwd").read_text().splitlines()
        rows = [line.split(":") for line in lines]
        passwd.write_text(
            "\n".join(":".join([*row[:6], self.shell] if row[0] == self.user else row) for row in rows) + "\n"
        )
        mount = 'mount --bind "$0" /etc/passwd && exec "$@"'
        return [program("unshare"), "-m", "sh", "-c", mount, str(passwd)]


class SshClient:
    """What `ssh NAME` means in a test: a configuration, a known_hosts file, and an `ssh` that uses them.

    OpenSSH takes its files from the account's home directory and not from $HOME, so the `ssh` in `bin` is a
    wrapper that adds `-F`.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.config = folder / "config"
        self.known_hosts = folder / "known_hosts"
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.config.write_text("")
        self.known_hosts.write_text("")
        wrapper = self.bin / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {shlex.quote(program("ssh"))} -F {shlex.quote(str(self.config))} "$@"\n')
        wrapper.chmod(0o755)

    def host(self, name: str, sshd: Sshd, *lines: str, known: bool = True) -> None:
        """Add an alias; `lines` come first, so they win. `known`: the host key was accepted before."""
        self.block(
            name,
            sshd,
            *lines,
            f"IdentityFile {sshd.client_key}",
            "IdentitiesOnly yes",
            "IdentityAgent none",
            known=known,
        )

    def block(self, name: str, sshd: Sshd, *lines: str, known: bool = True) -> None:
        """The same without a key: who logs in, and how, is for `lines` to say."""
        block = [
            f"Host {name}",
            *lines,
            f"HostName {sshd.address}",
            f"Port {sshd.port}",
            f"User {sshd.user}",
            f"UserKnownHostsFile {self.known_hosts}",
            "GlobalKnownHostsFile /dev/null",
        ]
        with self.config.open("a") as config:
            config.write("\n  ".join(block) + "\n\n")
        if known:
            self.know(sshd.known_hosts)

    def know(self, line: str) -> None:
        with self.known_hosts.open("a") as known_hosts:
            known_hosts.write(line + "\n")

    @property
    def path(self) -> str:
        """A PATH on which `ssh` is the wrapper."""
        return f"{self.bin}:{os.environ.get('PATH', '')}"


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it ended by itself


class SshAgent(Service):
    """A real ssh-agent of its own."""

    def __init__(self) -> None:
        # Unix paths are short on macOS.
        self.path = Path(f"/tmp/mlxops-agent-{os.getpid()}-{secrets.token_hex(4)}")
        self._process: subprocess.Popen[bytes] | None = None

    def add(self, key: Path, *options: str) -> None:
        """Put a key into it, and the certificate beside the key's file if there is one."""
        self._ssh_add("-q", *options, str(key))

    def remove(self, public_key: Path) -> None:
        self._ssh_add("-q", "-d", str(public_key))

    def clear(self) -> None:
        self._ssh_add("-q", "-D")

    def _ssh_add(self, *words: str) -> None:
        environ = {**os.environ, "SSH_AUTH_SOCK": str(self.path)}
        argv = [program("ssh-add"), *words]
        subprocess.run(argv, env=environ, check=True, stdin=subprocess.DEVNULL, capture_output=True)

    def start(self) -> None:
        argv = [program("ssh-agent"), "-D", "-a", str(self.path)]
        self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        wait_until(self.path.exists, START_SECONDS, "ssh-agent's socket")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        self.path.unlink(missing_ok=True)
