"""The keys to offer and their order: OpenSSH's rules as a table. The test keys are a few letters."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from mlxops.control.ssh.identities import Identity, offers
from mlxops.control.ssh.public_keys import certificate, kind, packed, plain


def key(name: str, type_: str = "ssh-ed25519") -> bytes:
    fields = [name] if type_ == "ssh-ed25519" else ["e", name]
    return packed(type_.encode()) + b"".join(packed(field.encode()) for field in fields)


def certified(name: str, type_: str = "ssh-ed25519", *, more: str = "") -> bytes:
    """A certificate for that key, in the shape of PROTOCOL.certkeys."""
    public = key(name, type_)
    start = 4 + len(type_)
    numbers = bytes(8) + (1).to_bytes(4, "big")
    names = packed(packed(b"me") + packed(b"you"))
    validity = (5).to_bytes(8, "big") + (9).to_bytes(8, "big")
    signature = packed(packed(b"ssh-ed25519") + packed(b"signed"))
    return (
        packed(f"{type_}-cert-v01@openssh.com".encode())
        + packed(f"nonce{more}".encode())
        + public[start:]
        + numbers
        + packed(b"lab")
        + names
        + validity
        + packed(b"") * 3
        + packed(key("authority"))
        + signature
    )


A, B, C, R = key("a"), key("b"), key("c"), key("r", "ssh-rsa")
A_CERT, A_OTHER, R_CERT = certified("a"), certified("a", more="2"), certified("r", "ssh-rsa")
FILE_A, FILE_B = Path("/keys/a"), Path("/keys/b")


class Case(NamedTuple):
    files: list[Identity]
    certificates: list[bytes]
    held: list[bytes]
    offered: list[tuple[bytes, bytes | Path]]
    only: bool = False
    accepted: tuple[str, ...] = ()


CASES = {
    "nothing": Case([], [], [], []),
    "files in their order": Case([Identity(FILE_A, A), Identity(FILE_B, B)], [], [], [(A, FILE_A), (B, FILE_B)]),
    "the agent's named key, its others, then files": Case(
        [Identity(FILE_A, A), Identity(FILE_B, B)], [], [C, B], [(B, B), (C, C), (A, FILE_A)]
    ),
    "the agent's order counts among named keys": Case(
        [Identity(FILE_A, A), Identity(FILE_B, B)], [], [B, A], [(B, B), (A, A)]
    ),
    "IdentitiesOnly": Case([Identity(FILE_A, A)], [], [C, A], [(A, A)], only=True),
    "a configured certificate first, signed by the agent": Case([], [A_CERT], [B, A], [(A_CERT, A), (B, B), (A, A)]),
    "a configured certificate, signed by a file": Case(
        [Identity(FILE_A, A)], [A_CERT], [], [(A_CERT, FILE_A), (A, FILE_A)]
    ),
    "a configured certificate whose key is not there": Case([Identity(FILE_B, B)], [A_CERT], [], [(B, FILE_B)]),
    "a configured certificate whose key is not named": Case([], [A_CERT], [A], [], only=True),
    "a certificate beside a key comes after the key": Case(
        [Identity(FILE_A, A), Identity(FILE_A, A_CERT)], [], [], [(A, FILE_A), (A_CERT, FILE_A)]
    ),
    "a certificate beside a key, signed by the agent": Case(
        [Identity(FILE_A, A), Identity(FILE_A, A_CERT)], [], [A], [(A, A), (A_CERT, A)]
    ),
    "a certificate that only the agent has signs itself": Case([], [], [A_CERT], [(A_CERT, A_CERT)]),
    "two certificates for one key": Case([], [A_CERT, A_OTHER], [A], [(A_CERT, A), (A_OTHER, A), (A, A)]),
    "nothing is offered twice": Case(
        [Identity(FILE_A, A), Identity(FILE_A, A_CERT)], [A_CERT], [A, A_CERT], [(A_CERT, A), (A, A)]
    ),
    "PubkeyAcceptedAlgorithms": Case(
        [Identity(FILE_A, A), Identity(FILE_B, R)], [], [], [(R, FILE_B)], accepted=("rsa-sha2-256",)
    ),
    "PubkeyAcceptedAlgorithms, certificates alone": Case(
        [Identity(FILE_B, R)], [R_CERT], [], [(R_CERT, FILE_B)], accepted=("rsa-sha2-512-cert-v01@openssh.com",)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_keys_are_offered_in_the_order_of_openssh(name: str) -> None:
    case = CASES[name]
    found = offers(case.files, case.certificates, case.held, identities_only=case.only, accepted=case.accepted)
    assert [(each.blob, each.signer) for each in found] == case.offered


def test_certificate_is_read_completely() -> None:
    found = certificate(A_CERT)
    assert found is not None
    assert (found.key, found.for_hosts, found.principals) == (A, False, ("me", "you"))
    assert (found.valid_after, found.valid_before, found.critical) == (5, 9, False)
    assert (found.authority, found.algorithm) == (key("authority"), "ssh-ed25519")
    assert plain(A_CERT) == A and plain(R_CERT) == R and kind(R_CERT) == "ssh-rsa-cert-v01@openssh.com"


def test_bytes_that_are_no_certificate_return_none() -> None:
    for blob in (b"", b"\0\0\0\xffx", A, b"x" * 100, packed(b"ssh-what-cert-v01@openssh.com") * 20):
        assert certificate(blob) is None and plain(blob) == blob
    for length in range(len(A_CERT) - 1):
        assert certificate(A_CERT[:length]) is None, length
