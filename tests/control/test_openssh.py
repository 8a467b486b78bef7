"""mlxops logs in where `ssh NAME` logs in: each case runs OpenSSH first, with the same configuration."""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import pytest

from mlxops.control.channel import ReadLimits
from mlxops.control.client import PASSING
from mlxops.control.ssh.connection import open_ssh
from mlxops.control.watch.link import RETRYABLE_CODES
from mlxops.core.errors import MlxopsError
from tests.control.test_ssh_connection import HOSTILE
from tests.lab.fakeagent import SECURITY_KEY, FakeAgent, SecurityKey
from tests.lab.homelab import Homelab
from tests.lab.sshd import SshAgent, SshClient, Sshd, certify, keygen, program, public

pytestmark = pytest.mark.lab


def convert(key: Path, passphrase: str, *options: str) -> None:
    argv = [program("ssh-keygen"), "-q", "-p", "-P", "", "-N", passphrase, *options, "-f", str(key)]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, capture_output=True)


KINDS = ("ed25519", "rsa", "ecdsa")


class World:
    """Real servers, keys, certificates and agents."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.stack = stack
        self.keys = folder / "keys"
        self.keys.mkdir()
        self.ca, self.other_ca = keygen(self.keys / "ca"), keygen(self.keys / "other_ca", "ecdsa")
        self.rsa_ca = keygen(self.keys / "rsa_ca", "rsa")
        trusted = self.keys / "trusted"
        trusted.write_text(f"{public(self.ca)}\n{public(self.rsa_ca)}\n")
        self.plain = self.server("plain")
        self.certified = self.server("certified", f"TrustedUserCAKeys {trusted}", "MaxAuthTries 6")
        # A key whose certificate is the only way in, in every arrangement of files.
        for kind in KINDS:
            key = keygen(self.keys / kind, kind)
            certify(self.ca, key, self.plain.user, to=self.keys / f"{kind}.crt")
        self.ed = self.keys / "ed25519"
        for name, how in {
            "expired": ["-V", "20200101:20210101"],
            "later": ["-V", "20900101:20910101"],
            "valid": ["-V", "-1h:+1h"],
        }.items():
            certify(self.ca, self.ed, self.plain.user, *how, to=self.keys / f"{name}.crt")
        certify(self.ca, self.ed, "another-user", to=self.keys / "wrong.crt")
        certify(self.other_ca, self.ed, self.plain.user, to=self.keys / "stranger.crt")
        certify(self.rsa_ca, self.ed, self.plain.user, to=self.keys / "by-rsa.crt")
        self.beside = self.keys / "beside"
        self.beside.mkdir()
        for name in ("ed25519", "ed25519.pub"):
            (self.beside / name).write_bytes((self.keys / name).read_bytes())
            (self.beside / name).chmod(0o600)
        (self.beside / "ed25519-cert.pub").write_bytes((self.keys / "ed25519.crt").read_bytes())
        self.only_public = self.keys / "public"
        self.only_public.mkdir()
        for kind in KINDS:
            (self.only_public / f"{kind}.pub").write_bytes((self.keys / f"{kind}.pub").read_bytes())
        (self.only_public / "ed25519-cert.pub").write_bytes((self.keys / "ed25519.crt").read_bytes())
        self._agent = stack.enter_context(SshAgent())
        self.many = [keygen(self.keys / f"stranger{number}") for number in range(6)]
        self.encrypted = self.keys / "encrypted"
        self.encrypted.write_bytes(self.certified.client_key.read_bytes())
        self.encrypted.chmod(0o600)
        convert(self.encrypted, "secret")
        self.mixed = self.keys / "mixed"
        self.mixed.write_bytes(self.certified.client_key.read_bytes())
        self.mixed.chmod(0o600)
        self.mixed.with_name("mixed.pub").write_text(public(self.many[0]) + "\n")

    def converted(self, kind: str, to: str, passphrase: str = "") -> Path:
        """An authorized key in another format, without a public file."""
        key = keygen(self.keys / f"{kind}-{to}-{len(passphrase)}", kind)
        with (self.certified.folder / "authorized_keys").open("a") as authorized:
            authorized.write(public(key) + "\n")
        convert(key, passphrase, "-m", to)
        key.with_name(f"{key.name}.pub").unlink()
        return key

    def server(self, name: str, *lines: str, **how: object) -> Sshd:
        return self.stack.enter_context(Sshd(self.folder / name, extra="\n".join(lines), **how))  # type: ignore[arg-type]

    def agent(self, *keys: Path) -> SshAgent:
        """The one agent, with these keys and no others."""
        self._agent.clear()
        for key in keys:
            self._agent.add(key)
        return self._agent


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(tmp_path_factory.mktemp("world"), stack)


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SshClient:
    client = SshClient(tmp_path / "client")
    monkeypatch.setenv("PATH", client.path)
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return client


def ssh(name: str, *options: str) -> int:
    """Return the exit status of `ssh NAME true`, without prompts."""
    argv = ["ssh", "-o", "BatchMode=yes", *options, name, "true"]
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False).returncode


def outcome(name: str) -> MlxopsError | None:
    """Return the error of mlxops; None if it logs in."""
    try:
        with closing(open_ssh(name)) as opened:
            session = opened.start(["true"], b"")
            with closing(session):
                assert session.wait(20).status == 0
    except MlxopsError as error:
        assert error.why and error.hint
        return error
    return None


def same(name: str) -> tuple[str, MlxopsError | None]:
    """Return `in` or the error's code. Fail unless OpenSSH ends in the same way."""
    status, error = ssh(name), outcome(name)
    shown = error and (error.code, error.why, error.hint)
    assert (status == 0) == (error is None), f"ssh ended with {status}, mlxops with {shown}"
    return (error.code if error else "in"), error


class Row(NamedTuple):
    lines: Callable[[World], Sequence[str]]
    """Of the host's block."""
    end: str = "in"
    """`in`, or the error's code."""
    says: tuple[str, ...] = ()
    """Words of the error."""


def agent_line(world: World, *keys: Path) -> str:
    return f"IdentityAgent {world.agent(*keys).path}"


