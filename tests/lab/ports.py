"""Ports of loopback addresses: chosen by the system, and looked at by trying. Standard library only."""

from __future__ import annotations

import socket
from collections.abc import Iterable


def listening(address: str, port: int) -> bool:
    """Whether something accepts connections there."""
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((address, port)) == 0


def can_bind(address: str, port: int = 0) -> bool:
    """Whether a server could listen there now: False also for an address that this machine does not have."""
    with socket.socket() as probe:
        # As servers do; otherwise a closed connection of a minute ago would still count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def free_port(address: str = "127.0.0.1") -> int:
    """A port that the system chose; it is free until someone takes it, so whoever uses it must be ready to retry."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        port = probe.getsockname()[1]
    assert isinstance(port, int)
    return port


def free_ports(addresses: Iterable[str], count: int) -> range:
    """`count` ports in a row that are free on every one of the addresses."""
    every = list(addresses)
    for _ in range(200):
        first = free_port(every[0])
        if first + count <= 65536 and all(
            can_bind(address, port) for port in range(first, first + count) for address in every
        ):
            return range(first, first + count)
    raise RuntimeError(f"no {count} free ports in a row on {', '.join(every)}")
