"""Resolve `ssh NAME` with OpenSSH itself (`ssh -G`), because only OpenSSH reads Include and Match."""

from __future__ import annotations

import hashlib
import os
import pwd
import re
import shlex
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import IO

from mlxops.common.files import read_start
from mlxops.core.errors import Unreachable, UsageError
from mlxops.core.frozen import dataclass
from mlxops.core.names import shown

_TOKEN = re.compile(r"%(.)")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_JUMP = re.compile(r"(?:ssh://)?(?:(?P<user>[^@]+)@)?(?P<host>\[[^\]]+\]|[^:@\[\]]+)(?::(?P<port>[0-9]{1,5}))?/?")
_JUMP_TOKENS = "%hnpr"
_LINE = re.compile(r"\s*([A-Za-z0-9]+)(?:\s*=\s*|\s+)(.*)")
_PLAIN = re.compile(r"[A-Za-z0-9_.:%+~@\[\]-]*")
"""Values that may be put into a ProxyCommand: they have no character that is special to a shell."""

_MAX_OUTPUT = 1024 * 1024
"""Bytes. `ssh -G` prints a few kB."""

_SUMMARIES = {
    "host_down": "cannot be reached",
    "connection_refused": "refused the connection",
    "connection_timeout": "did not answer in time",
    "authentication_failed": "refused the login",
    "host_locked": "is locked",
    "host_key_unknown": "showed an unknown host key",
    "host_key_changed": "showed a different host key than the known one",
    "no_common_algorithm": "has no algorithm in common with this machine",
}
_BLOCKS = ("host", "match")


@dataclass(frozen=True)
class Destination:
    """A host as OpenSSH's configuration describes it. Tokens in files and commands are replaced."""

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
    typed: tuple[str, ...] = ()
    """The arguments of ssh that lead to it: options, and its name."""
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The output of `ssh -G`: keywords in lower case, with their values."""
    tokens: Mapping[str, str] = field(default_factory=dict)
    """The values of %h and the like."""
    known_hosts_command: str | None = None
    """Its tokens are not replaced yet."""
    revoked_host_keys: tuple[Path, ...] = ()

    @property
    def command(self) -> str:
        """The ssh command that connects to it."""
        return f"ssh {shlex.join(self.typed)}"

    def option(self, keyword: str) -> str | None:
        """Return the value of an option; None if it has none or is switched off."""
        value = self.options.get(keyword.lower(), ("",))[0]
        return None if value.lower() in ("", "none", "no", "false") else value

    def algorithms(self, keyword: str) -> tuple[str, ...]:
        """Return the algorithms that the configuration allows, in its order; empty if ssh does not say."""
        return tuple(filter(None, self.options.get(keyword.lower(), ("",))[0].split(",")))

    def replaced(self, text: str, more: Mapping[str, str]) -> str:
        """Replace the tokens and variables in a text. `more` adds tokens."""
        tokens = {**self.tokens, **more}
        return _VARIABLE.sub(
            lambda variable: os.environ.get(variable[1], ""),
            _TOKEN.sub(lambda token: tokens.get(token[1], token[0]), text),
        )

    def __str__(self) -> str:
        hostname = f"[{self.hostname}]" if ":" in self.hostname else self.hostname
        return f"{self.name} ({hostname}:{self.port})"

    def unreachable(self, code: str, why: str, hint: str = "") -> Unreachable:
        return Unreachable(code, f"{self} {_SUMMARIES[code]}", why=why, hint=hint or f"try it: {self.command} true")

    def timeout(self, why: str, hint: str = "") -> Unreachable:
        return self.unreachable("connection_timeout", why, hint)


def error_text(error: BaseException) -> str:
    """Return the message of an exception on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def resolve(name: str, timeout: float, options: Sequence[str] = ()) -> Destination:
    """Return the host to which `ssh NAME` would connect. Raises `UsageError` no_ssh or bad_ssh_config."""
    status, output, errors = _ask_ssh(name, timeout, ["-G", *options, "--", name])
    if status != 0 and "fork into background" in errors:
        # ForkAfterAuthentication needs a command, and with RemoteCommand -G accepts none.
        no_fork = ["-o", "ForkAfterAuthentication=no"]
        status, output, errors = _ask_ssh(name, timeout, ["-G", *no_fork, *options, "--", name])
    if status != 0:
        lines = errors.strip().splitlines()
        raise _bad(name, f"ssh says: {lines[-1]}" if lines else f"`ssh -G` ended with {status}")
    return _parse(name, output, (*options, name))


