"""The one place that makes connections, and the runner that needs none.

An SSH connection is Fabric's, on a socket of our own: without TCP_NODELAY every command waits 40 ms, and only
whoever holds the socket can keep a deadline over all of connecting. Fabric itself checks no host key and reads
the ambient Invoke configuration; here it is given a policy that checks, and a configuration that is empty.
"""

from __future__ import annotations

import contextlib
import errno
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
from typing import IO, TYPE_CHECKING

from mlxops.control.channel import ConnectionLost, Dialogue, Ended, LineBuffer, ReadLimits, Session, Tail, Transport
from mlxops.control.local import LocalTransport, reap
from mlxops.control.ssh import config, host_keys
from mlxops.control.ssh.auth import Login
from mlxops.control.ssh.config import Destination, last_bytes, words
from mlxops.control.ssh.negotiation import Negotiation
from mlxops.core.errors import Unreachable

if TYPE_CHECKING:
    import fabric
    import paramiko

KEEPALIVE_SECONDS = 15
COMMAND_SECONDS = 60.0
"""How long a host that is connected to has to start a command. Not a part of connecting: one under load has proved that
it is there."""
MAX_JUMPS = 8
_SMALL = 32 * 1024
"""Bytes that a pipe, and the window of an SSH channel, take without anybody reading at the other end."""
_WINDOW = 2 * 1024 * 1024
"""Bytes that an SSH channel takes without anybody reading at our end; Paramiko's default."""
_LOOK = 0.25
"""Seconds between looks at standard error while standard output says nothing."""


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
    encoded = _SPECIAL.sub(lambda found: "".join(f"\\0{byte:03o}" for byte in found[0].encode()), line)
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
    """The socket, proxy process and connections that lead to one host, while they are made and after."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self._base: socket.socket | None = None
        self._proxy: subprocess.Popen[bytes] | None = None
        self._proxy_words: IO[bytes] | None = None
        self._connections: list[fabric.Connection] = []

    def connect(self, destination: Destination, asked: tuple[str, ...] = ()) -> fabric.Connection:
        """`asked`: the names whose own jump host this is."""
        asked = (*asked, destination.name)
        if not destination.jumps:
            return self._handshake(destination, self._socket(destination))
        via: fabric.Connection | None = None
        for number, jump in enumerate(destination.jumps):
            hop = config.resolve_jump(jump, destination, self._left(destination))
            if len(self._connections) >= MAX_JUMPS:
                raise destination.unreachable("host_down", f"more than {MAX_JUMPS} jump hosts: is there a loop?")
            # Only the first hop is reached by the ways of its own configuration, like `ssh -J first second`.
            if number == 0 and hop.jumps:
                if jump in hop.jumps:
                    raise destination.unreachable("host_down", f"{jump} is its own jump host", "correct ProxyJump")
                if hop.name in asked:
                    loop = " -> ".join((*asked, hop.name))
                    raise destination.unreachable(
                        "host_down", f"its jump hosts lead in a circle: {loop}", "correct ProxyJump"
                    )
                via = self.connect(hop, asked)
            elif via is None:
                via = self._handshake(hop, self._socket(hop))
            else:
                via = self._handshake(hop, self._through(via, hop))
        assert via is not None
        return self._handshake(destination, self._through(via, destination))

    def abort(self) -> None:
        """Cut it off, from any thread; whoever waits on it is woken. Never blocks."""
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
        if self._proxy_words is not None:
            self._proxy_words.close()

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
        self._proxy_words = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the connection
        with theirs:
            # The user's own configuration asks for a shell here, and OpenSSH gives it the user's.
            self._proxy = subprocess.Popen(
                [os.environ.get("SHELL") or "/bin/sh", "-c", f"exec {command}"],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=self._proxy_words,
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
                raise destination.unreachable(code, f"its jump host cannot reach it: {words(error)}") from error
        _close_quietly(channel)
        return channel

    def _handshake(self, destination: Destination, sock: socket.socket | paramiko.Channel) -> fabric.Connection:
        """Everything from the greeting to the authentication."""
        import fabric
        import paramiko
        from paramiko.config import SSHConfig

        _silence_paramiko()
        known = host_keys.known_keys(destination, self.deadline)
        left = self._left(destination)
        negotiation = Negotiation(destination, known)

        connection = fabric.Connection(
            destination.hostname,
            user=destination.user,
            port=destination.port,
            config=fabric.Config(lazy=True, ssh_config=SSHConfig()),
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
                raise negotiation.failed(words(error)) from error
            except (paramiko.SSHException, EOFError, OSError) as error:
                raise self._broken_off(destination, error) from error
        connection.transport.set_keepalive(KEEPALIVE_SECONDS)
        return connection

    def _broken_off(self, destination: Destination, error: Exception) -> Unreachable:
        if isinstance(error, TimeoutError):
            return destination.timeout("it did not finish the handshake")
        said = words(error)
        if self._proxy_words is not None:
            told = last_bytes(self._proxy_words, 4096)
            said = " ".join(told.decode(errors="replace").split())[-300:] or said
        return destination.unreachable(
            "connection_refused",
            f"the connection ended during the handshake: {said}",
            f"try `{destination.command}`; if it works, run this again",
        )

    @contextmanager
    def _watched(self, destination: Destination) -> Iterator[None]:
        """Paramiko's timeouts are one per step, some steps have none, and none covers the whole."""
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


