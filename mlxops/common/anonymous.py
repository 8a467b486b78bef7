"""Take names of users, machines and folders, addresses and secrets out of a text for a public report.

It hides rather too much than too little: a report goes to people who do not know what a name means.
"""

from __future__ import annotations

import getpass
import ipaddress
import os
import pwd
import re
import socket

from mlxops.core.redaction import redact
from mlxops.core.text import clean

_START = r"/(?!(?:System/(?!Volumes/)|usr/|bin/|sbin/|dev/|proc/|sys/))"
"""Not of the system's own paths, which are the same everywhere."""
_PART = r"[^\s:;,'\"()]"
_PATHS = (
    rf"(?<=')~?{_START}[^']+(?=')|(?<=\")~?{_START}[^\"]+(?=\")|(?<=\()~?{_START}[^():]+",
    # A space belongs to the path if what follows has a slash of its own: /Volumes/My Disk/hub.
    rf"(?<![\w.]){_START}{_PART}+(?:(?: [^\s:;,'\"()/]+){{1,4}}/{_PART}*)*",
)
_HOSTS = (
    r"[\w.+-]{1,100}@[A-Za-z][\w.-]{0,200}",
    r"(?<=host=')[^']+",
    r"(?<![\w.-])(?:[\w-]{1,63}\.){1,9}(?:local|lan|home|internal|corp|intranet|com|net|org|edu|gov)(?![\w-]|\.\w)",
)
_NUMBERS = r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|(?=(?:[0-9a-f]{0,4}:){2})[0-9a-f:]{2,39}(?:%\w+)?)(?![\w:]|\.\d)"
"""What may be an IPv4, IPv6 or hardware address. The time of day has colons, too."""
_HARDWARE = r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}"


def anonymous(text: str, length: int = 300) -> str:
    """Return the beginning of a text, without names, addresses, secrets and control characters."""
    text = redact(clean(text))
    for name in sorted(_names(), key=len, reverse=True):
        text = re.sub(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", "NAME", text, flags=re.IGNORECASE)
    for pattern in _PATHS:
        text = re.sub(pattern, "PATH", text)
    for pattern in _HOSTS:
        text = re.sub(pattern, lambda found: "NAME@NAME" if "@" in found[0] else "NAME", text)
    return re.sub(_NUMBERS, _hidden_address, text, flags=re.IGNORECASE)[:length]


def _hidden_address(found: re.Match[str]) -> str:
    try:
        address = ipaddress.ip_address(found[0])
    except ValueError:
        return "ADDRESS" if re.fullmatch(_HARDWARE, found[0], re.IGNORECASE) else found[0]
    return found[0] if address.is_loopback or address.is_unspecified else "ADDRESS"


def _names() -> set[str]:
    names = {socket.gethostname(), socket.gethostname().partition(".")[0]}
    try:
        names.add(getpass.getuser())
        account = pwd.getpwuid(os.getuid())
        full_name = account.pw_gecos.partition(",")[0].strip()
        names |= {account.pw_name, full_name, *full_name.split(), os.path.basename(account.pw_dir)}
    except (OSError, KeyError):  # an account without an entry, as in a container
        pass
    return {name for name in names if len(name) > 1}
