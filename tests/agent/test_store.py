"""The state folder and the registry's file: atomic durable writes, one writer at a time, locks that do not outlive
their holder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from mlxops.agent import install
from mlxops.agent.state import durable_files, locks
from mlxops.agent.state import store as stores
from mlxops.agent.state.durable_files import write_durably
from mlxops.agent.state.operation_log import OperationLog
from mlxops.agent.state.registry_file import RegistryFile
from mlxops.agent.state.store import Lock, Store
from mlxops.core.errors import Busy, MlxopsError, Refused
from mlxops.core.protocol import Done
from mlxops.core.records import Operation
from mlxops.core.registry import Registry, parse
from mlxops.core.settings import Settings
from tests.core.worlds import run
from tests.lab.sshd import missing
from tests.lab.world import wait_until

CONTENT = b'{"version": 1, "models": {"a": {"repo_id": "org/a", "port": 8100, "mine": [1]}}, "kept": true}'
ME = Operation("op1", "load", "a", 8100, "me@mini", "2026-01-01T00:00:00Z", "org/a")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "state", tmp_path / "hub" / "registry.json")
    made.create_folders()
    made.registry.path.parent.mkdir()
    made.registry.path.write_bytes(CONTENT)
    return made


def move(registry: Registry) -> Registry:
    return registry.assign("b", 8100)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(".tmp"))


PRELUDE = """
import json, os, sys
from pathlib import Path
from mlxops.agent.state.durable_files import write_durably
from mlxops.agent.state.store import Store
from mlxops.core.errors import MlxopsError
from mlxops.core.records import Operation
store = Store(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def program(store: Store, text: str, *args: str, before: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """Start another process with `store` on the same folders."""
    return subprocess.Popen(
        [*before, sys.executable, "-P", "-c", PRELUDE + text, str(store.state), str(store.registry.path), *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "PYTHONDONTWRITEBYTECODE": "1"},
    )


@contextmanager
def ended_after(*processes: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def next_line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline().strip()


# -- one transaction ------------------------------------------------------------------------------------------------


def test_update_writes_the_change_and_keeps_everything_else(store: Store) -> None:
    returned = store.registry.update(move)
    written = json.loads(store.registry.path.read_bytes())
    assert written == returned.raw
    assert written["models"] == {"a": {"repo_id": "org/a", "port": None, "mine": [1]}, "b": {"port": 8100}}
    assert written["kept"] is True


def test_previous_version_is_kept_byte_for_byte(store: Store) -> None:
    store.registry.update(move)
    previous = store.state / "registry.previous.json"
    assert previous.read_bytes() == CONTENT
    assert stat.S_IMODE(previous.stat().st_mode) == 0o600


def test_previous_version_is_a_copy_where_hard_links_fail(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def another_disk(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source), None, str(target))

    monkeypatch.setattr(os, "link", another_disk)
    store.registry.update(move)
    previous = store.state / "registry.previous.json"
    assert previous.read_bytes() == CONTENT and previous.stat().st_nlink == 1
    assert not leftovers(store.state)


def test_update_after_a_killed_update_keeps_the_previous_version(store: Store) -> None:
    """The update was killed after it had linked the backup: both names are one file then."""
    previous = store.state / "registry.previous.json"
    os.link(store.registry.path, previous)
    store.registry.update(move)
    assert previous.read_bytes() == CONTENT
    assert previous.stat().st_ino != store.registry.path.stat().st_ino
    assert not leftovers(store.state)


def test_update_without_a_change_does_not_write(store: Store) -> None:
    before = store.registry.path.stat()
    store.registry.update(lambda registry: registry.assign("a", 8100))
    after = store.registry.path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert not (store.state / "registry.previous.json").exists()


def test_first_update_creates_file_and_folder_without_a_backup(tmp_path: Path) -> None:
    store = Store(tmp_path / "state", tmp_path / "new" / "hub" / "registry.json")
    store.create_folders()
    assert store.registry.read().models == {}
    store.registry.update(move)
    assert parse(store.registry.path.read_bytes()).models["b"].port == 8100
    assert not (store.state / "registry.previous.json").exists()


@pytest.mark.parametrize("mode", [0o644, 0o600, 0o664])
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_update_keeps_the_files_mode_under_any_umask(store: Store, mode: int, umask: int) -> None:
    store.registry.path.chmod(mode)
    before = os.umask(umask)
    try:
        store.registry.update(move)
    finally:
        os.umask(before)
    assert stat.S_IMODE(store.registry.path.stat().st_mode) == mode


def test_update_follows_a_link_and_keeps_it(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "registry.json"
    real.write_bytes(CONTENT)
    link.symlink_to(real)
    store = Store(tmp_path / "state", link)
    store.create_folders()
    store.registry.update(move)
    assert link.is_symlink() and os.readlink(link) == str(real)
    assert parse(real.read_bytes()).models["b"].port == 8100


def test_update_reads_the_file_again(store: Store) -> None:
    store.registry.read()
    store.registry.path.write_bytes(CONTENT.replace(b"8100", b"8105"))
    seen: list[int | None] = []

    def change(registry: Registry) -> Registry:
        seen.append(registry.models["a"].port)
        return move(registry)

    store.registry.update(change)
    assert seen == [8105]


def writers(store: Store) -> tuple[Callable[[], object], ...]:
    return lambda: store.registry.update(move), store.registry.check_writable


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"version": 2, "models": {}, "lanes": {}}', b'{"version": 1, "models": {"a": 1}}']
)
def test_file_that_is_not_version_1_is_never_overwritten(store: Store, content: bytes) -> None:
    store.registry.path.write_bytes(content)
    for write in writers(store):
        with pytest.raises(Refused) as caught:
            write()
        assert caught.value.code == "registry_unusable" and caught.value.why
    assert store.registry.path.read_bytes() == content


def test_failed_change_leaves_no_trace_and_no_lock(store: Store) -> None:
    def fail(registry: Registry) -> Registry:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        store.registry.update(fail)
    assert store.registry.path.read_bytes() == CONTENT
    store.registry.update(move)


def test_folder_in_place_of_the_registry_is_refused_and_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "state", tmp_path / "registry.json")
    store.create_folders()
    store.registry.path.mkdir()
    assert store.registry.read().unwritable
    for write in writers(store):
        with pytest.raises(Refused):
            write()
    assert store.registry.path.is_dir() and not leftovers(tmp_path)


def test_backup_that_cannot_be_written_is_refused_with_its_path(store: Store) -> None:
    previous = store.state / "registry.previous.json"
    previous.mkdir()
    for write in writers(store):
        with pytest.raises(Refused) as caught:
            write()
        assert caught.value.code == "registry_unwritable" and str(previous) in caught.value.message
        assert "move it away" in caught.value.hint
    assert store.registry.path.read_bytes() == CONTENT
    assert not leftovers(store.state) and not leftovers(store.registry.path.parent)


def test_check_writable_changes_nothing(store: Store) -> None:
    before = store.registry.path.stat()
    store.registry.check_writable()
    assert os.listdir(store.registry.path.parent) == ["registry.json"]
    assert store.registry.path.stat().st_mtime_ns == before.st_mtime_ns


def test_update_removes_only_leftovers_of_killed_writers(store: Store) -> None:
    folder = store.registry.path.parent
    (folder / ".registry.json.4711.abcdef01.tmp").write_bytes(b"half")
    for name in (".other.json.1.ab.tmp", "registry.json.tmp", "models--org--a"):
        (folder / name).write_bytes(b"other")
    store.registry.update(move)
    assert sorted(os.listdir(folder)) == [
        ".other.json.1.ab.tmp",
        "models--org--a",
        "registry.json",
        "registry.json.tmp",
    ]


def test_failed_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    (target / "full").mkdir(parents=True)
    with pytest.raises(OSError):
        write_durably(target, b"new")
    assert os.listdir(tmp_path) == ["file"]


def test_update_waits_for_another_programs_lock_for_a_limited_time(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LOCK_SECONDS", 0.05)
    fd = os.open(store.registry.path.parent, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(Busy) as caught:
            store.registry.update(move)
        assert caught.value.code == "registry_locked"
        assert store.registry.read().models["a"].port == 8100, "reading needs no lock"
    finally:
        os.close(fd)
    store.registry.update(move)


# -- many at once ---------------------------------------------------------------------------------------------------

WRITERS, EACH = 8, 25

WRITE_MANY = f"""
for i in range({EACH}):
    store.registry.update(lambda r: r.set_fields(f"m-{{sys.argv[3]}}-{{i}}", {{"n": i}}))
"""


def test_concurrent_writers_lose_no_change_and_readers_see_whole_files(store: Store) -> None:
    writers = [program(store, WRITE_MANY, str(number)) for number in range(WRITERS)]
    counts: list[int] = []
    with ended_after(*writers):
        while any(writer.poll() is None for writer in writers):
            registry = store.registry.read()
            assert registry.unwritable is None
            counts.append(len(registry.models))
        assert [writer.returncode for writer in writers] == [0] * WRITERS
    assert counts == sorted(counts), "no change is ever undone"
    expected = {"a", *(f"m-{number}-{i}" for number in range(WRITERS) for i in range(EACH))}
    assert set(store.registry.read().models) == expected
    assert not leftovers(store.registry.path.parent)


def test_history_of_concurrent_writers_has_whole_lines(store: Store) -> None:
    text = 'for i in range(50): store.append_history(who=sys.argv[3], i=i, text="x" * 500)'
    writers = [program(store, text, str(number)) for number in range(3)]
    with ended_after(*writers):
        assert [writer.wait(30) for writer in writers] == [0, 0, 0]
    lines = [json.loads(line) for line in (store.state / "history.jsonl").read_text().splitlines()]
    assert sorted((line["who"], line["i"]) for line in lines) == [(str(n), i) for n in range(3) for i in range(50)]
    assert all(line["at"].endswith("Z") for line in lines)


def test_history_waits_for_a_line_that_is_being_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first half is not a line that a full disk cut off."""
    history = store.state / "history.jsonl"
    with open(history, "ab", buffering=0) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(b'{"by"')

        def end(seconds: float) -> None:
            other.write(b': "other"}\n')
            other.close()

        monkeypatch.setattr(time, "sleep", end)
        store.append_history(by="me")
    assert [line["by"] for line in store.history()] == ["other", "me"]


def test_wait_for_a_hung_holder_of_the_history_is_limited(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "LOCK_SECONDS", 0.05)
    with open(store.state / "history.jsonl", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another program"):
            store.append_history(by="me")


def test_history_returns_the_whole_lines_of_a_long_files_end(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        store.append_history(n=number)
    line = (store.state / "history.jsonl").stat().st_size // 5
    for size, expected in ((2 * line, [3, 4]), (2 * line + line // 2, [3, 4]), (5 * line, [0, 1, 2, 3, 4])):
        monkeypatch.setattr(stores, "HISTORY_BYTES", size)
        assert [entry["n"] for entry in store.history()] == expected


def test_findings_do_not_push_the_loads_out_of_the_history(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    (store.state / "history.jsonl").write_text('{"command": "measure", "n": 0}\n')  # an older build wrote it there
    store.append_history(command="load", n=1)
    monkeypatch.setattr(stores, "HISTORY_BYTES", 1000)
    for number in range(2, 50):
        store.append_history(command="measure", n=number, rows="x" * 100)
        store.append_history(command="probe", n=number)
    assert [entry["n"] for entry in store.history()] == [0, 1]
    found = [entry["n"] for entry in store.findings("measure")]
    assert found[0] == 0 and found[-1] == 49 and len(found) < 10
    assert {entry["command"] for entry in store.findings("probe")} == {"probe"}


# -- disk errors ---------------------------------------------------------------------------------------------------


def answers_of(process: subprocess.Popen[bytes]) -> dict[str, str]:
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    answers = json.loads(out)
    assert isinstance(answers, dict)
    return answers


TRY = """
def attempt(what):
    try:
        what()
        return "done"
    except MlxopsError as error:
        return error.code
def content():
    return Path(sys.argv[2]).read_text()
"""


def test_file_size_limit_is_reported_and_the_old_content_stays(store: Store) -> None:
    text = f"""{TRY}
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))
print(json.dumps({{
    "update": attempt(lambda: store.registry.update(lambda r: r.assign("b", 8100))),
    "check": attempt(store.registry.check_writable),
}}))
"""
    answers = answers_of(program(store, text))
    assert answers == {"update": "registry_unwritable", "check": "registry_unwritable"}
    assert store.registry.path.read_bytes() == CONTENT
    assert not leftovers(store.registry.path.parent) and not leftovers(store.state)
    store.registry.update(move)


def mounted(store: Store, mount: str, text: str) -> dict[str, str]:
    """Run `text` in a process in whose mount namespace `mount` has been run."""
    if sys.platform != "linux":
        pytest.skip("only Linux has mount namespaces")
    own = ["unshare", "-Urm", "sh", "-c"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*own, "mount -t tmpfs t /mnt"], check=False, capture_output=True).returncode
    ):
        missing("the right to make a mount namespace (unshare -Urm)")
    folder = store.registry.path.parent
    return answers_of(
        program(store, TRY + text, before=["env", f"FOLDER={folder}", *own, f'{mount} && exec "$@"', "sh"])
    )


def test_full_disk_is_reported_and_the_old_content_stays(store: Store) -> None:
    text = """
Path(sys.argv[2]).write_text('{"version": 1, "models": {}}')
with open(Path(sys.argv[2]).with_name("filler"), "wb", buffering=0) as file:
    try:
        while True:
            file.write(b"x" * 4096)
    except OSError:
        pass
print(json.dumps({
    "check": attempt(store.registry.check_writable),
    "update": attempt(lambda: store.registry.update(lambda r: r.assign("b", 8100))),
    "content": content(),
    "files": ",".join(sorted(os.listdir(os.path.dirname(sys.argv[2])))),
    "freed": attempt(Path(sys.argv[2]).with_name("filler").unlink),
    "again": attempt(lambda: store.registry.update(lambda r: r.assign("b", 8100))),
}))
"""
    assert mounted(store, 'mount -t tmpfs -o size=64k t "$FOLDER"', text) == {
        "check": "registry_unwritable",
        "update": "registry_unwritable",
        "content": '{"version": 1, "models": {}}',
        "files": "filler,registry.json",
        "freed": "done",
        "again": "done",
    }


def test_read_only_registry_can_be_read_and_is_refused_for_writing(store: Store) -> None:
    text = """
print(json.dumps({
    "read": str(store.registry.read().models["a"].port),
    "check": attempt(store.registry.check_writable),
    "update": attempt(lambda: store.registry.update(lambda r: r.assign("b", 8100))),
    "content": content(),
}))
"""
    assert mounted(store, 'mount --bind "$FOLDER" "$FOLDER" && mount -o remount,bind,ro "$FOLDER"', text) == {
        "read": "8100",
        "check": "registry_unwritable",
        "update": "registry_unwritable",
        "content": CONTENT.decode(),
    }


def test_read_only_state_folder_is_refused(store: Store) -> None:
    text = """
print(json.dumps({"ready": attempt(lambda: Store(Path(os.environ["FOLDER"]) / "state", Path("/x")).create_folders())}))
"""
    mount = 'mount --bind "$FOLDER" "$FOLDER" && mount -o remount,bind,ro "$FOLDER"'
    assert mounted(store, mount, text) == {"ready": "state_unwritable"}


TRANSACTION = """
try:
    store.registry.update(lambda r: r.assign("b", 8100))
except MlxopsError as error:
    os._exit(3 if error.code == "registry_unwritable" else 1)
os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="strace is Linux's")
@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
@pytest.mark.parametrize("fault", ["signal=SIGKILL", "error=ENOSPC", "error=EIO"])
def test_failed_write_flush_or_rename_never_leaves_a_mixed_file(store: Store, fault: str, call: str) -> None:
    new = parse(CONTENT).assign("b", 8100).encode()
    changed = []
    for number in range(1, 10):
        store.registry.path.write_bytes(CONTENT)
        ended = under_strace(store, f"inject={CALLS[call]}:{fault}:when={number}")
        after = store.registry.path.read_bytes()
        assert after in (CONTENT, new), f"{call} {number}"
        if ended == 0:
            assert after == new
            break
        assert ended in ((-9, 137) if "KILL" in fault else (3,)), f"{call} {number}"
        changed.append(after == new)
        if "error" in fault:
            assert not leftovers(store.registry.path.parent)
        store.registry.path.write_bytes(CONTENT)
        assert store.registry.update(move).models["b"].port == 8100, "the lock is free"
        assert not leftovers(store.registry.path.parent)
    # An update links the old file, writes, flushes and renames the new one, then flushes the folder. If it is killed
    # before the last flush, the new file is there. If that flush fails, the update is undone and reported as failed.
    killed = "KILL" in fault
    assert changed == {"write": [False], "fsync": [False, killed], "rename": [False, False]}[call]


