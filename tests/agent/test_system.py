"""/proc and psutil give the same view of a machine."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from mlxops.agent.host import sockets
from mlxops.agent.host.memory import linux_memory, linux_unexplained
from mlxops.agent.host.system import (
    LinuxSystem,
    Listener,
    Process,
    ProcessTable,
    PsutilSystem,
    System,
    collides,
    this_system,
)
from tests.lab.sshd import missing
from tests.lab.world import wait_until

both = pytest.mark.parametrize(
    "system",
    [
        pytest.param(
            LinuxSystem(), id="proc", marks=pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
        ),
        pytest.param(PsutilSystem(), id="psutil"),
    ],
)
linux = pytest.mark.skipif(sys.platform != "linux", reason="both ways can be compared only where there is /proc")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def child(stack: ExitStack, *argv: str, **how: object) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, **how)  # type: ignore[call-overload]  # passed on
    assert isinstance(process, subprocess.Popen)
    stack.callback(process.communicate)
    stack.callback(process.kill)
    return process


def listen(stack: ExitStack, family: int, address: str, port: int = 0, *, only6: bool = False) -> int:
    """Open a listener of this process. Return its port."""
    sock = stack.enter_context(socket.socket(family))
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only6)
    sock.bind((address, port))
    sock.listen()
    number = sock.getsockname()[1]
    assert isinstance(number, int)
    return number


def zombie(stack: ExitStack) -> subprocess.Popen[bytes]:
    process = child(stack, "/bin/sh", "-c", "exit 3")
    wait_until(lambda: (seen := this_system().process(process.pid)) is not None and seen.zombie, 30, "a zombie")
    return process


# -- processes ------------------------------------------------------------------------------------------------------


@both
def test_process_has_its_parent_group_and_command(system: System, stack: ExitStack) -> None:
    sleeper = child(stack, "/bin/sleep", "1000", start_new_session=True)
    wait_until(lambda: (p := system.process(sleeper.pid)) is not None and "1000" in p.argv, 30, "the sleeper")
    seen = system.process(sleeper.pid)
    assert seen is not None
    assert (seen.pid, seen.ppid, seen.pgid, seen.uid) == (sleeper.pid, os.getpid(), sleeper.pid, os.getuid())
    assert seen.argv == ("/bin/sleep", "1000") and not seen.zombie
    assert system.process_table(()).processes[sleeper.pid] == seen, "its start time does not move between two looks"


@both
def test_ended_process_returns_none(system: System, stack: ExitStack) -> None:
    gone = child(stack, "/bin/sh", "-c", ":")
    gone.wait()
    assert system.process(gone.pid) is None and gone.pid not in system.process_table(()).processes
    assert system.environment(gone.pid, "PATH") is None and system.memory([gone.pid]) == 0


@both
def test_ports_of_a_process_are_its_listening_ports(system: System, stack: ExitStack) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.2", 0)) as other:
        with socket.create_connection(one.getsockname()):
            own = system.ports_of(os.getpid())
        assert own is not None and own >= {one.getsockname()[1], other.getsockname()[1]}
    sleeper = child(stack, "/bin/sleep", "1000")
    assert system.ports_of(sleeper.pid) == frozenset()
    sleeper.kill()
    sleeper.wait()
    assert system.ports_of(sleeper.pid) is None


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
def test_ports_of_a_container_are_hidden(stack: ExitStack) -> None:
    inside = child(stack, "unshare", "-Urn", "sleep", "1000")

    def begun_or_gone() -> bool:
        process = this_system().process(inside.pid)
        return process is None or process.argv[:1] == ("sleep",)

    wait_until(begun_or_gone, 30, "the namespace")
    if inside.poll() is not None:
        missing("the right to make a network namespace (unshare -Urn)")
    assert this_system().ports_of(inside.pid) is None


@both
def test_zombie_is_not_a_member_of_its_group(system: System, stack: ExitStack) -> None:
    dead = zombie(stack)
    seen = system.process(dead.pid)
    assert seen is not None and seen.zombie
    assert dead.pid not in {process.pid for process in system.process_table(()).group(seen.pgid)}


@both
@pytest.mark.parametrize("name", ["a) S 1 1 (b", "with space", ") (", "(((", "1 (x) Z 0", "ü\u202e"])
def test_program_may_have_any_name(system: System, stack: ExitStack, tmp_path: Path, name: str) -> None:
    program = tmp_path / name
    shutil.copy("/bin/sleep", program)
    odd = child(stack, str(program), "1000", start_new_session=True)
    wait_until(lambda: (p := system.process(odd.pid)) is not None and p.argv[:1] == (str(program),), 30, "the program")
    seen = system.process(odd.pid)
    assert seen is not None
    assert (seen.ppid, seen.pgid, seen.zombie) == (os.getpid(), odd.pid, False)


@both
def test_arguments_with_any_characters_stay_separate(system: System, stack: ExitStack) -> None:
    words = ("a b", "", "c\nd", "$(x)", "é")
    waiting = child(stack, sys.executable, "-S", "-c", "input()", *words)
    wait_until(lambda: (p := system.process(waiting.pid)) is not None and p.argv[-1:] == ("é",), 30, "the program")
    seen = system.process(waiting.pid)
    assert seen is not None and seen.argv[-5:] == words


@both
def test_only_the_named_variable_is_read(system: System, stack: ExitStack) -> None:
    env = {"MARK_MORE": "no", "MARK": "a=b c", "EMPTY": ""}
    waiting = child(stack, "/bin/sleep", "1000", env=env)
    wait_until(lambda: system.environment(waiting.pid, "MARK"), 30, "the program")
    assert system.environment(waiting.pid, "MARK") == "a=b c"
    assert system.environment(waiting.pid, "EMPTY") == ""
    assert system.environment(waiting.pid, "MAR") is None and system.environment(waiting.pid, "OTHER") is None


@both
def test_memory_is_in_bytes(system: System) -> None:
    one = system.memory([os.getpid()])
    assert one is not None and 10_000_000 < one < 10_000_000_000
    assert system.memory([]) == 0 and system.memory([os.getpid(), 2**22 - 1]) == pytest.approx(one, rel=0.2)


@linux
@both
def test_ignored_signals_are_seen(stack: ExitStack, system: System) -> None:
    # A shell's `nohup`, below which the tests may run, ignores SIGHUP for all of its children.
    signals = "import signal as s; s.signal(s.SIGINT, s.SIG_IGN); s.signal(s.SIGHUP, s.SIG_DFL)"
    program = f"{signals}; print('up', flush=True); input()"
    waiting = child(stack, sys.executable, "-S", "-c", program, stdout=subprocess.PIPE)
    assert waiting.stdout is not None and waiting.stdout.readline()
    ignored = [system.ignores(waiting.pid, number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert ignored == [True, False, False]
    assert not system.ignores(2**22 - 1, signal.SIGINT)


def test_process_with_a_hidden_command_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS, the commands of root's processes are hidden."""

    def denied(process: psutil.Process) -> list[str]:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "cmdline", denied)
    seen = PsutilSystem().process(os.getpid())
    assert seen is not None and (seen.argv, seen.ppid) == ((), os.getppid())


