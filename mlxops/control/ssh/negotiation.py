"""Choose a connection's algorithms: those of the ssh configuration that Paramiko has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from mlxops.control.ssh import host_keys
from mlxops.control.ssh.config import Destination, describe_option
from mlxops.control.ssh.known_hosts import HostKeys
from mlxops.core.errors import Unreachable

if TYPE_CHECKING:
    import socket

    import paramiko

_KINDS = {
    "kex": ("KexAlgorithms", "kex_algo_list", "key exchange"),
    "host key": ("HostKeyAlgorithms", "server_key_algo_list", "host key algorithm"),
    "cipher": ("Ciphers", "server_encrypt_algo_list", "cipher"),
    "mac": ("MACs", "server_mac_algo_list", "MAC"),
}
"""Word in Paramiko's message -> (ssh option, Paramiko's key for the host's list, name for people)."""
_CURVE = "curve25519-sha256"
_SIGNS = ("kex-strict-", "ext-info-")
"""Prefixes of names in the list of key exchange algorithms that are not algorithms."""


class Negotiation:
    """The algorithms of one handshake. `known` decides which kind of host key to ask for."""

    def __init__(self, destination: Destination, known: HostKeys) -> None:
        self._destination = destination
        self._known = known
        self._has: dict[str, Sequence[str]] = {}
        """Option -> the algorithms that Paramiko has."""
        self._offered: dict[str, list[str]] = {}

    def transport(self, sock: socket.socket, **options: object) -> paramiko.Transport:
        """Make the transport; Paramiko's client calls this. Raises `Unreachable` no_common_algorithm."""
        transport, destination = _transport_class()(sock), self._destination
        transport.offered = self._offered
        security = transport.get_security_options()
        self._has = {
            "KexAlgorithms": security.kex,
            "HostKeyAlgorithms": security.key_types,
            "Ciphers": security.ciphers,
            "MACs": security.digests,
        }
        security.kex = self._allowed("KexAlgorithms")
        security.ciphers = self._allowed("Ciphers")
        security.digests = self._allowed("MACs")
        transport.host_key_algorithms = host_keys.preferred(
            self._known, destination.algorithms("HostKeyAlgorithms"), security.key_types
        )
        if not transport.host_key_algorithms:
            raise self._forbidden("HostKeyAlgorithms")
        made: paramiko.Transport = transport
        return made

    def failed(self, message: str) -> Unreachable:
        """Return the error for Paramiko's message that the two sides have no algorithm in common."""
        option, key, what = next((row for word, row in _KINDS.items() if f"acceptable {word}" in message), ("", "", ""))
        if not option:
            return self._error(message, f"compare with `{self._destination.command}`")
        theirs = [name for name in self._offered.get(key, []) if not name.startswith(_SIGNS)]
        ours = self._ours(option)
        common = [name for name in self._has[option] if name in theirs]
        if common:
            hint = f"add {common[0]} to {describe_option(self._destination, option)} here: {option} +{common[0]}"
        else:
            hint = f"in the host's sshd_config: {option} +{self._best(option)}"
        return self._error(f"it offers {what}s {_listed(theirs)}; mlxops (Paramiko) has {_listed(ours)}", hint)

    def _ours(self, option: str) -> Sequence[str]:
        allowed = self._destination.algorithms(option)
        return [name for name in allowed if name in self._has[option]] if allowed else self._has[option]

    def _best(self, option: str) -> str:
        return (self._ours(option) or self._has[option])[0]

    def _allowed(self, option: str) -> tuple[str, ...]:
        """Return the allowed algorithms in the configuration's order. Raises `Unreachable` if Paramiko has none."""
        ours = self._ours(option)
        if not ours:
            raise self._forbidden(option)
        return tuple(ours)

    def _forbidden(self, option: str) -> Unreachable:
        place, allowed = describe_option(self._destination, option), self._destination.algorithms(option)
        return self._error(
            f"{place} allows {_listed(allowed)}; mlxops (Paramiko) has {_listed(self._has[option])}",
            f"add {self._has[option][0]} to that line",
        )

    def _error(self, why: str, hint: str) -> Unreachable:
        return self._destination.unreachable("no_common_algorithm", why, hint)


@cache
def _transport_class() -> Any:
    """Return Paramiko's transport with a settable order of host key algorithms, `host_key_algorithms`.

    It notes in `offered` the algorithms that the host offers.
    """
    import paramiko

    curve = paramiko.Transport._kex_info.get("curve25519-sha256@libssh.org")  # type: ignore[attr-defined]

    class Transport(paramiko.Transport):
        if curve is not None:
            # One exchange, two names (RFC 8731); Paramiko knows the older one.
            _kex_info = {**paramiko.Transport._kex_info, _CURVE: curve}  # type: ignore[attr-defined]
            _preferred_kex = (_CURVE, *paramiko.Transport._preferred_kex)  # type: ignore[attr-defined]
        host_key_algorithms: tuple[str, ...] = ()
        offered: dict[str, list[str]]

        @property
        def preferred_keys(self) -> tuple[str, ...]:
            return self.host_key_algorithms

        def _really_parse_kex_init(self, *arguments: object, **named: object) -> dict[str, list[str]]:
            parsed: dict[str, list[str]] = super()._really_parse_kex_init(*arguments, **named)  # type: ignore[misc]
            self.offered.update({key: list(value) for key, value in parsed.items() if isinstance(value, list)})
            return parsed

    return Transport


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