CALLS = {"write": "write", "fsync": "fsync", "rename": "?rename,?renameat,?renameat2"}


def under_strace(store: Store, fault: str) -> int:
    """Run one update with a fault; return the exit status."""
    if shutil.which("strace") is None:
        missing("strace (Debian and Ubuntu: apt-get install strace)")
    before = ["strace", "-qq", "-o", os.devnull, "-e", f"trace={','.join(CALLS.values())}", "-e", fault]
    process = program(store, TRANSACTION, before=before)
    process.communicate(timeout=60)
    return process.returncode


class FullSync:
    """A stand-in for F_FULLFSYNC of macOS, which cannot run here. It records which files are flushed."""

    def __init__(self, refusal: int | None = None) -> None:
        self.full: list[str] = []
        self.plain: list[str] = []
        self._refusal = refusal

    def fcntl(self, fd: int, command: int) -> None:
        assert command == 51
        if self._refusal is not None:
            raise OSError(self._refusal, os.strerror(self._refusal))
        self.full.append(_kind(fd))

    def fsync(self, fd: int) -> None:
        self.plain.append(_kind(fd))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (durable_files, install):
            monkeypatch.setattr(module, "_F_FULLFSYNC", 51)
        monkeypatch.setattr(fcntl, "fcntl", self.fcntl)
        monkeypatch.setattr(os, "fsync", self.fsync)