@linux
def test_proc_and_psutil_see_the_same_processes(stack: ExitStack) -> None:
    program = "import subprocess; subprocess.Popen(['/bin/sleep', '1000']); print('up', flush=True); input()"
    parent = child(stack, sys.executable, "-S", "-c", program, stdout=subprocess.PIPE, start_new_session=True)
    stack.callback(os.killpg, parent.pid, signal.SIGKILL)
    assert parent.stdout is not None and parent.stdout.readline()
    dead = zombie(stack)
    # A process has no command for a moment after its exec, which ends the parent's wait.
    wait_until(
        lambda: all(process.argv for process in LinuxSystem().process_table(()).group(parent.pid)), 30, "the commands"
    )

    def rows(table: ProcessTable) -> dict[int, tuple[object, ...]]:
        wanted = {os.getpid(), dead.pid, *(process.pid for process in table.group(parent.pid))}
        return {pid: plain(table.processes[pid]) for pid in wanted}

    def plain(p: Process) -> tuple[object, ...]:
        return p.ppid, p.pgid, p.uid, p.zombie, p.argv

    seen = rows(LinuxSystem().process_table(()))
    assert len(seen) == 4 and rows(PsutilSystem().process_table(())) == seen
    assert LinuxSystem().boot_id() == PsutilSystem().boot_id() != ""


