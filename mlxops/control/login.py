"""What happens between the two ends of an SSH connection before the first command: host key, then login."""

from __future__ import annotations

import base64
import binascii
import os
import re
import shlex
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlxops.control import known_hosts
from mlxops.control.files import opened
from mlxops.control.ssh_config import Destination, words
from mlxops.core.errors import Unreachable

if TYPE_CHECKING:
    import paramiko
    from paramiko.agent import AgentSSH


def preferred(known: Sequence[str], offered: Sequence[str]) -> tuple[str, ...]:
    """Known kinds first: a host that has several keys is to show one that can be recognised."""
    first = [name for kind in known for name in _algorithms(kind) if name in offered]
    return (*dict.fromkeys(first), *(name for name in offered if name not in first))


def _algorithms(kind: str) -> tuple[str, ...]:
    return ("rsa-sha2-512", "rsa-sha2-256") if kind == "ssh-rsa" else (kind,)


def host_key_policy(destination: Destination, known: known_hosts.Known) -> paramiko.MissingHostKeyPolicy:
    """Paramiko's own table of keys stays empty, so that it leaves every decision to this."""
    import paramiko

    class Policy(paramiko.MissingHostKeyPolicy):
        def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
            blob = key.asbytes()
            if not known.accepts(blob):
                raise _bad_host_key(destination, known, key.get_name(), blob)

    return Policy()


def _bad_host_key(destination: Destination, known: known_hosts.Known, kind: str, blob: bytes) -> Unreachable:
    shown = known_hosts.fingerprint(blob)
    file = {"ssh-rsa": "rsa", "ssh-ed25519": "ed25519"}.get(kind, "ecdsa")
    compare = f"`ssh-keygen -lf /etc/ssh/ssh_host_{file}_key.pub` on that machine"
    details: dict[str, object] = {"kind": kind, "fingerprint": shown, "name": known.name}
    if blob in known.revoked:
        error = destination.unreachable(
            "host_key_changed",
            f"it showed {kind} {shown}, which a @revoked line of known_hosts forbids",
            f"do not connect; compare with {compare}, and give the machine a new host key",
        )
    elif known.keys:
        first = known.keys[0]
        expected = next((key for key in known.keys if key.kind == kind), first)
        forget = shlex.join(["ssh-keygen", "-R", known.name, "-f", str(expected.file)])
        details["expected"] = known_hosts.fingerprint(expected.blob)
        error = destination.unreachable(
            "host_key_changed",
            f"it showed {kind} {shown}, but {expected.file}:{expected.line} has "
            f"{expected.kind} {details['expected']}: a reinstalled machine, or somebody in between",
            f"compare with {compare}; only if that is {shown}: {forget}, then `ssh {destination.name}`",
        )
    else:
        error = destination.unreachable(
            "host_key_unknown",
            f"it showed {kind} {shown}, and no known_hosts file has a key for {known.name}",
            f"compare with {compare}; if they are equal, run `ssh {destination.name}` once and accept it",
        )
    error.details.update(details)
    return error


