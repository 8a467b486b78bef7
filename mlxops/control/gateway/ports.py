"""The ports of the hosts, as hosts.yaml and the agents describe them, and the addresses at which they are reached."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from functools import cache

from mlxops.control.client import HostTarget, reached_at
from mlxops.core.commands.gateway import ServedPort, ServedPorts
from mlxops.core.gateway import GatewayPort, same_name
from mlxops.core.ports import Owner, State

RESOLVE_SECONDS = 3.0
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""A connection to the "any" address goes to this machine."""


def same_host(one: str, other: str) -> bool:
    """Return whether two names lead to one machine: they are equal, or have an address in common."""
    return same_name(one, other) or bool(_addresses(one) & _addresses(other))


@cache
def _addresses(name: str) -> frozenset[str]:
    """Return the addresses of a name; none if it does not resolve in time."""
    addresses: set[str] = set()

    def resolve() -> None:
        try:
            rows = socket.getaddrinfo(_ANY_ADDRESS.get(name, name), None, type=socket.SOCK_STREAM)
            addresses.update(str(row[4][0]).removeprefix("::ffff:") for row in rows)
        except (OSError, UnicodeError):
            return

    thread = threading.Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(RESOLVE_SECONDS)
    return frozenset(addresses)


def configured_ports(target: HostTarget) -> tuple[GatewayPort, ...]:
    """Return a host's ports by its settings. Raises `Unreachable` if SSH does not say its address."""
    settings = target.settings
    address = reached_at(target)
    return tuple(
        GatewayPort(target.name, address, port, settings.slots.get(port), hold=settings.hold(port))
        for port in settings.ports
    )


def observed_ports(ports: Sequence[GatewayPort], observed: ServedPorts | None) -> tuple[GatewayPort, ...]:
    """Add what the host's agent observed. None: the host was not reached; the ports stay as they are."""
    rows = {row.port: row for row in observed.ports} if observed else {}
    return tuple(_observed_port(port, rows[port.port]) if port.port in rows else port for port in ports)


def _observed_port(port: GatewayPort, row: ServedPort) -> GatewayPort:
    return GatewayPort(
        port.host,
        port.address,
        port.port,
        port.alias,
        # An agent of another version may have other states and owners.
        state=State(row.state) if row.state in set(State) else State.UNKNOWN,
        owner=Owner(row.owner) if row.owner in set(Owner) else None,
        model=row.model,
        answers_to=row.answers_to,
        also_answers_to=row.also_answers_to,
        answers_to_any=row.answers_to_any,
        drops_for_others=row.drops_for_others,
        paths=frozenset(row.paths),
        not_asked=row.not_asked or "",
        context_length=row.context_length,
        assigned=row.assigned,
        detail=row.detail,
        hold=port.hold,
        swap_seconds=row.swap_seconds,
        smallest_context=row.smallest_context,
    )
