"""Read SSH public keys and OpenSSH certificates, from the wire and from files.

The formats are those of RFC 4253 section 6.6 and of OpenSSH's PROTOCOL.certkeys and PROTOCOL.key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from pathlib import Path

from mlxops.common.files import read_start
from mlxops.core.frozen import dataclass

CERTIFICATE = "-cert-v01@openssh.com"
"""The suffix of certificate types."""
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
    """The content of a certificate. Nothing in it is verified here."""

    key: bytes
    """The certified public key."""
    for_hosts: bool
    principals: tuple[str, ...]
    """The names that it is valid for; empty: all."""
    valid_after: int
    valid_before: int
    """Seconds since 1970, exclusive."""
    critical: bool
    """It has critical options."""
    authority: bytes
    """The public key of the authority that signed it."""
    algorithm: str
    """Of the signature: rsa-sha2-512, for instance."""


def kind(blob: bytes) -> str:
    """Return the name of a key's type, such as ssh-ed25519; "" if this is no key."""
    try:
        return unpacked(blob)[0].decode("ascii")
    except ValueError:
        return ""


def plain_kind(name: str) -> str:
    """Return the type of the key in a certificate; other types unchanged."""
    if not name.endswith(CERTIFICATE):
        return name
    plain = name.removesuffix(CERTIFICATE)
    return f"{plain}@openssh.com" if plain.startswith("sk-") else plain


def plain(blob: bytes) -> bytes:
    """Return the key in a certificate; other keys, and bytes that are no key, unchanged."""
    parsed = certificate(blob) if kind(blob).endswith(CERTIFICATE) else None
    return parsed.key if parsed else blob


def certificate(blob: bytes) -> Certificate | None:
    """Parse a certificate; None if this is none, or of an unknown type."""
    try:
        name, rest = unpacked(blob)
        type_ = plain_kind(name.decode("ascii"))
        if type_.encode() == name:
            return None
        _nonce, rest = unpacked(rest)
        fields = [type_.encode()]
        for _ in range(_FIELDS[type_]):
            field, rest = unpacked(rest)
            fields.append(field)
        purpose, rest = int.from_bytes(rest[8:12], "big"), rest[12:]  # after the serial number
        _key_id, rest = unpacked(rest)
        principals, rest = unpacked(rest)
        after, before, rest = int.from_bytes(rest[:8], "big"), int.from_bytes(rest[8:16], "big"), rest[16:]
        critical, rest = unpacked(rest)
        _extensions, rest = unpacked(rest)
        _reserved, rest = unpacked(rest)
        authority, rest = unpacked(rest)
        signature, _ = unpacked(rest)
        return Certificate(
            key=b"".join(map(packed, fields)),
            for_hosts=purpose == _FOR_HOSTS,
            principals=tuple(each.decode("utf-8", "replace") for each in _strings(principals)),
            valid_after=after,
            valid_before=before,
            critical=bool(critical) or purpose not in (_FOR_USERS, _FOR_HOSTS),
            authority=authority,
            algorithm=unpacked(signature)[0].decode("ascii"),
        )
    except (ValueError, KeyError):
        return None


def signature_is_good(blob: bytes) -> bool:
    """Return whether the authority in a certificate signed it.

    Also False for authorities on a security key (sk-): this cannot check their signatures.
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
    """Return the fingerprint as `ssh-keygen -l` prints it: `SHA256:...`. For a certificate, that of its key."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(plain(blob)).digest()).decode().rstrip("=")


def from_line(fields: Sequence[bytes]) -> bytes | None:
    """Return the key in a line `TYPE BASE64 ...`; None if there is none."""
    if len(fields) < 2 or not fields[0].startswith((b"ssh-", b"ecdsa-", b"sk-", b"rsa-sha2-")):
        return None
    try:
        return base64.b64decode(fields[1], validate=True)
    except binascii.Error:
        return None


def from_file(path: Path) -> bytes | None:
    """Return the public key of an identity, looked for where OpenSSH looks: in the file itself, in the file beside it
    with the suffix .pub, and in the unencrypted part of a private key in OpenSSH's format."""
    beside = path.with_name(f"{path.name}.pub")
    own = _content(path)
    return _first_key(own) or _first_key(_content(beside)) or _from_private(own)


def packed(field: bytes) -> bytes:
    """Return a field in wire format: its length in four bytes, then itself."""
    return len(field).to_bytes(4, "big") + field


def _content(path: Path) -> bytes:
    try:
        return read_start(path, _MAX_BYTES)
    except (OSError, ValueError):
        return b""


def _first_key(text: bytes) -> bytes | None:
    blobs = (from_line(line.split()) for line in text.splitlines())
    return next((blob for blob in blobs if blob), None)


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
            rest = unpacked(rest)[1]
        return unpacked(rest[4:])[0]  # after the number of keys
    except ValueError:
        return None


def unpacked(data: bytes) -> tuple[bytes, bytes]:
    """Return the first field in wire format, and the bytes after it. Raises `ValueError` if it is cut off."""
    end = 4 + int.from_bytes(data[:4], "big")
    if len(data) < max(4, end):
        raise ValueError("it ends too early")
    return data[4:end], data[end:]


def _strings(data: bytes) -> list[bytes]:
    strings: list[bytes] = []
    while data:
        string, data = unpacked(data)
        strings.append(string)
    return strings
