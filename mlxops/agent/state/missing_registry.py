"""Decide whether a missing registry file means an empty registry.

It does not if a link's target is gone, a disk is not mounted, a sync service replaced the file, or this host had a
registry before.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from mlxops.common import files

MAX_STATE_BYTES = 1024 * 1024
_REGISTRY_WRITERS = frozenset({"init", "load"})
"""Commands in the history that prove that there was a registry."""


def reason(configured: Path, real: Path) -> str | None:
    """Return why the missing file does not mean an empty registry; None if there may never have been one.

    `configured`: the path in the settings; `real`: the same with links resolved.
    """
    if link := files.dangling_link(configured):
        return f"{link} is a link to {os.path.realpath(link)}, which is not there; perhaps its disk is not mounted"
    placeholder = next(iter(_matching_files(real, _PLACEHOLDER)), None)
    if placeholder is not None:
        bring = f" (on a Mac: brctl download {shlex.quote(str(real))})" if placeholder.suffix == ".icloud" else ""
        return f"a sync service keeps only a placeholder of it on this host: {placeholder}{bring}"
    copies = conflicted_copies(real) or _matching_files(real, _OTHER_HOSTS)
    if copies:
        return f"it is gone, and a sync service left conflicted copies: {', '.join(map(str, copies[:3]))}"
    return None


def sync_service_hint(real: Path) -> str | None:
    """Return the beginning of a hint: how to undo what a sync service did. None if there is no sign of one."""
    if _matching_files(real, _PLACEHOLDER):
        return "have its sync service bring it back; or "
    copies = conflicted_copies(real) or _matching_files(real, _OTHER_HOSTS)
    if not copies:
        return None
    return f"put the right copy back: cp {shlex.quote(str(copies[0]))} {shlex.quote(str(real))}; or "


# How sync services rename a file: `{}` is the stem, `[]` the suffix.

_PLACEHOLDER = (
    r"\.{}[]\.icloud",  # iCloud Drive up to macOS 13
    r"{}[]\.(?:nextcloud|owncloud|cloud)",  # virtual files of Nextcloud and ownCloud; Synology
)
_CONFLICT = (
    r"{} ?\([^/]*\)[]",  # Dropbox, Nextcloud, Seafile, Google Drive: registry (Mini's conflicted copy 2026-01-31).json
    r"{} \d+[]",  # iCloud Drive: registry 2.json
    r"{}\.sync-conflict-[^/]*[]",  # Syncthing
    r"{}[._ -]+conflict[^/]*[]",  # ownCloud: registry_conflict-20260131-120000.json; Resilio: registry.Conflict.json
)
_OTHER_HOSTS = (
    r"{}-[^/]+[]",
)  # OneDrive: registry-MINI.json. Counts only if registry.json itself is gone: other files have such names, too.


def conflicted_copies(registry: Path) -> list[Path]:
    """Return the conflicted copies beside the registry."""
    return _matching_files(registry, _CONFLICT)


def _matching_files(registry: Path, patterns: Iterable[str]) -> list[Path]:
    stem, suffix = re.escape(registry.stem), re.escape(registry.suffix)
    compiled = [re.compile(text.replace("{}", stem).replace("[]", suffix), re.IGNORECASE) for text in patterns]
    try:
        names = os.listdir(registry.parent)
    except OSError:
        return []
    return [registry.parent / name for name in sorted(names) if any(pattern.fullmatch(name) for pattern in compiled)]


# Evidence of earlier registries in the state folder


def read_known_paths(file: Path) -> frozenset[str]:
    """Return the paths at which this host has had a registry, from registry.known.json."""
    try:
        paths = json.loads(files.read(file, MAX_STATE_BYTES))["paths"]
        return frozenset(path for path in paths if isinstance(path, str))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return frozenset()


def encode_known_paths(paths: Iterable[str]) -> bytes:
    return json.dumps({"paths": sorted(paths)}, indent=2).encode()


def older_state_shows_registry(state: Path) -> bool:
    """Return whether the state of an older mlxops, without registry.known.json, proves that there was a registry."""
    if os.path.lexists(state / "registry.previous.json"):
        return True
    try:
        data = files.read_end(state / "history.jsonl", MAX_STATE_BYTES)
    except OSError:
        return False
    return any(_proves_registry(line) for line in data.splitlines())


def _proves_registry(line: bytes) -> bool:
    try:
        return json.loads(line)["command"] in _REGISTRY_WRITERS
    except (ValueError, LookupError, TypeError, RecursionError):
        return False
