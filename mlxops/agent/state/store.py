"""The state folder of a host: locks, run records, agreed settings, history. Only this code writes them.

<state>/            0700
  host.json         the agreed settings (`agreement`)
  history.jsonl     what changed, by whom, when
  measure.jsonl, probe.jsonl  what `measure` and `probe` found; older builds wrote that into the history
  registry.previous.json  the registry before its last change (`registry_file`)
  stranded.json     memory that stopped servers did not return, since the last boot
  registry.known.json     where this host has had a registry: if a file there is gone, the registry is not empty
  locks/            one file per port or model; the flock decides, the content names the holder
  run/<port>.json   the run record; run/<port>/ is the server's working directory, and has the verdicts of `probe`
  engines/<key>     the `--help` of an installed engine

Other modules write there:

  ops/<id>/         one operation (`operation_log`): request.json, events.jsonl, lock, cancel, without-<port>, stderr
  logs/<port>.log   server logs (`serving.logs`); .log.1 to .3 are older ones; restore.log is the boot job's log
  agents/<build>/   deployed builds (`install`); venv and venv.previous link to the current and the previous one
  bin/mlxctl        the program on the host, if it was deployed (`install`)
  deploy.lock       held by a deploy (`install`)
  org.mlxops.restore.daemon.plist   macOS: what an administrator may install instead (`service.restore_job`)
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeGuard

from mlxops.agent.state.durable_files import (
    MAX_FILE_BYTES,
    flush,
    list_matching,
    parse_object,
    read_if_exists,
    temporary_path,
    write_durably,
    write_remedy,
    writer_is_alive,
)
from mlxops.agent.state.locks import (
    LOCK_SECONDS,
    NoLocks,
    add_path,
    flock_within,
    folder_lock,
    take_or_close,
    try_flock,
)
from mlxops.agent.state.registry_file import RegistryFile
from mlxops.common import files
from mlxops.common.files import Unfit, describe_error
from mlxops.core.errors import Refused
from mlxops.core.frozen import dataclass
from mlxops.core.records import (
    Operation,
    Run,
    Silence,
    Stranded,
    operation_from_wire,
    run_from_wire,
    stranded_from_wire,
)
from mlxops.core.settings import Settings, settings_from_wire

HISTORY_BYTES = 4 * 1024 * 1024
"""How much of the history's end is read: some twenty thousand changes. The same for each file of findings."""
FINDINGS = frozenset({"measure", "probe"})
"""Commands whose lines go into a file of their own. They would push the loads out of what is read of the history."""


def utc_now() -> str:
    """Return the wall time for display, in UTC, to the second."""
    return format_utc(time.time())


