"""Where `ssh NAME` would go: OpenSSH itself is asked (`ssh -G`), because only it reads Include and Match."""

from __future__ import annotations

import os
import pwd
import re
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxops.control.files import last_bytes
from mlxops.core.errors import Unreachable, UsageError
from mlxops.core.names import shown

_TOKEN = re.compile(r"%(.)")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_JUMP = re.compile(r"(?:ssh://)?(?:(?P<user>[^@]+)@)?(?P<host>\[[^\]]+\]|[^:@\[\]]+)(?::(?P<port>[0-9]{1,5}))?/?")
_PLAIN = re.compile(r"[A-Za-z0-9_.:%+~@\[\]-]*")
"""What may be put into a ProxyCommand: nothing that means something to a shell."""

_MAX_ANSWER = 1024 * 1024
"""Bytes of what `ssh -G` says; it is some kB."""

_WHAT = {
    "host_down": "cannot be reached",
    "connection_refused": "refused the connection",
    "connection_timeout": "did not answer in time",
    "authentication_failed": "refused the login",
    "host_locked": "is locked",
    "host_key_unknown": "showed a host key that is not known",
    "host_key_changed": "showed another host key than the known one",
}


@dataclass(frozen=True)
class Destination:
    """One host as OpenSSH's configuration describes it; files and commands with their tokens replaced."""

    name: str
    hostname: str
    port: int
    user: str
    family: socket.AddressFamily
    identities: tuple[Path, ...]
    certificates: tuple[Path, ...]
    identities_only: bool
    agent: str | None
    """The agent's socket."""
    jumps: tuple[str, ...]
    proxy_command: str | None
    known_hosts: tuple[Path, ...]
    host_key_alias: str | None
    connect_timeout: float | None

    def __str__(self) -> str:
        where = f"{self.hostname}:{self.port}" if ":" not in self.hostname else f"[{self.hostname}]:{self.port}"
        return f"{self.name} ({where})"

    def unreachable(self, code: str, why: str, hint: str = "") -> Unreachable:
        return Unreachable(code, f"{self} {_WHAT[code]}", why=why, hint=hint or f"try it: ssh {self.name} true")

    def timeout(self, why: str, hint: str = "") -> Unreachable:
        return self.unreachable("connection_timeout", why, hint)


def words(error: BaseException) -> str:
    """What an exception says, on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def resolve(name: str, timeout: float, options: Sequence[str] = ()) -> Destination:
    """Raises `UsageError` no_ssh or bad_ssh_config."""
    import tempfile

    try:
        # Not pipes: what a Match exec leaves behind may hold them open for ever.
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
            argv = ["ssh", "-G", *options, "--", name]
            status = subprocess.run(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, timeout=timeout, check=False
            ).returncode
            said, complaint = last_bytes(out, _MAX_ANSWER), last_bytes(errors, 4096)
    except FileNotFoundError:
        raise UsageError(
            "no_ssh",
            "there is no ssh program on PATH",
            why="OpenSSH's configuration says where a host is, and only ssh can read it",
            hint="install the OpenSSH client",
        ) from None
    except subprocess.TimeoutExpired:
        raise _bad(name, f"`ssh -G` did not answer within {timeout:.0f} s: a Match exec may hang") from None
    except (OSError, ValueError) as error:
        raise _bad(name, f"`ssh -G` cannot be run: {error}") from error
    if status != 0:
        words = complaint.decode(errors="replace").strip().splitlines()
        raise _bad(name, f"ssh says: {words[-1]}" if words else f"`ssh -G` ended with {status}")
    return _parse(name, said.decode(errors="surrogateescape"))


def resolve_jump(jump: str, timeout: float) -> Destination:
    """A hop of ProxyJump, `[user@]host[:port]` or an ssh URI, resolved as OpenSSH resolves it."""
    matched = _JUMP.fullmatch(jump)
    host = matched["host"].strip("[]") if matched else ""
    if matched is None or host.startswith("-") or (matched["user"] or "").startswith("-"):
        raise _bad(jump, "it is not a destination for ProxyJump")
    options: list[str] = []
    if matched["user"]:
        options += ["-l", matched["user"]]
    if matched["port"]:
        options += ["-p", matched["port"]]
    return resolve(host, timeout, options)


def _bad(name: str, why: str) -> UsageError:
    return UsageError(
        "bad_ssh_config",
        f"ssh cannot tell where {shown(name)} is",
        why=" ".join(why.split()),
        hint=f"try it: ssh -G {name if _PLAIN.fullmatch(name) else 'NAME'}",
    )


def _parse(name: str, text: str) -> Destination:
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        found.setdefault(key.lower(), []).append(value)

    def one(key: str) -> str | None:
        value = found.get(key, ["none"])[0]
        return None if value.lower() == "none" or not value else value

    account = pwd.getpwuid(os.getuid())
    hostname, port, user = one("hostname") or name, one("port") or "22", one("user") or account.pw_name
    alias = one("hostkeyalias")
    local = socket.gethostname()
    tokens = {
        "%": "%",
        "d": account.pw_dir,
        "h": hostname,
        "i": str(os.getuid()),
        "k": alias or name,
        "L": local.partition(".")[0],
        "l": local,
        "n": name,
        "p": port,
        "r": user,
        "u": account.pw_name,
    }

    def replaced(value: str) -> str:
        return _TOKEN.sub(lambda token: tokens.get(token[1], token[0]), value)

    def path(value: str) -> Path:
        value = _VARIABLE.sub(lambda variable: os.environ.get(variable[1], ""), replaced(value))
        return Path(f"{account.pw_dir}{value[1:]}" if value == "~" or value.startswith("~/") else value)

    def paths(key: str) -> tuple[Path, ...]:
        return tuple(path(value) for value in found.get(key, []) if value.lower() != "none")

    command = one("proxycommand")
    if command is not None:
        unsafe = [token for token in _TOKEN.findall(command) if not _PLAIN.fullmatch(tokens.get(token, ""))]
        if unsafe:
            raise _bad(name, f"%{unsafe[0]} in its ProxyCommand would be something that a shell acts upon")
        command = replaced(command)
    timeout = one("connecttimeout")
    jumps = one("proxyjump")
    return Destination(
        name=name,
        hostname=hostname,
        port=int(port),
        user=user,
        family={"inet": socket.AF_INET, "inet6": socket.AF_INET6}.get(one("addressfamily") or "", socket.AF_UNSPEC),
        identities=paths("identityfile"),
        certificates=paths("certificatefile"),
        identities_only=one("identitiesonly") == "yes",
        agent=_agent(found.get("identityagent", ["SSH_AUTH_SOCK"])[0], path),
        jumps=tuple(jumps.split(",")) if jumps else (),
        proxy_command=command,
        known_hosts=tuple(
            path(each) for key in ("userknownhostsfile", "globalknownhostsfile") for each in _files(one(key) or "")
        ),
        host_key_alias=alias,
        connect_timeout=float(timeout) if timeout and timeout.isdecimal() else None,
    )


def _agent(value: str, path: Callable[[str], Path]) -> str | None:
    if value.lower() == "none":
        return None
    if value == "SSH_AUTH_SOCK":
        return os.environ.get("SSH_AUTH_SOCK") or None
    if value.startswith("$") and not value.startswith("${"):
        return os.environ.get(value[1:]) or None
    return str(path(value))


def _files(value: str) -> list[str]:
    """`ssh -G` prints several files with spaces between them, and spaces inside a name as they are."""
    return [value] if os.path.exists(value) else value.split()
