"""Where things are on this host: the settings of a request with their paths made absolute."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlxops.common import files
from mlxops.core.errors import Refused
from mlxops.core.settings import AGREED, Settings

VOLUMES = ("/Volumes", "/mnt", "/media", "/run/media")
"""Where macOS and Linux mount disks."""


@dataclass(frozen=True)
class HostPaths:
    settings: Settings
    hub: Path
    registry: Path
    state: Path

    @property
    def connect_host(self) -> str:
        """Where a server of this host is asked from the host itself."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.settings.bind, self.settings.bind)

    def url(self, port: int) -> str:
        """Where the gateway reaches a server, as far as the host knows."""
        host = self.settings.address or self.connect_host
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def host_paths(settings: Settings, environ: Mapping[str, str]) -> HostPaths:
    """Raises `Refused` (no_home) if a path needs a home directory and there is none."""
    hub = _absolute(settings.hub, environ) if settings.hub else default_hub(environ)
    registry = _absolute(settings.registry, environ) if settings.registry else hub / "registry.json"
    return HostPaths(settings, hub, registry, _absolute(settings.state, environ))


def default_hub(environ: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps its cache in this environment (its `constants.py`)."""
    home = environ.get("HOME") or str(Path.home())
    cache = environ.get("XDG_CACHE_HOME", f"{home}/.cache")
    hf_home = _expanded(environ.get("HF_HOME", f"{cache}/huggingface"), home, environ)
    hub = environ.get("HF_HUB_CACHE", environ.get("HUGGINGFACE_HUB_CACHE", f"{hf_home}/hub"))
    return Path(_expanded(hub, home, environ))


def _expanded(path: str, home: str, environ: Mapping[str, str]) -> str:
    """`~` and `$NAME`, as os.path.expanduser and expandvars would in that environment."""
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
            why="the host gave no HOME to this session",
            hint="give absolute paths in hosts.yaml",
        )
    return Path(home, path[2:])


def differences(agreed: HostPaths, asked: HostPaths) -> dict[str, tuple[str, str]]:
    """The settings on which all control nodes must agree and do not: key -> (agreed, asked)."""
    return {key: (mine, theirs) for key in AGREED if (mine := _shown(agreed, key)) != (theirs := _shown(asked, key))}


def _shown(paths: HostPaths, key: str) -> str:
    if key in {"registry", "hub"}:
        return str(getattr(paths, key))
    value = getattr(paths.settings, key)
    return ", ".join(f"{port} {value[port]}" for port in sorted(value)) if key == "slots" else str(value)


def settings_differ(found: Mapping[str, tuple[str, str]]) -> Refused:
    listed = "; ".join(f"{key}: agreed {mine!r}, asked {theirs!r}" for key, (mine, theirs) in found.items())
    return Refused(
        "settings_differ",
        "this request and the host do not agree on the host's settings",
        why=listed,
        hint="correct hosts.yaml, or agree anew: inv deploy",
        details={"differences": {key: list(pair) for key, pair in found.items()}},
    )


def require(folder: Path) -> None:
    """Raises `Refused`: folder_missing if a folder is not there and must not be made, folder_closed if that cannot be
    seen.

    Below the home directory it may be made, with all that leads to it: that is a fresh machine. Elsewhere only its
    parent's absence, or a place where disks are mounted, tells that a disk is missing; what was written there instead
    would fill the system's disk, and be hidden once the other one is back.
    """
    why = missing_folder(folder)
    if why is not None:
        make = f"mkdir -p {shlex.quote(os.path.realpath(folder))}"
        raise Refused(
            "folder_missing",
            why,
            why="perhaps its disk is not mounted; mlxops makes no such folder, or it would fill the system's disk",
            hint=f"mount the disk, or correct hub and registry in hosts.yaml; or, to make {folder}: {make}",
        )


def missing_folder(folder: Path) -> str | None:
    """Return a sentence if a folder is not there and must not be made; None if it is there or may be made.

    Raises `Refused` (folder_closed).
    """
    real = Path(os.path.realpath(folder))
    if _is_folder(real):
        return None
    if link := files.dangling_link(folder):
        return f"{folder} is not there: {link} is a link to {os.path.realpath(link)}"
    if real.is_relative_to(os.path.realpath(Path.home())):
        return None
    if _is_folder(real.parent) and not any(real.is_relative_to(host_paths) for host_paths in VOLUMES):
        return None
    return f"{folder} is not there"


def _is_folder(path: Path) -> bool:
    try:
        return files.is_folder(path)
    except OSError as error:
        raise closed(error, path) from None


def closed(error: OSError, path: str | Path) -> Refused:
    """Return the error for a file or folder that the system does not let us read."""
    return Refused(
        "folder_closed",
        f"{error.filename or path} cannot be read",
        why=files.said(error),
        hint=files.remedy(error) or "repair it on the host, then try again",
    )