def format_utc(seconds: float) -> str:
    """Format seconds since the epoch for display."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


HOLDER_SECONDS = 2.0
"""How long the holder of a lock may take to write its name. Usually that is an instant."""
KEEPER = "keeper"
"""Name of the lock that the running keeper holds."""
UNKNOWN_HOLDER = Operation(id="?", command="?")


@dataclass(frozen=True)
class Lock:
    """A held lock. It ends with this process at the latest; no child inherits it."""

    path: Path
    fd: int
    abandoned: Operation | None = None
    """The previous holder if it did not release the lock: its worker was killed."""

    @property
    def is_there(self) -> bool:
        """Whether others find this lock: its file may have been removed, with its folder."""
        try:
            return os.path.samestat(os.fstat(self.fd), os.stat(self.path))
        except OSError:
            return False

    def release(self) -> None:
        with contextlib.suppress(OSError):
            os.ftruncate(self.fd, 0)
        os.close(self.fd)


def _is_free(path: Path) -> bool:
    """Try a shared lock and release it at once. Raises `OSError`."""
    try:
        fd = files.open_file(path)
    except FileNotFoundError:
        return True
    try:
        with add_path(path):
            return try_flock(fd, shared=True)
    finally:
        os.close(fd)


class Store:
    """One host's state folder. Reading creates nothing."""

    def __init__(self, state: Path, registry: Path) -> None:
        self.state = state
        self.registry = RegistryFile(registry, state / "registry.previous.json")

    def create_folders(self) -> None:
        """Raises `Refused` (state_unwritable)."""
        with self._report_unwritable():
            self.state.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.state.chmod(0o700)
            for name in ("locks", "run", "ops", "logs"):
                (self.state / name).mkdir(exist_ok=True, mode=0o700)

    @contextmanager
    def _report_unwritable(self) -> Iterator[None]:
        """Turn an `OSError` into `Refused` (state_unwritable)."""
        try:
            yield
        except OSError as error:
            raise state_unwritable(self.state, error) from None

    # Leftovers of killed writers

    def leftovers(self) -> list[Path]:
        """Return temporary files, here and beside the registry, whose writers are gone."""
        folders = (self.state, self.state / "run")
        temporary = [path for folder in folders for path in list_matching(folder, ".", ".tmp")]
        return sorted(path for path in (*temporary, *self.registry.leftovers()) if not writer_is_alive(path))

    def remove_leftovers(self) -> list[Path]:
        """Remove the leftovers and return them. One that cannot be removed is found again the next time."""
        paths = self.leftovers()
        with contextlib.suppress(OSError):
            self.registry.remove_leftovers()
        for path in paths:
            _remove_tree(path)
        return paths

    # Locks

    def lock(self, name: str, holder: Operation) -> Lock | Operation:
        """Take the lock `name` (port-8100, model-x). Return it, or the operation that holds it."""
        path = self.state / "locks" / name
        deadline = time.monotonic() + HOLDER_SECONDS
        while True:
            with self._report_unwritable():
                fd = files.open_file(path, os.O_RDWR | os.O_CREAT)
                taken = take_or_close(fd, path)
            if taken:
                break
            # If it has no name, it was just taken, or just released.
            if (other := self._read_holder(path)) or time.monotonic() > deadline:
                return other or UNKNOWN_HOLDER
            time.sleep(0.005)
        abandoned = self._read_holder(path)
        try:
            with self._report_unwritable():
                os.ftruncate(fd, 0)
                os.pwrite(fd, json.dumps(holder.__dict__).encode(), 0)
        except BaseException:
            os.close(fd)
            raise
        return Lock(path, fd, abandoned)

    def running_keeper(self) -> str | None:
        """Describe the keeper that runs; None if there is none, or if that is not known."""
        with contextlib.suppress(OSError):
            if holder := self.holder(KEEPER):
                return f"{holder.id}, since {holder.since}"
        return None

    def holder(self, name: str) -> Operation | None:
        """Return who holds the lock now; None if it is free. It tries a shared lock and releases it at once.

        Raises `OSError` if that cannot be found out.
        """
        path = self.state / "locks" / name
        deadline = time.monotonic() + HOLDER_SECONDS
        while not _is_free(path):
            # If it has no name, it was just taken, or just released.
            if (holder := self._read_holder(path)) or time.monotonic() > deadline:
                return holder or UNKNOWN_HOLDER
            time.sleep(0.005)
        return None

    def abandoned_by(self, name: str) -> Operation | None:
        """Return the operation that had the lock `name` and did not release it; None if the lock is held now."""
        operation = self._read_holder(self.state / "locks" / name)
        return None if operation is None or self.holder(name) else operation

    def _read_holder(self, path: Path) -> Operation | None:
        """Return the operation that a lock's file names, held or not. Releasing the lock empties the file."""
        try:
            return operation_from_wire(parse_object(files.read(path, MAX_FILE_BYTES)))
        except (OSError, ValueError):
            return None

    # Run records

    def run(self, port: int) -> Run | None:
        """Return a port's run record. Raises `ValueError` if it is damaged, `OSError` if it cannot be read."""
        data = read_if_exists(self.state / "run" / f"{port}.json")
        if data is None:
            return None
        return run_from_wire(parse_object(data))

    def file_versions(self) -> frozenset[tuple[str, int, int]]:
        """Return (path, inode, time) of the registry and the run records. The set differs after any of them was
        written."""
        versions = set()
        for path in (self.registry.path, *(self.state / "run").glob("*.json")):
            with contextlib.suppress(OSError):
                status = path.stat()
                versions.add((str(path), status.st_ino, status.st_mtime_ns))
        return frozenset(versions)

    def save_run(self, run: Run) -> None:
        with self._report_unwritable():
            write_durably(self.state / "run" / f"{run.port}.json", json.dumps(run.to_wire()).encode())

    def forget_run(self, port: int) -> None:
        with self._report_unwritable():
            (self.state / "run" / f"{port}.json").unlink(missing_ok=True)

    def verdicts(self, port: int) -> dict[str, object] | None:
        """Return what the last `probe` of a port found; None if there is nothing that can be read."""
        try:
            return parse_object(files.read(self._verdicts_path(port), MAX_FILE_BYTES))
        except (OSError, ValueError):
            return None

    def keep_verdicts(self, port: int, record: Mapping[str, object]) -> None:
        """Keep what a `probe` found, in the server's folder, so that the next server of the port does not have it."""
        with self._report_unwritable():
            path = self._verdicts_path(port)
            path.parent.mkdir(mode=0o700, exist_ok=True)  # an adopted server has no folder
            write_durably(path, json.dumps(record).encode())

    def silence(self, run: Run) -> Silence | None:
        """Return since when this very server completes nothing, as the keeper has noted; None if it does."""
        try:
            found = parse_object(files.read(self._silence_path(run.port), MAX_FILE_BYTES))
        except (OSError, ValueError):
            return None
        since, stays = found.get("since"), found.get("stays")
        if (found.get("pid"), found.get("start")) != (run.pid, run.start) or not isinstance(since, str):
            return None
        return Silence(since, stays if isinstance(stays, str) else "")

    def note_silence(self, run: Run, silence: Silence | None) -> None:
        """Note it in the server's folder; None: it completes again. Raises `Refused` (state_unwritable)."""
        path = self._silence_path(run.port)
        with self._report_unwritable():
            if silence is None:
                path.unlink(missing_ok=True)
                return
            record = {"pid": run.pid, "start": run.start, "since": silence.since, "stays": silence.stays}
            path.parent.mkdir(mode=0o700, exist_ok=True)
            write_durably(path, json.dumps(record).encode())

    def _silence_path(self, port: int) -> Path:
        return self.run_folder(port) / ".silence.json"

    def _verdicts_path(self, port: int) -> Path:
        return self.run_folder(port) / ".verdicts.json"  # no alias begins with a dot

    def run_folder(self, port: int) -> Path:
        """Return the working directory of the port's server."""
        return self.state / "run" / str(port)

    def new_run_folder(self, port: int) -> None:
        """Make an empty run folder. Move an old one away first: a rename cannot fail half way, and a process that
        still works in the old folder keeps it."""
        folder = self.run_folder(port)
        with self._report_unwritable():
            if os.path.lexists(folder):
                old = temporary_path(folder)
                folder.rename(old)
                _remove_tree(old)
            folder.mkdir(mode=0o700)

    def log_path(self, port: int) -> Path:
        return self.state / "logs" / f"{port}.log"

    # Stranded memory

    @property
    def stranded_path(self) -> Path:
        return self.state / "stranded.json"

    def stranded(self, boot_id: str) -> Stranded | None:
        """Return the record of memory stranded since this boot; None if there is none.

        Raises `ValueError` if the file is damaged, `OSError` if it cannot be read.
        """
        data = read_if_exists(self.stranded_path)
        record = None if data is None else stranded_from_wire(parse_object(data))
        return record if record and record.boot_id == boot_id else None

    def save_stranded(self, record: Stranded) -> None:
        with self._report_unwritable():
            write_durably(self.stranded_path, json.dumps(record.to_wire()).encode())

    # The engines' --help

    def engine_help(self, key: str) -> str | None:
        try:
            return files.read(self.state / "engines" / key, MAX_FILE_BYTES).decode()
        except (OSError, ValueError):
            return None

    def keep_engine_help(self, key: str, text: str) -> None:
        """Cache the text. Ignore a failure: the engine can be asked again."""
        with contextlib.suppress(OSError):
            folder = self.state / "engines"
            folder.mkdir(exist_ok=True, mode=0o700)
            write_durably(folder / key, text.encode())

    # Agreed settings

    @contextmanager
    def settings_lock(self) -> Iterator[None]:
        """Lock the agreed settings from their reading to their writing. Raises `Refused` (state_unwritable) and `Busy`
        (settings_locked)."""
        with self._report_unwritable(), folder_lock(self.state, "settings"):
            yield

    def agreed_settings(self) -> Settings | None:
        """Return the agreed settings; None if none are saved.

        Raises `Refused` (state_unreadable, host_json_unusable).
        """
        path = self.state / "host.json"
        try:
            data = read_if_exists(path)
            return None if data is None else settings_from_wire(parse_object(data))
        except OSError as error:
            raise state_unreadable(path, error) from None
        except ValueError as error:
            raise Refused(
                "host_json_unusable",
                f"the saved settings of the host, {path}, cannot be read",
                why=str(error)[:200],
                hint="save them again: `mlxctl deploy`",
            ) from None

    def save_agreed_settings(self, settings: Settings) -> None:
        with self._report_unwritable():
            write_durably(self.state / "host.json", json.dumps(settings.to_wire(), indent=2).encode())

    # History

    def history(self) -> list[dict[str, object]]:
        """Return the entries in the history's last `HISTORY_BYTES`, oldest first, without unreadable lines.

        Raises `OSError`.
        """
        return self._entries("history.jsonl")

    def require_history(self) -> None:
        """Raises `OSError` if the history cannot be read, or cannot be written."""
        self.history()
        os.close(files.open_file(self.state / "history.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND))

    def findings(self, command: str) -> list[dict[str, object]]:
        """Return what earlier runs of `measure` or `probe` noted, oldest first. Raises `OSError`."""
        older = [entry for entry in self.history() if entry.get("command") == command]
        return [*older, *self._entries(f"{command}.jsonl")]

    def _entries(self, name: str) -> list[dict[str, object]]:
        try:
            data = files.read_end(self.state / name, HISTORY_BYTES)
        except FileNotFoundError:
            return []
        entries = []
        # The first line may be incomplete, and then is not an object.
        for line in data.splitlines():
            with contextlib.suppress(ValueError):
                entries.append(parse_object(line))
        return entries

    def append_history(self, **entry: object) -> None:
        """Append a line to the history, or to the file of its command (`FINDINGS`). Raises `OSError`."""
        command = entry.get("command")
        self._append(f"{command}.jsonl" if command in FINDINGS else "history.jsonl", entry)

    def _append(self, name: str, entry: Mapping[str, object]) -> None:
        """Append a line to a file, in one write(2). Raises `OSError`."""
        line = (json.dumps({"at": utc_now(), **entry}) + "\n").encode()
        fd = files.open_file(self.state / name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            # A full disk may have cut off the last line. Start a new line after it, or this entry is lost too. Without
            # the lock, a line that another process is writing would look the same.
            if not flock_within(fd, LOCK_SECONDS):
                raise OSError(errno.EWOULDBLOCK, "another program holds its lock")
            if not _ends_with_newline(fd):
                line = b"\n" + line
            if os.write(fd, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            flush(fd)
        finally:
            os.close(fd)


def _ends_with_newline(fd: int) -> bool:
    """Return whether a file is empty or its last byte ends a line."""
    size = os.fstat(fd).st_size
    return size == 0 or os.pread(fd, 1, size - 1) == b"\n"


def _remove_tree(path: Path) -> None:
    """Remove a file, or a folder with everything in it, as far as possible."""
    import shutil

    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def disk_failed(error: Exception) -> TypeGuard[OSError]:
    """Return whether an error means that a disk is full, broken or read-only."""
    return isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS}


def state_failed(error: Exception, state: Path) -> TypeGuard[OSError]:
    """Return whether an error is about something in the state folder that has the wrong type or another owner, or
    cannot be locked."""
    if not isinstance(error, Unfit | NotADirectoryError | PermissionError | NoLocks):
        return False
    path = error.filename if isinstance(error.filename, str | bytes) else "/"
    return Path(os.fsdecode(path)).is_relative_to(state)


def state_unwritable(state: Path, error: OSError) -> Refused:
    return Refused(
        "state_unwritable",
        f"the state folder {state} cannot be written",
        why=describe_error(error),
        hint=write_remedy(error, state, _RELOCATE_STATE),
    )


def state_unreadable(path: Path, error: OSError) -> Refused:
    relocate = _RELOCATE_STATE if isinstance(error, NoLocks) else ""
    return Refused(
        "state_unreadable",
        f"the state file {path} cannot be read",
        why=describe_error(error),
        hint=relocate or files.remedy(error) or "repair it on the host, or move it away, then try again",
    )


_RELOCATE_STATE = "put the state folder on a local disk: `state` in hosts.yaml, then `mlxctl deploy`"
