"""The TCP sockets of a Linux machine: of the kernel itself (sock_diag(7)), else of /proc/net (proc(5)).

Both tell the same. But /proc/net/tcp walks the whole table of connections, which is large on a machine with much
memory: 20 ms for a handful of listeners, which sock_diag tells in a tenth of one.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass

CONNECTED, LISTENING = 1, 10
"""<net/tcp_states.h>"""
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _DONE, _ERROR = 4, 20, 3, 2
_DUMP = 0x301
"""NLM_F_REQUEST, NLM_F_ROOT and NLM_F_MATCH: all that there are."""
_HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr of <linux/netlink.h>: length, type, flags, sequence, port."""
_QUESTION = struct.Struct("=BBBBI48x")
"""struct inet_diag_req_v2 of <linux/inet_diag.h>: family, protocol, extensions, padding, states; any address."""
_ANSWER = struct.Struct("=BBBB2s2s16s16s12xIIIII")
"""struct inet_diag_msg: family, state, timer, retransmits, ports and addresses, expiry, queues, uid, inode."""


@dataclass(frozen=True)
class Socket:
    """Addresses are as `ipaddress` writes them, IPv4 that is written as IPv6 among them."""

    address: str
    port: int
    far: tuple[str, int]
    inode: str
    uid: int


def tcp(state: int) -> list[Socket]:
    """The sockets in `state`, `CONNECTED` or `LISTENING`. Raises `OSError` if nobody tells."""
    try:
        return [*from_kernel(socket.AF_INET, state), *from_kernel(socket.AF_INET6, state)]
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # a file takes a descriptor too
        # A sandbox that has no such sockets.
        return [*from_proc("tcp", state), *from_proc("tcp6", state)]


def from_kernel(family: int, state: int) -> Iterable[Socket]:
    """Ask the kernel. Raises `OSError` where it cannot be asked."""
    if sys.platform != "linux":
        raise OSError(errno.EAFNOSUPPORT, "only Linux has sock_diag")
    question = _QUESTION.pack(family, socket.IPPROTO_TCP, 0, 0, 1 << state)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as kernel:
        kernel.settimeout(5)
        kernel.send(_HEADER.pack(_HEADER.size + len(question), _SOCK_DIAG_BY_FAMILY, _DUMP, 0, 0) + question)
        found: list[Socket] = []
        while True:
            data = kernel.recv(65536)
            while data:
                length, kind, _, _, _ = _HEADER.unpack_from(data)
                if kind == _DONE:
                    return found
                if kind == _ERROR or length < _HEADER.size:
                    raise OSError("sock_diag is refused")
                found.append(_socket(data[_HEADER.size : length]))
                data = data[(length + 3) & ~3 :]


def _socket(message: bytes) -> Socket:
    family, _, _, _, port, far_port, address, far, *_, uid, inode = _ANSWER.unpack_from(message)
    size = 4 if family == socket.AF_INET else 16
    return Socket(
        str(ipaddress.ip_address(address[:size])),
        int.from_bytes(port),
        (str(ipaddress.ip_address(far[:size])), int.from_bytes(far_port)),
        str(inode),
        uid,
    )


def from_proc(table: str, state: int) -> Iterable[Socket]:
    """The same from /proc/net/`table`."""
    try:
        with open(f"/proc/net/{table}", encoding="ascii") as file:
            lines = file.readlines()[1:]
    except FileNotFoundError:
        return  # a kernel without IPv6
    for fields in map(str.split, lines):
        if int(fields[3], 16) == state:
            address, port = _end(fields[1])
            yield Socket(address, port, _end(fields[2]), fields[9], int(fields[7]))


def _end(text: str) -> tuple[str, int]:
    """An address and port as /proc/net/tcp writes them: 32-bit words in the machine's byte order, all in hex."""
    address, _, port = text.partition(":")
    raw = bytes.fromhex(address)
    words = [raw[i : i + 4] for i in range(0, len(raw), 4)]
    if sys.byteorder == "little":
        words = [word[::-1] for word in words]
    return str(ipaddress.ip_address(b"".join(words))), int(port, 16)
