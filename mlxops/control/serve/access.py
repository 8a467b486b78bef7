"""Who may ask `serve`: decided for each request before anything else sees it.

A page of another site must not read anything through the user's browser, also not under a name of its own that leads to
this machine (DNS rebinding). So the names in Host and Origin are checked, even on loopback. Clients elsewhere need a
token.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
import socket
import stat
from collections.abc import Sequence
from pathlib import Path

from mlxops.common import files
from mlxops.core.commands.serve import Address
from mlxops.core.errors import UsageError
from mlxops.core.frozen import dataclass

MAX_BODY_BYTES = 64 * 1024
SHORTEST_TOKEN = 16
MAX_TOKEN_BYTES = 4096
_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:[0-9]{1,5})?", re.ASCII)

Headers = Sequence[tuple[bytes, bytes]]
"""Names in lower case, and values, as ASGI has them."""


@dataclass(frozen=True)
class Refusal:
    status: int
    message: str
    headers: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True)
class Access:
    """What requests are accepted."""

    names: frozenset[str]
    """Names and IP addresses in Host that are this machine's."""
    any_address: bool
    """Accept every IP address in Host. No site can have one as its name."""
    token: bytes | None
    """What clients send as `Authorization: Bearer TOKEN`; None: nothing."""


def access_to(address: Address, token: bytes | None, names: Sequence[str]) -> Access:
    """Raises `UsageError` (token_needed) for an address that other machines reach, without a token."""
    own = {"localhost", "127.0.0.1", "::1", address.host, *(name.lower() for name in names)}
    if address.loopback:
        return Access(frozenset(own), any_address=False, token=token)
    if token is None:
        raise UsageError(
            "token_needed",
            f"{address} needs --token-file",
            why="other machines reach it, and the metrics name hosts and models",
            hint="leave --address out to listen on loopback; or: (umask 077; openssl rand -hex 32 > FILE), then "
            "`mlxctl serve --token-file FILE`",
        )
    machine = socket.gethostname().lower()
    return Access(frozenset({*own, machine, f"{machine.partition('.')[0]}.local"}), any_address=True, token=token)


def refusal(access: Access, headers: Headers) -> Refusal | None:
    """Return why a request is refused; None if it is accepted."""
    host = _only(headers, b"host")
    if host is None or not _is_ours(access, host):
        return Refusal(403, "this name is not known here; see: `mlxctl help serve`")
    if _all(headers, b"origin") not in ([], [f"http://{host}"]):
        return Refusal(403, "requests of other sites are refused")
    if access.token is not None and not _has_token(headers, access.token):
        return Refusal(401, "a token is needed", ((b"www-authenticate", b"Bearer"),))
    if _all(headers, b"transfer-encoding"):
        return Refusal(411, "a body needs its length")
    if any(int(size) > MAX_BODY_BYTES for size in _all(headers, b"content-length")):
        return Refusal(413, "the body is too large")
    return None


def _all(headers: Headers, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip().lower() for key, value in headers if key == name]


def _only(headers: Headers, name: bytes) -> str | None:
    values = _all(headers, name)
    return values[0] if len(values) == 1 else None


def _is_ours(access: Access, host: str) -> bool:
    found = _HOST.fullmatch(host)
    if found is None:
        return False
    name = found["name"].strip("[]")
    try:
        address = str(ipaddress.ip_address(name))
    except ValueError:
        return name.removesuffix(".") in access.names
    return access.any_address or address in access.names


def _has_token(headers: Headers, token: bytes) -> bool:
    given = [value for key, value in headers if key == b"authorization"]
    scheme, _, rest = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    return scheme.lower() == b"bearer" and hmac.compare_digest(rest.strip(), token)


def read_token(path: Path) -> bytes:
    """Return the token of a file that only this user can read. Raises `UsageError` (bad_token_file)."""
    try:
        descriptor = files.open_file(path)
        try:
            found = os.fstat(descriptor)
            token = os.read(descriptor, MAX_TOKEN_BYTES + 1).strip()
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _bad_token(path, f"it cannot be read: {error.strerror or error}", "name a file") from None
    if found.st_uid != os.getuid():
        raise _bad_token(path, "it belongs to another user", "make a file of your own")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise _bad_token(path, "other users can read or write it", f"if it holds the token: chmod 600 {path}")
    if not SHORTEST_TOKEN <= len(token) <= MAX_TOKEN_BYTES or not re.fullmatch(rb"[!-~]+", token):
        why = f"a token is one word of {SHORTEST_TOKEN} or more characters"
        raise _bad_token(path, why, "make one: (umask 077; openssl rand -hex 32 > FILE)")
    return token


def _bad_token(path: Path, why: str, hint: str) -> UsageError:
    return UsageError("bad_token_file", f"the token file {path} cannot be used", why=why, hint=hint)