def resolve_jump(jump: str, target: Destination, timeout: float) -> Destination:
    """Resolve a hop of `target`'s ProxyJump, `[user@]host[:port]` or an ssh URI, as OpenSSH does.

    Replace the tokens that ssh_config(5) allows in ProxyJump by `target`'s values.
    """
    jump = _TOKEN.sub(lambda token: target.tokens[token[1]] if token[1] in _JUMP_TOKENS else token[0], jump)
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


def describe_option(destination: Destination, keyword: str) -> str:
    """Name an option with its line: `Ciphers (/home/me/.ssh/config:7)`; without the line if it is not certain.

    `ssh -G` prints values without lines. `ssh -v -G` prints the files that it reads, in its order.
    """
    value = destination.options.get(keyword.lower(), ("",))[0]
    try:
        _, _, log = _ask_ssh(destination.name, 5.0, ["-v", "-G", *destination.typed[:-1], "--", destination.name])
    except UsageError:
        return keyword
    files = re.findall(r"Reading configuration data (.+)", log)
    applied = {(file, int(line)) for file, line in re.findall(r"debug1: (.+) line (\d+): Applying options", log)}
    places = [place for file in dict.fromkeys(files) for place in _places(Path(file.strip()), keyword, applied)]
    same = [place for place, text in places if text == value]
    if len(places) == 1 or same:
        return f"{keyword} ({same[0] if same else places[0][0]})"
    return keyword


def _places(file: Path, keyword: str, applied: set[tuple[str, int]]) -> list[tuple[str, str]]:
    """Return `FILE:LINE` and value of each line that sets an option. Skip Host blocks that ssh did not apply."""
    places: list[tuple[str, str]] = []
    applies = True
    try:
        text = read_start(file, _MAX_OUTPUT).decode("utf-8", "replace")
    except (OSError, ValueError):
        return places
    for number, line in enumerate(text.splitlines(), 1):
        matched = _LINE.match(line)
        if matched is None:
            continue
        word = matched[1].lower()
        if word in _BLOCKS:
            applies = word == "match" or (str(file), number) in applied
        elif applies and word == keyword.lower():
            places.append((f"{file}:{number}", matched[2].strip().strip('"')))
    return places


def _ask_ssh(name: str, timeout: float, arguments: Sequence[str]) -> tuple[int, str, str]:
    """Return exit status, standard output and standard error. Raises `UsageError` no_ssh or bad_ssh_config."""
    try:
        status, output, errors = ask_program(["ssh", *arguments], timeout, _MAX_OUTPUT)
    except FileNotFoundError:
        raise UsageError(
            "no_ssh",
            "there is no ssh program on PATH",
            why="mlxops finds a host with OpenSSH's configuration, which only ssh can read",
            hint="install the OpenSSH client",
        ) from None
    except subprocess.TimeoutExpired:
        raise _bad(name, f"`ssh -G` did not answer within {timeout:.0f} s: a Match exec may hang") from None
    except (OSError, ValueError) as error:
        raise _bad(name, f"`ssh -G` cannot be run: {error}") from error
    return status, output.decode(errors="surrogateescape"), errors.decode(errors="replace")


def _bad(name: str, why: str) -> UsageError:
    return UsageError(
        "bad_ssh_config",
        f"ssh cannot resolve {shown(name)}",
        why=" ".join(why.split()),
        hint=f"try it: ssh -G -- {shlex.quote(name)}" if name.isprintable() else "correct `ssh` in hosts.yaml",
    )