class Login:
    """Public keys, in OpenSSH's order: the agent's that the configuration names, its others, then files.

    Nothing is ever asked of the user. Takes the place of paramiko's AuthStrategy, of which only `authenticate`
    is used.
    """

    def __init__(self, destination: Destination, deadline: float) -> None:
        self._destination = destination
        self._deadline = deadline
        self._notes: list[str] = []
        self._refusals = 0
        """Keys that the host has said no to."""

    def authenticate(self, transport: paramiko.Transport) -> None:
        """Raises `Unreachable` authentication_failed, host_locked, or host_down if the connection ended first."""
        import paramiko
        from paramiko.agent import AgentSSH

        agent = AgentSSH()
        banner = ""
        allowed: list[str] = []
        try:
            for key in self._keys(self._agent_keys(agent)):
                try:
                    partly = transport.auth_publickey(self._destination.user, key)
                    if not partly:
                        return
                    allowed = partly
                    break  # what else it wants, only a person can give
                except paramiko.BadAuthenticationType as error:
                    allowed = error.allowed_types
                    break
                except paramiko.AuthenticationException:
                    self._refusals += transport.is_active()
                except paramiko.SSHException as error:
                    if not transport.is_active():
                        break
                    self._notes.append(words(error))
                banner = banner or _banner(transport)
            banner = banner or _banner(transport)
            if transport.is_active() and not allowed:
                try:
                    transport.auth_none(self._destination.user)
                    return
                except paramiko.BadAuthenticationType as error:
                    allowed = error.allowed_types
                except paramiko.SSHException:
                    pass
            banner = banner or _banner(transport)
        finally:
            agent._close()  # type: ignore[attr-defined]
        raise self._refused(banner, allowed, ended=not transport.is_active())

    def _refused(self, banner: str, allowed: Sequence[str], *, ended: bool) -> Unreachable:
        destination = self._destination
        if re.search(r"\block(ed)?\b", banner, re.IGNORECASE):
            return destination.unreachable(
                "host_locked",
                f"it says: {banner[:200]}",
                f"after a restart FileVault waits for a person: log in once with `ssh {destination.name}` and the "
                "password, or at the screen",
            )
        if ended and not self._refusals:
            # sshd says no to a key before it has had too many of them.
            return destination.unreachable(
                "host_down", "the connection ended during the login", "try again; then look at the log of its sshd"
            )
        tried = [f"user {destination.user}"]
        if ended:
            tried.append("the host ended the connection: too many keys?")
        if allowed:
            tried.append(f"it wants {' or '.join(allowed)}")
        refused = destination.unreachable(
            "authentication_failed",
            "; ".join([*tried, *dict.fromkeys(self._notes)])[:600] or "no key was accepted",
            f"`ssh -o BatchMode=yes {destination.name} true` must work without a question: "
            "ssh-add the key, or add it to authorized_keys there",
        )
        if ended:
            refused.details["ended"] = True
        return refused

    def _agent_keys(self, agent: AgentSSH) -> list[paramiko.PKey]:
        import paramiko

        path = self._destination.agent
        if path is None:
            return []
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(max(0.001, self._deadline - time.monotonic()))
            sock.connect(path)
            agent._connect(sock)  # type: ignore[attr-defined]
        except (OSError, paramiko.SSHException) as error:
            sock.close()
            self._notes.append(f"the agent at {path} does not answer: {words(error)}")
            return []
        return list(agent.get_keys())

    def _keys(self, offered: list[paramiko.PKey]) -> Iterator[paramiko.PKey]:
        named = {blob: path for path in self._destination.identities if (blob := _public_blob(path))}
        held = [key for key in offered if key.asbytes() in named]
        if not self._destination.identities_only:
            held += [key for key in offered if key not in held]
        yield from held
        blobs = {key.asbytes() for key in held}
        for path in self._destination.identities:
            yield from self._load(path, blobs)

    def _load(self, path: Path, held: set[bytes]) -> Iterator[paramiko.PKey]:
        """A file's key: with each certificate that fits it, then by itself."""
        import paramiko
        from paramiko.pkey import UnknownKeyType

        blob = _public_blob(path)
        if blob in held or not os.path.isfile(path):
            return
        try:
            key = paramiko.PKey.from_path(path)
        except (paramiko.PasswordRequiredException, TypeError):
            self._notes.append(f"{path} is encrypted, and no agent has it")
            return
        except (paramiko.SSHException, UnknownKeyType, OSError, ValueError) as error:
            self._notes.append(f"{path} cannot be read: {words(error)}")
            return
        beside = path.with_name(f"{path.name}-cert.pub")
        for certificate in filter(Path.is_file, dict.fromkeys((*self._destination.certificates, beside))):
            try:
                key.load_certificate(str(certificate))
            except (paramiko.SSHException, OSError, ValueError):
                continue
            yield key
        key.public_blob = None
        yield key


def _banner(transport: paramiko.Transport) -> str:
    said = transport.get_banner()
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else ""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def _public_blob(path: Path) -> bytes | None:
    """The public half of an identity: from the file beside it, or from an identity that is itself a public key."""
    for candidate in (path.with_name(f"{path.name}.pub"), path):
        try:
            with opened(candidate) as stream:
                fields = stream.read(65536).split()
        except OSError:
            continue
        if len(fields) >= 2 and fields[0].startswith((b"ssh-", b"ecdsa-", b"sk-")):
            try:
                return base64.b64decode(fields[1], validate=True)
            except binascii.Error:
                continue
    return None
