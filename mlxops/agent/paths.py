"""Absolute paths on this host, from the settings of a request."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path

from mlxops.common import files
from mlxops.core.drift import DriftCode
from mlxops.core.errors import Refused
from mlxops.core.frozen import dataclass
from mlxops.core.settings import AGREED, Settings

VOLUMES = ("/Volumes", "/mnt", "/media", "/run/media")
"""The folders in which macOS and Linux mount disks."""


@dataclass(frozen=True)
class HostPaths:
    settings: Settings
    hub: Path
    registry: Path
    state: Path
    differences: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """For a read: the saved settings that the request has otherwise, key -> (saved, requested)."""

    @property
    def connect_host(self) -> str:
        """The address at which the host itself reaches its servers."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.settings.bind, self.settings.bind)

    def url(self, port: int) -> str:
        """Return the URL at which the gateway reaches a server, as far as the host knows."""
        host = self.settings.address or self.connect_host
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def host_paths(settings: Settings, environ: Mapping[str, str]) -> HostPaths:
    """Make the paths absolute. Raises `Refused` (no_home) if one needs a home directory and there is none."""
    hub = _absolute(settings.hub, environ) if settings.hub else default_hub(environ)
    registry = _absolute(settings.registry, environ) if settings.registry else hub / "registry.json"
    return HostPaths(settings, hub, registry, _absolute(settings.state, environ))


def default_hub(environ: Mapping[str, str]) -> Path:
    """Return the folder in which huggingface_hub keeps its cache in this environment (see its `constants.py`)."""
    home = environ.get("HOME") or str(Path.home())
    cache = environ.get("XDG_CACHE_HOME", f"{home}/.cache")
    hf_home = _expanded(environ.get("HF_HOME", f"{cache}/huggingface"), home, environ)
    hub = environ.get("HF_HUB_CACHE", environ.get("HUGGINGFACE_HUB_CACHE", f"{hf_home}/hub"))
    return Path(_expanded(hub, home, environ))


def _expanded(path: str, home: str, environ: Mapping[str, str]) -> str:
    """Expand `~` and `$NAME` as os.path.expanduser and expandvars would in that environment."""
    if path == "~" or path.startswith("~/"):
        path = home + path[1:]
    return re.sub(r"\$(?:(\w+)|\{([^}]*)\})", lambda m: environ.get(m[1] or m[2], m[0]), path, flags=re.ASCII)


def _absolute(path: str, environ: Mapping[str, str]) -> Path:
    if path != "~" and not path.startswith("~/"):
        return Path(path)
    home = environ.get("HOME")
    if not home:
        raise Refused(
            "no_home",
            f"{path} cannot be found",
            why="HOME is not set in this session on the host",
            hint="use absolute paths in hosts.yaml",
        )
    return Path(home, path[2:])


def settings_differences(agreed: HostPaths, requested: HostPaths) -> dict[str, tuple[str, str]]:
    """Compare the settings that must be the same everywhere. Return those that differ: key -> (agreed, requested)."""
    pairs = {key: (_setting_text(agreed, key), _setting_text(requested, key)) for key in AGREED}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _setting_text(paths: HostPaths, key: str) -> str:
    if key in {"registry", "hub"}:
        return str(getattr(paths, key))
    value = getattr(paths.settings, key)
    return ", ".join(f"{port} {value[port]}" for port in sorted(value)) if key == "slots" else str(value)


def settings_differ(differences: Mapping[str, tuple[str, str]]) -> Refused:
    pairs = differences.items()
    listed = "; ".join(
        f"{key}: the host has {agreed!r}, hosts.yaml has {requested!r}" for key, (agreed, requested) in pairs
    )
    return Refused(
        "settings_differ",
        "hosts.yaml differs from the settings that this host has saved",
        why=listed,
        hint=DriftCode.SETTINGS_DIFFER.remedy,
        details={"differences": {key: list(pair) for key, pair in differences.items()}},
    )


def require_folder(folder: Path) -> None:
    """Check that a folder exists or may be created.

    Below the home directory it may be created with its parents: that is a fresh machine. Elsewhere, a missing parent or
    a place where disks are mounted means that a disk is missing. Files written there would fill the system's disk, and
    mounting the disk would hide them.

    Raises `Refused`: folder_missing if it must not be created, folder_closed if it may not be accessed.
    """
    why = missing_folder(folder)
    if why is not None:
        create = f"mkdir -p {shlex.quote(os.path.realpath(folder))}"
        raise Refused(
            "folder_missing",
            why,
            why="its disk may not be mounted; if mlxops created the folder, its files would fill the system's disk",
            hint=f"mount the disk, or correct hub and registry in hosts.yaml; or, to create {folder}: {create}",
        )


def missing_folder(folder: Path) -> str | None:
    """Return why a folder is missing and must not be created; None if it exists or may be created.

    Raises `Refused` (folder_closed).
    """
    real = Path(os.path.realpath(folder))
    if _is_folder(real):
        return None
    if link := files.dangling_link(folder):
        return f"{folder} is not there: {link} is a link to {os.path.realpath(link)}"
    if real.is_relative_to(os.path.realpath(Path.home())):
        return None
    if _is_folder(real.parent) and not any(real.is_relative_to(volume) for volume in VOLUMES):
        return None
    return f"{folder} is not there"


def _is_folder(path: Path) -> bool:
    try:
        return files.is_folder(path)
    except OSError as error:
        raise folder_closed(error, path) from None


def folder_closed(error: OSError, path: str | Path) -> Refused:
    """Return the error for a file or folder that may not be read."""
    return Refused(
        "folder_closed",
        f"{error.filename or path} cannot be read",
        why=files.describe_error(error),
        hint=files.remedy(error) or "repair it on the host, then try again",
    )
