"""`doctor --report`: try what the code assumes about the system, with processes and files of its own.

Each trial starts its own small programs and ends them; nothing of mlxops or of the user is touched. A trial returns
figures for the report. It raises `AssertionError` if the assumption is wrong, `Untried` if this system has no such
thing. Run on Linux by the tests; made for macOS.
"""

from __future__ import annotations

import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from mlxops.agent.context import Context
from mlxops.agent.host import health
from mlxops.agent.host.memory import HostMemory
from mlxops.agent.host.programs import MARK
from mlxops.agent.service.managers import ABSENT, NO_DOMAIN, ask_manager, which
from mlxops.agent.state.locks import flock_within
from mlxops.common.anonymous import anonymous
from mlxops.core import boot_jobs
from mlxops.core.doctor.assumptions import Assumption, Trial, Verdict
from mlxops.core.doctor.incidents import incident
from mlxops.core.protocol import Phase
from mlxops.core.text import amount

WAIT_SECONDS = 10.0
START_SECONDS = 20.0
"""For a program to touch 1 GB on a busy machine."""
RETURN_SECONDS = 25.0
"""A virtual machine may take ten seconds."""
TRIAL_SECONDS = 90.0
MAX_OUTPUT = 100_000
TOUCHED = 200_000_000
HEAVY = 1_000_000_000
TOLERANCE = 0.8
_SLEEP = "import time; print('up', flush=True); time.sleep(600)"
_HOLD = (
    "import mmap, sys, time; size = int(sys.argv[1]); held = mmap.mmap(-1, size)\n"
    "held[::4096] = b'x' * len(range(0, size, 4096)); print('up', flush=True); time.sleep(600)"
)
_LISTEN = (
    "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)\n"
    "held = [s.accept() for _ in range(1)]; time.sleep(600)"
)
_SERVE = (
    "import http.server, mmap, sys; size = int(sys.argv[1]); held = mmap.mmap(-1, size)\n"
    "held[::4096] = b'x' * len(range(0, size, 4096))\n"
    "server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), http.server.BaseHTTPRequestHandler)\n"
    "print(server.server_address[1], flush=True)\n"
    "try: server.serve_forever()\n"
    "except KeyboardInterrupt: server.server_close()"
)
"""Ends as mlx-lm does: at SIGINT it closes its socket, at SIGTERM it just ends."""
_IGNORE = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + _SLEEP
_METAL = (
    "from ctypes import CDLL, CFUNCTYPE, c_char_p, c_uint64, c_void_p\n"
    "frameworks = '/System/Library/Frameworks/{0}.framework/{0}'\n"
    "graphics, metal = (CDLL(frameworks.format(name)) for name in ('CoreGraphics', 'Metal'))\n"
    "objc = CDLL('/usr/lib/libobjc.A.dylib')\n"
    "selector = CFUNCTYPE(c_void_p, c_char_p)(('sel_registerName', objc))(b'recommendedMaxWorkingSetSize')\n"
    "device = CFUNCTYPE(c_void_p)(('MTLCreateSystemDefaultDevice', metal))()\n"
    "print(CFUNCTYPE(c_uint64, c_void_p, c_void_p)(('objc_msgSend', objc))(device, selector), flush=True)"
)
"""Asks Metal in a process of its own: a wrong call into its library would end the agent."""
_FORK = "import os, time\nif os.fork(): print('up', flush=True)\ntime.sleep(600)"
Trying = Callable[[Context], str]


class Untried(Exception):
    """This system has no such thing. The message says what is missing."""


def try_all(ctx: Context) -> tuple[Trial, ...]:
    """Make the trials, one after the other: they measure memory and time. Say which kind of thing is tried."""
    trials, kind = [], ""
    for number, assumption in enumerate(Assumption, 1):
        trying = TRIALS.get(assumption)
        if trying and kind != (kind := assumption.value.partition(".")[0]):
            ctx.emit(Phase("trial", f"{kind} ({number} of {len(TRIALS)})"))
        verdict, detail = _within_time(ctx, trying) if trying else (Verdict.UNTRIED, "")
        trials.append(Trial(assumption.value, verdict, detail))
    return tuple(trials)


