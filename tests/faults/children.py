"""Child processes of the campaign: forks of itself, strace, and the orphans that its faults make.

No other code of the campaign's process waits for children, so every status can be collected here.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tests.lab.world import wait_until

_PR_SET_PTRACER = 0x59616D61
"""<linux/prctl.h>: which process may trace this one, under Yama."""
_statuses: dict[int, int] = {}


def reap() -> None:
    """Collect all children that have ended, including orphans of killed workers."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _statuses[pid] = status


def wait(pid: int, seconds: float) -> int:
    """Return the exit status of a child, negative for a signal. On a timeout, kill it and raise `TimeoutError`."""
    deadline = time.monotonic() + seconds
    while True:
        reap()
        if pid in _statuses:
            return os.waitstatus_to_exitcode(_statuses.pop(pid))
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            raise TimeoutError(f"process {pid} did not end within {seconds:.0f} s")
        time.sleep(0.002)


def fork(body: Callable[[], int], output: Path, *, stopped: bool = False, keep: int = 2) -> int:
    """Fork. The child runs `body` in its own session, and exits with its return value. `stopped`: wait for SIGCONT.

    The child keeps only the descriptors in `keep`.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    # The batch's own answer to SIGTERM is not its forks': until they have theirs, none is delivered.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        _statuses.pop(pid, None)  # of an orphan that had this pid before
        return pid
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (sink, 1), (sink, 2)):
            os.dup2(source, target)
        os.closerange(3, max(3, keep))
        os.closerange(max(3, keep + 1), 1024)
        if stopped:
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
        status = body()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - a fork must never return into the campaign
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def spawn(argv: Sequence[str], output: Path) -> int:
    """Start a program; its output goes to a file."""
    sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        pid = os.posix_spawnp(
            argv[0],
            list(argv),
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, sink, 1), (os.POSIX_SPAWN_DUP2, sink, 2)],
        )
    finally:
        os.close(sink)
    _statuses.pop(pid, None)
    return pid


def traced(pid: int, options: Sequence[str], log: Path) -> int:
    """Attach strace to a stopped fork, and continue the fork. Return strace's pid. Raises `TimeoutError`."""
    until_stopped(pid)
    tracer = spawn(["strace", "-qq", "-s", "65536", "-o", str(log), "-p", str(pid), *options], log.with_suffix(".err"))
    wait_until(lambda: _field(pid, "TracerPid") not in {"0", ""}, 20, "strace to attach")
    os.kill(pid, signal.SIGCONT)
    return tracer


def until_stopped(pid: int) -> None:
    """Wait until a fork has stopped itself."""
    wait_until(lambda: _state(pid) in {"T", "t"}, 20, "the fork to stop")


def end(pids: Iterable[int]) -> None:
    """Kill processes, and wait for their end. A process that is ending has no arguments, and may still listen."""
    doomed = list(pids)
    for pid in doomed:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    wait_until(lambda: not any(map(lives, doomed)), 20, f"the end of {doomed}")


def lives(pid: int) -> bool:
    return _state(pid) not in {"", "Z", "X"}


def _field(pid: int, key: str) -> str:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{key}:")), "")


def _state(pid: int) -> str:
    return _field(pid, "State")[:1]
