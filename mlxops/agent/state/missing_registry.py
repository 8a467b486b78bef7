"""Decide whether a missing registry file may be taken for an empty registry. It may not if a link's target is gone, a
disk is not mounted, a sync service replaced the file, or this host had one before."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from mlxops.common import files

MAX_BYTES = 1024 * 1024
_WRITERS = frozenset({"init", "load"})
"""The commands of the history after which there was a registry."""


def reason(configured: Path, real: Path) -> str | None:
    """Return why the missing file is not an empty registry; None if there may never have been one.

    `configured`: the path as the settings name it; `real`: the same without links.
    """
    if link := files.dangling_link(configured):
        return f"{link} is a link to {os.path.realpath(link)}, which is not there; perhaps its disk is not mounted"
    placeholder = next(iter(_named(real, _PLACEHOLDER)), None)
    if placeholder is not None:
        bring = f" (on a Mac: brctl download {shlex.quote(str(real))})" if placeholder.suffix == ".icloud" else ""
        return f"a sync service keeps only a placeholder of it on this host: {placeholder}{bring}"
    copies = conflicts(real) or _named(real, _OTHER_HOSTS)
    if copies:
        return f"it is gone, and a sync service left conflicted copies: {', '.join(map(str, copies[:3]))}"
    return None


def way_back(real: Path) -> str | None:
    """The beginning of a hint: how to undo what a sync service did; None: it did nothing that can be seen."""
    if _named(real, _PLACEHOLDER):
        return "have its sync service bring it back; or "
    copies = conflicts(real) or _named(real, _OTHER_HOSTS)
    if not copies:
        return None
    return f"put the right copy back: cp {shlex.quote(str(copies[0]))} {shlex.quote(str(real))}; or "


# What sync services make of a name: `{}` is the stem, `[]` the suffix.

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
)  # OneDrive: registry-MINI.json. Only counts if registry.json itself is gone: other files have such names, too.


def conflicts(registry: Path) -> list[Path]:
    """Return the conflicted copies beside the registry."""
    return _named(registry, _CONFLICT)


def _named(registry: Path, patterns: Iterable[str]) -> list[Path]:
    stem, suffix = re.escape(registry.stem), re.escape(registry.suffix)
    wanted = [re.compile(each.replace("{}", stem).replace("[]", suffix), re.IGNORECASE) for each in patterns]
    try:
        names = os.listdir(registry.parent)
    except OSError:
        return []
    return [registry.parent / name for name in sorted(names) if any(each.fullmatch(name) for each in wanted)]


# What the state folder says about earlier registries


def remembered(mark: Path) -> frozenset[str]:
    """Return the paths at which this host has had a registry."""
    try:
        paths = json.loads(files.read(mark, MAX_BYTES))["paths"]
        return frozenset(path for path in paths if isinstance(path, str))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return frozenset()


def encoded(paths: Iterable[str]) -> bytes:
    return json.dumps({"paths": sorted(paths)}, indent=2).encode()


def had_one_before_marks(state: Path) -> bool:
    """Whether the state of an older mlxops, which wrote no registry.known.json, shows that there was a registry."""
    if os.path.lexists(state / "registry.previous.json"):
        return True
    try:
        data = files.read_end(state / "history.jsonl", MAX_BYTES)
    except OSError:
        return False
    return any(_wrote(line) for line in data.splitlines())


def _wrote(line: bytes) -> bool:
    try:
        return json.loads(line)["command"] in _WRITERS
    except (ValueError, LookupError, TypeError, RecursionError):
        return False