REFUSED = "authentication_failed"
LOGINS = {
    "CertificateFile, the key in the agent": Row(
        lambda w: [f"CertificateFile {w.keys}/ed25519.crt", agent_line(w, w.ed), "IdentityFile none"]
    ),
    "CertificateFile, the key in the agent and named by its public half": Row(
        lambda w: [
            f"CertificateFile {w.keys}/ed25519.crt",
            agent_line(w, w.ed),
            "IdentitiesOnly yes",
            f"IdentityFile {w.only_public}/ed25519.pub",
        ]
    ),
    "CertificateFile, the key in the agent and not named, IdentitiesOnly": Row(
        lambda w: [
            f"CertificateFile {w.keys}/ed25519.crt",
            agent_line(w, w.ed),
            "IdentitiesOnly yes",
            "IdentityFile none",
        ],
        REFUSED,
    ),
    "a certificate beside the key, the bare key in the agent": Row(
        lambda w: [agent_line(w, w.ed), f"IdentityFile {w.beside}/ed25519"]
    ),
    "a certificate beside a public key, the private one in the agent": Row(
        lambda w: [agent_line(w, w.ed), f"IdentityFile {w.only_public}/ed25519", "IdentitiesOnly yes"]
    ),
    "key and certificate in the agent": Row(
        lambda w: [agent_line(w, w.beside / "ed25519"), "IdentityFile none"],
    ),
    "key and certificate in the agent, IdentitiesOnly": Row(
        lambda w: [agent_line(w, w.beside / "ed25519"), f"IdentityFile {w.only_public}/ed25519", "IdentitiesOnly yes"]
    ),
    "CertificateFile hides the certificate beside the key": Row(
        lambda w: [f"CertificateFile {w.keys}/expired.crt", f"IdentityFile {w.beside}/ed25519"],
        REFUSED,
        ("expired on 2021-01-01",),
    ),
    "RSA in the agent": Row(
        lambda w: [f"CertificateFile {w.keys}/rsa.crt", agent_line(w, w.keys / "rsa"), "IdentityFile none"]
    ),
    "RSA in a file": Row(lambda w: [f"CertificateFile {w.keys}/rsa.crt", f"IdentityFile {w.keys}/rsa"]),
    "RSA, certificates not accepted": Row(
        lambda w: [
            f"CertificateFile {w.keys}/rsa.crt",
            f"IdentityFile {w.keys}/rsa",
            "PubkeyAcceptedAlgorithms rsa-sha2-512,ssh-ed25519",
        ],
        REFUSED,
    ),
    "ECDSA in the agent": Row(
        lambda w: [f"CertificateFile {w.keys}/ecdsa.crt", agent_line(w, w.keys / "ecdsa"), "IdentityFile none"]
    ),
    "ECDSA in a file": Row(lambda w: [f"CertificateFile {w.keys}/ecdsa.crt", f"IdentityFile {w.keys}/ecdsa"]),
    "an expired certificate": Row(
        lambda w: [f"CertificateFile {w.keys}/expired.crt", f"IdentityFile {w.ed}"], REFUSED, ("expired on 2021-01-01",)
    ),
    "a certificate of the future": Row(
        lambda w: [f"CertificateFile {w.keys}/later.crt", f"IdentityFile {w.ed}"], REFUSED, ("not valid before 2090",)
    ),
    "a certificate for another name": Row(
        lambda w: [f"CertificateFile {w.keys}/wrong.crt", f"IdentityFile {w.ed}"], REFUSED, ("is for another-user",)
    ),
    "a certificate by another authority": Row(
        lambda w: [f"CertificateFile {w.keys}/stranger.crt", f"IdentityFile {w.ed}"], REFUSED
    ),
    "a certificate by an RSA authority": Row(
        lambda w: [f"CertificateFile {w.keys}/by-rsa.crt", f"IdentityFile {w.ed}"]
    ),
    "bad certificates, then a good one": Row(
        lambda w: [
            *(f"CertificateFile {w.keys}/{name}.crt" for name in ("expired", "later", "wrong", "stranger", "valid")),
            f"IdentityFile {w.ed}",
        ]
    ),
    "an expired certificate, then a plain key": Row(
        lambda w: [
            f"CertificateFile {w.keys}/expired.crt",
            f"IdentityFile {w.ed}",
            f"IdentityFile {w.certified.client_key}",
        ]
    ),
    "a CertificateFile that is no certificate": Row(
        lambda w: [f"CertificateFile {w.ca}.pub", f"IdentityFile {w.certified.client_key}"]
    ),
    "six keys in the agent before the file": Row(
        lambda w: [agent_line(w, *w.many), f"IdentityFile {w.certified.client_key}"], REFUSED, ("too many keys?",)
    ),
    "five keys in the agent before the file": Row(
        lambda w: [agent_line(w, *w.many[:5]), f"IdentityFile {w.certified.client_key}"]
    ),
    "six keys in the agent, IdentitiesOnly": Row(
        lambda w: [agent_line(w, *w.many), f"IdentityFile {w.certified.client_key}", "IdentitiesOnly yes"]
    ),
    "six keys in the agent before the named one, which is there, too": Row(
        lambda w: [agent_line(w, *w.many, w.certified.client_key), f"IdentityFile {w.certified.client_key}"]
    ),
    "six keys in the agent after CertificateFile": Row(
        lambda w: [agent_line(w, *w.many, w.ed), f"CertificateFile {w.keys}/ed25519.crt", "IdentityFile none"]
    ),
    "six keys in the agent before a certificate beside a file": Row(
        lambda w: [agent_line(w, *w.many), f"IdentityFile {w.beside}/ed25519"], REFUSED, ("too many keys?",)
    ),
    "IdentityAgent $NAME": Row(lambda w: ["IdentityAgent $LAB_AGENT"]),
    "IdentityAgent ${NAME}": Row(lambda w: ["IdentityAgent ${LAB_AGENT}"]),
    "IdentityAgent none": Row(lambda w: ["IdentityAgent none", "IdentityFile none"], REFUSED),
    "an agent that is not there": Row(
        lambda w: [f"IdentityAgent {w.folder}/missing", f"IdentityFile {w.certified.client_key}"]
    ),
    "IdentityFile is a public key, the private one in the agent": Row(
        lambda w: [
            agent_line(w, w.certified.client_key),
            f"IdentityFile {w.certified.client_key}.pub",
            "IdentitiesOnly yes",
        ]
    ),
    "IdentityFile is a public key, and no agent": Row(
        lambda w: [f"IdentityFile {w.only_public}/rsa.pub"], REFUSED, ("rsa.pub is a public key",)
    ),
    "an encrypted key without a public file, in the agent": Row(
        lambda w: [agent_line(w, w.certified.client_key), f"IdentityFile {w.encrypted}", "IdentitiesOnly yes"]
    ),
    "an encrypted key": Row(
        lambda w: [f"IdentityFile {w.encrypted}"], REFUSED, ("encrypted, and no agent has it", "ssh-add ")
    ),
    "an RSA key in PEM": Row(lambda w: [f"IdentityFile {w.converted('rsa', 'PEM')}"]),
    "an RSA key in PKCS#8": Row(lambda w: [f"IdentityFile {w.converted('rsa', 'PKCS8')}"]),
    "an ECDSA key in PEM": Row(lambda w: [f"IdentityFile {w.converted('ecdsa', 'PEM')}"]),
    "an ECDSA key in PKCS#8": Row(lambda w: [f"IdentityFile {w.converted('ecdsa', 'PKCS8')}"]),
    "an encrypted key in PKCS#8": Row(
        lambda w: [f"IdentityFile {w.converted('ecdsa', 'PKCS8', 'secret')}"], REFUSED, ("is encrypted",)
    ),
    "PKCS11Provider": Row(
        lambda w: ["PKCS11Provider /no/such/provider.so", "IdentityFile none"],
        REFUSED,
        ("PKCS11Provider (", "config:2)", "ssh-add -s /no/such/provider.so"),
    ),
    "a public key of another pair beside the private one": Row(
        lambda w: [f"IdentityFile {w.mixed}"], REFUSED, ("mixed.pub are not of one pair",)
    ),
    "a directory as IdentityFile": Row(
        lambda w: [f"IdentityFile {w.keys}", f"IdentityFile {w.certified.client_key}"],
    ),
}


