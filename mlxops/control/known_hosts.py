"""OpenSSH's known_hosts files: which keys a host is known by. Host certificates are not supported."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxops.control.files import opened

MAX_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class KnownKey:
    """A line of a file. `kind` is ssh-ed25519 and the like."""

    kind: str
    blob: bytes
    file: Path
    line: int


@dataclass(frozen=True)
class Known:
    """What the files say of one host.

    `keys` are its own. `elsewhere` are those of the same machine's port 22, which OpenSSH accepts as proof for
    another port, though their absence proves nothing. `revoked` are refused whatever else is said, those of the
    machine on every port.
    """

    name: str
    keys: tuple[KnownKey, ...]
    elsewhere: tuple[KnownKey, ...]
    revoked: frozenset[bytes]

    def accepts(self, blob: bytes) -> bool:
        return blob not in self.revoked and any(key.blob == blob for key in (*self.keys, *self.elsewhere))

    def kinds(self) -> list[str]:
        """The kinds of key that could be recognised, to be asked for before others."""
        return list(dict.fromkeys(key.kind for key in (*self.keys, *self.elsewhere)))


def lookup(files: Sequence[Path], hostname: str, port: int, alias: str | None) -> Known:
    """Files that are not there are empty; lines that make no sense are skipped, as OpenSSH does."""
    plain = (alias or hostname).lower()
    name = plain if alias or port == 22 else f"[{plain}]:{port}"
    keys: list[KnownKey] = []
    elsewhere: list[KnownKey] = []
    revoked: set[bytes] = set()
    for marker, patterns, key in _lines(files):
        own = _matches(patterns, name)
        other = not own and name != plain and _matches(patterns, plain)
        if marker == "@revoked" and (own or other):
            revoked.add(key.blob)
        elif not marker and own:
            keys.append(key)
        elif not marker and other:
            elsewhere.append(key)
    return Known(name, tuple(keys), tuple(elsewhere), frozenset(revoked))


def fingerprint(blob: bytes) -> str:
    """As `ssh-keygen -l` prints it: `SHA256:...`."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def _lines(files: Sequence[Path]) -> Iterator[tuple[str, list[str], KnownKey]]:
    for file in files:
        try:
            with opened(file) as stream:
                text = stream.read(MAX_BYTES).decode("utf-8", "replace")
        except OSError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            fields = line.split()
            marker = fields.pop(0) if fields and fields[0].startswith("@") else ""
            if len(fields) < 3 or fields[0].startswith("#"):
                continue
            try:
                blob = base64.b64decode(fields[2], validate=True)
            except binascii.Error:
                continue
            yield marker, fields[0].split(","), KnownKey(fields[1], blob, file, number)


def _matches(patterns: Sequence[str], name: str) -> bool:
    """A negated pattern that matches wins over all others of its line."""
    found = False
    for pattern in patterns:
        if pattern.startswith("|1|"):
            found = found or _hash_matches(pattern, name)
        elif _glob_matches(pattern.removeprefix("!").lower(), name):
            if pattern.startswith("!"):
                return False
            found = True
    return found


def _hash_matches(pattern: str, name: str) -> bool:
    try:
        salt, digest = (base64.b64decode(part, validate=True) for part in pattern[3:].split("|"))
    except ValueError:
        return False
    return hmac.compare_digest(hmac.digest(salt, name.encode(), "sha1"), digest)


def _glob_matches(pattern: str, name: str) -> bool:
    """OpenSSH's patterns know * and ? only; brackets are part of `[host]:port`.

    By hand: a regular expression tries every way to share a name among many stars, for longer than anybody waits.
    """
    at = here = began = 0
    star = -1
    while here < len(name):
        if pattern[at : at + 1] == "*":
            star, began = at, here
            at += 1
        elif pattern[at : at + 1] in ("?", name[here]):
            at, here = at + 1, here + 1
        elif star >= 0:
            began += 1  # the last star takes one more; those before it need not change
            at, here = star + 1, began
        else:
            return False
    return not pattern[at:].strip("*")