def _within_time(ctx: Context, trying: Trying) -> tuple[Verdict, str]:
    """Make a trial in a thread, and send heartbeats. One that hangs keeps its thread until the agent ends."""
    outcome: list[tuple[Verdict, str]] = []
    thread = threading.Thread(target=lambda: outcome.append(_outcome(ctx, trying)), daemon=True)
    thread.start()
    deadline = time.monotonic() + TRIAL_SECONDS
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(0.5)
        ctx.beat()
    return outcome[0] if outcome else (Verdict.FAIL, f"it took longer than {TRIAL_SECONDS:.0f} s")


def _outcome(ctx: Context, trying: Trying) -> tuple[Verdict, str]:
    """Return the verdict, and the details without names. Any failure on an unknown system belongs in the report."""
    try:
        verdict, detail = _tried(ctx, trying)
        return verdict, anonymous(detail)
    except Exception as error:  # noqa: BLE001 - a detail that may have names is not sent
        return Verdict.FAIL, type(error).__name__


def _tried(ctx: Context, trying: Trying) -> tuple[Verdict, str]:
    try:
        return Verdict.PASS, trying(ctx)
    except Untried as missing:
        return Verdict.UNTRIED, str(missing)
    except Exception as error:  # noqa: BLE001 - as above
        return Verdict.FAIL, f"{type(error).__name__}: {error}"


# -- programs of its own ------------------------------------------------------------------------------------------


@contextmanager
def _child(code: str, *arguments: str, env: Mapping[str, str] = {}, cwd: str = "/") -> Iterator[tuple[int, str]]:
    """Run a Python program in a session of its own. Yield its pid and its first line; kill its group at the end."""
    argv = [sys.executable, "-I", "-S", "-c", code, *arguments]
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"PATH": os.defpath, **env},
        cwd=cwd,
        start_new_session=True,
    )
    try:
        yield process.pid, _first_lines(process, 1)[0]
    finally:
        _end(process)


def _first_lines(process: subprocess.Popen[bytes], count: int) -> list[str]:
    """Return the first lines of a program's output. Raises `AssertionError` if they do not come, or are endless."""
    assert process.stdout is not None
    deadline, text = time.monotonic() + START_SECONDS, b""
    while text.count(b"\n") < count:
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"it printed no line within {START_SECONDS:.0f} s"
        more = os.read(process.stdout.fileno(), 4096)
        assert more, f"it ended with {process.wait(WAIT_SECONDS)}"
        text += more
        assert len(text) < MAX_OUTPUT, "its output has no end"
    return [line.decode(errors="replace").strip() for line in text.split(b"\n")[:count]]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the group of a program, also after the program itself has ended, and wait for the program."""
    with process:
        if process.returncode is None:  # until it is waited for, no other group has its number
            with suppress(ProcessLookupError, PermissionError):  # of a group of zombies, macOS says the second
                os.killpg(process.pid, signal.SIGKILL)


def _until(condition: Callable[[], object], what: str, seconds: float = WAIT_SECONDS) -> float:
    """Wait until the condition is true; return the seconds. Raises `AssertionError`."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"{what} takes longer than {seconds:.0f} s"
        time.sleep(0.02)
    return time.monotonic() - started


def _equal(found: object, wanted: object) -> None:
    assert found == wanted, f"found {found!r}, not {wanted!r}"


# -- processes ----------------------------------------------------------------------------------------------------


def _process_seen(ctx: Context) -> str:
    with _child(_SLEEP) as (pid, _):
        seen = ctx.system.process_table(()).processes[pid]
        _equal((seen.ppid, seen.uid, seen.zombie), (os.getpid(), os.getuid(), False))
    return ""


def _process_argv(ctx: Context) -> str:
    with _child(_SLEEP, "two words", "", "naïve") as (pid, _):
        seen = ctx.system.process(pid)
        assert seen is not None
        _equal(seen.argv[-3:], ("two words", "", "naïve"))
    return ""


def _process_start(ctx: Context) -> str:
    with _child(_SLEEP) as (first, _):
        time.sleep(0.05)
        with _child(_SLEEP) as (second, _):
            starts = [process.start for pid in (first, first, second) if (process := ctx.system.process(pid))]
    _equal(starts[0], starts[1])
    assert starts[0] != starts[2], f"both started at {starts[0]}"
    return f"for example {starts[0]}"


def _process_environment(ctx: Context) -> str:
    with _child(_SLEEP, env={MARK: "trial"}) as (pid, _):
        _equal(ctx.system.environment(pid, MARK), "trial")
    return ""