@pytest.mark.parametrize("case", LOGINS)
def test_login_ends_like_that_of_openssh(
    world: World, client: SshClient, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    row = LOGINS[case]
    monkeypatch.setenv("LAB_AGENT", str(world.agent(world.beside / "ed25519").path))
    client.block("studio", world.certified, *row.lines(world))
    end, error = same("studio")
    assert end == row.end, error and error.why
    assert error is None or all(words in f"{error.why}\n{error.hint}" for words in row.says), (error.why, error.hint)


class Trust(NamedTuple):
    """A known_hosts situation and its result."""

    known: Callable[[World, Sshd], Sequence[str]]
    """Lines of known_hosts."""
    end: str = "in"
    says: tuple[str, ...] = ()
    lines: Callable[[World, Sshd], Sequence[str]] = lambda w, s: []
    """Of the host's block."""
    server: str = "good"
    """Which certificate the host shows."""
    ssh: int | None = None
    """How ssh ends, where mlxops is stricter on purpose."""


def authority(world: World, names: str, ca: str = "ca") -> str:
    return f"@cert-authority {names} {public(world.keys / ca)} the authority"


def at(server: Sshd) -> str:
    return f"[{server.address}]:{server.port}"


def script(world: World, text: str) -> Path:
    path = world.folder / f"script{len(list(world.folder.iterdir()))}"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def listed(world: World, *lines: str) -> Path:
    path = world.folder / f"list{len(list(world.folder.iterdir()))}"
    path.write_text("\n".join(lines) + "\n")
    return path


def revocations(world: World, *keys: Path, options: Sequence[str] = ()) -> Path:
    """A key revocation list in OpenSSH's own format."""
    path = world.folder / f"krl{len(list(world.folder.iterdir()))}"
    argv = [program("ssh-keygen"), "-q", "-k", "-f", str(path), *options, *(f"{key}.pub" for key in keys)]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    return path


LOGGED = 'test "$1" = HOSTNAME && echo "[$2]:PORT $3 $4"; true'
UNKNOWN, CHANGED = "host_key_unknown", "host_key_changed"
TRUST = {
    "the address": Trust(lambda w, s: [authority(w, at(s))]),
    "every host": Trust(lambda w, s: [authority(w, "*")]),
    "a pattern": Trust(lambda w, s: [authority(w, "[127.0.0.?]:*")]),
    "the name without its port": Trust(lambda w, s: [authority(w, s.address)]),
    "one of several names": Trust(lambda w, s: [authority(w, f"elsewhere,{at(s)}")]),
    "another authority's line before": Trust(lambda w, s: [authority(w, "*", "other_ca"), authority(w, "*")]),
    "a plain key of before a reinstallation beside it": Trust(
        lambda w, s: [f"{at(s)} {public(w.keys / 'ed25519')}", authority(w, "*")]
    ),
    "an authority for other hosts": Trust(lambda w, s: [authority(w, "*.example.com")], UNKNOWN),
    "a negated pattern": Trust(lambda w, s: [authority(w, f"*,!*{s.address}*")], UNKNOWN),
    "a negated pattern for the port alone": Trust(lambda w, s: [authority(w, f"*,!{at(s)}")]),
    "another authority": Trust(lambda w, s: [authority(w, "*", "other_ca")], UNKNOWN, ("no @cert-authority line for",)),
    "the authority's key without the marker": Trust(lambda w, s: [f"{at(s)} {public(w.ca)}"], CHANGED),
    "a revoked authority": Trust(
        lambda w, s: [authority(w, "*"), f"@revoked * {public(w.ca)}"], CHANGED, ("@revoked",)
    ),
    "a revoked authority, and the plain key": Trust(
        lambda w, s: [s.known_hosts, authority(w, "*"), f"@revoked * {public(w.ca)}"], CHANGED, ("@revoked",)
    ),
    "the plain key, and a revoked authority that no other line names": Trust(
        lambda w, s: [s.known_hosts, f"@revoked * {public(w.ca)}"], CHANGED, ("@revoked",)
    ),
    "the plain key, and another revoked authority": Trust(
        lambda w, s: [s.known_hosts, f"@revoked * {public(w.other_ca)}"]
    ),
    "a revoked key": Trust(lambda w, s: [authority(w, "*"), f"@revoked * {s.host_key}"], CHANGED, ("@revoked",)),
    "an expired certificate": Trust(lambda w, s: [authority(w, "*")], UNKNOWN, ("it has expired",), server="expired"),
    "an expired certificate, and the plain key": Trust(
        lambda w, s: [authority(w, "*"), s.known_hosts], server="expired"
    ),
    "a certificate of the future": Trust(lambda w, s: [authority(w, "*")], UNKNOWN, ("not valid yet",), server="later"),
    "a certificate for another host": Trust(
        lambda w, s: [authority(w, "*")], UNKNOWN, ("it is for elsewhere",), server="elsewhere"
    ),
    "a certificate for another host, and the plain key": Trust(
        lambda w, s: [authority(w, "*"), s.known_hosts], server="elsewhere"
    ),
    "a certificate for another host, and another plain key": Trust(
        lambda w, s: [authority(w, "*"), f"{at(s)} {public(w.keys / 'ed25519')}"],
        CHANGED,
        ("it is for elsewhere",),
        server="elsewhere",
    ),
    "a certificate for all hosts": Trust(lambda w, s: [authority(w, "*")], server="all"),
    "a certificate by an ECDSA authority": Trust(lambda w, s: [authority(w, "*", "other_ca")], server="ecdsa"),
    "a certificate by an RSA authority": Trust(lambda w, s: [authority(w, "*", "rsa_ca")], server="rsa"),
    "a certificate by an RSA authority, which CASignatureAlgorithms forbids": Trust(
        lambda w, s: [authority(w, "*", "rsa_ca")],
        UNKNOWN,
        ("CASignatureAlgorithms",),
        lambda w, s: ["CASignatureAlgorithms ssh-ed25519"],
        server="rsa",
    ),
    "HostKeyAlgorithms of certificates only": Trust(
        lambda w, s: [authority(w, "*")], lines=lambda w, s: ["HostKeyAlgorithms ssh-ed25519-cert-v01@openssh.com"]
    ),
    "HostKeyAlgorithms without certificates": Trust(
        lambda w, s: [authority(w, "*")], UNKNOWN, lines=lambda w, s: ["HostKeyAlgorithms ssh-ed25519"]
    ),
    "HostKeyAlias": Trust(
        lambda w, s: [authority(w, "elsewhere")], lines=lambda w, s: ["HostKeyAlias elsewhere"], server="elsewhere"
    ),
    "several files": Trust(
        lambda w, s: [],
        lines=lambda w, s: [f"UserKnownHostsFile /nowhere {listed(w, authority(w, '*'))} ~/nowhere"],
    ),
    "a file with a space in its name": Trust(
        lambda w, s: [],
        lines=lambda w, s: [
            f"UserKnownHostsFile /nowhere '{listed(w, authority(w, '*')).rename(w.folder / 'a b')}'".replace("'", '"')
        ],
    ),
    "the global file": Trust(
        lambda w, s: [],
        lines=lambda w, s: ["UserKnownHostsFile none", f"GlobalKnownHostsFile {listed(w, s.known_hosts)}"],
    ),
    "no file at all": Trust(
        lambda w, s: [],
        UNKNOWN,
        ("name a file in UserKnownHostsFile (",),
        lambda w, s: ["UserKnownHostsFile /dev/null"],
    ),
    "KnownHostsCommand prints the key": Trust(
        lambda w, s: [], lines=lambda w, s: [f"KnownHostsCommand /bin/echo %H {s.host_key}"]
    ),
    "KnownHostsCommand prints an authority": Trust(
        lambda w, s: [],
        lines=lambda w, s: [f"KnownHostsCommand /bin/echo {authority(w, '*')}"],
    ),
    "KnownHostsCommand gets the key": Trust(
        lambda w, s: [],
        lines=lambda w, s: [f"KnownHostsCommand {script(w, LOGGED.replace('PORT', str(s.port)))} %I %h %t %K"],
        server="none",
    ),
    "KnownHostsCommand prints another key": Trust(
        lambda w, s: [],
        CHANGED,
        ("KnownHostsCommand:1 has", "correct what KnownHostsCommand prints"),
        lambda w, s: [f"KnownHostsCommand /bin/echo %H {public(w.keys / 'ed25519')}"],
    ),
    "KnownHostsCommand prints nothing": Trust(
        lambda w, s: [], UNKNOWN, lines=lambda w, s: ["KnownHostsCommand /bin/true"]
    ),
    "KnownHostsCommand fails": Trust(
        lambda w, s: [s.known_hosts],
        UNKNOWN,
        ("KnownHostsCommand (", "ended with status 3"),
        lambda w, s: [f"KnownHostsCommand {script(w, 'exit 3')}"],
    ),
    "KnownHostsCommand is not there": Trust(
        lambda w, s: [],
        UNKNOWN,
        ("KnownHostsCommand (", "No such file"),
        lambda w, s: ["KnownHostsCommand /no/such/program"],
    ),
    "RevokedHostKeys lists the key": Trust(
        lambda w, s: [s.known_hosts],
        CHANGED,
        ("RevokedHostKeys /",),
        lambda w, s: [f"RevokedHostKeys {listed(w, '# stolen', s.host_key)}"],
    ),
    "RevokedHostKeys lists the authority": Trust(
        lambda w, s: [authority(w, "*")],
        CHANGED,
        ("RevokedHostKeys /",),
        lambda w, s: [f"RevokedHostKeys {listed(w, public(w.ca))}"],
    ),
    "RevokedHostKeys lists others": Trust(
        lambda w, s: [authority(w, "*")], lines=lambda w, s: [f"RevokedHostKeys {listed(w, public(w.other_ca))}"]
    ),
    "a revocation list of the key": Trust(
        lambda w, s: [s.known_hosts],
        CHANGED,
        ("RevokedHostKeys /",),
        lambda w, s: [f"RevokedHostKeys {revocations(w, s.key_file)}"],
    ),
    "a revocation list of other keys": Trust(
        lambda w, s: [authority(w, "*")], lines=lambda w, s: [f"RevokedHostKeys {revocations(w, w.other_ca)}"]
    ),
    "RevokedHostKeys is /dev/null": Trust(
        lambda w, s: [s.known_hosts], lines=lambda w, s: ["RevokedHostKeys /dev/null"], server="none"
    ),
    "RevokedHostKeys is not there": Trust(
        lambda w, s: [s.known_hosts],
        UNKNOWN,
        ("cannot be checked for revocation", "RevokedHostKeys ("),
        lambda w, s: ["RevokedHostKeys /no/such/file"],
    ),
    "StrictHostKeyChecking no": Trust(
        lambda w, s: [],
        UNKNOWN,
        ("StrictHostKeyChecking (", "makes ssh accept"),
        lambda w, s: ["StrictHostKeyChecking no"],
        ssh=0,
    ),
    "StrictHostKeyChecking accept-new": Trust(
        lambda w, s: [],
        UNKNOWN,
        ("StrictHostKeyChecking (", "makes ssh accept"),
        lambda w, s: ["StrictHostKeyChecking accept-new"],
        ssh=0,
    ),
    "StrictHostKeyChecking yes": Trust(
        lambda w, s: [],
        UNKNOWN,
        ("ssh -o StrictHostKeyChecking=ask studio",),
        lambda w, s: ["StrictHostKeyChecking yes"],
    ),
    "BatchMode yes": Trust(lambda w, s: [], UNKNOWN, ("ssh -o BatchMode=no studio",), lambda w, s: ["BatchMode yes"]),
    "VerifyHostKeyDNS": Trust(
        lambda w, s: [], UNKNOWN, ("VerifyHostKeyDNS (", "VerifyHostKeyDNS=no"), lambda w, s: ["VerifyHostKeyDNS yes"]
    ),
    "NoHostAuthenticationForLocalhost": Trust(
        lambda w, s: [],
        UNKNOWN,
        ("NoHostAuthenticationForLocalhost (", "NoHostAuthenticationForLocalhost=no"),
        lambda w, s: ["NoHostAuthenticationForLocalhost yes"],
        ssh=0,
    ),
    "CheckHostIP, the key under the name": Trust(
        lambda w, s: [f"[localhost]:{s.port} {s.host_key}"],
        lines=lambda w, s: ["HostName localhost", "AddressFamily inet", "CheckHostIP yes"],
    ),
    "a line in letters that are not ASCII": Trust(
        lambda w, s: ["\u2588\u2588 \u2588\u2588 \u2588\u2588", s.known_hosts]
    ),
}


@pytest.fixture(scope="module")
def hosts(world: World) -> dict[str, Sshd]:
    """Servers by the certificate that they show."""
    ways: dict[str, tuple[str, str, list[str]]] = {
        "good": ("ca", "127.0.0.1", []),
        "expired": ("ca", "127.0.0.1", ["-V", "20200101:20210101"]),
        "later": ("ca", "127.0.0.1", ["-V", "20900101:20910101"]),
        "elsewhere": ("ca", "elsewhere", []),
        "all": ("ca", "", []),
        "ecdsa": ("other_ca", "127.0.0.1", []),
        "rsa": ("rsa_ca", "127.0.0.1", []),
    }
    found = {"none": world.plain}
    for name, (ca, principals, options) in ways.items():
        folder = world.folder / f"host-{name}"
        folder.mkdir()
        key = keygen(folder / "host_key")
        certificate = certify(world.keys / ca, key, principals, "-h", *options, to=folder / "host.crt")
        found[name] = world.server(f"host-{name}", f"HostCertificate {certificate}", client_key=world.plain.client_key)
    return found


@pytest.mark.parametrize("case", TRUST)
def test_host_is_trusted_like_by_openssh(world: World, hosts: dict[str, Sshd], client: SshClient, case: str) -> None:
    row = TRUST[case]
    server = hosts[row.server]
    client.host("studio", server, *row.lines(world, server), known=False)
    for line in row.known(world, server):
        client.know(line)
    error = outcome("studio")  # first: some of these let ssh write what it sees
    assert (error.code if error else "in") == row.end, error and (error.why, error.hint)
    assert error is None or all(words in f"{error.why}\n{error.hint}" for words in row.says), (error.why, error.hint)
    assert (ssh("studio") == 0) == (row.end == "in" if row.ssh is None else row.ssh == 0)


class Way(NamedTuple):
    """A way to reach the host, and its result."""

    lines: Callable[[Sshd], Sequence[str]]
    end: str = "in"
    says: tuple[str, ...] = ()
    server: str = "plain"
    ssh: int | None = None
    """How ssh ends, where mlxops can do more or less."""


PASSER = Path(__file__).parents[1] / "lab" / "passing.py"
FASTEST = "aes128-gcm@openssh.com"
WAYS = {
    "a jump host": Way(lambda s: ["ProxyJump bastion"]),
    "a jump host with the user's token": Way(lambda s: ["ProxyJump %r@bastion"]),
    "a jump host with the name's token": Way(lambda s: ["ProxyJump jump-%n"]),
    "a jump host with the host's token": Way(lambda s: ["ProxyJump jump-%h"]),
    "a jump host with the port's token": Way(lambda s: ["ProxyJump jump-%p"]),
    "a jump host with a percent sign": Way(lambda s: ["ProxyJump jump%%1"]),
    "a jump host that ssh refuses": Way(lambda s: ["ProxyJump ssh://%r@bastion"], "bad_ssh_config"),
    "several jump hosts with tokens": Way(lambda s: ["ProxyJump %r@bastion,jump-%n"]),
    "a jump host behind a jump host": Way(lambda s: ["ProxyJump behind-%n"]),
    "ProxyJump none": Way(lambda s: ["ProxyJump none"]),
    "ProxyCommand none": Way(lambda s: ["ProxyCommand none"]),
    "ProxyCommand with tokens": Way(lambda s: ["ProxyCommand ssh -W %h:%p %r@bastion"]),
    "ProxyUseFdpass": Way(lambda s: [f"ProxyCommand {sys.executable} {PASSER} %h %p", "ProxyUseFdpass yes"]),
    "ProxyUseFdpass, and nothing is passed": Way(
        lambda s: ["ProxyCommand true", "ProxyUseFdpass yes"], "connection_refused", ("passed no connection",)
    ),
    "BindAddress": Way(lambda s: ["BindAddress 127.0.0.9"], server="picky"),
    "another BindAddress": Way(lambda s: ["BindAddress 127.0.0.8"], "authentication_failed", server="picky"),
    "a BindAddress that is not here": Way(
        lambda s: ["BindAddress 192.0.2.1"], "host_down", ("BindAddress (", "192.0.2.1", "VPN")
    ),
    "BindInterface": Way(lambda s: ["BindInterface lo"]),
    "a BindInterface that is not here": Way(
        lambda s: ["BindInterface nowhere0"], "host_down", ("BindInterface (", "nowhere0")
    ),
    "AddressFamily without an address": Way(lambda s: ["AddressFamily inet6"], "host_down"),
    "an own user, twice": Way(lambda s: [f"User {s.user}", "User daemon"]),
    "RemoteCommand": Way(lambda s: ["RemoteCommand echo hello", "RequestTTY yes"], ssh=255),
    "ForkAfterAuthentication": Way(lambda s: ["ForkAfterAuthentication yes"]),
    "SendEnv, SetEnv, LocalCommand": Way(
        lambda s: ["SetEnv A=b", "SendEnv LANG", "PermitLocalCommand yes", "LocalCommand true"]
    ),
    "ControlMaster": Way(lambda s: ["ControlMaster auto", "ControlPath /nowhere/%C"], ssh=255),
    "a tag and Match": Way(lambda s: ["Compression yes", "CheckHostIP yes", "ServerAliveInterval 5"]),
    "Ciphers that both have": Way(lambda s: [f"Ciphers chacha20-poly1305@openssh.com,{FASTEST}"]),
    "Ciphers that Paramiko lacks": Way(
        lambda s: ["Ciphers chacha20-poly1305@openssh.com"],
        "no_common_algorithm",
        ("Ciphers (", "config:2)", "chacha20-poly1305@openssh.com", "aes128-ctr"),
        ssh=0,
    ),
    "MACs that Paramiko lacks": Way(
        lambda s: ["MACs umac-128@openssh.com"], "no_common_algorithm", ("MACs (", "umac-128"), ssh=0
    ),
    "KexAlgorithms that Paramiko lacks": Way(
        lambda s: ["KexAlgorithms sntrup761x25519-sha512@openssh.com"],
        "no_common_algorithm",
        ("KexAlgorithms (", "sntrup761"),
        ssh=0,
    ),
    "HostKeyAlgorithms that Paramiko lacks": Way(
        lambda s: ["HostKeyAlgorithms sk-ssh-ed25519@openssh.com"], "no_common_algorithm", ("HostKeyAlgorithms (",)
    ),
    "HostKeyAlgorithms that the host lacks": Way(
        lambda s: ["HostKeyAlgorithms rsa-sha2-512"],
        "no_common_algorithm",
        ("it offers host key algorithms ssh-ed25519", "HostKeyAlgorithms ("),
    ),
    "a host with a cipher that Paramiko lacks": Way(
        lambda s: [], "no_common_algorithm", ("it offers ciphers chacha20-poly1305", "sshd_config"), "chacha", 0
    ),
    "a host with the other name of Curve25519 alone": Way(lambda s: [], server="curve"),
    "a host without RSA logins, an RSA key first": Way(
        lambda s: [f"IdentityFile {s.folder}/rsa", f"IdentityFile {s.client_key}"], server="modern"
    ),
    "a host that wants two keys": Way(lambda s: [f"IdentityFile {s.folder}/second"], server="two"),
    "a host that wants a key and a password": Way(
        lambda s: [], "authentication_failed", ("it wants password",), server="password"
    ),
    "a host that wants Kerberos": Way(
        lambda s: ["GSSAPIAuthentication yes"],
        "authentication_failed",
        ("GSSAPIAuthentication (", "not supported by mlxops"),
        "kerberos",
    ),
    "a host that wants the other host's key": Way(
        lambda s: ["HostbasedAuthentication yes"],
        "authentication_failed",
        ("HostbasedAuthentication (", "not supported by mlxops"),
        "hostbased",
    ),
}


@pytest.fixture(scope="module")
def ways(world: World) -> dict[str, Sshd]:
    second, rsa = keygen(world.keys / "second"), keygen(world.keys / "old", "rsa")
    extra = {
        "picky": ["Match Address *,!127.0.0.9", "PubkeyAuthentication no", "Match all"],
        "chacha": ["Ciphers chacha20-poly1305@openssh.com"],
        "curve": ["KexAlgorithms curve25519-sha256"],
        "modern": ["PubkeyAcceptedAlgorithms ssh-ed25519"],
        "two": ["AuthenticationMethods publickey,publickey"],
        "password": ["PasswordAuthentication yes", "AuthenticationMethods publickey,password"],
        "kerberos": ["PubkeyAuthentication no", "GSSAPIAuthentication yes"],
        "hostbased": ["PubkeyAuthentication no", "HostbasedAuthentication yes"],
    }
    found = {"plain": world.plain, "bastion": world.certified}
    for name, lines in extra.items():
        server = found[name] = world.server(name, *lines)
        (server.folder / "second").write_bytes(second.read_bytes())
        (server.folder / "rsa").write_bytes(rsa.read_bytes())
        for file in ("second", "rsa"):
            (server.folder / file).chmod(0o600)
        with (server.folder / "authorized_keys").open("a") as authorized:
            authorized.write(f"{public(second)}\n{public(rsa)}\n")
    return found


@pytest.mark.parametrize("case", WAYS)
def test_host_is_reached_like_by_openssh(ways: dict[str, Sshd], client: SshClient, case: str) -> None:
    row = WAYS[case]
    server = ways[row.server]
    client.host("studio", server, *row.lines(server))
    jump = f"jump-studio jump-{server.address} jump-{server.port} jump%1"
    client.host(f"bastion {jump}", ways["bastion"])
    client.host("behind-studio", ways["bastion"], "ProxyJump %r@bastion")
    error = outcome("studio")
    assert (error.code if error else "in") == row.end, error and (error.why, error.hint)
    assert error is None or all(words in f"{error.why}\n{error.hint}" for words in row.says), (error.why, error.hint)
    assert (ssh("studio") == 0) == (row.end == "in" if row.ssh is None else row.ssh == 0)


def follow(hint: str, tmp_path: Path) -> None:
    """Follow a hint about a host key: run its last command and answer yes."""
    command = hint.split("`")[-2]
    says_yes = tmp_path / "yes"
    says_yes.write_text("#!/bin/sh\necho yes\n")
    says_yes.chmod(0o755)
    environ = {**os.environ, "SSH_ASKPASS": str(says_yes), "SSH_ASKPASS_REQUIRE": "force"}
    subprocess.run(
        [*shlex.split(command), "true"],
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=30,
        check=True,
    )


@pytest.mark.parametrize(
    "line",
    [
        "",
        "StrictHostKeyChecking yes",
        "StrictHostKeyChecking no",
        "BatchMode yes",
        "NoHostAuthenticationForLocalhost yes",
    ],
)
def test_hint_about_an_unknown_host_works(world: World, client: SshClient, tmp_path: Path, line: str) -> None:
    client.host("studio", world.plain, line, known=False)
    error = outcome("studio")
    assert error is not None and error.code == UNKNOWN
    follow(error.hint, tmp_path)
    assert outcome("studio") is None


def test_hint_about_an_unknown_jump_host_works(world: World, client: SshClient, tmp_path: Path) -> None:
    bastion = world.certified
    client.host("studio", world.plain, f"ProxyJump {bastion.user}@{bastion.address}:{bastion.port}")
    client.block(bastion.address, bastion, "User daemon", f"IdentityFile {bastion.client_key}", known=False)
    client.config.write_text(client.config.read_text().replace(f"Port {bastion.port}", "Port 1"))
    error = outcome("studio")
    assert error is not None and error.code == UNKNOWN and f"-p {bastion.port}" in error.hint
    follow(error.hint, tmp_path)
    assert outcome("studio") is None


@pytest.mark.parametrize(
    "case", ["Ciphers that Paramiko lacks", "MACs that Paramiko lacks", "KexAlgorithms that Paramiko lacks"]
)
def test_hint_to_change_a_line_works(world: World, client: SshClient, case: str) -> None:
    [line] = WAYS[case].lines(world.plain)
    # Otherwise no MAC is needed, and ssh asks for none.
    client.host("studio", world.plain, line, "Ciphers aes128-ctr" if line.startswith("MACs") else "")
    error = outcome("studio")
    assert error is not None and error.code == "no_common_algorithm"
    added = error.hint.removeprefix("add ").split()[0]
    client.config.write_text(client.config.read_text().replace(line, f"{line},{added}"))
    assert outcome("studio") is None


def test_hint_to_add_a_line_on_the_host_works(ways: dict[str, Sshd], client: SshClient, tmp_path: Path) -> None:
    client.host("studio", ways["chacha"])
    error = outcome("studio")
    assert error is not None and error.code == "no_common_algorithm"
    line = error.hint.removeprefix("in the host's sshd_config: ")
    with Sshd(tmp_path / "server", extra=line) as server:
        client.host("repaired", server)
        assert outcome("repaired") is None


SHELLS = ("bash", "dash", "zsh", "fish", "csh", "tcsh", "nu")


@pytest.mark.parametrize("name", SHELLS)
def test_every_login_shell_runs_the_command_line(world: World, client: SshClient, tmp_path: Path, name: str) -> None:
    shell = shutil.which(name)
    if shell is None:
        pytest.skip(f"{name} is not installed")
    with Sshd(tmp_path / "server", shell=shell, client_key=world.plain.client_key, env={"HOME": "/h h"}) as server:
        client.host("studio", server)
        code = "import sys, json; print(json.dumps(sys.argv[1:]))"
        with closing(open_ssh("studio")) as opened:
            with closing(opened.start([sys.executable, "-c", code, "~/x y", *HOSTILE], b"")) as session:
                assert json.loads(next(session.lines(ReadLimits(20)))) == ["/h h/x y", *HOSTILE]
                assert session.wait(20).status == 0
            with closing(opened.start(["/bin/sh", "-s", "--", "a b"], b'cat; echo "$1"\n')) as session:
                assert list(session.lines(ReadLimits(20))) == ["a b"]


@pytest.mark.parametrize(
    ("shell", "extra"),
    [("/bin/false", ""), ("/usr/sbin/nologin", ""), ("/bin/rbash", ""), (None, "ForceCommand internal-sftp")],
)
def test_account_that_runs_no_commands_is_reported(tmp_path: Path, shell: str | None, extra: str) -> None:
    if shell is not None and not Path(shell).exists():
        pytest.skip(f"{shell} is not installed")
    with Homelab(tmp_path) as lab:
        lab.studio.sshd.stop()
        lab.studio.sshd.shell, lab.studio.sshd.extra = shell, extra
        lab.studio.sshd.start()
        error = lab.mini.inv("status", "--json").json["hosts"][0]["error"]
        assert error["code"] == "no_shell" and "chsh" in error["hint"]


def test_security_key_in_the_agent_logs_in(client: SshClient, tmp_path: Path) -> None:
    token = SecurityKey()
    line = f"{SECURITY_KEY.decode()} {base64.b64encode(token.blob).decode()}"
    authorized = tmp_path / "authorized"
    authorized.write_text(line + "\n")
    with (
        FakeAgent([token.blob], token.sign) as agent,
        Sshd(tmp_path / "server", extra=f"AuthorizedKeysFile {authorized}") as server,
    ):
        client.block("studio", server, f"IdentityAgent {agent.path}", "IdentityFile none")
        assert same("studio")[0] == "in"
        # Without the agent, ssh would ask the token itself.
        stub = tmp_path / "token"
        stub.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n")
        (tmp_path / "token.pub").write_text(line + "\n")
        client.config.write_text("")
        client.block("studio", server, f"IdentityFile {stub}", "IdentitiesOnly yes")
        error = outcome("studio")
        assert error is not None and f"{stub} is on a security key" in error.why
        assert f"ssh-add {stub}" in error.hint


def test_agent_that_refuses_to_sign_does_not_end_the_login(world: World, client: SshClient) -> None:
    """The user refused (ssh-add -c), the agent is locked, or the key is for other hosts (ssh-add -h)."""
    server = world.certified
    held = key_in(server.client_key)
    with FakeAgent([held], lambda data: None) as agent:
        client.block(
            "studio", server, f"IdentityAgent {agent.path}", f"CertificateFile {world.keys}/ed25519.crt",
            f"IdentityFile {world.ed}",
        )  # fmt: skip
        assert same("studio")[0] == "in"
        client.config.write_text("")
        client.block("studio", server, f"IdentityAgent {agent.path}", "IdentityFile none")
        end, error = same("studio")
        assert end == REFUSED and error is not None and "it refuses" in error.why


def test_agent_signs_only_for_keys_that_the_host_accepts(world: World, client: SshClient) -> None:
    """A signature may need a touch or a confirmation."""
    token = SecurityKey()
    with FakeAgent([token.blob, key_in(world.ed)], lambda data: None) as agent:
        client.block(
            "studio", world.certified, f"IdentityAgent {agent.path}", f"IdentityFile {world.certified.client_key}"
        )
        assert outcome("studio") is None
        assert agent.signed == []


def test_agent_that_waits_for_a_person_is_named(world: World, client: SshClient) -> None:
    never = threading.Event()

    def waits(data: bytes) -> None:
        never.wait(20)

    try:
        with FakeAgent([key_in(world.certified.client_key)], waits) as agent:
            client.block(
                "studio", world.certified, f"IdentityAgent {agent.path}", "IdentityFile none", "ConnectTimeout 2"
            )
            error = outcome("studio")
            assert error is not None and error.code == REFUSED
            assert "it may wait for a touch or a confirmation" in error.why
            never.set()
    finally:
        never.set()


def key_in(path: Path) -> bytes:
    return base64.b64decode(public(path).split()[1])


def test_passphrase_in_the_keychain_is_named(world: World, client: SshClient) -> None:
    """Recorded: OpenSSH on macOS says `usekeychain yes`. No Keychain was available for this test."""
    wrapper = client.bin / "ssh"
    wrapper.write_text(f'{wrapper.read_text().replace("exec ", "")}test "$1" != -G || echo usekeychain yes\n')
    client.block("studio", world.certified, f"IdentityFile {world.encrypted}")
    client.config.write_text(f"IgnoreUnknown UseKeychain\nUseKeychain yes\n{client.config.read_text()}")
    error = outcome("studio")
    assert error is not None and f"UseKeychain ({client.config}:2)" in error.why
    assert "ssh-add --apple-load-keychain" in error.hint


def test_missing_algorithm_is_not_retried() -> None:
    assert "no_common_algorithm" not in PASSING | RETRYABLE_CODES


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_host_may_be_given_as_user_at_address_or_uri(client: SshClient, tmp_path: Path, address: str) -> None:
    with Sshd(tmp_path / "server", address=address) as server:
        client.host(address, server)
        assert outcome(f"{server.user}@{address}") is None
        client.config.write_text(client.config.read_text().replace(f"Port {server.port}", ""))
        if ":" not in address:  # OpenSSH 9.2 takes no URI with an IPv6 address
            assert outcome(f"ssh://{server.user}@{address}:{server.port}") is None


def test_user_in_a_name_does_not_change_its_tokens(world: World, client: SshClient) -> None:
    """In `user@studio`, %n is studio."""
    known = world.folder / "of-studio"
    known.write_text(world.plain.known_hosts + "\n")
    client.host("studio", world.plain, f"UserKnownHostsFile {world.folder}/of-%n", known=False)
    assert ssh(f"{world.plain.user}@studio") == 0
    assert outcome(f"{world.plain.user}@studio") is None


@pytest.mark.parametrize("kind", KINDS)
def test_certificate_without_its_key_in_the_agent_logs_in(world: World, client: SshClient, kind: str) -> None:
    """As `step ssh login` and Vault's helpers leave it there."""
    key = world.folder / f"stepped-{kind}"
    key.write_bytes((world.keys / kind).read_bytes())
    key.chmod(0o600)
    certificate = key.with_name(f"{key.name}-cert.pub")
    certificate.write_bytes((world.keys / f"{kind}.crt").read_bytes())
    agent = world.agent(key)
    bare = world.folder / f"bare-{kind}.pub"
    bare.write_bytes((world.keys / f"{kind}.pub").read_bytes())
    agent.remove(bare)
    client.block("studio", world.certified, f"IdentityAgent {agent.path}", "IdentityFile none")
    assert same("studio")[0] == "in"


def test_teleports_configuration_works(world: World, client: SshClient) -> None:
    """`tsh config`: RSA certificates on both sides, host certificates alone allowed, an authority file of its own."""
    folder = world.folder / "tele port"
    folder.mkdir()
    key = keygen(folder / "host_key", "rsa")
    certificate = certify(world.rsa_ca, key, "studio.cluster", "-h", to=folder / "host.crt")
    known = folder / "known_hosts"
    known.write_text(f"@cert-authority proxy,cluster,*.cluster {public(world.rsa_ca)} type=host\n")
    extra = [f'HostKey "{key}"', f'HostCertificate "{certificate}"', f"TrustedUserCAKeys {world.keys}/trusted"]
    with Sshd(world.folder / "teleport", extra="\n".join(extra)) as server:
        client.block(
            "*.cluster",
            server,
            f'UserKnownHostsFile "{known}"',
            f"IdentityFile {world.keys}/rsa",
            f"CertificateFile {world.keys}/rsa.crt",
            "HostKeyAlgorithms rsa-sha2-512-cert-v01@openssh.com,rsa-sha2-256-cert-v01@openssh.com",
            "HostKeyAlias studio.cluster",
            "ProxyCommand sh -c 'exec ssh -W %h:%p bastion'",
            known=False,
        )
        client.host("bastion", world.plain)
        assert same("studio.cluster")[0] == "in"