def _kind(fd: int) -> str:
    return "folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"


def _write_every_durable_file(store: Store, log: OperationLog) -> None:
    write_durably(store.state / "host.json", b"{}")
    store.append_history(command="x")
    install.stamp(store.state, {})
    log.emitter()(Done({}))


DURABLE = ["file", "folder", "file", "file", "folder", "file"]


def test_macos_flushes_the_drives_cache_for_files_and_folders(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = FullSync()
    sync.install(monkeypatch)
    _write_every_durable_file(store, OperationLog(store.state))
    assert (sync.full, sync.plain) == (DURABLE, [])


@pytest.mark.parametrize("refusal", [errno.ENOTSUP, errno.EINVAL, errno.ENOTTY])
def test_fsync_is_used_where_full_fsync_is_unsupported(
    store: Store, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    sync = FullSync(refusal)
    sync.install(monkeypatch)
    _write_every_durable_file(store, OperationLog(store.state))
    assert (sync.full, sync.plain) == ([], DURABLE)


@pytest.mark.parametrize("flush", [durable_files.flush, install.flush])
def test_failed_flush_is_an_error(monkeypatch: pytest.MonkeyPatch, flush: Callable[[int], None]) -> None:
    FullSync(errno.EIO).install(monkeypatch)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        flush(0)


# -- locks ----------------------------------------------------------------------------------------------------------


def taken(store: Store, name: str = "port-8100", by: Operation = ME) -> Lock:
    lock = store.lock(name, by)
    assert isinstance(lock, Lock)
    return lock


def test_lock_that_is_taken_names_its_holder(store: Store) -> None:
    lock = taken(store)
    assert store.lock("port-8100", replace(ME, id="op2")) == ME
    assert store.holder("port-8100") == ME
    taken(store, "port-8101").release()
    lock.release()
    assert store.holder("port-8100") is None
    taken(store, by=replace(ME, id="op2")).release()


def test_holder_changes_nothing(store: Store) -> None:
    assert store.holder("port-8100") is None
    assert os.listdir(store.state / "locks") == [], "no file is created"
    lock = taken(store)
    path = store.state / "locks" / "port-8100"
    before = path.stat()
    store.holder("port-8100")
    assert (path.stat().st_mtime_ns, path.read_bytes()) == (before.st_mtime_ns, path.read_bytes())
    assert store.lock("port-8100", replace(ME, id="op2")) == ME, "it is still held"
    lock.release()


def test_lock_with_damaged_content_still_holds(store: Store) -> None:
    lock = taken(store)
    (store.state / "locks" / "port-8100").write_bytes(b"[")
    assert store.holder("port-8100") == Operation("?", "?")
    assert store.lock("port-8100", ME) == Operation("?", "?")
    lock.release()


HOLD = """
store.lock("port-8100", Operation("op9", "load"))
print("held", flush=True)
sys.stdin.readline()
"""


def test_lock_ends_with_the_process_that_holds_it(store: Store) -> None:
    holder = program(store, HOLD)
    with ended_after(holder):
        assert next_line(holder) == b"held"
        assert store.holder("port-8100") == Operation("op9", "load")
        holder.kill()
        holder.wait()
        assert store.holder("port-8100") is None
        taken(store).release()


def test_lock_names_its_last_holder_only_if_it_was_not_released(store: Store) -> None:
    lock = taken(store)
    assert store.abandoned_by("port-8100") is None, "it is held"
    lock.release()
    assert store.abandoned_by("port-8100") is None
    os.close(taken(store).fd)  # as a kill does
    assert store.abandoned_by("port-8100") == ME


def test_lock_that_cannot_be_written_is_released(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes, at: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched, pytest.raises(Refused):
        patched.setattr(os, "pwrite", full)
        store.lock("port-8100", ME)
    taken(store).release()


def test_child_does_not_inherit_a_lock(store: Store) -> None:
    lock = taken(store)
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    with ended_after(child):
        lock.release()
        assert child.poll() is None
        taken(store).release()


def test_child_does_not_inherit_the_registrys_lock(store: Store) -> None:
    children: list[subprocess.Popen[bytes]] = []

    def change(registry: Registry) -> Registry:
        children.append(
            subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
        )
        return move(registry)

    store.registry.update(change)
    with ended_after(*children):
        assert children[0].poll() is None
        store.registry.update(lambda registry: registry.clear(["b"]))


def test_killed_update_releases_the_lock(store: Store) -> None:
    text = """
def change(registry):
    print("in", flush=True)
    sys.stdin.readline()
    return registry
store.registry.update(change)
"""
    holder = program(store, text)
    with ended_after(holder):
        assert next_line(holder) == b"in"
        holder.kill()
        holder.wait()
        store.registry.update(move)


def test_only_one_of_several_processes_gets_a_lock(store: Store) -> None:
    text = """
got = store.lock("port-8100", Operation(sys.argv[3], "load"))
print(got.id if isinstance(got, Operation) else "mine", flush=True)
sys.stdin.readline()
"""
    racers = [program(store, text, f"op{number}") for number in range(4)]
    with ended_after(*racers):
        answers = [next_line(racer).decode() for racer in racers]
    assert answers.count("mine") == 1
    assert set(answers) - {"mine"} == {f"op{answers.index('mine')}"}


# -- the rest of the state folder -----------------------------------------------------------------------------------


def test_state_folder_is_private_to_the_user(tmp_path: Path) -> None:
    store = Store(tmp_path / "state", tmp_path / "registry.json")
    before = os.umask(0)
    try:
        store.create_folders()
        store.save_run(run())
        store.save_agreed_settings(Settings())
        store.append_history(command="x")
        taken(store).release()
    finally:
        os.umask(before)
    paths = [store.state, *store.state.rglob("*")]
    assert len(paths) == 9
    assert all(stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600) for path in paths)


def test_reading_creates_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "state", tmp_path / "registry.json")
    assert (store.registry.read().models, store.holder("x"), store.run(8100), store.agreed_settings()) == (
        {},
        None,
        None,
        None,
    )
    assert os.listdir(tmp_path) == []


def test_run_record_is_kept_until_it_is_deleted(store: Store) -> None:
    store.save_run(run(port=8103))
    assert store.run(8103) == run(port=8103) and store.run(8104) is None
    store.forget_run(8103)
    store.forget_run(8103)
    assert store.run(8103) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b"\xff", b'{"port": 8103, "argv": []}'])
