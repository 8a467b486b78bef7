"""Read OpenSSH's known_hosts files: the keys of a host, and the authorities whose certificates it may show."""

from __future__ import annotations

import base64
import hmac
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mlxops.common.files import read_start
from mlxops.control.ssh import public_keys
from mlxops.core.frozen import dataclass

MAX_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class KnownKey:
    """A line of a file. `kind` is ssh-ed25519 and the like."""

    kind: str
    blob: bytes
    file: Path
    line: int


@dataclass(frozen=True)
class HostKeys:
    """The known keys of one host.

    `keys` are its own. `elsewhere` are the keys of the same machine's port 22, which OpenSSH accepts for another port,
    too. `revoked` keys are always refused; they count for all ports of the machine. `authorities` are the keys that may
    sign certificates for the host.
    """

    name: str
    keys: tuple[KnownKey, ...]
    elsewhere: tuple[KnownKey, ...]
    revoked: frozenset[bytes]
    authorities: tuple[KnownKey, ...] = ()
    principals: tuple[str, ...] = ()
    """A certificate must be for one of these names."""

    def accepts(self, blob: bytes) -> bool:
        return blob not in self.revoked and any(key.blob == blob for key in (*self.keys, *self.elsewhere))

    def kinds(self) -> list[str]:
        """Return the kinds of key that are known, to request them before others."""
        return list(dict.fromkeys(key.kind for key in (*self.keys, *self.elsewhere)))

    def __add__(self, other: HostKeys) -> HostKeys:
        """Combine what two sources know about the same host."""
        return HostKeys(
            self.name,
            self.keys + other.keys,
            self.elsewhere + other.elsewhere,
            self.revoked | other.revoked,
            self.authorities + other.authorities,
            self.principals,
        )

    def fault_of(self, certificate: public_keys.Certificate, now: float, algorithms: Sequence[str]) -> str | None:
        """Return why a host certificate does not prove the host; None if it does.

        `algorithms` are those that an authority may sign with. The signature itself is not checked.
        """
        if not any(key.blob == certificate.authority for key in self.authorities):
            shown = public_keys.fingerprint(certificate.authority)
            return f"no @cert-authority line for {self.name} has the authority that signed it, {shown}"
        if not certificate.for_hosts:
            return "it is not a host certificate"
        if now < certificate.valid_after:
            return "it is not valid yet"
        if now >= certificate.valid_before:
            return "it has expired"
        # A certificate without names is for all hosts (PROTOCOL.certkeys), as in OpenSSH before 10.3.
        if certificate.principals and not set(self.principals) & set(certificate.principals):
            return f"it is for {', '.join(certificate.principals)}, and not for {self.principals[0]}"
        if certificate.critical:
            return "it has critical options, which no host certificate may have"
        if algorithms and certificate.algorithm not in algorithms:
            return f"its signature is {certificate.algorithm}, which CASignatureAlgorithms does not allow"
        return None


def lookup(files: Sequence[Path], hostname: str, port: int, alias: str | None) -> HostKeys:
    """Look up a host in files. Like OpenSSH, skip missing files and invalid lines."""
    return _known(_lines(files), hostname, port, alias)


def lookup_in(text: str, source: str, hostname: str, port: int, alias: str | None) -> HostKeys:
    """Look up a host in the output of a command. `source` names the output in messages."""
    return _known(_lines_of(text, Path(source)), hostname, port, alias)


def _known(lines: Iterator[_Line], hostname: str, port: int, alias: str | None) -> HostKeys:
    plain = (alias or hostname).lower()
    name = plain if alias or port == 22 else f"[{plain}]:{port}"
    keys: list[KnownKey] = []
    elsewhere: list[KnownKey] = []
    authorities: list[KnownKey] = []
    revoked: set[bytes] = set()
    for line in lines:
        own = _matches(line.patterns, name)
        other = not own and name != plain and _matches(line.patterns, plain)
        key = _key_of(line) if own or other else None
        if key is None:
            continue
        if line.marker == "@revoked":
            revoked.add(public_keys.plain(key.blob))
        elif line.marker == "@cert-authority":
            authorities.append(key)
        elif not line.marker:
            (keys if own else elsewhere).append(key)
    return HostKeys(name, tuple(keys), tuple(elsewhere), frozenset(revoked), tuple(authorities), (plain,))


class _Line(NamedTuple):
    marker: str
    patterns: list[str]
    kind: str
    encoded: str
    """The key in base64."""
    file: Path
    number: int


def _lines(files: Sequence[Path]) -> Iterator[_Line]:
    for file in files:
        try:
            text = read_start(file, MAX_BYTES).decode("utf-8", "replace")
        except (OSError, ValueError):
            continue
        yield from _lines_of(text, file)


def _lines_of(text: str, file: Path) -> Iterator[_Line]:
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        marker = fields.pop(0) if fields and fields[0].startswith("@") else ""
        if len(fields) < 3 or fields[0].startswith("#"):
            continue
        yield _Line(marker, fields[0].split(","), fields[1], fields[2], file, number)


def _key_of(line: _Line) -> KnownKey | None:
    """Return the line's key; None if it cannot be decoded."""
    try:
        blob = base64.b64decode(line.encoded, validate=True)
    except ValueError:
        return None
    return KnownKey(line.kind, blob, line.file, line.number)


def _matches(patterns: Sequence[str], name: str) -> bool:
    """Return whether one of the patterns matches, and no negated one does."""
    matches = False
    for pattern in patterns:
        if pattern.startswith("|1|"):
            matches = matches or _hash_matches(pattern, name)
        elif _glob_matches(pattern.removeprefix("!").lower(), name):
            if pattern.startswith("!"):
                return False
            matches = True
    return matches


def _hash_matches(pattern: str, name: str) -> bool:
    try:
        salt, digest = (base64.b64decode(part, validate=True) for part in pattern[3:].split("|"))
    except ValueError:
        return False
    return hmac.compare_digest(hmac.digest(salt, name.encode(), "sha1"), digest)


def _glob_matches(pattern: str, name: str) -> bool:
    """Match an OpenSSH pattern: only * and ? are special; brackets are part of `[host]:port`.

    Not a regular expression: with many stars one takes exponential time.
    """
    if "*" not in pattern and "?" not in pattern:
        return pattern == name
    at = here = began = 0
    star = -1
    while here < len(name):
        if pattern[at : at + 1] == "*":
            star, began = at, here
            at += 1
        elif pattern[at : at + 1] in ("?", name[here]):
            at, here = at + 1, here + 1
        elif star >= 0:
            began += 1  # the last star matches one character more; earlier stars need not change
            at, here = star + 1, began
        else:
            return False
    return not pattern[at:].strip("*")
