"""The command line. Here is only what both a command and a completion need, which share no other module."""

from __future__ import annotations

import os


def names_folder() -> str:
    """Return the folder of the names for tab completion. If it exists, commands write them there."""
    cache = os.environ.get("XDG_CACHE_HOME") or ""
    return os.path.join(cache if os.path.isabs(cache) else os.path.expanduser("~/.cache"), "mlxops")