# -- listeners ------------------------------------------------------------------------------------------------------

ADDRESSES = {
    "127.0.0.1": (socket.AF_INET, "127.0.0.1"),
    "0.0.0.0": (socket.AF_INET, "0.0.0.0"),
    "::1": (socket.AF_INET6, "::1"),
    "::": (socket.AF_INET6, "::"),
    # An IPv4 address in IPv6 notation is that IPv4 address.
    "127.0.0.1 ": (socket.AF_INET6, "::ffff:127.0.0.1"),
}


@both
@pytest.mark.parametrize("shown", ADDRESSES)
def test_listener_has_its_address_and_process(system: System, stack: ExitStack, shown: str) -> None:
    port = listen(stack, *ADDRESSES[shown])
    expected = (Listener(shown.strip(), port, frozenset({os.getpid()})),)
    assert system.process_table({port}).listeners == expected
    assert system.process_table({port + 1}).listeners == () and system.process_table(()).listeners == ()


@both
def test_connected_and_bound_sockets_are_not_listeners(system: System, stack: ExitStack) -> None:
    port = listen(stack, socket.AF_INET, "127.0.0.1")
    client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
    bound = stack.enter_context(socket.socket())
    bound.bind(("127.0.0.1", 0))
    assert system.process_table({client.getsockname()[1], bound.getsockname()[1]}).listeners == ()


@both
def test_shared_listener_names_all_its_processes(system: System, stack: ExitStack) -> None:
    sock = stack.enter_context(socket.socket())
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    port = sock.getsockname()[1]
    heir = child(stack, "/bin/sleep", "1000", pass_fds=(sock.fileno(),))
    (seen,) = system.process_table({port}).listeners
    assert seen.pids == {os.getpid(), heir.pid}


def test_sockets_are_not_read_if_no_port_is_requested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def sockets_of(process: psutil.Process, kind: str) -> list[object]:
        asked.append(process.pid)
        return []

    monkeypatch.setattr(psutil.Process, "net_connections", sockets_of)
    assert os.getpid() in PsutilSystem().process_table(frozenset()).processes and not asked
    assert PsutilSystem().process_table({1}).listeners == () and os.getpid() in asked


@linux
def test_proc_and_psutil_see_the_same_listeners(stack: ExitStack) -> None:
    ports = {listen(stack, family, address) for family, address in ADDRESSES.values()}

    def rows(system: System) -> set[Listener]:
        return set(system.process_table(ports).listeners)

    assert rows(LinuxSystem()) == rows(PsutilSystem())
    assert len(rows(LinuxSystem())) == 5


@linux
def test_forking_server_stays_the_only_group_on_its_port(stack: ExitStack) -> None:
    """Between fork and exec, a child holds all listeners of its parent. It may end a moment later."""
    code = """if True:
        import os, socket
        server = socket.create_server(("127.0.0.1", 0))
        print(server.getsockname()[1], flush=True)
        while True:
            if os.fork() == 0:
                os._exit(0)
            os.wait()
    """
    busy = child(stack, sys.executable, "-IS", "-c", code, stdout=subprocess.PIPE, start_new_session=True)
    assert busy.stdout is not None
    port = int(busy.stdout.readline())
    for _ in range(60):
        table = LinuxSystem().process_table({port})
        (listener,) = table.on("127.0.0.1", port)
        assert busy.pid in listener.pids <= {process.pid for process in table.group(busy.pid)}


