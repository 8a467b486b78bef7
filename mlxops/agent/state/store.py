"""What mlxops keeps on a host: the registry, locks, run records, settings, history. The only code that writes them.

<state>/            0700
  host.json         the settings last agreed on
  history.jsonl     what changed, by whom, when
  registry.previous.json  the registry before its last change
  registry.known.json     where this host has had a registry: a file that is gone from there is not an empty one
  locks/            one file a port or model; the flock is the truth, the content says who
  run/<port>.json   the run record; run/<port>/ the server's working directory
  engines/<key>     what an installed engine printed as its options

What others write there:

  ops/<id>/         one operation (`journal`): request.json, events.jsonl, lock, cancel, without-<port>, stderr
  logs/<port>.log   the servers' (`logs`); .log.1 to .3 those before; restore.log, what the boot job says (`boot`)
  agents/<build>/   the deployed builds (`install`); venv and venv.previous lead to the present one and the one before
  bin/mlxctl        the program on the host, if it was deployed (`install`)
  deploy.lock       held by a deploy (`install`)
  org.mlxops.restore.daemon.plist   what an administrator may install instead (`boot`; macOS)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from mlxops.agent.paths import require
from mlxops.agent.state.locks import LOCK_SECONDS, NoLocks, alone, flock_within, naming, take_or_close, try_flock
from mlxops.common import files
from mlxops.common.files import Unfit, said
from mlxops.core import registry as registries
from mlxops.core.errors import Refused
from mlxops.core.records import Operation, Run, operation_from_wire, run_from_wire
from mlxops.core.registry import Registry
from mlxops.core.settings import Settings, settings_from_wire

MAX_BYTES = registries.MAX_BYTES
"""Of a file that is read as a whole; the registry is the longest of them."""

HISTORY_BYTES = 4 * 1024 * 1024
"""Of the history's end that are read: some twenty thousand changes."""


def now() -> str:
    """Wall time for display, UTC, to the second."""
    return utc(time.time())


def utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def write_durably(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a file's content at once and for good: temporary file, flush, rename, flush of the folder.

    A reader sees the old or the new content; after the return, power loss does not undo it. Raises `OSError`.
    """
    temporary = _temporary(path)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            # What open(2) makes of the mode depends on the umask. Some file systems (exFAT, SMB) keep no modes.
            with _unless_unsupported():
                os.fchmod(fd, mode)
            _write_all(fd, data)
            flush(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Not every file system can flush a folder (SMB, some of FUSE).
        with _unless_unsupported():
            flush(folder)
    finally:
        os.close(folder)


@contextmanager
def _unless_unsupported() -> Iterator[None]:
    """Ignore errors of file systems that do not support the operation. Raises every other `OSError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


_UNSUPPORTED = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EBADF, errno.EPERM})


def _temporary(path: Path) -> Path:
    """A name beside `path` for what is to replace it; from it is seen who writes."""
    return path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")


def named(folder: Path, prefix: str, suffix: str = "") -> list[Path]:
    """What lies in a folder under such names, sorted; nothing if there is no folder. (`glob` compiles every pattern
    anew, which takes longer than the looking.)"""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return [folder / name for name in sorted(names) if name.startswith(prefix) and name.endswith(suffix)]


def _remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, as far as that goes."""
    import shutil

    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _writer_lives(temporary: Path) -> bool:
    """Whether the process whose pid is in a temporary file's name lives; if it is another one by now, the file is
    found later."""
    pid = "".join(temporary.name.split(".")[-3:-2])
    if not pid.isdecimal() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's process: alive
    return True


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


_F_FULLFSYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)
"""Only macOS has it, whose fsync(2) leaves the data in the drive's cache."""


def flush(fd: int) -> None:
    """What a file or a folder has now outlives a power loss. Raises `OSError`."""
    try:
        if _F_FULLFSYNC is not None:
            fcntl.fcntl(fd, _F_FULLFSYNC)
            return
    except OSError as error:
        # Not every file system knows it: those of other systems, and of the network.
        if error.errno not in {errno.ENOTSUP, errno.EINVAL, errno.ENOTTY}:
            raise
    os.fsync(fd)


def _read(path: Path) -> bytes | None:
    try:
        return files.read(path, MAX_BYTES)
    except FileNotFoundError:
        return None


def _object(data: bytes) -> dict[str, object]:
    """The JSON object that a file of ours holds. Raises `ValueError`."""
    try:
        wire = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(wire, dict):
        raise ValueError("not an object")
    return wire


class RegistryFile:
    """registry.json at its configured path: one reader, one writer."""

    def __init__(self, path: Path, previous: Path) -> None:
        self._configured = path
        # Through a symlink: the link stays, the file behind it changes.
        self.path = Path(os.path.realpath(path))
        self._previous = previous
        self._mark = previous.with_name("registry.known.json")
        self._marked = False

    def read(self) -> Registry:
        """Return the current registry. A file that cannot be read, or is gone, is not empty but `unwritable`."""
        try:
            data = _read(self.path)
        except OSError as error:
            return Registry(raw={}, models={}, unwritable=f"{self.path} cannot be read: {error.strerror}")
        found = self._parsed(data)
        if data is None and not found.missing:
            try:
                require(self.path.parent)
            except Refused as refused:
                return _missing(f"{refused.message}: {refused.why}")
        return found

    def _parsed(self, data: bytes | None) -> Registry:
        why = self._why_missing() if data is None else None
        return registries.parse(data) if why is None else _missing(why)

    def _why_missing(self) -> str | None:
        """Return why the file is missing although there was one, or should be; None if this host has had none yet."""
        from mlxops.agent.state import missing_registry

        why = missing_registry.reason(self._configured, self.path)
        if why is not None:
            return why
        known = missing_registry.remembered(self._mark)
        if known & self._names():
            return "it is gone: this host had a registry there before; perhaps its disk is not mounted"
        if not known and missing_registry.had_one_before_marks(self._mark.parent):
            return "it is gone: the history of this host shows that it had one; perhaps its disk is not mounted"
        return None

    def conflicts(self) -> list[Path]:
        """Return the conflicted copies beside an existing registry."""
        if len(named(self.path.parent, self.path.stem)) < 2:
            return []
        from mlxops.agent.state.missing_registry import conflicts

        return conflicts(self.path)

    def _names(self) -> set[str]:
        return {str(self._configured), str(self.path)}

    def remember(self) -> None:
        """Record in registry.known.json that this host has a registry here. Raises `OSError`."""
        if self._marked or not os.path.lexists(self.path):
            return
        from mlxops.agent.state import missing_registry

        known = missing_registry.remembered(self._mark)
        if not self._names() <= known:
            write_durably(self._mark, missing_registry.encoded(known | self._names()))
        self._marked = True

    def update(self, change: Callable[[Registry], Registry]) -> Registry:
        """One transaction: lock, read, `change`, and if that changed anything, write. Returns what is then on disk.

        Raises `Refused` (registry_missing, registry_unusable, registry_unwritable) and `Busy` (registry_locked).
        """
        # Refuse before its folder is made.
        if not os.path.lexists(self.path) and (found := self._parsed(None)).missing:
            raise self.refusal(found)
        with _blaming(self.path), self._locked():
            data = _read(self.path)
            old = self._parsed(data)
            if old.unwritable:
                raise self.refusal(old)
            new = change(old)
            if new.raw == old.raw:
                return old
            self._remove_leftovers()
            self._write(data, new.encode())
        with contextlib.suppress(OSError):
            self.remember()
        return new

    def _write(self, old: bytes | None, new: bytes) -> None:
        """Write, or leave what was there: a change that could not be made to last is taken back before it is reported
        as failed, or the file would say what nobody stands for."""
        mode = self.path.stat().st_mode & 0o777 if old is not None else 0o644
        if old is not None:
            with _blaming(self._previous):
                self._keep(old)
        try:
            write_durably(self.path, new, mode)
        except OSError:
            with contextlib.suppress(OSError):
                if old is None:
                    self.path.unlink(missing_ok=True)
                elif _read(self.path) != old:
                    write_durably(self.path, old, mode)
            raise
        if old is not None:
            with contextlib.suppress(OSError):
                os.chmod(self._previous, 0o600)

    def _keep(self, old: bytes) -> None:
        """The generation before: one more name for the file that is about to be replaced, so that nothing has to be
        written and flushed a second time. A copy where that cannot be: on another disk, or one without such names."""
        temporary = _temporary(self._previous)
        try:
            os.link(self.path, temporary)
        except OSError:
            return write_durably(self._previous, old)
        try:
            os.replace(temporary, self._previous)
        finally:
            # Still there after a failure, and where the two are names of one file already: rename(2) does nothing then.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Temporary files of writers that were killed. Raises `Busy` (registry_locked), `OSError`."""
        if self.leftovers():
            with self._locked():
                self._remove_leftovers()

    def leftovers(self) -> list[Path]:
        """Temporary files beside the registry; one that is being written at this moment counts too."""
        return named(self.path.parent, f".{self.path.name}.", ".tmp")

    def usable(self) -> Registry:
        """Return the registry if it may be written; does not try to. Raises `Refused` and `Busy` (registry_locked)."""
        require(self._configured.parent)
        current = self.read()
        if current.unwritable:
            raise self.refusal(current)
        require(self.path.parent)
        if self.path.parent.is_dir():
            with _blaming(self.path), self._locked():
                pass
        return current

    def check_writable(self) -> Registry:
        """Check, before anything is started or stopped, that a write would succeed, and return the registry.

        Raises what `usable` raises.
        """
        current = self.usable()
        with _blaming(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _try_writing(self.path)
        # Where the generation before cannot be kept, nothing is written at all.
        with _blaming(self._previous):
            _try_writing(self._previous)
            self.remember()
        return current

    def refusal(self, found: Registry) -> Refused:
        """Return the error for a registry that must not be written, for the reason `found.unwritable`."""
        error = registries.refusal(found.unwritable or "", str(self.path), self._repair(found))
        if found.missing:
            error.code, error.message = "registry_missing", f"the registry {self._configured} is not there"
        return error

    def _repair(self, found: Registry) -> str:
        """Return what to do, with commands that work when typed."""
        from mlxops.agent.state import missing_registry

        if found.raw:
            return "repair it by hand, then try again"
        if not found.missing and (access := self._access()):
            return access
        target, first, before = self.path, "repair it by hand; or ", ""
        if found.missing:
            first = missing_registry.way_back(self.path) or "put it back, or mount its disk; or "
            if not os.path.isdir(self.path.parent):
                first = "mount its disk; or, if that is gone for good, "
                if os.path.islink(self._configured):
                    target = self._configured
                    before = f"rm {shlex.quote(str(target))} && "
                else:
                    before = f"mkdir -p {shlex.quote(str(target.parent))} && "
        elif os.path.lexists(target):
            if not os.path.isfile(target):
                # Move the configured name, never a link's target: that may be a device of the system.
                target, first = self._configured, ""
            # What can be repaired is kept.
            before = f"mv {shlex.quote(str(target))} {shlex.quote(f'{target}.away')} && "
        file, previous = shlex.quote(str(target)), shlex.quote(str(self._previous))
        ways = [f"begin with an empty one: {before}echo '{EMPTY_DOCUMENT}' > {file}"]
        if os.path.isfile(self._previous):
            ways.insert(0, f"go back to the generation before its last change: {before}cp {previous} {file}")
        return first + "; or ".join(ways)

    def _access(self) -> str | None:
        """What helps against the error that reading it ends in; None: it can be read, or nothing known helps."""
        try:
            _read(self.path)
        except OSError as error:
            return files.remedy(_named(error, self.path))
        return None

    def _remove_leftovers(self) -> None:
        """Temporary files of writers that were killed: nobody else is writing while we hold the lock."""
        for leftover in self.leftovers():
            with contextlib.suppress(OSError):
                leftover.unlink()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # The folder is locked, not the file: the file is replaced by every write.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with alone(self.path.parent, "registry"):
            yield


def _missing(why: str) -> Registry:
    return Registry(raw={}, models={}, unwritable=why, missing=True)


EMPTY_DOCUMENT = '{"version": 1, "models": {}}'


def _try_writing(path: Path) -> None:
    """Everything that `write_durably` does but the replacing. Raises `OSError` if that could not succeed either."""
    _try_replacing(path)
    probe = _temporary(path)
    try:
        # Unbuffered: the flush is to try the disk, so what it flushes must have been written.
        with open(probe, "xb", buffering=0) as file:
            _write_all(file.fileno(), b" " * 4096)
            flush(file.fileno())
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _try_replacing(path: Path) -> None:
    """Raises `OSError` if a rename could not replace the path: it is no file, is immutable, or belongs to another user
    and lies in a sticky folder."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EISDIR, "it is not a file")
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        # A file that may not be written can still be replaced; an immutable one (EPERM) cannot.
        if error.errno == errno.EPERM:
            raise
    folder = os.stat(path.parent)
    if folder.st_mode & stat.S_ISVTX and os.geteuid() not in {0, found.st_uid, folder.st_uid}:
        raise OSError(errno.EPERM, "it is another user's, in a folder in which only owners replace files", str(path))


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Raises `Refused` (registry_unwritable), which names `path`, for whatever the disk says no to."""
    try:
        yield
    except OSError as error:
        raise Refused(
            "registry_unwritable",
            f"the registry cannot be written: {path}",
            why=error.strerror or str(error),
            hint=_what_helps(
                error, path, "put the registry on a local disk: `registry` in hosts.yaml, then inv deploy"
            ),
        ) from None


def _what_helps(error: OSError, path: Path, elsewhere: str) -> str:
    """Return what to do against an error about `path`. `elsewhere`: how to move it to another disk."""
    if isinstance(error, NoLocks):
        return elsewhere
    if error.errno == errno.EISDIR:
        file = shlex.quote(str(path))
        return f"move it away on the host: mv {file} {file}.away; then try again"
    return files.remedy(_named(error, path)) or "free disk space or repair the permissions on the host, then try again"


def _named(error: OSError, path: Path) -> OSError:
    """Return the same error about `path`: the name of a temporary file means nothing to the user."""
    return OSError(error.errno, error.strerror, str(path))


@dataclass(frozen=True)
class Lock:
    """A held lock. It ends with this process at the latest; no child inherits it."""

    path: Path
    fd: int
    left: Operation | None = None
    """Who had it before and never gave it back: an operation whose worker was killed."""

    def release(self) -> None:
        with contextlib.suppress(OSError):
            os.ftruncate(self.fd, 0)
        os.close(self.fd)


class Store:
    """One host's state folder. Nothing is made until something is written."""

    def __init__(self, state: Path, registry: Path) -> None:
        self.state = state
        self.registry = RegistryFile(registry, state / "registry.previous.json")

    def ready(self) -> None:
        """Make the folders. Raises `Refused` (state_unwritable)."""
        try:
            self.state.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.state.chmod(0o700)
            for name in ("locks", "run", "ops", "logs"):
                (self.state / name).mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            raise state_unwritable(self.state, error) from None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises `Refused` (state_unwritable) for whatever the disk says no to."""
        try:
            yield
        except OSError as error:
            raise state_unwritable(self.state, error) from None

    # What killed writers left

    def leftovers(self) -> list[Path]:
        """Temporary files, here and beside the registry, whose writers are gone."""
        folders = (self.state, self.state / "run")
        own = [path for folder in folders for path in named(folder, ".", ".tmp") if not _writer_lives(path)]
        return sorted([*own, *(path for path in self.registry.leftovers() if not _writer_lives(path))])

    def remove_leftovers(self) -> list[Path]:
        """Remove them; returns what there was. One that cannot be removed stays, and is found the next time."""
        found = self.leftovers()
        with contextlib.suppress(OSError):
            self.registry.remove_leftovers()
        for path in found:
            _remove(path)
        return found

    # Locks

    def lock(self, name: str, holder: Operation) -> Lock | Operation:
        """The lock `name` (port-8100, model-x), or the operation that holds it."""
        path = self.state / "locks" / name
        with self._writing():
            fd = files.open_file(path, os.O_RDWR | os.O_CREAT)
            taken = take_or_close(fd, path)
        if not taken:
            return self._holder(path) or Operation(id="?", command="?")
        left = self._trace(path)
        try:
            with self._writing():
                os.ftruncate(fd, 0)
                os.pwrite(fd, json.dumps(holder.__dict__).encode(), 0)
        except BaseException:
            os.close(fd)
            raise
        return Lock(path, fd, left)

    def holder(self, name: str) -> Operation | None:
        """Who holds the lock now; None if nobody does. It tries the lock, shared, and gives it back at once.

        Raises `OSError` where that cannot be told.
        """
        path = self.state / "locks" / name
        try:
            fd = files.open_file(path)
        except FileNotFoundError:
            return None
        try:
            with naming(path):
                free = try_flock(fd, shared=True)
        finally:
            os.close(fd)
        return None if free else self._holder(path) or Operation(id="?", command="?")

    def left(self, name: str) -> Operation | None:
        """The operation that had the lock `name` and never gave it back, if nobody holds it now."""
        trace = self._trace(self.state / "locks" / name)
        return None if trace is None or self.holder(name) else trace

    def _holder(self, path: Path) -> Operation | None:
        # Between taking a lock and writing into it there is an instant: look again for a moment.
        for _ in range(20):
            found = self._trace(path)
            if found is not None:
                return found
            time.sleep(0.005)
        return None

    def _trace(self, path: Path) -> Operation | None:
        """Who a lock's file names, held or not; it is emptied by whoever gives the lock back."""
        try:
            return operation_from_wire(_object(files.read(path, MAX_BYTES)))
        except (OSError, ValueError):
            return None

    # Run records

    def run(self, port: int) -> Run | None:
        """The run record of a port. Raises `ValueError` if there is one that says nothing, `OSError` if it cannot be
        read."""
        data = _read(self.state / "run" / f"{port}.json")
        if data is None:
            return None
        return run_from_wire(_object(data))

    def marks(self) -> frozenset[tuple[str, int, int]]:
        """What is not the same any more once anybody has written the registry or a run record: (path, inode, time)."""
        found = set()
        for path in (self.registry.path, *(self.state / "run").glob("*.json")):
            with contextlib.suppress(OSError):
                stat = path.stat()
                found.add((str(path), stat.st_ino, stat.st_mtime_ns))
        return frozenset(found)

    def save_run(self, run: Run) -> None:
        with self._writing():
            write_durably(self.state / "run" / f"{run.port}.json", json.dumps(run.to_wire()).encode())

    def forget_run(self, port: int) -> None:
        with self._writing():
            (self.state / "run" / f"{port}.json").unlink(missing_ok=True)

    def run_folder(self, port: int) -> Path:
        """The working directory of the port's server."""
        return self.state / "run" / str(port)

    def new_run_folder(self, port: int) -> None:
        """Make it anew, with nothing of a server before in it. What is there is moved away first: that cannot fail half
        way, whatever it is, and what works in it still goes on where it is."""
        folder = self.run_folder(port)
        with self._writing():
            if os.path.lexists(folder):
                old = _temporary(folder)
                folder.rename(old)
                _remove(old)
            folder.mkdir(mode=0o700)

    def log_path(self, port: int) -> Path:
        return self.state / "logs" / f"{port}.log"

    # What engines said of themselves

    def engine_help(self, key: str) -> str | None:
        try:
            return files.read(self.state / "engines" / key, MAX_BYTES).decode()
        except (OSError, ValueError):
            return None

    def keep_engine_help(self, key: str, text: str) -> None:
        """Worth keeping, not worth failing for: it can be asked again."""
        with contextlib.suppress(OSError):
            folder = self.state / "engines"
            folder.mkdir(exist_ok=True, mode=0o700)
            write_durably(folder / key, text.encode())

    # Agreed settings

    @contextmanager
    def settling(self) -> Iterator[None]:
        """Alone with the agreed settings: from reading to writing them. Raises `Refused` (state_unwritable) and `Busy`
        (settings_locked)."""
        with self._writing(), alone(self.state, "settings"):
            yield

    def agreed(self) -> Settings | None:
        """The settings that this host was last agreed with; None if it never was. Raises `Refused`."""
        path = self.state / "host.json"
        try:
            data = _read(path)
            return None if data is None else settings_from_wire(_object(data))
        except OSError as error:
            raise state_unreadable(path, error) from None
        except ValueError as error:
            raise Refused(
                "host_json_unusable",
                f"the host's agreed settings {path} cannot be read",
                why=str(error)[:200],
                hint="agree anew: inv deploy",
            ) from None

    def agree(self, settings: Settings) -> None:
        with self._writing():
            write_durably(self.state / "host.json", json.dumps(settings.to_wire(), indent=2).encode())

    # History

    def history(self) -> list[dict[str, object]]:
        """What was remembered, oldest first; lines that cannot be read are skipped. The last megabytes of it.

        Raises `OSError`.
        """
        try:
            data = files.read_end(self.state / "history.jsonl", HISTORY_BYTES)
        except FileNotFoundError:
            return []
        found = []
        # The first may be only the end of a line, which is no object.
        for line in data.splitlines():
            with contextlib.suppress(ValueError):
                found.append(_object(line))
        return found

    def remember(self, **what: object) -> None:
        """Append a line to the history, in one write(2). Raises `OSError`."""
        line = (json.dumps({"at": now(), **what}) + "\n").encode()
        fd = files.open_file(self.state / "history.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            # Alone: half of another's line must not be taken for one that a full disk cut off, for which the next one
            # begins anew so that it is not lost too.
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
    """Whether a file is empty or its last byte ends a line."""
    size = os.fstat(fd).st_size
    return size == 0 or os.pread(fd, 1, size - 1) == b"\n"


def disk_failed(error: Exception) -> TypeGuard[OSError]:
    """Whether an error says that a disk is full, broken or not to be written."""
    return isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS}


def state_failed(error: Exception, state: Path) -> TypeGuard[OSError]:
    """Whether an error says that something in the state folder is not of the kind that it should be, or not ours."""
    if not isinstance(error, Unfit | NotADirectoryError | PermissionError | NoLocks):
        return False
    named = error.filename if isinstance(error.filename, str | bytes) else "/"
    return Path(os.fsdecode(named)).is_relative_to(state)


def state_unwritable(state: Path, error: OSError) -> Refused:
    return Refused(
        "state_unwritable",
        f"the state folder {state} cannot be written",
        why=said(error),
        hint=_what_helps(error, state, _STATE_ELSEWHERE),
    )


def state_unreadable(path: Path, error: OSError) -> Refused:
    elsewhere = _STATE_ELSEWHERE if isinstance(error, NoLocks) else ""
    return Refused(
        "state_unreadable",
        f"{path}, of the host's state, cannot be read",
        why=said(error),
        hint=elsewhere or files.remedy(error) or "repair it on the host, or move it away, then try again",
    )


_STATE_ELSEWHERE = "put the state folder on a local disk: `state` in hosts.yaml, then inv deploy"
