"""Connect to hosts over SSH, and run commands there. No other module makes connections.

A connection is Fabric's, over a socket that this module opens. So it can set TCP_NODELAY, without which every command
waits 40 ms, and can close the socket when the time for connecting is over. Fabric by default checks no host key and
reads Invoke's configuration files. Here it gets a policy that checks, and an empty configuration.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import ipaddress
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import IO, TYPE_CHECKING

from mlxops.control.channel import ConnectionLost, Dialogue, Ended, LineBuffer, ReadLimits, Session, Tail, Transport
from mlxops.control.local import LocalTransport, reap
from mlxops.control.ssh import config, host_keys
from mlxops.control.ssh.auth import Login
from mlxops.control.ssh.config import Destination, error_text, last_bytes
from mlxops.control.ssh.negotiation import Negotiation
from mlxops.core.errors import Unreachable

if TYPE_CHECKING:
    import fabric
    import paramiko

KEEPALIVE_SECONDS = 15
COMMAND_SECONDS = 60.0
"""How long a connected host may take to start a command. Longer than for connecting: the host is up, and may be under
load."""
MAX_JUMPS = 8
_SMALL = 32 * 1024
"""Bytes that a pipe, or the window of an SSH channel, accepts while the other end does not read."""
_WINDOW = 2 * 1024 * 1024
"""Bytes that an SSH channel accepts while this end does not read; Paramiko's default."""
_STDERR_POLL_SECONDS = 0.25
"""How often standard error is read while standard output is silent."""


def open_ssh(ssh_name: str, *, connect_timeout: float = 10.0) -> Transport:
    """Connect to what `ssh SSH_NAME` would connect to, within `connect_timeout` seconds altogether.

    Raises `Unreachable`, and `UsageError` where OpenSSH's configuration is unusable. Never prompts.
    """
    deadline = time.monotonic() + connect_timeout
    destination = config.resolve(ssh_name, connect_timeout)
    if destination.connect_timeout is not None:
        deadline = min(deadline, time.monotonic() + destination.connect_timeout)
    path = _Path(deadline)
    try:
        return _SshTransport(path, path.connect(destination), ssh_name)
    except BaseException:
        path.close()
        raise


def import_libraries() -> None:
    """Import what connections need, before many threads do: they would wait for each other at every import."""
    for name in ("fabric", "paramiko", "paramiko.config", "logging", "subprocess", "tempfile"):
        importlib.import_module(name)


def open_local() -> Transport:
    return LocalTransport()


_DECODE = 'eval "$(printf %b "$1")"'


def command_line(argv: Sequence[str]) -> str:
    """Return `argv` as a line for any login shell: sh, bash, zsh, fish, csh, tcsh, nushell.

    These shells have little in common. All of them take a word in single quotes literally, if it has no quote,
    backslash or exclamation mark. So the line has only such words: a script for /bin/sh, special characters encoded.
    Raises `ValueError` for arguments that no line can hold.
    """
    line = "exec " + " ".join(_quoted(argument) for argument in argv)
    encoded = _SPECIAL.sub(lambda match: "".join(f"\\0{byte:03o}" for byte in match[0].encode()), line)
    if encoded == line:
        return f"exec /bin/sh -c '{line}'"  # a millisecond less on the host
    return f"exec /bin/sh -c '{_DECODE}' sh '{encoded}'"


_SPECIAL = re.compile(r"[^ -~]|['!\\]")


def _quoted(argument: str) -> str:
    if re.search(r"[\0\r\n]", argument):
        raise ValueError("an argument with a line end or NUL cannot be sent through a login shell")
    if argument.startswith("~/"):
        return '"$HOME"/' + shlex.quote(argument[2:])
    return shlex.quote(argument)


# -- a path to a host ---------------------------------------------------------------------------------------------