def _parse(name: str, text: str, typed: tuple[str, ...]) -> Destination:
    options: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        options.setdefault(key.lower(), []).append(value)

    def one(key: str) -> str | None:
        value = options.get(key, ["none"])[0]
        return None if value.lower() == "none" or not value else value

    account = pwd.getpwuid(os.getuid())
    # Before OpenSSH 9, `ssh -G` does not print the host of user@host.
    host = one("host") or name.rpartition("@")[2]
    hostname, port, user = one("hostname") or host, one("port") or "22", one("user") or account.pw_name
    alias = one("hostkeyalias")
    local = socket.gethostname()
    jumps = one("proxyjump")
    tokens = {
        "%": "%",
        "C": hashlib.sha1(
            "".join((local, hostname, port, user, jumps or "")).encode(errors="surrogateescape")
        ).hexdigest(),
        "d": account.pw_dir,
        "h": hostname,
        "i": str(os.getuid()),
        "j": jumps or "",
        "k": alias or host,
        "L": local.partition(".")[0],
        "l": local,
        "n": host,
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
        return tuple(path(value) for value in options.get(key, []) if value.lower() != "none")

    command = one("proxycommand")
    if command is not None:
        unsafe = [token for token in _TOKEN.findall(command) if not _PLAIN.fullmatch(tokens.get(token, ""))]
        if unsafe:
            raise _bad(
                name, f"the value of %{unsafe[0]} in its ProxyCommand has characters that are special to a shell"
            )
        command = replaced(command)
    timeout = one("connecttimeout")
    return Destination(
        name=name,
        hostname=hostname,
        port=int(port),
        user=user,
        family={"inet": socket.AF_INET, "inet6": socket.AF_INET6}.get(one("addressfamily") or "", socket.AF_UNSPEC),
        identities=paths("identityfile"),
        certificates=paths("certificatefile"),
        identities_only=one("identitiesonly") == "yes",
        agent=_agent(options.get("identityagent", ["SSH_AUTH_SOCK"])[0], path),
        jumps=tuple(jumps.split(",")) if jumps else (),
        proxy_command=command,
        known_hosts=tuple(
            file for key in ("userknownhostsfile", "globalknownhostsfile") for file in _files(one(key) or "", path)
        ),
        host_key_alias=alias,
        connect_timeout=float(timeout) if timeout and timeout.isdecimal() else None,
        typed=typed,
        options={key: tuple(values) for key, values in options.items()},
        tokens=tokens,
        known_hosts_command=one("knownhostscommand"),
        revoked_host_keys=tuple(
            file for value in options.get("revokedhostkeys", []) if value != "none" for file in _files(value, path)
        ),
    )


def _agent(value: str, path: Callable[[str], Path]) -> str | None:
    if value.lower() == "none":
        return None
    if value == "SSH_AUTH_SOCK":
        return os.environ.get("SSH_AUTH_SOCK") or None
    if value.startswith("$") and not value.startswith("${"):
        return os.environ.get(value[1:]) or None
    return str(path(value))


def _files(value: str, path: Callable[[str], Path]) -> list[Path]:
    """Split a list of files. `ssh -G` separates them by spaces and does not quote spaces in names.

    So take the longest run of words that names an existing file as one file.
    """
    files: list[Path] = []
    words = value.split(" ")
    while words:
        lengths = (count for count in range(len(words), 1, -1) if os.path.exists(path(" ".join(words[:count]))))
        count = next(lengths, 1)
        files.append(path(" ".join(words[:count])))
        words = words[count:]
    return [file for file in files if str(file) != "."]


def ask_program(argv: Sequence[str], timeout: float, limit: int) -> tuple[int, bytes, bytes]:
    """Run a helper program. Return its exit status and the last `limit` bytes of standard output and standard error.

    The output goes to files, not to pipes: a process that the program leaves behind may keep a pipe open indefinitely.
    Raises `OSError`, `ValueError` and `subprocess.TimeoutExpired`.
    """
    import tempfile

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, timeout=timeout, check=False)
        return done.returncode, last_bytes(out, limit), last_bytes(errors, limit)


def last_bytes(stream: IO[bytes], count: int) -> bytes:
    """Return the end of a file to which another process may still write."""
    stream.seek(max(0, stream.seek(0, os.SEEK_END) - count))
    return stream.read(count)
