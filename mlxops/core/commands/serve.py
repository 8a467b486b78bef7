"""`serve`: watch the hosts, and export what is seen for Prometheus."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence

from mlxops.core import names
from mlxops.core.command import Group, Hosts, Request, option
from mlxops.core.errors import UsageError
from mlxops.core.frozen import dataclass
from mlxops.core.replies import HostReply

SHORTEST_INTERVAL = 1.0
FILES = ("alerts", "dashboard")


@dataclass(frozen=True)
class Address:
    """Where to listen."""

    host: str
    port: int

    @property
    def loopback(self) -> bool:
        return ipaddress.ip_address(self.host).is_loopback

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _address(text: str) -> Address:
    """Raises `UsageError` (bad_address). A host name is refused: it may have several addresses."""
    found = re.fullmatch(
        r"\[(?P<v6>[0-9a-fA-F:.]+)\]:(?P<a>[0-9]{1,5})|(?P<v4>[0-9.]+):(?P<b>[0-9]{1,5})", text, re.ASCII
    )
    host, port = (found["v6"] or found["v4"], int(found["a"] or found["b"])) if found else ("", 0)
    try:
        if port < 65536:
            return Address(str(ipaddress.ip_address(host)), port)
    except ValueError:
        pass
    why = "it is an IP address and a port"
    raise UsageError(
        "bad_address", f"{names.shown(text)} is not an address", why=why, hint="for example: 127.0.0.1:8190"
    )


def _interval() -> Callable[[str], float]:
    def parse(text: str) -> float:
        seconds = names.seconds(text, "--interval")
        if seconds < SHORTEST_INTERVAL:
            why = "each look asks every server for its health"
            raise UsageError(
                "bad_duration", f"--interval {text} is too short", why=why, hint="for example: --interval 10"
            )
        return seconds

    return parse


def _file(text: str) -> str:
    if text in FILES:
        return text
    why = f"it is one of: {', '.join(FILES)}"
    raise UsageError(
        "unknown_file", f"there is no file {names.shown(text)}", why=why, hint="for example: --print alerts"
    )


def _names(text: str) -> str:
    for name in text.split(","):
        if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", name, re.ASCII):
            why = "it is a host name, as in the URL of a client"
            raise UsageError(
                "bad_name", f"{names.shown(name)} is not a name", why=why, hint="for example: --known-as mini.lan"
            )
    return text


@dataclass(frozen=True)
class ServeResult:
    text: str = ""
    """With `--print`: the file."""


@dataclass(frozen=True)
class Serve(Request[ServeResult], group=Group.LOOK, example="mlxctl serve", hosts=Hosts.ALL):
    """Watch all hosts, and serve what is seen to Prometheus."""

    address: Address = option(
        "IP address and port to listen on (127.0.0.1:8190)",
        default=Address("127.0.0.1", 8190),
        parse=_address,
        sent=False,
    )
    token_file: str | None = option(
        "file with the token that clients must send; needed for an address that is not loopback", sent=False
    )
    known_as: str | None = option("further names by which clients may ask for this machine", parse=_names, sent=False)
    interval: float = option("seconds between two looks at a host (10)", default=10.0, parse=_interval(), sent=False)
    print: str | None = option(
        "print the alert rules or the Grafana dashboard: alerts or dashboard", parse=_file, sent=False
    )


def show(replies: Sequence[HostReply[ServeResult]]) -> str:
    return "\n".join(reply.result.text.rstrip("\n") for reply in replies if reply.result)