class _Path:
    """The socket, the proxy process and the connections that lead to one host."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self._base: socket.socket | None = None
        self._proxy: subprocess.Popen[bytes] | None = None
        self._proxy_stderr: IO[bytes] | None = None
        self._connections: list[fabric.Connection] = []

    def connect(self, destination: Destination, leads_to: tuple[str, ...] = ()) -> fabric.Connection:
        """`leads_to`: the destinations that this one is a jump host for."""
        leads_to = (*leads_to, destination.name)
        if not destination.jumps:
            return self._handshake(destination, self._socket(destination))
        via: fabric.Connection | None = None
        for number, jump in enumerate(destination.jumps):
            hop = config.resolve_jump(jump, destination, self._left(destination))
            if len(self._connections) >= MAX_JUMPS:
                raise destination.unreachable("host_down", f"more than {MAX_JUMPS} jump hosts: is there a loop?")
            # Only for the first hop do its own ProxyJump and ProxyCommand count, as in `ssh -J first second`.
            if number == 0 and hop.jumps:
                if jump in hop.jumps:
                    raise destination.unreachable("host_down", f"{jump} is its own jump host", "correct ProxyJump")
                if hop.name in leads_to:
                    loop = " -> ".join((*leads_to, hop.name))
                    raise destination.unreachable(
                        "host_down", f"its jump hosts lead in a circle: {loop}", "correct ProxyJump"
                    )
                via = self.connect(hop, leads_to)
            elif via is None:
                via = self._handshake(hop, self._socket(hop))
            else:
                via = self._handshake(hop, self._through(via, hop))
        assert via is not None
        return self._handshake(destination, self._through(via, destination))

    def abort(self) -> None:
        """Cut the connection. Threads that wait for it wake up. May be called from any thread; never blocks."""
        if self._base is not None:
            try:
                self._base.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # not connected any more
        if self._proxy is not None and self._proxy.poll() is None:
            self._proxy.terminate()

    def close(self) -> None:
        self.abort()
        for connection in () if _ctrl_c() else reversed(self._connections):
            _hang_up(connection)
        self._connections.clear()
        if self._base is not None:
            self._base.close()
        if self._proxy is not None:
            reap(self._proxy)
        if self._proxy_stderr is not None:
            self._proxy_stderr.close()

    def _left(self, destination: Destination) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise destination.timeout("nothing but the name could be resolved in time")
        return left

    def _socket(self, destination: Destination) -> socket.socket:
        if destination.proxy_command is None:
            self._base = _tcp(destination, self.deadline)
            return self._base
        self._base = self._start_proxy(destination.proxy_command)
        if destination.option("ProxyUseFdpass"):
            self._base = self._passed(destination, self._base)
        return self._base

    def _passed(self, destination: Destination, proxy: socket.socket) -> socket.socket:
        """Receive the connection that a proxy program made (ProxyUseFdpass)."""
        with proxy:
            proxy.settimeout(self._left(destination))
            try:
                _, descriptors, _, _ = socket.recv_fds(proxy, 1, 1)
            except TimeoutError:
                raise destination.timeout("its ProxyCommand passed no connection") from None
            if not descriptors:
                raise self._broken_off(destination, EOFError("its ProxyCommand passed no connection"))
        return socket.socket(fileno=descriptors[0])

    def _start_proxy(self, command: str) -> socket.socket:
        import tempfile

        ours, theirs = socket.socketpair()
        self._proxy_stderr = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the connection
        with theirs:
            # A ProxyCommand is a shell command. OpenSSH runs it with the user's shell.
            self._proxy = subprocess.Popen(
                [os.environ.get("SHELL") or "/bin/sh", "-c", f"exec {command}"],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=self._proxy_stderr,
                process_group=0,
            )
        return ours

    def _through(self, via: fabric.Connection, destination: Destination) -> paramiko.Channel:
        import paramiko

        with self._watched(destination):
            try:
                transport: paramiko.Transport = via.client.get_transport()
                channel: paramiko.Channel = transport.open_channel(
                    "direct-tcpip",
                    (destination.hostname, destination.port),
                    ("", 0),
                    timeout=self._left(destination),
                )
            except (paramiko.SSHException, EOFError, OSError) as error:
                code = "connection_refused" if getattr(error, "code", None) == 1 else "host_down"
                raise destination.unreachable(code, f"its jump host cannot reach it: {error_text(error)}") from error
        _close_quietly(channel)
        return channel

    def _handshake(self, destination: Destination, sock: socket.socket | paramiko.Channel) -> fabric.Connection:
        """Run the SSH handshake, from the version strings to the end of the authentication."""
        import fabric
        import paramiko

        _silence_paramiko()
        known = host_keys.known_keys(destination, self.deadline)
        left = self._left(destination)
        negotiation = Negotiation(destination, known)

        connection = fabric.Connection(
            destination.hostname,
            user=destination.user,
            port=destination.port,
            config=_empty_config(),
            gateway=False,
            forward_agent=False,
            connect_kwargs={
                "sock": sock,
                "timeout": left,
                "banner_timeout": left,
                "auth_timeout": left,
                "channel_timeout": COMMAND_SECONDS,
                "transport_factory": negotiation.transport,
                "auth_strategy": Login(destination, self.deadline),
            },
        )
        connection.client.set_missing_host_key_policy(host_keys.policy(destination, known, self.deadline))
        self._connections.append(connection)
        with self._watched(destination):
            try:
                connection.open()
            except paramiko.ssh_exception.IncompatiblePeer as error:
                raise negotiation.failed(error_text(error)) from error
            except (paramiko.SSHException, EOFError, OSError) as error:
                raise self._broken_off(destination, error) from error
        connection.transport.set_keepalive(KEEPALIVE_SECONDS)
        return connection

    def _broken_off(self, destination: Destination, error: Exception) -> Unreachable:
        if isinstance(error, TimeoutError):
            return destination.timeout("it did not finish the handshake")
        reason = error_text(error)
        if self._proxy_stderr is not None:
            output = last_bytes(self._proxy_stderr, 4096)
            reason = " ".join(output.decode(errors="replace").split())[-300:] or reason
        return destination.unreachable(
            "connection_refused",
            f"the connection ended during the handshake: {reason}",
            f"try `{destination.command}`; if it works, run this again",
        )

    @contextmanager
    def _watched(self, destination: Destination) -> Iterator[None]:
        """Cut the connection at the deadline. Paramiko's timeouts are one per step, and some steps have none."""
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self.abort()

        watchdog = threading.Timer(self._left(destination), expire)
        watchdog.start()
        try:
            yield
        except Unreachable as error:
            if expired.is_set() and error.code in ("connection_refused", "host_down", "authentication_failed"):
                raise destination.timeout("it accepted the connection and then did not answer") from error
            raise
        finally:
            watchdog.cancel()
            watchdog.join()
        if expired.is_set():
            raise destination.timeout("it accepted the connection and then did not answer")


