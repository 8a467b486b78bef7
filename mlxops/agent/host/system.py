"""The operating system as the agent sees it: processes, listeners, the boot's identity. Reads only.

One seam with two sides. On Linux /proc is read directly: one pass, raw kernel numbers. Elsewhere, which means
macOS, psutil looks. Both sides run in the tests on Linux and are compared there; on macOS itself they were not run.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import shutil
import subprocess
import sys
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol

from mlxops.agent.host import sockets
from mlxops.agent.host.sockets import Socket
from mlxops.core.errors import Refused

_SHORT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
"""Errors that say something of us, who have no descriptor or memory left, and nothing of what was looked at: they must
not be taken for its absence. Any other one says that a process has ended meanwhile, or is not ours to see."""


def _unseen(error: Exception) -> Refused:
    """What could not be looked at for reasons of our own. Nothing may be concluded from it."""
    return Refused(
        "not_seen",
        "the processes of this host could not be looked at",
        why=getattr(error, "strerror", None) or str(error),
        hint="nothing is changed meanwhile; see the host's limits (ulimit -n) and its memory, then try again",
    )


def shortage(error: Exception) -> Refused | None:
    """What is told of an error that comes from a shortage of our own; None for any other error."""
    return _unseen(error) if getattr(error, "errno", None) in _SHORT else None


def _check_shortage(error: Exception) -> None:
    if told := shortage(error):
        raise told from None


@dataclass(frozen=True)
class Process:
    """One row of the process table.

    `start` is the kernel's raw start time as text: clock ticks since boot on Linux, the kernel's own time stamp
    on macOS. It never moves when the wall clock is stepped, so it is compared and never calculated with.
    """

    pid: int
    ppid: int
    pgid: int
    uid: int
    start: str
    zombie: bool
    argv: tuple[str, ...] = ()


@dataclass(frozen=True)
class Listener:
    """A listening TCP socket. `pids` is empty when its owner cannot be seen: that is not the same as free."""

    address: str
    port: int
    pids: frozenset[int] = frozenset()
    uid: int | None = field(default=None, compare=False)
    """Whose it is; None where the system does not tell."""


@dataclass(frozen=True)
class Look:
    """Processes and listeners, looked at once."""

    processes: Mapping[int, Process] = field(default_factory=dict)
    listeners: tuple[Listener, ...] = ()

    def group(self, pgid: int) -> tuple[Process, ...]:
        """The living members of a process group: a zombie holds no memory, port or file, so it does not count."""
        return tuple(p for p in self.processes.values() if p.pgid == pgid and not p.zombie)

    def on(self, bind: str, port: int) -> tuple[Listener, ...]:
        """The listeners that a server bound to `bind:port` would collide with."""
        return tuple(each for each in self.listeners if each.port == port and collides(each.address, bind))

    @cached_property
    def children(self) -> Mapping[int, tuple[int, ...]]:
        """The living children of each process."""
        found: dict[int, list[int]] = {}
        for process in self.processes.values():
            if not process.zombie and process.ppid != process.pid:
                found.setdefault(process.ppid, []).append(process.pid)
        return {pid: tuple(children) for pid, children in found.items()}

    def ancestors(self, pid: int) -> Iterable[Process]:
        seen: set[int] = set()
        while pid in self.processes and pid not in seen:
            seen.add(pid)
            yield self.processes[pid]
            pid = self.processes[pid].ppid


def collides(one: str, other: str) -> bool:
    """Two listening addresses cannot share a port: they are equal, or one of them means every address."""
    addresses = [ipaddress.ip_address(_plain(each)) for each in (one, other)]
    return addresses[0] == addresses[1] or any(address.is_unspecified for address in addresses)


def _plain(text: str) -> str:
    """An address in its one usual form; an IPv4 address that is written as IPv6 is that IPv4 address."""
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def free_on_disk(path: Path) -> int:
    """Bytes; `path` itself may not be there yet."""
    return shutil.disk_usage(next(each for each in (path, *path.parents) if os.path.exists(each))).free


class System(Protocol):
    """Raises `Refused` (not_seen) where the system says neither yes nor no."""

    sees_all_listeners: bool
    """Also those of other users; where not, only a connect tells that something listens."""

    def boot_id(self) -> str:
        """What identifies this boot; another after a reboot."""

    def booted_at(self) -> float:
        """When it was, as wall time in seconds since the epoch; for display."""

    def look(self, ports: Container[int]) -> Look:
        """Every process, and the listeners on `ports`."""

    def connected(self, ports: Container[int]) -> frozenset[int]:
        """Those of the ports at which somebody is connected to a server: a request may be in flight there."""

    def process(self, pid: int) -> Process | None: ...

    def ports_of(self, pid: int) -> frozenset[int] | None:
        """Return the ports on which a process listens; None if it is gone, hidden, or in another network namespace."""

    def environment(self, pid: int, key: str) -> str | None:
        """A variable of another process's environment; None if it is not there or must not be seen."""

    def variables(self, pid: int) -> Mapping[str, str]:
        """Return another process's environment, as it was when its program began; empty if hidden."""

    def units(self, pid: int) -> tuple[str, ...]:
        """Return the systemd units whose control group a process is in; empty if there are none."""

    def folder(self, pid: int) -> str | None:
        """A process's working directory; None if it is gone or must not be seen."""

    def memory(self, pids: Iterable[int]) -> int:
        """Resident bytes of these processes together; shared pages count more than once."""

    def available(self) -> int | None:
        """Bytes that a new program could have without anything being swapped out; None if that is not told."""

    def connections(self, port: int, pids: Iterable[int]) -> frozenset[tuple[str, int]]:
        """The far ends of the TCP connections that are open to `port`, which these processes serve."""


