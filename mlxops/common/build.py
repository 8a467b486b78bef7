"""Identify the code: the version, and a hash of the sources that run on the host."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from mlxops import __version__

try:
    from _blake2 import blake2b  # hashlib would load OpenSSL, which takes as long as all hashing
except ImportError:
    from hashlib import blake2b

PACKAGE = Path(__file__).resolve().parent.parent


def shipped() -> list[Path]:
    """Return the source files of an agent in a fixed order: the package itself, common, core and agent."""
    return [
        PACKAGE / "__init__.py",
        *sorted((PACKAGE / "common").rglob("*.py")),
        *sorted((PACKAGE / "core").rglob("*.py")),
        *sorted((PACKAGE / "agent").rglob("*.py")),
    ]


NOT_ENGINES = frozenset({"__init__", "argv", "base", "inspection", "installation"})
"""The modules of `agent/engines` that all engines share."""


@cache
def engines() -> tuple[str, ...]:
    """Return the names of the engines. Every other file of `agent/engines` is one."""
    files = (PACKAGE / "agent" / "engines").glob("*.py")
    return tuple(sorted(file.stem.replace("_", "-") for file in files if file.stem not in NOT_ENGINES))


@cache
def build_id() -> str:
    """Return `<version>+<12 hex digits>`. Equal ids mean equal version and equal shipped sources."""
    digest = blake2b(digest_size=6)
    for path in shipped():
        data = path.read_bytes()
        digest.update(f"{path.relative_to(PACKAGE).as_posix()}\0{len(data)}\0".encode())
        digest.update(data)
    return f"{__version__}+{digest.hexdigest()}"