@cache
def _empty_config() -> fabric.Config:
    """Return the configuration of all connections; to make one takes a millisecond."""
    import fabric
    from paramiko.config import SSHConfig

    return fabric.Config(lazy=True, ssh_config=SSHConfig())


class _PromptSocket(socket.socket):
    """A socket that acknowledges packets at once (Linux only). Linux resets TCP_QUICKACK, so every read sets it again.

    sshd sets TCP_NODELAY only at the first command. Before that it holds back an answer until the packet before is
    acknowledged, and TCP delays an acknowledgement without data by 40 ms.
    """

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        data = super().recv(size, flags)
        if sys.platform == "linux":
            self.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return data


def _tcp(destination: Destination, deadline: float) -> socket.socket:
    """Connect, with TCP_NODELAY. Try every address; each gets a share of the time that is left."""
    attempts = int(destination.option("ConnectionAttempts") or 1)
    for attempt in range(attempts):
        try:
            return _tcp_once(destination, deadline)
        except Unreachable:
            # Like ssh, wait a second between two attempts.
            if attempt + 1 == attempts or deadline - time.monotonic() < 1.0:
                raise
            time.sleep(1.0)
    raise destination.timeout("no attempt was made")


def _tcp_once(destination: Destination, deadline: float) -> socket.socket:
    addresses = _addresses(destination, deadline)
    problem: OSError = TimeoutError()
    for tried, (family, kind, protocol, _, address) in enumerate(addresses):
        sock = _PromptSocket(family, kind, protocol)
        try:
            source = _source(destination, family)
            if source:
                sock.bind((source, 0))
            sock.settimeout(max(0.001, (deadline - time.monotonic()) / (len(addresses) - tried)))
            sock.connect(address)
        except OSError as error:
            problem = error
            sock.close()
            continue
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return sock
    if isinstance(problem, TimeoutError):
        raise destination.timeout("it did not answer at all", "is it switched on, awake, and the network between up?")
    if problem.errno == errno.ECONNREFUSED:
        raise destination.unreachable(
            "connection_refused",
            "the machine is there, and nothing listens on that port",
            "switch on Remote Login on a Mac, or start sshd",
        )
    bound = next((option for option in _BOUND if destination.option(option)), None)
    if bound and problem.errno in (errno.EADDRNOTAVAIL, errno.ENODEV, errno.EAFNOSUPPORT, errno.EINVAL):
        raise destination.unreachable(
            "host_down",
            f"{config.describe_option(destination, bound)} is {destination.option(bound)}, "
            f"and no connection can be made from there now: {error_text(problem)}",
            "is a VPN or an interface down? Bring it up, or correct the option",
        )
    raise destination.unreachable("host_down", error_text(problem), "is it switched on, and the network between up?")


