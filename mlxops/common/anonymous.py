"""Take names of users, machines and folders, addresses and secrets out of a text for a public report."""

from __future__ import annotations

import getpass
import re
import socket

from mlxops.core.redaction import redact
from mlxops.core.text import clean

_PATH = r"(?<![\w.])/(?!(?:System|usr|bin|sbin|dev|proc|sys)/)[^\s:;,'\"()]+"
"""Not those of the system, which are the same everywhere."""
_ADDRESS = r"(?<![\w.])(?:(?!127\.)\d{1,3}(?:\.\d{1,3}){3})(?![\w.])"


def anonymous(text: str, length: int = 300) -> str:
    """Return the beginning of a text, without names, addresses, secrets and control characters."""
    text = redact(clean(text))
    for name in _names():
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", "NAME", text)
    return re.sub(_ADDRESS, "ADDRESS", re.sub(_PATH, "PATH", text))[:length]


def _names() -> set[str]:
    names = {socket.gethostname(), socket.gethostname().partition(".")[0]}
    try:
        names.add(getpass.getuser())
    except (OSError, KeyError):  # an account without an entry, as in a container
        pass
    return names - {""}