def _process_folder(ctx: Context) -> str:
    with tempfile.TemporaryDirectory() as folder, _child(_SLEEP, cwd=folder) as (pid, _):
        found = ctx.system.folder(pid)
        _equal(found and os.path.realpath(found), os.path.realpath(folder))
    return ""


def _process_group(ctx: Context) -> str:
    with _child(_FORK) as (pid, _):
        _until(lambda: len(ctx.system.process_table(()).group(pid)) == 2, "a group of two")
    return ""


def _process_zombie(ctx: Context) -> str:
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", ""])
    try:
        took = _until(lambda: (seen := ctx.system.process(process.pid)) and seen.zombie, "a zombie")
    finally:
        process.wait()
    return f"{took:.2f} s"


def _process_gone(ctx: Context) -> str:
    with _child(_SLEEP) as (pid, _):
        pass
    _equal(ctx.system.process(pid), None)
    return ""


def _boot_id(ctx: Context) -> str:
    _equal(ctx.system.boot_id(), ctx.system.boot_id())
    assert ctx.system.boot_id(), "it is empty"
    return f"{len(ctx.system.boot_id())} characters"


def _boot_time(ctx: Context) -> str:
    up = time.time() - ctx.system.booted_at()
    assert up > 0, f"{-up:.0f} s in the future"
    return f"up for {up / 86400:.1f} days"


# -- listeners ----------------------------------------------------------------------------------------------------


def _listener_seen(ctx: Context) -> str:
    with _child(_LISTEN) as (pid, port):
        (found,) = ctx.system.process_table({int(port)}).listeners
        _equal((found.address, found.pids), ("127.0.0.1", frozenset({pid})))
    return "" if ctx.system.sees_all_listeners else "of this user's processes only"


def _listener_ports(ctx: Context) -> str:
    with _child(_LISTEN) as (pid, port):
        _equal(ctx.system.ports_of(pid), frozenset({int(port)}))
    return ""


def _listener_gone(ctx: Context) -> str:
    with _child(_LISTEN) as (_, port):
        pass
    return f"{_until(lambda: not ctx.system.process_table({int(port)}).listeners, 'the end of the listener'):.2f} s"


def _connection_seen(ctx: Context) -> str:
    with _child(_LISTEN) as (pid, port), socket.create_connection(("127.0.0.1", int(port)), 5):
        _until(lambda: int(port) in ctx.system.connected({int(port)}), "the connection")
        assert ctx.system.connections(int(port), [pid]), "its remote end is not seen"
    return ""


# -- memory -------------------------------------------------------------------------------------------------------


def _memory_resident(ctx: Context) -> str:
    with _child(_HOLD, str(TOUCHED)) as (pid, _):
        held = ctx.system.memory([pid])
    assert held is not None, "it is hidden"
    assert held > TOUCHED * TOLERANCE, f"{amount(held)} of {amount(TOUCHED)}"
    return f"{amount(held)} for {amount(TOUCHED)} touched"


def _memory_footprint(ctx: Context) -> str:
    if sys.platform != "darwin":
        raise Untried("this is not a Mac")
    return _memory_resident(ctx)


def _memory_available(ctx: Context) -> str:
    free = ctx.system.available()
    assert free is not None, "it is not known"
    return amount(free)


def _memory_returned(ctx: Context) -> str:
    before = ctx.system.available()
    if before is None or before < 3 * HEAVY:
        raise Untried("there is too little free memory for it")
    with _child(_HOLD, str(HEAVY)):
        during = ctx.system.available() or 0
    # Other programs take and return memory, too: half of it is enough.
    returned = lambda: (ctx.system.available() or 0) > during + HEAVY / 2  # noqa: E731
    took = _until(returned, "the return of its memory", RETURN_SECONDS)
    return f"{amount(HEAVY)} in {took:.2f} s"


def _memory_in_use(ctx: Context) -> str:
    before = ctx.system.host_memory()
    if before.in_use is None or before.total - before.in_use < 3 * HEAVY:
        raise Untried("there is too little free memory for it")
    wanted = before.in_use + HEAVY / 2  # other programs take and return memory, too
    with _child(_HOLD, str(HEAVY)):
        _until(lambda: (ctx.system.host_memory().in_use or 0) > wanted, f"{amount(HEAVY)} more", RETURN_SECONDS)
    return f"{amount(before.in_use)} before {amount(HEAVY)} were touched"