class _PromptSocket(socket.socket):
    """Acknowledges at once where the system can be told to (Linux; it forgets, so it is told again and again).

    Before its first command sshd has not set TCP_NODELAY yet: it holds its answer back until we acknowledge the
    packet before, and an acknowledgement with nothing to ride on is sent after 40 ms.
    """

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        data = super().recv(size, flags)
        if sys.platform == "linux":
            self.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return data


def _tcp(destination: Destination, deadline: float) -> socket.socket:
    """Connected, with TCP_NODELAY; every address is tried, none may use up all the time that is left."""
    attempts = int(destination.option("ConnectionAttempts") or 1)
    for attempt in range(attempts):
        try:
            return _tcp_once(destination, deadline)
        except Unreachable:
            # As ssh does: a second between two attempts.
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
            f"{config.setting(destination, bound)} is {destination.option(bound)}, from where no connection to it "
            f"can be made now: {words(problem)}",
            "is a VPN or an interface down? Bring it up, or correct the option",
        )
    raise destination.unreachable("host_down", words(problem), "is it switched on, and the network between up?")


_BOUND = ("BindAddress", "BindInterface")


def _source(destination: Destination, family: socket.AddressFamily) -> str | None:
    """Return the local address that BindAddress or BindInterface sets; None if neither does. Raises `OSError`."""
    address = destination.option("BindAddress")
    if address:
        found = socket.getaddrinfo(address, None, family, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)
        return str(found[0][4][0])
    interface = destination.option("BindInterface")
    if interface is None:
        return None
    import psutil

    own = [each.address for each in psutil.net_if_addrs().get(interface, ()) if each.family == family]
    # As ssh does: a loopback or link-local address only if there is no other.
    for each in map(ipaddress.ip_address, own):
        if not each.is_loopback and not each.is_link_local:
            return str(each)
    if not own:
        raise OSError(errno.ENODEV, f"{interface} has no address of this family")
    return own[0]


_Address = tuple[
    socket.AddressFamily, socket.SocketKind, int, str, tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]
]


def _addresses(destination: Destination, deadline: float) -> list[_Address]:
    """getaddrinfo has no timeout, so it runs beside us, and is left behind when it takes too long."""
    found: list[_Address] = []
    problems: list[OSError] = []

    def ask() -> None:
        try:
            found.extend(
                socket.getaddrinfo(destination.hostname, destination.port, destination.family, socket.SOCK_STREAM)
            )
        except (OSError, UnicodeError) as error:
            problems.append(error if isinstance(error, OSError) else OSError(str(error)))

    asking = threading.Thread(target=ask, name="resolve", daemon=True)
    asking.start()
    asking.join(max(0.0, deadline - time.monotonic()))
    if asking.is_alive():
        raise destination.timeout("the name service did not answer")
    if not found:
        said = words(problems[0]) if problems else "no addresses"
        raise destination.unreachable(
            "host_down",
            f"its name has no address: {said}",
            "correct `ssh:` in hosts.yaml, or HostName in the ssh configuration",
        )
    return found


