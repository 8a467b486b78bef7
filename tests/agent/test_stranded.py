"""Stranded memory: real processes hold real memory, and leave it behind in shared memory or not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from mlxops.agent.context import Context
from mlxops.agent.host.memory import kilobytes
from mlxops.agent.host.system import LinuxSystem
from mlxops.agent.operations import list as list_operation
from mlxops.agent.operations import operation, status
from mlxops.agent.operations.stop import look_for_memory
from mlxops.agent.operations.stop import stop as stop_server
from mlxops.agent.paths import host_paths
from mlxops.agent.serving import stranded
from mlxops.agent.serving.memory import Budget, check_fits, in_use
from mlxops.agent.serving.stranded import expect_return, still_missing
from mlxops.agent.state.store import Store
from mlxops.core.commands.list import List
from mlxops.core.commands.status import Status
from mlxops.core.errors import Busy, Refused
from mlxops.core.memory import Estimate
from mlxops.core.ports import Owner, PortView, State
from mlxops.core.protocol import Event
from mlxops.core.records import Run, Server, Stranded, run_of, stranded_from_wire
from mlxops.core.registry import EMPTY
from mlxops.core.settings import PortRange, Settings
from tests.lab.envelopes import envelope
from tests.lab.ports import free_port

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the memory is left behind in /dev/shm")

MB = 1024 * 1024
GB = 10**9
SIZE = 192 * MB
NOISE = 64 * MB
"""What other programs of this machine may take or free during a test."""

SHARED = Path("/dev/shm")
OWN = f"mlxops-test-{os.getpid()}"


class Alone(LinuxSystem):
    """This machine without the shared memory of other programs: other tests may use it at the same time."""

    def unexplained(self, pids: Collection[int]) -> int | None:
        found = super().unexplained(pids)
        shared = kilobytes((self.root / "meminfo").read_text())["Shmem"]
        own = sum(path.stat().st_blocks * 512 for path in SHARED.glob(f"{OWN}*"))
        return None if found is None else found - shared + own


class Sleepy(Alone):
    """A machine that has slept an hour more at each look."""

    slept = 0.0

    def slept_seconds(self) -> float:
        self.slept += 3600
        return self.slept


HOLDER = """
import mmap, os, sys
kind, size = sys.argv[1], int(sys.argv[2])
if kind == "private":
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
else:
    with open(kind, "w+b") as file:
        file.truncate(size)
        memory = mmap.mmap(file.fileno(), size)
for at in range(0, size, mmap.PAGESIZE):
    memory[at] = 1