def _memory_unexplained(ctx: Context) -> str:
    """Every claim of stranded memory compares two of these figures."""
    before = ctx.system.unexplained(())
    free = ctx.system.available()
    if before is None or free is None or free < 3 * HEAVY:
        raise Untried("it is not known" if before is None else "there is too little free memory for it")
    with _child(_HOLD, str(HEAVY)) as (pid, _):
        during = _change(ctx, before, [pid])
    after = _change(ctx, before, [])
    return f"{amount(before)}; changes by {during / 1e6:.0f} MB while it runs, by {after / 1e6:.0f} MB after it"


def _change(ctx: Context, before: int, pids: list[int]) -> int:
    """Wait until less than half of what the process touched is unexplained. Return the change."""
    seen = [0]

    def is_explained() -> bool:
        seen[0] = (ctx.system.unexplained(pids) or 0) - before
        return abs(seen[0]) < HEAVY / 2

    _until(is_explained, f"until {amount(HEAVY)} of a process are explained", RETURN_SECONDS)
    return seen[0]


def _memory_statistics(ctx: Context) -> str:
    if sys.platform != "darwin":
        raise Untried("this is not a Mac")
    from mlxops.agent.host import darwin

    statistics = darwin.vm_statistics()
    assert statistics is not None, "host_statistics64 failed"
    sizes = darwin.page_bytes(statistics, os.sysconf("SC_PAGE_SIZE"))
    assert all(sizes[:2]), "nothing is wired, or nothing is internal"
    names = ("wired", "internal", "compressed")
    return ", ".join(f"{name} {amount(size)}" for name, size in zip(names, sizes, strict=True))


def _memory_wired(ctx: Context) -> str:
    if sys.platform != "darwin":
        raise Untried("this is not a Mac")
    memory = ctx.system.host_memory()
    assert memory.wired is not None, "it cannot be read"
    assert 0 < memory.wired < memory.total, f"{amount(memory.wired)} of {amount(memory.total)}"
    return f"{amount(memory.wired)} of {amount(memory.total)}"


def _gpu_default(ctx: Context) -> str:
    if sys.platform != "darwin":
        raise Untried("this is not a Mac")
    from mlxops.agent.host import darwin

    memory = ctx.system.host_memory()
    if memory.gpu_limit_set:
        raise Untried("a limit is set (iogpu.wired_limit_mb)")
    with _child(_METAL) as (_, line):
        assert line.isdecimal() and int(line), "Metal did not say"
    expected, found = darwin.default_gpu_limit(memory.total), int(line)
    figures = f"Metal allows {amount(found)}, the code takes {amount(expected)}, of {amount(memory.total)}"
    assert found > expected * 0.99, figures
    return figures


def _host_memory(read: Callable[[HostMemory], object]) -> Trying:
    def trying(ctx: Context) -> str:
        if sys.platform != "darwin":
            raise Untried("this is not a Mac")
        value = read(ctx.system.host_memory())
        assert value is not None, "it cannot be read"
        return str(value)

    return trying


# -- launchd ------------------------------------------------------------------------------------------------------


def _launchctl(ctx: Context, *arguments: str) -> subprocess.CompletedProcess[str]:
    if which("launchctl", ctx.environ) is None:
        raise Untried("there is no launchctl")
    return ask_manager(ctx.environ, "launchctl", *arguments)


def _launchctl_absent(ctx: Context) -> str:
    _equal(_launchctl(ctx, "print", "system/io.mlxops.no-such-job").returncode, ABSENT)
    return ""


def _launchctl_print(ctx: Context) -> str:
    done = _launchctl(ctx, "print", "system/com.apple.powerd")
    _equal(done.returncode, 0)
    job = boot_jobs.launched(done.stdout)
    assert job.active and job.path, f"read as state {job.state!r}, path {job.path!r}"
    return job.state


def _launchctl_disabled(ctx: Context) -> str:
    done = _launchctl(ctx, "print-disabled", f"user/{os.getuid()}")
    _equal(done.returncode, 0)
    labels = re.findall(r'^\s*"([^"]+)" => (\w+)', done.stdout, re.MULTILINE)
    assert all(boot_jobs.is_disabled(done.stdout, label) is not None for label, _ in labels)
    return f"{len(labels)} labels; words: {', '.join(sorted({word for _, word in labels})) or 'none'}"


def _launchctl_gui(ctx: Context) -> str:
    status = _launchctl(ctx, "print", f"gui/{os.getuid()}").returncode
    assert status in (0, NO_DOMAIN), f"it ended with {status}"
    return "a user is logged in" if status == 0 else "no user is logged in"