@pytest.fixture(params=["kernel", "proc"])
def socket_source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the source of sockets. For `proc`, make sock_diag fail with an error of the operating system."""
    if request.param == "proc":
        monkeypatch.setattr(sockets, "_NETLINK_SOCK_DIAG", 99)
        with pytest.raises(OSError):
            sockets.from_kernel(socket.AF_INET, sockets.LISTENING)
    return str(request.param)


@linux
@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_listeners_and_connections_are_the_same_from_both_sources(
    stack: ExitStack, socket_source: str, family: int, address: str
) -> None:
    if family == socket.AF_INET6 and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    port = listen(stack, family, address)
    client = stack.enter_context(socket.create_connection((address, port)))
    own = client.getsockname()[1]
    inode = os.fstat(client.fileno()).st_ino
    assert [(each.address, each.port) for each in sockets.tcp(sockets.LISTENING) if each.port == port] == [
        (address, port)
    ]
    ends = {each.port: each for each in sockets.tcp(sockets.CONNECTED) if {each.port, each.remote[1]} == {port, own}}
    assert (ends[own].address, ends[own].remote, ends[own].inode) == (address, (address, port), str(inode))
    assert ends[port].remote == (address, own)
    assert LinuxSystem().connections(port, []) == {(address, own)} and LinuxSystem().connected({port}) == {port}


@both
def test_open_files_are_seen_through_links(system: System, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    paths = [tmp_path / "link" / name for name in ("open", "closed", "gone")]
    paths[1].touch()
    with open(paths[0], "w"):
        assert system.opened(paths) == {paths[0]}
    assert system.opened(paths) == system.opened([]) == frozenset()


@linux
def test_many_sockets_are_read_in_several_messages(stack: ExitStack) -> None:
    ports = {listen(stack, socket.AF_INET, "127.0.0.1") for _ in range(500)}
    listeners = sockets.from_kernel(socket.AF_INET, sockets.LISTENING)
    found = [each.port for each in listeners if each.port in ports and each.address == "127.0.0.1"]
    assert sorted(found) == sorted(ports)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("0.0.0.0", "127.0.0.1", True),
        ("127.0.0.1", "0.0.0.0", True),
        ("::", "127.0.0.1", True),
        ("::", "::1", True),
        ("::1", "127.0.0.1", False),
        ("::1", "0:0:0:0:0:0:0:1", True),
        ("::ffff:127.0.0.1", "127.0.0.1", True),
        ("::ffff:0.0.0.0", "127.0.0.1", True),
    ],
)
def test_equal_or_unspecified_addresses_collide(one: str, other: str, expected: bool) -> None:
    assert collides(one, other) is expected and collides(other, one) is expected


def test_only_colliding_listeners_count() -> None:
    here, there = Listener("127.0.0.1", 8100), Listener("127.0.0.2", 8100)
    table = ProcessTable({}, (here, there, Listener("127.0.0.1", 8101)))
    assert table.on("127.0.0.1", 8100) == (here,)
    assert table.on("0.0.0.0", 8100) == (here, there)


def test_ancestors_end_in_a_circle_of_parents() -> None:
    def process(pid: int, ppid: int) -> Process:
        return Process(pid, ppid, pid, 0, "1", False)

    table = ProcessTable({2: process(2, 3), 3: process(3, 2), 4: process(4, 99)})
    assert [p.pid for p in table.ancestors(2)] == [2, 3]
    assert [p.pid for p in table.ancestors(4)] == [4]
    assert list(table.ancestors(77)) == []


@linux
def test_proc_is_used_where_sock_diag_is_refused(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = {
        listen(stack, socket.AF_INET, "127.0.0.1"),
        listen(stack, socket.AF_INET, "0.0.0.0"),
        listen(stack, socket.AF_INET6, "::1"),
        listen(stack, socket.AF_INET6, "::"),
        listen(stack, socket.AF_INET6, "::ffff:127.0.0.1"),
    }
    asked = LinuxSystem().process_table(ports).listeners

    def refused(family: int, state: int) -> list[tuple[str, int, str]]:
        raise OSError("no such protocol")

    monkeypatch.setattr("mlxops.agent.host.sockets.from_kernel", refused)
    assert len(asked) == len(ports) and all(each.pids == {os.getpid()} for each in asked)
    assert set(LinuxSystem().process_table(ports).listeners) == set(asked)


# -- memory -----------------------------------------------------------------------------------------------------------

FAMILY = """
import mmap, os, sys
size = int(sys.argv[1])
with open(sys.argv[2], "rb") as file:
    weights = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
private = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, size, mmap.PAGESIZE):
    private[at] = 1
child = os.fork()
own = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, size, mmap.PAGESIZE):
    own[at] = 1