_BOUND = ("BindAddress", "BindInterface")


def _source(destination: Destination, family: socket.AddressFamily) -> str | None:
    """Return the local address that BindAddress or BindInterface sets; None if neither does. Raises `OSError`."""
    if name := destination.option("BindAddress"):
        results = socket.getaddrinfo(name, None, family, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)
        return str(results[0][4][0])
    interface = destination.option("BindInterface")
    if interface is None:
        return None
    import psutil

    own = [row.address for row in psutil.net_if_addrs().get(interface, ()) if row.family == family]
    # Like ssh, use a loopback or link-local address only if there is no other.
    for address in map(ipaddress.ip_address, own):
        if not address.is_loopback and not address.is_link_local:
            return str(address)
    if not own:
        raise OSError(errno.ENODEV, f"{interface} has no address of this family")
    return own[0]


_Address = tuple[
    socket.AddressFamily, socket.SocketKind, int, str, tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]
]


def _addresses(destination: Destination, deadline: float) -> list[_Address]:
    """Resolve the host name. getaddrinfo has no timeout, so it runs in a thread, which is abandoned at the deadline."""
    addresses: list[_Address] = []
    problems: list[OSError] = []

    def resolve_name() -> None:
        try:
            addresses.extend(
                socket.getaddrinfo(destination.hostname, destination.port, destination.family, socket.SOCK_STREAM)
            )
        except (OSError, UnicodeError) as error:
            problems.append(error if isinstance(error, OSError) else OSError(str(error)))

    thread = threading.Thread(target=resolve_name, name="resolve", daemon=True)
    thread.start()
    thread.join(max(0.0, deadline - time.monotonic()))
    if thread.is_alive():
        raise destination.timeout("the name service did not answer")
    if not addresses:
        reason = error_text(problems[0]) if problems else "no addresses"
        raise destination.unreachable(
            "host_down",
            f"its name has no address: {reason}",
            "correct the name (`ssh` in hosts.yaml), or HostName in the ssh configuration",
        )
    return addresses


def _close_quietly(channel: paramiko.Channel) -> None:
    """Make the channel's `close` ignore a broken connection.

    The channel is the socket of the inner connection, whose thread closes it at the end. If the jump host is gone by
    then, closing fails, and the thread would print a traceback.
    """
    import paramiko

    close = channel.close

    def quietly() -> None:
        with contextlib.suppress(paramiko.SSHException, EOFError, OSError):
            close()

    channel.close = quietly  # type: ignore[method-assign]


def _ctrl_c() -> bool:
    """Return whether Ctrl-C is being handled.

    It may have interrupted Paramiko while this thread held one of its locks. An orderly close would wait for that lock.
    So only the sockets are closed, and the threads end with them.
    """
    return isinstance(sys.exception(), KeyboardInterrupt)


def _hang_up(connection: fabric.Connection) -> None:
    """Close a connection whose socket is already shut down, and wait for its thread.

    `connection.close()` would do nothing to a connection that has just broken.
    """
    import paramiko

    transport: paramiko.Transport | None = connection.client.get_transport()
    try:
        connection.client.close()
    except (paramiko.SSHException, EOFError, OSError):
        pass  # the jump host is gone, so no goodbye can be sent
    if transport is not None:
        transport.packetizer.complete_handshake()  # stops the timer that a failed handshake leaves behind
        transport.join(1.0)


def _silence_paramiko() -> None:
    """Drop Paramiko's log. It also raises what it logs; without a handler its tracebacks would go to standard error."""
    import logging

    logger = logging.getLogger("paramiko")
    if logger.propagate:
        logger.addHandler(logging.NullHandler())
        logger.propagate = False


# -- commands over SSH --------------------------------------------------------------------------------------------