def test_damaged_run_record_is_not_a_missing_one(store: Store, content: bytes) -> None:
    (store.state / "run" / "8103.json").write_bytes(content)
    with pytest.raises(ValueError):
        store.run(8103)


def test_agreed_settings_are_read_back_and_damaged_ones_refused(store: Store) -> None:
    settings = Settings(bind="::1", slots={8100: "jerry-xl"})
    store.save_agreed_settings(settings)
    assert store.agreed_settings() == settings
    for content in (b"", b"[]", b"{}", b'{"ports": 1}'):
        (store.state / "host.json").write_bytes(content)
        with pytest.raises(MlxopsError) as caught:
            store.agreed_settings()
        assert caught.value.code == "host_json_unusable"


def test_new_run_folder_is_empty_and_link_targets_are_kept(store: Store, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_bytes(b"w")
    store.new_run_folder(8103)
    folder = store.run_folder(8103)
    (folder / "org").mkdir()
    for link in (folder / "jerry", folder / "org" / "name"):
        link.symlink_to(model)
    with ended_after(subprocess.Popen(["sleep", "60"], cwd=folder)):
        store.new_run_folder(8103)
        assert [path.name for path in (store.state / "run").rglob("*")] == ["8103"]
    for strange in (folder.mkdir, partial(os.mkfifo, folder), folder.touch, partial(folder.symlink_to, model)):
        folder.rmdir()
        strange()
        store.new_run_folder(8103)
        assert folder.is_dir() and not folder.is_symlink() and not os.listdir(folder)
    assert (model / "weights").read_bytes() == b"w"


def test_run_folder_left_by_a_killed_start_is_removed_later(store: Store) -> None:
    left = store.state / "run" / ".8103.999999999.0123abcd.tmp"
    (left / "org").mkdir(parents=True)
    assert store.remove_leftovers() == [left] and not left.exists()


def test_holder_waits_until_the_lock_names_its_holder(store: Store) -> None:
    """A process takes the lock an instant before it writes its name."""
    fd = os.open(store.state / "locks" / "port-8100", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        text = 'print(store.holder("port-8100").id, flush=True)'
        asker = program(store, "print('ask', flush=True)\n" + text)
        with ended_after(asker):
            assert next_line(asker) == b"ask"
            os.pwrite(fd, json.dumps(ME.__dict__).encode(), 0)
            assert next_line(asker) == b"op1"
    finally:
        os.close(fd)


def test_update_leaves_only_the_registry_file_in_its_folder(store: Store) -> None:
    RegistryFile(store.registry.path, store.state / "registry.previous.json").update(move)
    assert os.listdir(store.registry.path.parent) == ["registry.json"]
    wait_until(lambda: not leftovers(store.state), 10, "the end of temporary files")
