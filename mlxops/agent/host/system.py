"""Read processes, listeners and the boot id from the operating system.

One interface, two implementations. On Linux, /proc is read directly: one pass, raw kernel numbers. Elsewhere, which
means macOS, psutil is used. The tests run and compare both on Linux. They were not run on macOS.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import sys
import time
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mlxops.agent.host import sockets
from mlxops.agent.host.sockets import Socket
from mlxops.core.errors import Refused
from mlxops.core.frozen import dataclass

if TYPE_CHECKING:
    from mlxops.agent.host.memory import HostMemory

_SHORTAGE_ERRORS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
"""Errors because this process has no descriptor or memory left. They do not mean that the object is absent.

Any other error means that a process has ended in between, or must not be seen."""


def _not_seen(error: Exception) -> Refused:
    """Return the error for a failed observation, from which nothing may be concluded."""
    return Refused(
        "not_seen",
        "the processes of this host could not be read",
        why=getattr(error, "strerror", None) or str(error),
        hint="nothing was changed; check the host's limits (ulimit -n) and its memory, then try again",
    )


def shortage(error: Exception) -> Refused | None:
    """Return the error to report if this process is short of descriptors or memory; None for any other error."""
    return _not_seen(error) if getattr(error, "errno", None) in _SHORTAGE_ERRORS else None


def _check_shortage(error: Exception) -> None:
    if refused := shortage(error):
        raise refused from None


@dataclass(frozen=True)
class Process:
    """One row of the process table.

    `start` is the kernel's raw start time as text: clock ticks since boot on Linux, the kernel's own time stamp on
    macOS. It does not change when the wall clock is set. Compare it, but do not calculate with it.
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
    """A listening TCP socket. `pids` is empty if its owner is hidden, which does not mean that the port is free."""

    address: str
    port: int
    pids: frozenset[int] = frozenset()
    uid: int | None = field(default=None, compare=False)
    """The owner's user id; None if the system does not show it."""


@dataclass(frozen=True)
class ProcessTable:
    """The processes and listeners of the host at one moment."""

    processes: Mapping[int, Process] = field(default_factory=dict)
    listeners: tuple[Listener, ...] = ()

    def group(self, pgid: int) -> tuple[Process, ...]:
        """Return the living processes of a group. Zombies hold no memory, port or file, so they do not count."""
        return tuple(p for p in self.processes.values() if p.pgid == pgid and not p.zombie)

    def on(self, bind: str, port: int) -> tuple[Listener, ...]:
        """Return the listeners that prevent a server from binding `bind:port`."""
        return tuple(
            listener for listener in self.listeners if listener.port == port and collides(listener.address, bind)
        )

    @cached_property
    def children(self) -> Mapping[int, tuple[int, ...]]:
        """Map each process to its living children."""
        found: dict[int, list[int]] = {}
        for process in self.processes.values():
            if not process.zombie and process.ppid != process.pid:
                found.setdefault(process.ppid, []).append(process.pid)
        return {pid: tuple(children) for pid, children in found.items()}

    def ancestors(self, pid: int) -> Iterable[Process]:
        """Yield a process, its parent and so on."""
        seen: set[int] = set()
        while pid in self.processes and pid not in seen:
            seen.add(pid)
            yield self.processes[pid]
            pid = self.processes[pid].ppid


def collides(one: str, other: str) -> bool:
    """Return whether two listening addresses cannot share a port: they are equal, or one means all addresses."""
    addresses = [ipaddress.ip_address(_normalise(text)) for text in (one, other)]
    return addresses[0] == addresses[1] or any(address.is_unspecified for address in addresses)


def _normalise(text: str) -> str:
    """Return an address in its normal form. An IPv4 address written as IPv6 becomes IPv4."""
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def free_on_disk(path: Path) -> int:
    """Return the free bytes on the disk of `path`, which need not exist."""
    import shutil

    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if os.path.exists(folder))).free


def slept_seconds() -> float:
    """Return the difference of the two monotonic clocks of which only one counts while the machine sleeps."""
    if sys.platform == "darwin":  # clock_gettime(3): CLOCK_MONOTONIC_RAW increments while the system is asleep
        return time.clock_gettime(time.CLOCK_MONOTONIC_RAW) - time.clock_gettime(time.CLOCK_UPTIME_RAW)
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
    return 0.0