for at in range(0, len(weights), mmap.PAGESIZE):
    weights[at]
os.write(1, b"%d\\n" % os.getpid())
sys.stdin.read()
"""
"""Two processes: each reads the same weights and has `size` bytes of its own; `size` more are from before the fork."""


@linux
def test_memory_of_a_family_counts_what_it_shares_once(stack: ExitStack, tmp_path: Path) -> None:
    size = 40 * 1024 * 1024
    weights = tmp_path / "weights"
    weights.write_bytes(os.urandom(size))
    parent = child(stack, sys.executable, "-IS", "-c", FAMILY, str(size), str(weights), stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    system = LinuxSystem()
    single = [system.memory([pid]) or 0 for pid in pids]
    assert all(each == pytest.approx(3 * size, rel=0.15) for each in single)
    # Weights once; the pages from before the fork look private to each process.
    assert system.memory(pids) == pytest.approx(5 * size, rel=0.15)
    # The kernel knows which of them are still shared.
    assert system.shared_memory(pids) == pytest.approx(4 * size, rel=0.15)
    assert system.shared_memory(pids[:1]) == pytest.approx(single[0], rel=0.01)


@linux
def test_large_family_is_not_walked_page_by_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxops.agent.host.system.MAX_WALKED_BYTES", 1)
    pids = [os.getpid(), os.getppid()]
    assert LinuxSystem().shared_memory(pids) == pytest.approx(LinuxSystem().memory(pids), rel=0.01)


@both
def test_host_memory_is_the_machines(system: System) -> None:
    memory = system.host_memory()
    assert memory.total == psutil.virtual_memory().total and memory.in_use is not None
    assert 0 < memory.in_use < memory.total and memory.swap_total == psutil.swap_memory().total
    assert memory.stalled_percent is None or 0 <= memory.stalled_percent <= 100
    unexplained = system.unexplained(())
    assert unexplained is not None and unexplained < memory.in_use


MEMINFO = """MemTotal:       263753480 kB
MemFree:         1936520 kB
MemAvailable:   58120124 kB
AnonPages:     198000000 kB
SwapTotal:       8388604 kB
SwapFree:        8000000 kB
HugePages_Total:       0
"""


def test_memory_of_a_linux_host_is_read_from_its_files(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    memory = linux_memory(tmp_path)
    assert (memory.total, memory.in_use) == (263753480 * 1024, (263753480 - 58120124) * 1024)
    assert (memory.swap_total, memory.swap_used, memory.stalled_percent) == (8388604 * 1024, 388604 * 1024, None)
    assert linux_unexplained(tmp_path, ()) == (263753480 - 58120124 - 198000000) * 1024
    (tmp_path / "pressure").mkdir()
    (tmp_path / "pressure" / "memory").write_text(
        "some avg10=12.34 avg60=1.00 avg300=0.10 total=24207815\nfull avg10=1.00 avg60=0.00 avg300=0.00 total=2133\n"
    )
    (tmp_path / "zoneinfo").write_text("Node 0\n  pagesets\n    cpu: 0\n              count:    1000\n")
    assert linux_memory(tmp_path).stalled_percent == 12.34
    assert linux_unexplained(tmp_path, ()) == (263753480 - 58120124 - 198000000) * 1024 - 1000 * mmap.PAGESIZE


def test_figures_that_an_old_kernel_lacks_are_none(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\n")
    memory = linux_memory(tmp_path)
    assert (memory.total, memory.in_use, memory.swap_used) == (102400, None, None)
    assert linux_unexplained(tmp_path, ()) is None


@linux
def test_time_asleep_is_what_one_clock_counts_alone() -> None:
    """A time namespace moves the clock that goes on while the machine sleeps."""
    code = (
        "from mlxops.agent.host.system import *; print(LinuxSystem().slept_seconds(), PsutilSystem().slept_seconds())"
    )
    argv = ["unshare", "-UrT", "--boottime", "3600", "--fork", sys.executable, "-c", code]
    answer = subprocess.run(argv, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        missing("the right to make a time namespace (unshare -UrT)")
    own = this_system().slept_seconds()
    assert [float(word) - own for word in answer.stdout.split()] == pytest.approx([3600, 3600], abs=1)
