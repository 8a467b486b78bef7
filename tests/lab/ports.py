"""Ports of loopback addresses: chosen by the system, and looked at by trying. Standard library only."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterable

_FIRST, _RANGES, _END = 20_000, 24_000, 32_768
"""Outgoing connections take local ports from 32768 on Linux and from 49152 on macOS."""
_RANDOM = random.SystemRandom()
"""Property tests seed the ordinary generator: two test workers would get the same ports from it."""


def listening(address: str, port: int) -> bool:
    """Whether something accepts connections there."""
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((address, port)) == 0


def can_bind(address: str, port: int = 0) -> bool:
    """Whether a server could listen there now: False also for an address that this machine does not have."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        # As servers do; otherwise a closed connection of a minute ago would still count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def free_port(address: str = "127.0.0.1") -> int:
    """Return a free port. Another program may take it before the caller does, so the caller must be ready to retry."""
    return free_ports([address], 1)[0]


def free_ports(addresses: Iterable[str], count: int) -> range:
    """Return `count` consecutive ports that are free on each of the addresses.

    A single port is never one of a range: a lab's sshd, started later, must not take a port of its Studio.

    Not from the range of which the system takes the local ports of outgoing connections: a client of a lab's address
    gets its local port at that very address, and a server could not listen there until the connection is forgotten.
    """
    every = list(addresses)
    for _ in range(200):
        first = _RANDOM.randrange(_FIRST, _RANGES) if count == 1 else _RANDOM.randrange(_RANGES, _END - count)
        if all(can_bind(address, port) for port in range(first, first + count) for address in every):
            return range(first, first + count)
    raise RuntimeError(f"no {count} free ports in a row on {', '.join(every)}")