class System(Protocol):
    """The operating system. Methods raise `Refused` (not_seen) if this process lacks the means to look."""

    sees_all_listeners: bool
    """Listeners of other users are visible too. If not, only a connection attempt shows that a port is in use."""

    def boot_id(self) -> str:
        """Return the id of this boot, which changes with a reboot."""

    def booted_at(self) -> float:
        """Return the time of the boot in seconds since the epoch, for display."""

    def slept_seconds(self) -> float:
        """Return how long this boot has slept."""

    def process_table(self, ports: Container[int]) -> ProcessTable:
        """Return all processes, and the listeners on `ports`."""

    def connected(self, ports: Container[int]) -> frozenset[int]:
        """Return those of the ports that have a client connected: a request may be in progress there."""

    def process(self, pid: int) -> Process | None:
        """Return a process; None if it does not exist."""

    def ports_of(self, pid: int) -> frozenset[int] | None:
        """Return the ports on which a process listens; None if it is gone, hidden, or in another network namespace."""

    def environment(self, pid: int, key: str) -> str | None:
        """Return a variable of another process's environment; None if it is not set or hidden."""

    def variables(self, pid: int) -> Mapping[str, str]:
        """Return another process's environment at the start of its program; empty if hidden."""

    def units(self, pid: int) -> tuple[str, ...]:
        """Return the systemd units whose control group a process is in; empty if there are none."""

    def folder(self, pid: int) -> str | None:
        """Return a process's working directory; None if it is gone or hidden."""

    def opened(self, paths: Collection[Path]) -> frozenset[Path]:
        """Return those of the files that a process has open, as far as processes are visible."""

    def memory(self, pids: Collection[int]) -> int | None:
        """Return the bytes that these processes hold together; None if one of them is hidden.

        Linux: resident memory, of which files and shared memory count once. macOS: the physical footprint, of which
        the GPU's buffers are part. Resident size lacks them.
        """

    def shared_memory(self, pids: Collection[int]) -> int | None:
        """Return the same, with everything that processes share divided among them. Slow on Linux."""

    def host_memory(self) -> HostMemory:
        """Return the host's memory."""

    def unexplained(self, pids: Collection[int]) -> int | None:
        """Return the bytes in use that no visible process explains; None if not known.

        `pids`: processes whose shared memory counts as explained. That of other processes does not: several of them
        may hold the same.
        """

    def available(self) -> int | None:
        """Return the bytes that a new program can use without swapping; None if not known."""

    def ignores(self, pid: int, number: int) -> bool:
        """Return whether a process ignores a signal; False if that is not known."""

    def connections(self, port: int, pids: Iterable[int]) -> frozenset[tuple[str, int]]:
        """Return the remote ends of the TCP connections to `port`, which these processes serve."""

    def cpu_seconds(self, pids: Iterable[int]) -> float | None:
        """Return the processor time that these processes have used; None if one of them has ended or is hidden."""


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


MAX_WALKED_BYTES = 8_000_000_000
"""The largest server whose shared pages are divided among its processes, which takes a third of a second."""