_UNITS = (".service", ".scope")


def units_in(cgroup: str) -> tuple[str, ...]:
    """Return the units in `/proc/PID/cgroup` (both versions): system units, and a user manager's inside its own."""
    paths = [line.split(":", 2)[2] for line in cgroup.splitlines() if line.count(":") >= 2]
    # systemd puts an underscore before a name that the kernel's own files could have ("_memory.service").
    parts = [part.removeprefix("_") for path in paths for part in path.split("/")]
    return tuple(dict.fromkeys(part for part in parts if part.endswith(_UNITS)))


@cache
def this_system() -> System:
    return LinuxSystem() if sys.platform == "linux" else PsutilSystem()


class LinuxSystem:
    """/proc, as proc(5) describes it, and the kernel's own word about sockets."""

    root = Path("/proc")
    sees_all_listeners = True

    @cache  # noqa: B019 - one system a process, and no process sees two boots
    def boot_id(self) -> str:
        return (self.root / "sys/kernel/random/boot_id").read_text().strip()

    def booted_at(self) -> float:
        lines = (self.root / "stat").read_text().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("btime ")))

    def process(self, pid: int) -> Process | None:
        try:
            stat = _read(f"{self.root}/{pid}/stat")
            argv = _read(f"{self.root}/{pid}/cmdline")
            uid = os.stat(f"{self.root}/{pid}").st_uid
        except OSError as error:
            _check_shortage(error)
            return None
        # The name in parentheses may hold anything, so the fields are counted from the last parenthesis.
        fields = stat[stat.rindex(b")") + 2 :].split()
        return Process(
            pid=pid,
            ppid=int(fields[1]),
            pgid=int(fields[2]),
            uid=uid,
            start=fields[19].decode(),
            zombie=fields[0] in (b"Z", b"X"),
            argv=tuple(os.fsdecode(arg) for arg in argv.rstrip(b"\0").split(b"\0")) if argv else (),
        )

    def look(self, ports: Container[int]) -> Look:
        # Listeners first: a server that comes up in between is then seen as a process without a port, which
        # decides nothing, and not as a port without a process.
        listening = self._listening(ports)
        processes = {p.pid: p for p in map(self.process, self._pids()) if p is not None}
        owners = self._owners({each.inode for each in listening}) if listening else {}
        # A child that a server has made meanwhile holds its listener too: it is told, or, if it has ended, not counted.
        later = map(self.process, set().union(*owners.values()) - processes.keys())
        processes |= {p.pid: p for p in later if p is not None}
        living = {p.pid for p in processes.values() if not p.zombie}
        owners = {inode: pids & living for inode, pids in owners.items() if pids & living}
        if any(each.inode not in owners for each in listening):
            # Closed while its owner was looked for, or still there and nobody's that can be seen: two different things.
            open_still = {each.inode for each in self._listening(ports)}
            listening = [each for each in listening if each.inode in owners or each.inode in open_still]
        return Look(
            processes,
            tuple(
                Listener(_plain(each.address), each.port, frozenset(owners.get(each.inode, ())), each.uid)
                for each in listening
            ),
        )

    def ports_of(self, pid: int) -> frozenset[int] | None:
        try:
            if os.readlink(f"{self.root}/{pid}/ns/net") != os.readlink(f"{self.root}/self/ns/net"):
                return None  # in a container
            folder = f"{self.root}/{pid}/fd"
            names = os.listdir(folder)
        except OSError as error:
            _check_shortage(error)
            return None
        open_files = set()
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # closed in between
                open_files.add(os.readlink(f"{folder}/{name}"))
        listening = self._sockets(sockets.LISTENING)
        return frozenset(each.port for each in listening if f"socket:[{each.inode}]" in open_files)

    def environment(self, pid: int, key: str) -> str | None:
        try:
            block = _read(f"{self.root}/{pid}/environ")
        except OSError as error:
            _check_shortage(error)
            return None
        wanted = os.fsencode(key) + b"="
        return next((os.fsdecode(v[len(wanted) :]) for v in block.split(b"\0") if v.startswith(wanted)), None)

    def variables(self, pid: int) -> Mapping[str, str]:
        try:
            block = _read(f"{self.root}/{pid}/environ")
        except OSError as error:
            _check_shortage(error)
            return {}
        pairs = (os.fsdecode(each).partition("=") for each in block.split(b"\0") if each)
        return {key: value for key, _, value in pairs}

    def units(self, pid: int) -> tuple[str, ...]:
        try:
            return units_in(os.fsdecode(_read(f"{self.root}/{pid}/cgroup")))
        except OSError as error:
            _check_shortage(error)
            return ()

    def folder(self, pid: int) -> str | None:
        try:
            return os.readlink(f"{self.root}/{pid}/cwd")
        except OSError:
            return None

    def memory(self, pids: Iterable[int]) -> int:
        total = 0
        for pid in pids:
            try:
                total += int(_read(f"{self.root}/{pid}/statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")
            except (OSError, IndexError):
                continue
        return total

    def available(self) -> int | None:
        for line in _read(f"{self.root}/meminfo").decode().splitlines():
            key, _, value = line.partition(":")
            if key == "MemAvailable":
                return int(value.split()[0]) * 1024
        return None

    def connections(self, port: int, pids: Iterable[int]) -> frozenset[tuple[str, int]]:
        return frozenset(
            (_plain(each.far[0]), each.far[1]) for each in self._sockets(sockets.CONNECTED) if each.port == port
        )

    def _pids(self) -> Iterable[int]:
        try:
            return [int(name) for name in os.listdir(self.root) if name.isdigit()]
        except OSError as error:
            raise _unseen(error) from None

    def connected(self, ports: Container[int]) -> frozenset[int]:
        return frozenset(each.port for each in self._sockets(sockets.CONNECTED) if each.port in ports)

    def _listening(self, ports: Container[int]) -> list[Socket]:
        return [each for each in self._sockets(sockets.LISTENING) if each.port in ports]

    def _sockets(self, state: int) -> list[Socket]:
        try:
            return sockets.tcp(state)
        except OSError as error:
            raise _unseen(error) from None

    def _owners(self, inodes: set[str]) -> dict[str, set[int]]:
        wanted = {f"socket:[{inode}]": inode for inode in inodes}
        owners: dict[str, set[int]] = {}
        for pid in self._pids():
            folder = f"{self.root}/{pid}/fd"
            try:
                for name in os.listdir(folder):
                    inode = wanted.get(os.readlink(f"{folder}/{name}"))
                    if inode is not None:
                        owners.setdefault(inode, set()).add(pid)
            except OSError as error:
                _check_shortage(error)
                continue  # ended meanwhile, or not ours to see
        return owners


class PsutilSystem:
    """psutil, for macOS. It sees listeners of the user's own processes only."""

    sees_all_listeners = False

    @cache  # noqa: B019 - as above; here it costs a process each time
    def boot_id(self) -> str:
        if sys.platform != "darwin":
            return LinuxSystem().boot_id()
        # kern.bootsessionuuid: a UUID for each boot (XNU, bsd/kern/kern_sysctl.c).
        command = ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    def booted_at(self) -> float:
        import psutil

        return psutil.boot_time()

    def process(self, pid: int) -> Process | None:
        import psutil

        try:
            process = psutil.Process(pid)
            with process.oneshot():
                zombie = process.status() == psutil.STATUS_ZOMBIE
                # Its identity holds the kernel's start time without the correction for a stepped clock.
                start = repr(process._ident[1])  # type: ignore[attr-defined]
                try:
                    argv = tuple(process.cmdline())
                except (psutil.AccessDenied, psutil.ZombieProcess):
                    argv = ()
                return Process(pid, process.ppid(), os.getpgid(pid), process.uids().real, start, zombie, argv)
        except (psutil.Error, OSError) as error:
            _check_shortage(error)
            return None

    def ports_of(self, pid: int) -> frozenset[int] | None:
        import psutil

        try:
            connections = psutil.Process(pid).net_connections(kind="tcp")
        except (psutil.Error, OSError) as error:
            _check_shortage(error)
            return None
        return frozenset(each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN)

    def look(self, ports: Container[int]) -> Look:
        import psutil

        found: dict[tuple[str, int], set[int]] = {}
        processes: dict[int, Process] = {}
        for pid in _all_pids():
            process = self.process(pid)
            if process is None:
                continue
            processes[pid] = process
            if not ports:
                continue  # to look at the sockets of every process takes long
            try:
                for connection in psutil.Process(pid).net_connections(kind="tcp"):
                    if connection.status == psutil.CONN_LISTEN and connection.laddr.port in ports:
                        found.setdefault((_plain(connection.laddr.ip), connection.laddr.port), set()).add(pid)
            except (psutil.Error, OSError) as error:
                _check_shortage(error)
                continue
        return Look(
            processes,
            tuple(Listener(address, port, frozenset(pids)) for (address, port), pids in found.items()),
        )

    def connected(self, ports: Container[int]) -> frozenset[int]:
        import psutil

        found: set[int] = set()
        for pid in _all_pids():
            try:
                connections = psutil.Process(pid).net_connections(kind="tcp")
            except (psutil.Error, OSError) as error:
                _check_shortage(error)
                continue
            found |= {each.laddr.port for each in connections if each.status == psutil.CONN_ESTABLISHED}
        return frozenset(port for port in found if port in ports)

    def environment(self, pid: int, key: str) -> str | None:
        import psutil

        try:
            return psutil.Process(pid).environ().get(key)
        except (psutil.Error, OSError) as error:
            _check_shortage(error)
            return None

    def variables(self, pid: int) -> Mapping[str, str]:
        import psutil

        try:
            return psutil.Process(pid).environ()
        except (psutil.Error, OSError) as error:
            _check_shortage(error)
            return {}

    def units(self, pid: int) -> tuple[str, ...]:
        return LinuxSystem().units(pid) if sys.platform == "linux" else ()

    def folder(self, pid: int) -> str | None:
        import psutil

        try:
            return psutil.Process(pid).cwd()
        except (psutil.Error, OSError):
            return None

    def memory(self, pids: Iterable[int]) -> int:
        import psutil

        total = 0
        for pid in pids:
            try:
                total += psutil.Process(pid).memory_info().rss
            except (psutil.Error, OSError):
                continue
        return total

    def available(self) -> int | None:
        import psutil

        return int(psutil.virtual_memory().available)

    def connections(self, port: int, pids: Iterable[int]) -> frozenset[tuple[str, int]]:
        import psutil

        found = set()
        for pid in pids:
            try:
                for connection in psutil.Process(pid).net_connections(kind="tcp"):
                    if connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port == port:
                        found.add((_plain(connection.raddr.ip), connection.raddr.port))
            except (psutil.Error, OSError):
                continue
        return frozenset(found)


def _all_pids() -> list[int]:
    import psutil

    try:
        return psutil.pids()
    except OSError as error:
        raise _unseen(error) from None


def _read(path: str) -> bytes:
    # Not `open`, whose questions about the file take longer than its few bytes; there are hundreds of such files.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = [os.read(descriptor, 65536)]
        while parts[-1]:
            parts.append(os.read(descriptor, 65536))
        return b"".join(parts)
    finally:
        os.close(descriptor)
