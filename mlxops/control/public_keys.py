"""SSH public keys and OpenSSH certificates, as they travel on the wire and stand in files.

The formats are those of RFC 4253 section 6.6 and of OpenSSH's PROTOCOL.certkeys and PROTOCOL.key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxops.control.files import opened

CERTIFICATE = "-cert-v01@openssh.com"
"""How the name of a certificate's type ends."""
_FIELDS = {
    "ssh-ed25519": 1,
    "ssh-rsa": 2,
    "ecdsa-sha2-nistp256": 2,
    "ecdsa-sha2-nistp384": 2,
    "ecdsa-sha2-nistp521": 2,
    "sk-ssh-ed25519@openssh.com": 2,
    "sk-ecdsa-sha2-nistp256@openssh.com": 3,
}
"""How many fields follow the name in a public key."""
_FOR_USERS, _FOR_HOSTS = 1, 2
_MAX_BYTES = 64 * 1024
_PRIVATE = b"openssh-key-v1\0"


@dataclass(frozen=True)
class Certificate:
    """What a certificate says. Nothing of it is verified here."""

    key: bytes
    """The certified public key."""
    for_hosts: bool
    principals: tuple[str, ...]
    """Names it is valid for; none means all."""
    valid_after: int
    valid_before: int
    """Seconds since 1970; the end does not belong to it."""
    critical: bool
    """It has critical options."""
    authority: bytes
    """The public key of the authority that signed it."""
    algorithm: str
    """Of the signature: rsa-sha2-512, for instance."""


def kind(blob: bytes) -> str:
    """The name of a key's type: ssh-ed25519 and the like. "" if this is no key."""
    try:
        return _string(blob)[0].decode("ascii")
    except ValueError:
        return ""


def plain_kind(name: str) -> str:
    """The type of the key in a certificate; other types are returned as they are."""
    if not name.endswith(CERTIFICATE):
        return name
    plain = name.removesuffix(CERTIFICATE)
    return f"{plain}@openssh.com" if plain.startswith("sk-") else plain


def plain(blob: bytes) -> bytes:
    """The public key without its certificate; other keys, and what is no key, are returned as they are."""
    found = certificate(blob) if kind(blob).endswith(CERTIFICATE) else None
    return found.key if found else blob


def certificate(blob: bytes) -> Certificate | None:
    """None if this is no certificate of a type that is known here."""
    try:
        name, rest = _string(blob)
        type_ = plain_kind(name.decode("ascii"))
        if type_.encode() == name:
            return None
        _nonce, rest = _string(rest)
        fields = [type_.encode()]
        for _ in range(_FIELDS[type_]):
            field, rest = _string(rest)
            fields.append(field)
        purpose, rest = int.from_bytes(rest[8:12], "big"), rest[12:]  # after the serial number
        _key_id, rest = _string(rest)
        principals, rest = _string(rest)
        after, before, rest = int.from_bytes(rest[:8], "big"), int.from_bytes(rest[8:16], "big"), rest[16:]
        critical, rest = _string(rest)
        _extensions, rest = _string(rest)
        _reserved, rest = _string(rest)
        authority, rest = _string(rest)
        signature, _ = _string(rest)
        return Certificate(
            key=b"".join(map(packed, fields)),
            for_hosts=purpose == _FOR_HOSTS,
            principals=tuple(each.decode("utf-8", "replace") for each in _strings(principals)),
            valid_after=after,
            valid_before=before,
            critical=bool(critical) or purpose not in (_FOR_USERS, _FOR_HOSTS),
            authority=authority,
            algorithm=_string(signature)[0].decode("ascii"),
        )
    except (ValueError, KeyError):
        return None


def signature_is_good(blob: bytes) -> bool:
    """Whether a certificate was signed with the key that it names as its authority's.

    False also for authorities on a security key (sk-), whose signatures cannot be checked here.
    """
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import ssh

    line = f"{kind(blob)} ".encode() + base64.b64encode(blob)
    try:
        loaded = ssh.load_ssh_public_identity(line)
        if not isinstance(loaded, ssh.SSHCertificate):
            return False
        loaded.verify_cert_signature()
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        return False
    return True


def fingerprint(blob: bytes) -> str:
    """As `ssh-keygen -l` prints it: `SHA256:...`. A certificate has that of its key."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(plain(blob)).digest()).decode().rstrip("=")


def from_line(fields: Sequence[bytes]) -> bytes | None:
    """The key in `TYPE BASE64 ...`; None if there is none."""
    if len(fields) < 2 or not fields[0].startswith((b"ssh-", b"ecdsa-", b"sk-", b"rsa-sha2-")):
        return None
    try:
        return base64.b64decode(fields[1], validate=True)
    except binascii.Error:
        return None


def from_file(path: Path) -> bytes | None:
    """The public half of an identity, looked for where OpenSSH looks: in the file itself, in the one beside it whose
    name ends in .pub, and in the readable part of a private key in OpenSSH's format, encrypted or not."""
    beside = path.with_name(f"{path.name}.pub")
    own = _content(path)
    return _first_key(own) or _first_key(_content(beside)) or _from_private(own)


def packed(field: bytes) -> bytes:
    """A string as it travels: its length in four bytes, then itself."""
    return len(field).to_bytes(4, "big") + field


def _content(path: Path) -> bytes:
    try:
        with opened(path) as stream:
            return stream.read(_MAX_BYTES)
    except (OSError, ValueError):
        return b""


def _first_key(text: bytes) -> bytes | None:
    found = (from_line(line.split()) for line in text.splitlines())
    return next((blob for blob in found if blob), None)


def _from_private(text: bytes) -> bytes | None:
    lines = text.strip().splitlines()
    if not lines or lines[0].strip() != b"-----BEGIN OPENSSH PRIVATE KEY-----":
        return None
    try:
        rest = base64.b64decode(b"".join(line.strip() for line in lines[1:-1]), validate=True)
        if not rest.startswith(_PRIVATE):
            return None
        rest = rest[len(_PRIVATE) :]
        for _ in ("cipher", "kdf", "kdf options"):
            rest = _string(rest)[1]
        return _string(rest[4:])[0]  # after the number of keys
    except ValueError:
        return None


def _string(data: bytes) -> tuple[bytes, bytes]:
    """The first string, and what follows it."""
    end = 4 + int.from_bytes(data[:4], "big")
    if len(data) < max(4, end):
        raise ValueError("it ends too early")
    return data[4:end], data[end:]


def _strings(data: bytes) -> list[bytes]:
    found: list[bytes] = []
    while data:
        each, data = _string(data)
        found.append(each)
    return found