class LinuxSystem:
    """Linux: /proc (proc(5)), and sock_diag for sockets."""

    root = Path("/proc")
    sees_all_listeners = True

    @cache  # noqa: B019 - one instance per process, and a process sees one boot
    def boot_id(self) -> str:
        return (self.root / "sys/kernel/random/boot_id").read_text().strip()

    def booted_at(self) -> float:
        lines = (self.root / "stat").read_text().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("btime ")))

    def slept_seconds(self) -> float:
        return slept_seconds()

    def process(self, pid: int) -> Process | None:
        try:
            stat = _read(f"{self.root}/{pid}/stat")
            argv = _read(f"{self.root}/{pid}/cmdline")
            uid = os.stat(f"{self.root}/{pid}").st_uid
        except OSError as error:
            _check_shortage(error)
            return None
        # The name in parentheses may contain any character, so the fields are counted from the last parenthesis.
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

    def process_table(self, ports: Container[int]) -> ProcessTable:
        # Listeners first: a server that starts in between then appears as a process without a port, which is
        # harmless, and not as a port without a process.
        listening = self._listening(ports)
        processes = {p.pid: p for p in map(self.process, self._pids()) if p is not None}
        owners = self._socket_owners({socket.inode for socket in listening}) if listening else {}
        # A child that a server forked in between also holds its listener. Read it too, unless it has ended.
        later = map(self.process, set().union(*owners.values()) - processes.keys())
        processes |= {p.pid: p for p in later if p is not None}
        living = {p.pid for p in processes.values() if not p.zombie}
        owners = {inode: pids & living for inode, pids in owners.items() if pids & living}
        if any(socket.inode not in owners for socket in listening):
            # Either it was closed while its owner was searched for, or its owner is hidden.
            still_open = {socket.inode for socket in self._listening(ports)}
            listening = [socket for socket in listening if socket.inode in owners or socket.inode in still_open]
        return ProcessTable(
            processes,
            tuple(
                Listener(_normalise(socket.address), socket.port, frozenset(owners.get(socket.inode, ())), socket.uid)
                for socket in listening
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
        return frozenset(socket.port for socket in listening if f"socket:[{socket.inode}]" in open_files)

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
        pairs = (os.fsdecode(item).partition("=") for item in block.split(b"\0") if item)
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

    def opened(self, paths: Collection[Path]) -> frozenset[Path]:
        wanted = {os.path.realpath(path): path for path in paths}
        return frozenset(wanted[name] for name in (self._owners(wanted.keys()) if wanted else ()))

    def memory(self, pids: Collection[int]) -> int | None:
        private, shared = 0, 0
        for pid in pids:
            try:
                whole, common = _resident(_read(f"{self.root}/{pid}/statm"))
            except PermissionError:
                return None
            except (OSError, IndexError):
                continue  # it has ended
            private, shared = private + whole - common, max(shared, common)
        return private + shared

    def shared_memory(self, pids: Collection[int]) -> int | None:
        held = self.memory(pids)
        # The kernel walks every page: 40 ms for each GB. A single process shares next to nothing.
        if held is None or len(pids) < 2 or held > MAX_WALKED_BYTES:
            return held
        from mlxops.agent.host.memory import kilobytes

        total = 0
        for pid in pids:
            try:
                total += kilobytes(_read(f"{self.root}/{pid}/smaps_rollup").decode())["Pss"]
            except PermissionError:
                return held
            except (OSError, KeyError):
                continue
        return total

    def host_memory(self) -> HostMemory:
        from mlxops.agent.host.memory import linux_memory

        return linux_memory(self.root)

    def unexplained(self, pids: Collection[int]) -> int | None:
        from mlxops.agent.host.memory import linux_unexplained

        return linux_unexplained(self.root, pids)

    def available(self) -> int | None:
        for line in _read(f"{self.root}/meminfo").decode().splitlines():
            key, _, value = line.partition(":")
            if key == "MemAvailable":
                return int(value.split()[0]) * 1024
        return None

    def ignores(self, pid: int, number: int) -> bool:
        try:
            status = _read(f"{self.root}/{pid}/status")
        except OSError as error:
            _check_shortage(error)
            return False
        mask = next((line.split()[1] for line in status.splitlines() if line.startswith(b"SigIgn:")), b"0")
        return bool(int(mask, 16) >> (number - 1) & 1)

    def connections(self, port: int, pids: Iterable[int]) -> frozenset[tuple[str, int]]:
        return frozenset(
            (_normalise(socket.remote[0]), socket.remote[1])
            for socket in self._sockets(sockets.CONNECTED)
            if socket.port == port
        )

    def cpu_seconds(self, pids: Iterable[int]) -> float | None:
        ticks = 0
        for pid in pids:
            try:
                stat = _read(f"{self.root}/{pid}/stat")
            except OSError as error:
                _check_shortage(error)
                return None
            fields = stat[stat.rindex(b")") + 2 :].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _pids(self) -> Iterable[int]:
        try:
            return [int(name) for name in os.listdir(self.root) if name.isdigit()]
        except OSError as error:
            raise _not_seen(error) from None

    def connected(self, ports: Container[int]) -> frozenset[int]:
        return frozenset(socket.port for socket in self._sockets(sockets.CONNECTED) if socket.port in ports)

    def _listening(self, ports: Container[int]) -> list[Socket]:
        return [socket for socket in self._sockets(sockets.LISTENING) if socket.port in ports]

    def _sockets(self, state: int) -> list[Socket]:
        try:
            return sockets.tcp(state)
        except OSError as error:
            raise _not_seen(error) from None

    def _socket_owners(self, inodes: Collection[str]) -> dict[str, set[int]]:
        owners = self._owners({f"socket:[{inode}]" for inode in inodes})
        return {name.removeprefix("socket:[").removesuffix("]"): pids for name, pids in owners.items()}

    def _owners(self, names: Collection[str]) -> dict[str, set[int]]:
        """Return the processes that have a file open, for each of these names in /proc/PID/fd that one has."""
        owners: dict[str, set[int]] = {}
        for pid in self._pids():
            folder = f"{self.root}/{pid}/fd"
            try:
                for name in os.listdir(folder):
                    target = os.readlink(f"{folder}/{name}")
                    if target in names:
                        owners.setdefault(target, set()).add(pid)
            except OSError as error:
                _check_shortage(error)
                continue  # it has ended, or is hidden
        return owners


class PsutilSystem:
    """macOS, with psutil. It sees only listeners of the user's own processes."""

    sees_all_listeners = False

    @cache  # noqa: B019 - as above; each call starts a process
    def boot_id(self) -> str:
        import subprocess

        if sys.platform != "darwin":
            return LinuxSystem().boot_id()
        # kern.bootsessionuuid: a UUID for each boot (XNU, bsd/kern/kern_sysctl.c).
        command = ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    def booted_at(self) -> float:
        import psutil

        return psutil.boot_time()

    def slept_seconds(self) -> float:
        return slept_seconds()

    def process(self, pid: int) -> Process | None:
        import psutil

        try:
            process = psutil.Process(pid)
            with process.oneshot():
                zombie = process.status() == psutil.STATUS_ZOMBIE
                # `_ident` has the kernel's start time without corrections for changes of the wall clock.
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
        return frozenset(connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN)

    def process_table(self, ports: Container[int]) -> ProcessTable:
        import psutil

        found: dict[tuple[str, int], set[int]] = {}
        processes: dict[int, Process] = {}
        for pid in _all_pids():
            process = self.process(pid)
            if process is None:
                continue
            processes[pid] = process
            if not ports:
                continue  # reading the sockets of each process is slow
            try:
                for connection in psutil.Process(pid).net_connections(kind="tcp"):
                    if connection.status == psutil.CONN_LISTEN and connection.laddr.port in ports:
                        found.setdefault((_normalise(connection.laddr.ip), connection.laddr.port), set()).add(pid)
            except (psutil.Error, OSError) as error:
                _check_shortage(error)
                continue
        return ProcessTable(
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
            found |= {
                connection.laddr.port for connection in connections if connection.status == psutil.CONN_ESTABLISHED
            }
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

    def opened(self, paths: Collection[Path]) -> frozenset[Path]:
        import psutil

        wanted = {os.path.realpath(path): path for path in paths}
        found: set[Path] = set()
        for pid in _all_pids() if wanted else ():
            try:
                names = {file.path for file in psutil.Process(pid).open_files()}
            except (psutil.Error, OSError) as error:
                _check_shortage(error)
                continue
            found |= {wanted[name] for name in names & wanted.keys()}
        return frozenset(found)

    def memory(self, pids: Collection[int]) -> int | None:
        if sys.platform != "darwin":
            return LinuxSystem().memory(pids)
        from mlxops.agent.host import darwin

        sizes = [darwin.footprint(pid) for pid in pids]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def shared_memory(self, pids: Collection[int]) -> int | None:
        return self.memory(pids) if sys.platform == "darwin" else LinuxSystem().shared_memory(pids)

    def host_memory(self) -> HostMemory:
        if sys.platform != "darwin":
            return LinuxSystem().host_memory()
        from mlxops.agent.host import darwin

        return darwin.host_memory(_all_pids())

    def unexplained(self, pids: Collection[int]) -> int | None:
        if sys.platform != "darwin":
            return LinuxSystem().unexplained(pids)
        from mlxops.agent.host import darwin

        return darwin.unexplained(_all_pids())

    def available(self) -> int | None:
        import psutil

        return int(psutil.virtual_memory().available)

    def ignores(self, pid: int, number: int) -> bool:
        # psutil does not show it.
        return LinuxSystem().ignores(pid, number) if sys.platform == "linux" else False

    def connections(self, port: int, pids: Iterable[int]) -> frozenset[tuple[str, int]]:
        import psutil

        found = set()
        for pid in pids:
            try:
                for connection in psutil.Process(pid).net_connections(kind="tcp"):
                    if connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port == port:
                        found.add((_normalise(connection.raddr.ip), connection.raddr.port))
            except (psutil.Error, OSError):
                continue
        return frozenset(found)

    def cpu_seconds(self, pids: Iterable[int]) -> float | None:
        import psutil

        try:
            times = [psutil.Process(pid).cpu_times() for pid in pids]
        except (psutil.Error, OSError) as error:
            _check_shortage(error)
            return None
        return float(sum(each.user + each.system for each in times))


def _all_pids() -> list[int]:
    import psutil

    try:
        return psutil.pids()
    except OSError as error:
        raise _not_seen(error) from None


def _read(path: str) -> bytes:
    # `open` examines the file first, which takes longer than reading its few bytes; there are hundreds of such files.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = [os.read(descriptor, 65536)]
        while parts[-1]:
            parts.append(os.read(descriptor, 65536))
        return b"".join(parts)
    finally:
        os.close(descriptor)


def _resident(statm: bytes) -> tuple[int, int]:
    """Return the resident bytes of /proc/PID/statm, and how many of them may be shared: files and shared memory."""
    page = os.sysconf("SC_PAGE_SIZE")
    fields = statm.split()
    return int(fields[1]) * page, int(fields[2]) * page