# -- stopping -----------------------------------------------------------------------------------------------------


def _ends_at(ctx: Context, signal_number: int, *arguments: str) -> str:
    with _child(*(arguments or (_SLEEP,))) as (pid, _):
        os.killpg(pid, signal_number)
        took = _until(lambda: not ctx.system.process_table(()).group(pid), "its end")
    return f"{took:.2f} s"


def _stop_int(ctx: Context) -> str:
    return _ends_at(ctx, signal.SIGINT)


def _stop_ignored(ctx: Context) -> str:
    with _child(_IGNORE) as (deaf, _), _child(_SLEEP) as (other, _):
        if sys.platform != "darwin":
            _equal((ctx.system.ignores(deaf, signal.SIGINT), ctx.system.ignores(other, signal.SIGINT)), (True, False))
            return "it is seen"
        _equal(ctx.system.ignores(deaf, signal.SIGINT), False)
        shown = subprocess.run(
            ["/bin/ps", "-o", "sigignore=", "-p", str(deaf)], capture_output=True, text=True, timeout=5, check=False
        ).stdout.strip()
    # A figure with the bit of SIGINT means that the code could see it.
    mask = int(shown, 16) if re.fullmatch(r"(0x)?[0-9a-fA-F]+", shown) else 0
    assert not mask >> (signal.SIGINT - 1) & 1, f"ps shows it: {shown}"
    return f"ps shows {shown or 'nothing'}"


def _stop_server(signal_number: int) -> Trying:
    def trying(ctx: Context) -> str:
        with _child(_SERVE, str(HEAVY)) as (pid, port), socket.create_connection(("127.0.0.1", int(port)), 5):
            _until(lambda: int(port) in ctx.system.connected({int(port)}), "the connection")
            os.kill(pid, signal_number)
            took = _until(lambda: not ctx.system.process_table(()).group(pid), "its end")
        return f"{took:.2f} s"

    return trying


def _stop_kill(ctx: Context) -> str:
    return _ends_at(ctx, signal.SIGKILL, _HOLD, str(HEAVY))


def _stop_background(ctx: Context) -> str:
    script = f"{shlex.join([sys.executable, '-I', '-S', '-c', _SLEEP])} & echo $!"
    argv = ["/bin/sh", "-c", script]
    shell = subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        return _signalled(ctx, shell)
    finally:
        _end(shell)


def _signalled(ctx: Context, shell: subprocess.Popen[bytes]) -> str:
    (pid,) = (int(line) for line in _first_lines(shell, 2) if line.isdecimal())
    os.kill(pid, signal.SIGINT)
    time.sleep(0.3)
    seen = ctx.system.process(pid)
    assert seen is not None and not seen.zombie, "it ended at SIGINT"
    os.kill(pid, signal.SIGTERM)
    took = _until(lambda: (left := ctx.system.process(pid)) is None or left.zombie, "its end at SIGTERM")
    return f"{took:.2f} s after SIGTERM"


# -- files --------------------------------------------------------------------------------------------------------


