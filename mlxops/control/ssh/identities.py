"""Choose the keys to offer to a host, their order and their signers, by OpenSSH's rules. Pure.

The order is that of `pubkey_prepare` in OpenSSH's sshconnect2.c. It matters: after MaxAuthTries keys, usually six, the
host closes the connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlxops.control.ssh import public_keys
from mlxops.core.frozen import dataclass


@dataclass(frozen=True)
class Identity:
    """A key of an IdentityFile line, or the certificate beside it."""

    path: Path
    """The private key's file."""
    blob: bytes
    """Its public key or certificate."""


@dataclass(frozen=True)
class Offer:
    """A public key or certificate, and what signs for it."""

    blob: bytes
    signer: bytes | Path
    """The agent's key that signs, or a private key's file."""


def offers(
    identities: Sequence[Identity],
    certificates: Sequence[bytes],
    held: Sequence[bytes],
    *,
    identities_only: bool,
    accepted: Sequence[str] = (),
) -> list[Offer]:
    """Return the offers in order: CertificateFile's certificates, the agent's keys that an IdentityFile names, the
    agent's other keys unless IdentitiesOnly, the other files.

    `held` are the agent's keys. `accepted` are the algorithms of PubkeyAcceptedAlgorithms; empty: all. A certificate
    without a private key is not offered.
    """
    named = {identity.blob for identity in identities}
    usable = [blob for blob in held if blob in named]
    if not identities_only:
        usable += [blob for blob in held if blob not in named]
    ordered = dict.fromkeys((*certificates, *usable, *(identity.blob for identity in identities)))
    offers: list[Offer] = []
    for blob in ordered:
        signer = _signer(blob, usable, identities)
        if signer is not None and _is_accepted(public_keys.kind(blob), accepted):
            offers.append(Offer(blob, signer))
    return offers


def _signer(blob: bytes, usable: Sequence[bytes], identities: Sequence[Identity]) -> bytes | Path | None:
    plain = public_keys.plain(blob)
    for candidate in (plain, blob):
        if candidate in usable:
            return candidate
    return next((identity.path for identity in identities if public_keys.plain(identity.blob) == plain), None)


def _is_accepted(kind: str, accepted: Sequence[str]) -> bool:
    return not accepted or any(name in accepted for name in signatures(kind))


def signatures(kind: str) -> tuple[str, ...]:
    """Return the algorithms with which a key of this type signs a login, the best one first."""
    if public_keys.plain_kind(kind) != "ssh-rsa":
        return (kind,)
    suffix = kind.removeprefix("ssh-rsa")
    return (f"rsa-sha2-512{suffix}", f"rsa-sha2-256{suffix}")