def _close_quietly(channel: paramiko.Channel) -> None:
    """The thread of the connection inside closes the channel as its socket; where the jump host is gone by then, the
    goodbye to it fails, and the exception would end that thread with a traceback on the user's screen."""
    import paramiko

    close = channel.close

    def quietly() -> None:
        with contextlib.suppress(paramiko.SSHException, EOFError, OSError):
            close()

    channel.close = quietly  # type: ignore[method-assign]


def _ctrl_c() -> bool:
    """Whether Ctrl-C is what ends this. It may have come right after paramiko had taken one of its locks, which this
    very thread would then wait for; so nobody is told goodbye, and the threads end with their sockets."""
    return isinstance(sys.exception(), KeyboardInterrupt)


def _hang_up(connection: fabric.Connection) -> None:
    """Close a connection whose socket was shut down before, and see its thread end.

    Not `connection.close()`: that does nothing to a connection which has just broken.
    """
    import paramiko

    transport: paramiko.Transport | None = connection.client.get_transport()
    try:
        connection.client.close()
    except (paramiko.SSHException, EOFError, OSError):
        pass  # a goodbye through a jump host that is gone
    if transport is not None:
        transport.packetizer.complete_handshake()  # stops its timer, which a handshake that failed leaves behind
        transport.join(1.0)


def _silence_paramiko() -> None:
    """What it logs, it also raises; unconfigured, logging would print its tracebacks to standard error."""
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
        # exec_command waits for its answer without a limit.
        watchdog = threading.Timer(COMMAND_SECONDS, self._path.abort)
        watchdog.start()
        try:
            channel: paramiko.Channel = self._connection.create_session()
            channel.exec_command(line)
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise ConnectionLost(f"the connection to {self._name} broke: {words(error)}") from error
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
            # Who sends more than a window must read meanwhile: the other side may be writing, too.
            self._sender = threading.Thread(target=self._send, args=(data,), name="send", daemon=True)
            self._sender.start()

    def lines(self, patience: ReadLimits) -> Iterator[str]:
        lines = LineBuffer()
        while True:
            self._channel.settimeout(min(_LOOK, patience.left))
            try:
                data = self._channel.recv(65536)
            except TimeoutError:
                data = None
            self._drain()
            if data == b"":
                break
            if data:
                patience.took(len(data))
                yield from lines.feed(data)
                patience.waits_for_the_rest_of(lines.rest)
            if patience.over:
                raise ConnectionLost(f"{self._name} {patience}")
        if not self._channel.eof_received and self._channel.exit_status == -1:
            raise self._lost()
        yield from lines.end()

    def wait(self, timeout: float) -> Ended:
        deadline = time.monotonic() + timeout
        while not self._channel.status_event.wait(min(_LOOK, max(0.0, deadline - time.monotonic()))):
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
            # Half a request was sent and cannot be finished; closing the channel would queue behind it.
            self._path.abort()
            return
        self._channel.close()

    def _send(self, data: bytes) -> None:
        try:
            if data:
                self._channel.sendall(data)
            self._sent()
        except (OSError, EOFError):
            pass  # the command does not read, or the connection broke: its end tells which

    def _sent(self) -> None:
        self._channel.shutdown_write()

    def _drain(self) -> None:
        """Take what is there of standard error; left alone, it would fill the window and stop the command.

        A window at most: of a command that writes faster than we read, there is always more.
        """
        for _ in range(_WINDOW // 65536):
            if not self._channel.recv_stderr_ready():
                break
            self._stderr.add(self._channel.recv_stderr(65536))

    def _alive(self, timeout: float) -> bool:
        """A command that a signal ended has no exit status, and neither has one whose connection broke.

        Paramiko does not tell the two apart; an answer to a question does.
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
        """Its standard input stays open."""