print("holds", flush=True)
sys.stdin.read()
"""

Hold = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Start a process that holds `SIZE` bytes: `private`, or in a file of that path."""
    with ExitStack() as stack:

        def start(kind: str) -> subprocess.Popen[str]:
            argv = [sys.executable, "-S", "-c", HOLDER, kind, str(SIZE)]
            child = stack.enter_context(
                subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            stack.callback(child.kill)
            assert child.stdout is not None and child.stdout.readline() == "holds\n"
            return child

        yield start


@pytest.fixture
def leftover() -> Iterator[Path]:
    """A file in memory that outlives the process which fills it."""
    path = SHARED / OWN
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(stranded, "MIN_BYTES", NOISE)
    monkeypatch.setattr(stranded, "RETURN_SECONDS", 0.5)
    made = Store(tmp_path / "state", tmp_path / "registry.json")
    made.create_folders()
    return made


def record_of(child: subprocess.Popen[str]) -> Run:
    process = Alone().process(child.pid)
    assert process is not None
    server = Server(child.pid, process.pgid, "mlx-lm", "m", process.argv, process.start)
    return replace(run_of(server, 8100, Alone().boot_id()), model="m")


def stop(store: Store, child: subprocess.Popen[str], *, between: Callable[[], object] = lambda: None) -> list[str]:
    """Kill a process as a stop does. Return the warnings."""
    notes: list[str] = []
    keep = lambda text, level: notes.append(text) if level == "warning" else None  # noqa: E731
    with expect_return(store, Alone(), record_of(child), keep):
        between()
        child.kill()
        child.wait()
    return notes


def test_memory_that_stays_behind_is_stranded_until_it_returns(store: Store, hold: Hold, leftover: Path) -> None:
    (note,) = stop(store, hold(str(leftover)))
    assert "of memory did not return within" in note and "only a reboot returns it" in note
    found = still_missing(store, Alone())
    assert found is not None and (found.port, found.model) == (8100, "m")
    assert found.size == pytest.approx(SIZE, abs=NOISE)
    leftover.unlink()
    assert still_missing(store, Alone()) is None


def test_memory_that_returns_is_not_stranded(store: Store, hold: Hold, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stranded, "RETURN_SECONDS", 60.0)
    began = time.monotonic()
    assert stop(store, hold("private")) == []
    assert time.monotonic() - began < 30, "once it is available, nothing more is waited for"
    assert not store.stranded_path.exists()


def test_memory_that_another_process_takes_is_not_stranded(store: Store, hold: Hold) -> None:
    assert stop(store, hold("private"), between=lambda: hold("private")) == []


def test_second_stop_adds_only_what_is_still_missing(store: Store, hold: Hold, leftover: Path) -> None:
    other = leftover.with_name(f"{leftover.name}-other")
    try:
        stop(store, hold(str(leftover)))
        stop(store, hold(str(other)))
        both = still_missing(store, Alone())
        assert both is not None and both.size == pytest.approx(2 * SIZE, abs=2 * NOISE)
        leftover.unlink()
        one = still_missing(store, Alone())
        assert one is not None and one.size == pytest.approx(SIZE, abs=NOISE)
        stop(store, hold(str(leftover)))
        again = still_missing(store, Alone())
        assert again is not None and again.size == pytest.approx(2 * SIZE, abs=2 * NOISE)
    finally:
        other.unlink(missing_ok=True)


def test_stop_that_fails_claims_nothing(store: Store, hold: Hold, leftover: Path) -> None:
    child = hold(str(leftover))
    with (
        pytest.raises(Refused),
        expect_return(store, Alone(), record_of(child), lambda text, level: None),
    ):
        raise Refused("not_ours", "it is not signalled")
    assert not store.stranded_path.exists()


@pytest.mark.parametrize("command", ["unload", "reconcile"])
def test_server_that_ends_after_its_stop_gave_up_is_looked_for(
    tmp_path: Path, store: Store, hold: Hold, leftover: Path, command: str
) -> None:
    child = hold(str(leftover))
    run = replace(record_of(child), port=2)
    with pytest.raises(Busy), expect_return(store, Alone(), run, lambda text, level: None) as seen:
        store.save_run(replace(seen, stopped_by="unload", stopping_since="now"))
        raise Busy("still_ending", "it has not ended yet")
    child.kill()
    child.wait()
    events: list[Event] = []
    args = {"port": "2"} if command == "unload" else {}
    ctx = replace(context(tmp_path, store, command, args), emit=events.append, operation="op")
    operation(command)(ctx, ctx.request)
    assert "of memory did not return within" in str(events)
    found = still_missing(store, Alone())
    assert found is not None and (found.port, found.model) == (2, "m") and store.run(2) is None
    assert found.size == pytest.approx(SIZE, abs=NOISE)


def test_memory_is_looked_for_once(tmp_path: Path, store: Store, hold: Hold, leftover: Path) -> None:
    child = hold(str(leftover))
    with expect_return(store, Alone(), replace(record_of(child), port=2), print) as seen:
        store.save_run(seen)
        child.kill()
        child.wait()
        leftover.unlink()
    events: list[Event] = []
    ctx = replace(context(tmp_path, store, "unload", {}), emit=events.append)
    look_for_memory(ctx, 2)
    assert events == [] and store.run(2) == replace(seen, held_bytes=None, unexplained_bytes=None)


def test_second_stop_keeps_the_look_of_the_first(store: Store, hold: Hold) -> None:
    run = replace(record_of(hold("private")), held_bytes=300 * GB, unexplained_bytes=-5)
    with pytest.raises(Busy), expect_return(store, Alone(), run, print) as seen:
        assert seen == run
        raise Busy("still_ending", "it has not ended yet")


class Blind(Alone):
    """A system that cannot measure the memory in use."""

    def unexplained(self, pids: Collection[int]) -> int | None:
        return None


def test_nothing_is_claimed_or_refused_if_memory_cannot_be_measured(store: Store, hold: Hold, leftover: Path) -> None:
    child = hold(str(leftover))
    with expect_return(store, Blind(), record_of(child), print):
        child.kill()
    assert not store.stranded_path.exists()
    store.save_stranded(Stranded(Alone().boot_id(), GB, 0, 8100, "m", "now"))
    assert still_missing(store, Blind()) is None


def test_nothing_is_claimed_if_the_host_has_slept(store: Store, hold: Hold, leftover: Path) -> None:
    child = hold(str(leftover))
    with expect_return(store, Sleepy(), record_of(child), print) as seen:
        child.kill()
    assert seen.slept_seconds == 3600 and not store.stranded_path.exists()


def test_record_of_an_earlier_boot_is_ignored(store: Store) -> None:
    store.save_stranded(Stranded("another boot", GB, -(10**15), 8100, "m", "now"))
    assert still_missing(store, Alone()) is None


def test_time_to_return_grows_with_the_size() -> None:
    assert [stranded.return_seconds(size * GB) for size in (0, 148, 400)] == [10, 47, 110]


@pytest.mark.parametrize(
    "change",
    [
        {"size": "1"},
        {"size": True},
        {"size": 10**400},
        {"baseline": -(2**63) - 1},
        {"port": None},
        {"model": 5},
        {"boot_id": None},
        {"stopped_at": []},
    ],
)
def test_record_with_a_wrong_field_is_refused(change: dict[str, object]) -> None:
    record = Stranded("boot", 5, -6, 8100, "m", "now")
    assert stranded_from_wire({**record.to_wire(), "later": "field"}) == record
    with pytest.raises(ValueError):
        stranded_from_wire({**record.to_wire(), **change})


def test_stopping_a_server_records_what_it_leaves_behind(tmp_path: Path, store: Store, leftover: Path) -> None:
    """The stop path itself, from the signal to the record."""
    argv = (sys.executable, "-S", "-c", HOLDER, str(leftover), str(SIZE))
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as child:
        assert child.stdout is not None and child.stdout.readline() == b"holds\n"
        process = Alone().process(child.pid)
        assert process is not None
        server = Server(child.pid, process.pgid, "mlx-lm", "m", argv, process.start)
        view = PortView(free_port(), None, State.READY, Owner.HAND, "m", pid=child.pid, server=server)
        reaper = threading.Thread(target=child.wait)
        reaper.start()
        stop_server(context(tmp_path, store, "unload"), view)
        reaper.join()
    found = still_missing(store, Alone())
    assert found is not None and (found.port, found.model) == (view.port, "m")
    assert found.size == pytest.approx(SIZE, abs=NOISE)


# -- where it shows ---------------------------------------------------------------------------------------------------


def context(tmp_path: Path, store: Store, command: str, args: Mapping[str, object] = MappingProxyType({})) -> Context:
    settings = Settings(
        state=str(store.state), registry=str(store.registry.path), hub=str(tmp_path), ports=PortRange(1, 2)
    )
    paths = host_paths(settings, {"HOME": str(tmp_path)})
    request = envelope(command, dict(args), settings, "").request
    return Context(request, paths, store, Alone(), lambda event: None, {})


@pytest.fixture
def record(store: Store) -> Stranded:
    """A record of 100 GB that are still missing: the baseline is that much below what no process explains now."""
    system = Alone()
    now = system.unexplained(())
    assert now is not None
    made = Stranded(system.boot_id(), 100 * GB, now - 101 * GB, 8101, "big", "2026-01-02T03:04:05Z")
    store.save_stranded(made)
    return made


def test_status_reports_stranded_memory(tmp_path: Path, store: Store, record: Stranded) -> None:
    result = status.run(context(tmp_path, store, "status"), Status())
    (found,) = [each for each in result.drift if each.code == "memory_stranded"]
    assert found.message == ("100 GB of memory did not return; big on 8101 was stopped last, at 2026-01-02T03:04:05Z")
    assert found.hint.startswith("only a reboot returns it") and found.commands


def test_list_shows_stranded_memory_as_in_use(tmp_path: Path, store: Store, record: Stranded) -> None:
    result = list_operation.run(context(tmp_path, store, "list"), List(memory=True))
    assert result.memory is not None and result.memory.stranded_bytes == 100 * GB
    (found,) = [use for use in result.memory.servers if use.owner == "stranded"]
    assert (found.port, found.counted_bytes) == (None, 100 * GB)
    assert result.memory.left_bytes <= result.memory.budget_bytes - 100 * GB


def test_load_that_needs_stranded_memory_is_refused(tmp_path: Path, store: Store, record: Stranded) -> None:
    ctx = context(tmp_path, store, "status")
    uses = [use for use in in_use(ctx.observe(EMPTY), ctx.system, {}) if use.owner == "stranded"]
    need = Estimate(30 * GB, GB, 32768)
    check_fits("new", need, Budget(140 * GB, "test"), uses, (), ())
    with pytest.raises(Refused) as caught:
        check_fits("new", need, Budget(120 * GB, "test"), uses, (), ())
    assert "100 GB of stranded memory, which only a reboot returns" in caught.value.why
    assert "reboot the host" in caught.value.hint and "--overcommit" in caught.value.hint


def test_damaged_record_is_drift_and_refuses_nothing(tmp_path: Path, store: Store) -> None:
    store.stranded_path.write_text('{"size": "much"}')
    ctx = context(tmp_path, store, "status")
    result = status.run(ctx, Status())
    (found,) = [each for each in result.drift if each.code == "state_unreadable"]
    assert str(store.stranded_path) in found.message
    assert all(use.owner != "stranded" for use in in_use(ctx.observe(EMPTY), ctx.system, {}))


def test_stop_after_a_damaged_record_writes_a_new_one(store: Store, hold: Hold, leftover: Path) -> None:
    store.stranded_path.write_text("{")
    stop(store, hold(str(leftover)))
    found = still_missing(store, Alone())
    assert found is not None and replace(found, size=0, baseline=0, stopped_at="") == Stranded(
        Alone().boot_id(), 0, 0, 8100, "m", ""
    )
