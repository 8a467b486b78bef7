"""Read and change registry.json: one writer at a time, each write durable, the version before kept as a backup."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlxops.agent.paths import require_folder
from mlxops.agent.state.durable_files import (
    check_replaceable,
    list_matching,
    read_if_exists,
    temporary_path,
    with_path,
    write_durably,
    write_remedy,
)
from mlxops.agent.state.locks import folder_lock
from mlxops.common import files
from mlxops.core import registry as registries
from mlxops.core.errors import Refused
from mlxops.core.registry import Registry

EMPTY_DOCUMENT = '{"version": 1, "models": {}}'


class RegistryFile:
    """registry.json at its configured path: one reader, one writer."""

    def __init__(self, path: Path, previous: Path) -> None:
        """`previous`: the file that gets the registry as it was before the last write."""
        self._configured = path
        # Follow a symlink: the link stays, and the file that it points to changes.
        self.path = Path(os.path.realpath(path))
        self._previous = previous
        self._known_paths_file = previous.with_name("registry.known.json")
        self._recorded = False

    def read(self) -> Registry:
        """Return the current registry; an `unwritable` one if the file cannot be read or has disappeared."""
        try:
            data = read_if_exists(self.path)
        except OSError as error:
            return Registry(raw={}, models={}, unwritable=f"{self.path} cannot be read: {error.strerror}")
        current = self._parse(data)
        if data is None and not current.missing:
            try:
                require_folder(self.path.parent)
            except Refused as refused:
                return _missing_registry(f"{refused.message}: {refused.why}")
        return current

    def _parse(self, data: bytes | None) -> Registry:
        why = self._why_missing() if data is None else None
        return registries.parse(data) if why is None else _missing_registry(why)

    def _why_missing(self) -> str | None:
        """Return why the absent file does not mean an empty registry; None if this host never had a registry."""
        from mlxops.agent.state import missing_registry

        why = missing_registry.reason(self._configured, self.path)
        if why is not None:
            return why
        known = missing_registry.read_known_paths(self._known_paths_file)
        if known & self._own_paths():
            return "it is gone: this host had a registry there before; perhaps its disk is not mounted"
        if not known and missing_registry.older_state_shows_registry(self._known_paths_file.parent):
            return "it is gone: the history of this host shows that it had one; perhaps its disk is not mounted"
        return None

    def conflicted_copies(self) -> list[Path]:
        """Return the conflicted copies that a sync service left beside an existing registry."""
        if len(list_matching(self.path.parent, self.path.stem)) < 2:
            return []
        from mlxops.agent.state.missing_registry import conflicted_copies

        return conflicted_copies(self.path)

    def _own_paths(self) -> set[str]:
        return {str(self._configured), str(self.path)}

    def record_existence(self) -> None:
        """Record in registry.known.json that this host has a registry here. Raises `OSError`."""
        if self._recorded or not os.path.lexists(self.path):
            return
        from mlxops.agent.state import missing_registry

        known = missing_registry.read_known_paths(self._known_paths_file)
        if not self._own_paths() <= known:
            write_durably(self._known_paths_file, missing_registry.encode_known_paths(known | self._own_paths()))
        self._recorded = True

    def update(self, change: Callable[[Registry], Registry]) -> Registry:
        """Run one transaction: lock, read, `change`, write if anything changed. Return what is then on disk.

        Raises `Refused` (registry_missing, registry_unusable, registry_unwritable) and `Busy` (registry_locked).
        """
        # Refuse before locking, which makes the folder.
        if not os.path.lexists(self.path) and (absent := self._parse(None)).missing:
            raise self.refusal(absent)
        with _report_unwritable(self.path), self._locked():
            data = read_if_exists(self.path)
            old = self._parse(data)
            if old.unwritable:
                raise self.refusal(old)
            new = change(old)
            if new.raw == old.raw:
                return old
            self._remove_leftovers()
            self._write(data, new.encode())
        with contextlib.suppress(OSError):
            self.record_existence()
        return new

    def _write(self, old: bytes | None, new: bytes) -> None:
        """Write the file. If the write cannot be made durable, undo it before reporting failure.

        Otherwise the file would show a change that was reported as failed.
        """
        mode = self.path.stat().st_mode & 0o777 if old is not None else 0o644
        if old is not None:
            with _report_unwritable(self._previous):
                self._back_up(old)
        try:
            write_durably(self.path, new, mode)
        except OSError:
            with contextlib.suppress(OSError):
                if old is None:
                    self.path.unlink(missing_ok=True)
                elif read_if_exists(self.path) != old:
                    write_durably(self.path, old, mode)
            raise
        if old is not None:
            with contextlib.suppress(OSError):
                os.chmod(self._previous, 0o600)

    def _back_up(self, old: bytes) -> None:
        """Hard-link the file that is about to be replaced: that saves a second write and flush.

        Copy it where hard links do not work: on another disk, or on a file system without them.
        """
        temporary = temporary_path(self._previous)
        try:
            os.link(self.path, temporary)
        except OSError:
            return write_durably(self._previous, old)
        try:
            os.replace(temporary, self._previous)
        finally:
            # It still exists after a failure. rename(2) also leaves it if both names already are the same file.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Remove temporary files of killed writers. Raises `Busy` (registry_locked), `OSError`."""
        if self.leftovers():
            with self._locked():
                self._remove_leftovers()

    def leftovers(self) -> list[Path]:
        """Return the temporary files beside the registry, including one that is being written now."""
        return list_matching(self.path.parent, f".{self.path.name}.", ".tmp")

    def read_usable(self) -> Registry:
        """Return the registry if it may be written; try no write. Raises `Refused` and `Busy` (registry_locked)."""
        require_folder(self._configured.parent)
        current = self.read()
        if current.unwritable:
            raise self.refusal(current)
        require_folder(self.path.parent)
        if self.path.parent.is_dir():
            with _report_unwritable(self.path), self._locked():
                pass
        return current

    def check_writable(self) -> Registry:
        """Check, before anything is started or stopped, that a write would succeed. Return the registry.

        Raises what `read_usable` raises.
        """
        current = self.read_usable()
        with _report_unwritable(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            check_replaceable(self.path)
        # A write fails if the backup cannot be made.
        with _report_unwritable(self._previous):
            check_replaceable(self._previous)
            self.record_existence()
        return current

    def refusal(self, current: Registry) -> Refused:
        """Return the error for a registry that must not be written, for the reason `current.unwritable`."""
        error = registries.refusal(current.unwritable or "", str(self.path), self._repair_hint(current))
        if current.missing:
            error.code, error.message = "registry_missing", f"the registry {self._configured} is not there"
        return error

    def _repair_hint(self, current: Registry) -> str:
        """Return what to do, with commands that work when typed."""
        from mlxops.agent.state import missing_registry

        if current.raw:
            return "repair it by hand, then try again"
        if not current.missing and (access := self._access_hint()):
            return access
        target, first, before = self.path, "repair it by hand; or ", ""
        if current.missing:
            first = missing_registry.sync_service_hint(self.path) or "put it back, or mount its disk; or "
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
            # Keep the old file: it may be possible to repair it.
            before = f"mv {shlex.quote(str(target))} {shlex.quote(f'{target}.away')} && "
        file, previous = shlex.quote(str(target)), shlex.quote(str(self._previous))
        ways = [f"begin with an empty one: {before}echo '{EMPTY_DOCUMENT}' > {file}"]
        if os.path.isfile(self._previous):
            ways.insert(0, f"go back to the version before its last change: {before}cp {previous} {file}")
        return first + "; or ".join(ways)

    def _access_hint(self) -> str | None:
        """Return what helps if reading the file fails; None if it can be read, or if no remedy is known."""
        try:
            read_if_exists(self.path)
        except OSError as error:
            return files.remedy(with_path(error, self.path))
        return None

    def _remove_leftovers(self) -> None:
        """Remove temporary files of killed writers. Call with the lock held: then no living process writes."""
        for leftover in self.leftovers():
            with contextlib.suppress(OSError):
                leftover.unlink()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # Lock the folder, not the file: every write replaces the file.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with folder_lock(self.path.parent, "registry"):
            yield


def _missing_registry(why: str) -> Registry:
    return Registry(raw={}, models={}, unwritable=why, missing=True)


@contextmanager
def _report_unwritable(path: Path) -> Iterator[None]:
    """Turn an `OSError` into `Refused` (registry_unwritable) that names `path`."""
    try:
        yield
    except OSError as error:
        raise Refused(
            "registry_unwritable",
            f"the registry cannot be written: {path}",
            why=error.strerror or str(error),
            hint=write_remedy(
                error, path, "put the registry on a local disk: `registry` in hosts.yaml, then `mlxctl deploy`"
            ),
        ) from None