class _SshTransport:
    def __init__(self, path: _Path, connection: fabric.Connection, name: str) -> None:
        self._path = path
        self._connection = connection
        self._name = name

    def start(self, argv: Sequence[str], data: bytes) -> Session:
        return _SshSession(self._path, self._execute(argv), data, self._name)

    def converse(self, argv: Sequence[str], data: bytes) -> Dialogue:
        return _SshDialogue(self._path, self._execute(argv), data, self._name)

    def _execute(self, argv: Sequence[str]) -> paramiko.Channel:
        import paramiko

        line = command_line(argv)
        # exec_command has no timeout.
        watchdog = threading.Timer(COMMAND_SECONDS, self._path.abort)
        watchdog.start()
        try:
            channel: paramiko.Channel = self._connection.create_session()
            channel.exec_command(line)
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise ConnectionLost(f"the connection to {self._name} broke: {error_text(error)}") from error
        finally:
            watchdog.cancel()
            watchdog.join()
        return channel

    def close(self) -> None:
        self._path.close()


class _SshSession:
    def __init__(self, path: _Path, channel: paramiko.Channel, data: bytes, name: str) -> None:
        self._path = path
        self._channel = channel
        self._name = name
        self._stderr = Tail()
        self._sender: threading.Thread | None = None
        if len(data) <= _SMALL:
            self._send(data)
        else:
            # Send in a thread, so that this one can read: a host that cannot write any more stops reading.
            self._sender = threading.Thread(target=self._send, args=(data,), name="send", daemon=True)
            self._sender.start()

    def lines(self, limits: ReadLimits) -> Iterator[str]:
        lines = LineBuffer()
        while True:
            self._channel.settimeout(min(_STDERR_POLL_SECONDS, limits.left))
            try:
                data = self._channel.recv(65536)
            except TimeoutError:
                data = None
            self._drain()
            if data == b"":
                break
            if data:
                limits.count(len(data))
                yield from lines.feed(data)
                limits.allow_unfinished(lines.unfinished)
            if limits.over:
                raise ConnectionLost(f"{self._name} {limits}")
        if not self._channel.eof_received and self._channel.exit_status == -1:
            raise self._lost()
        yield from lines.end()

    def wait(self, timeout: float) -> Ended:
        deadline = time.monotonic() + timeout
        while not self._channel.status_event.wait(min(_STDERR_POLL_SECONDS, max(0.0, deadline - time.monotonic()))):
            self._drain()
            if time.monotonic() >= deadline:
                raise ConnectionLost(f"{self._name} did not say within {timeout:.0f} s how the command ended")
        self._drain()
        status = self._channel.exit_status
        if status == -1 and not self._alive(max(0.1, deadline - time.monotonic())):
            raise self._lost()
        return Ended(status, str(self._stderr))

    def close(self) -> None:
        if (self._sender is not None and self._sender.is_alive()) or _ctrl_c():
            # Closing the channel would wait behind the unsent half of the request.
            self._path.abort()
            return
        self._channel.close()

    def _send(self, data: bytes) -> None:
        try:
            if data:
                self._channel.sendall(data)
            self._sent()
        except (OSError, EOFError):
            pass  # the command does not read, or the connection broke: `wait` finds out which

    def _sent(self) -> None:
        self._channel.shutdown_write()

    def _drain(self) -> None:
        """Read what has arrived on standard error. Unread, it would fill the window and stop the command.

        Read at most one window: a command may write faster than this reads.
        """
        for _ in range(_WINDOW // 65536):
            if not self._channel.recv_stderr_ready():
                break
            self._stderr.add(self._channel.recv_stderr(65536))

    def _alive(self, timeout: float) -> bool:
        """Return whether the host still answers.

        A command has no exit status if a signal ended it, or if the connection broke. Paramiko does not distinguish the
        two cases; a new session does.
        """
        import paramiko

        transport = self._channel.get_transport()
        try:
            transport.open_session(timeout=timeout).close()
        except (paramiko.SSHException, EOFError, OSError):
            return False
        return True

    def _lost(self) -> ConnectionLost:
        return ConnectionLost(f"the connection to {self._name} broke before the command ended")


class _SshDialogue(_SshSession):
    def send(self, data: bytes) -> None:
        import paramiko

        try:
            self._channel.sendall(data)
        except (paramiko.SSHException, OSError, EOFError):
            raise self._lost() from None

    def _sent(self) -> None:
        """Leave standard input open."""