@contextmanager
def _scratch() -> Iterator[Path]:
    """Yield a temporary folder. On a Mac it is on the same disk as the state folder."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _files_flush(ctx: Context) -> str:
    import fcntl

    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is None:
        raise Untried("this system has no F_FULLFSYNC")
    with _scratch() as folder, open(folder / "file", "wb") as file:
        file.write(b"x" * 4096)
        file.flush()
        started = time.monotonic()
        fcntl.fcntl(file.fileno(), full)
        return f"{(time.monotonic() - started) * 1000:.1f} ms"


def _files_lock(ctx: Context) -> str:
    code = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print('up', flush=True)"
    with _scratch() as folder, open(folder / "lock", "wb") as file:
        with _child(f"{code}; time.sleep(600)", str(folder / "lock")):
            assert not flock_within(file.fileno(), 0.2), "two processes held it"
        assert flock_within(file.fileno(), WAIT_SECONDS), "it stayed when its holder was gone"
    return ""


def _files_rename(ctx: Context) -> str:
    with _scratch() as folder:
        (folder / "new").write_text("new")
        (folder / "old").write_text("old")
        os.replace(folder / "new", folder / "old")
        _equal((folder / "old").read_text(), "new")
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return ""


# -- power and reports --------------------------------------------------------------------------------------------


def _power_pmset(ctx: Context) -> str:
    text = health.output_of(ctx.environ, "pmset", "-g")
    if not text:
        raise Untried("there is no pmset")
    settings = dict(re.findall(r"^ *(sleep|autorestart) +(\d+)", text, re.MULTILINE))
    assert "sleep" in settings, "it shows no sleep"
    return ", ".join(f"{key} {value}" for key, value in sorted(settings.items()))


def _power_filevault(ctx: Context) -> str:
    text = health.output_of(ctx.environ, "fdesetup", "status")
    if not text:
        raise Untried("there is no fdesetup")
    assert text.startswith(("FileVault is On", "FileVault is Off")), f"it says {text.splitlines()[0]!r}"
    return text.splitlines()[0]


def _reports_readable(ctx: Context) -> str:
    folders = [folder for folder in health.report_folders(ctx.environ) if folder.is_dir()]
    if not folders:
        raise Untried("there is no such folder")
    paths = list(health.recent_reports(tuple(folders)))
    for path in paths:
        incident(path.name, health.read_report(path))
    return f"{len(paths)} of the last {health.REPORT_DAYS} days"


TRIALS: dict[Assumption, Trying] = {
    Assumption.PROCESS_SEEN: _process_seen,
    Assumption.PROCESS_ARGV: _process_argv,
    Assumption.PROCESS_START: _process_start,
    Assumption.PROCESS_ENVIRONMENT: _process_environment,
    Assumption.PROCESS_FOLDER: _process_folder,
    Assumption.PROCESS_GROUP: _process_group,
    Assumption.PROCESS_ZOMBIE: _process_zombie,
    Assumption.PROCESS_GONE: _process_gone,
    Assumption.BOOT_ID: _boot_id,
    Assumption.BOOT_TIME: _boot_time,
    Assumption.LISTENER_SEEN: _listener_seen,
    Assumption.LISTENER_PORTS: _listener_ports,
    Assumption.LISTENER_GONE: _listener_gone,
    Assumption.CONNECTION_SEEN: _connection_seen,
    Assumption.MEMORY_RESIDENT: _memory_resident,
    Assumption.MEMORY_FOOTPRINT: _memory_footprint,
    Assumption.MEMORY_AVAILABLE: _memory_available,
    Assumption.MEMORY_RETURNED: _memory_returned,
    Assumption.MEMORY_STATISTICS: _memory_statistics,
    Assumption.MEMORY_IN_USE: _memory_in_use,
    Assumption.MEMORY_WIRED: _memory_wired,
    Assumption.MEMORY_UNEXPLAINED_WIRED: _host_memory(lambda memory: memory.unexplained_wired),
    Assumption.MEMORY_UNEXPLAINED: _memory_unexplained,
    Assumption.GPU_DEFAULT: _gpu_default,
    Assumption.SYSCTL_MEMSIZE: _host_memory(lambda memory: memory.total or None),
    Assumption.SYSCTL_WIRED_LIMIT: _host_memory(lambda memory: memory.gpu_limit),
    Assumption.SYSCTL_PRESSURE: _host_memory(lambda memory: memory.pressure),
    Assumption.SYSCTL_SWAP: _host_memory(lambda memory: memory.swap_used),
    Assumption.LAUNCHCTL_ABSENT: _launchctl_absent,
    Assumption.LAUNCHCTL_PRINT: _launchctl_print,
    Assumption.LAUNCHCTL_DISABLED: _launchctl_disabled,
    Assumption.LAUNCHCTL_GUI: _launchctl_gui,
    Assumption.STOP_INT: _stop_int,
    Assumption.STOP_BACKGROUND: _stop_background,
    Assumption.STOP_IGNORED: _stop_ignored,
    Assumption.STOP_SERVER_INT: _stop_server(signal.SIGINT),
    Assumption.STOP_SERVER_TERM: _stop_server(signal.SIGTERM),
    Assumption.STOP_KILL: _stop_kill,
    Assumption.FILES_FLUSH: _files_flush,
    Assumption.FILES_LOCK: _files_lock,
    Assumption.FILES_RENAME: _files_rename,
    Assumption.POWER_PMSET: _power_pmset,
    Assumption.POWER_FILEVAULT: _power_filevault,
    Assumption.REPORTS_READABLE: _reports_readable,
}
"""`DEMO` needs the clone: the control node tries it."""
