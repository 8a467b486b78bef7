"""The protocol between control node and agent.

The control node writes one request, a JSON document on one line, to the agent's standard input. The agent writes one
event a line to its standard output: first `hello`, then any number of `note`, `phase`, `progress`, `line` and
`reached`, and one `done` or `failed` at the end. While standard input stays open, a request that only reads can be
repeated: `AGAIN` is the same request once more, and has its own `done` or `failed`. Every line begins with the same
marker, which distinguishes it from the output of a login shell. The events of a change are also recorded on the host:
`started` names that record, and its events follow. After a lost connection the control node asks for the rest of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import field

from mlxops.core import wire
from mlxops.core.command import AnyRequest, decode_request
from mlxops.core.errors import MlxopsError, error_from_wire
from mlxops.core.frozen import dataclass
from mlxops.core.hints import Commands, commands_from_wire, split
from mlxops.core.settings import Settings, settings_from_wire
from mlxops.core.tables import one_line
from mlxops.core.text import amount, duration

PROTOCOL = 1
MARKER = '{"mlxops":'
TICKET = re.compile(r"[0-9a-f]{8}")
MAX_LINE = 64 * 1024 * 1024
"""Bytes; a longer line is noise. The longest intended line is the `list` of the largest registry, 16 MiB. With entries
as mlxops writes them, its result has twice that size; with memory and problems in each row, four times. With empty
entries it can be longer. Then the agent sends the error result_too_long."""

AGAIN = b"\n"
HEARTBEAT = b".\n"
"""The control node is still connected and has no request now."""


@dataclass(frozen=True)
class Requester:
    """The user who sent the request, by the control node's account. Shown to people; never a permission."""

    user: str = "?"
    host: str = "?"
    by: str = ""
    """Who or what asked, as `MLXOPS_BY` said there: the name of an agent or a job."""

    def __str__(self) -> str:
        return f"{self.user}@{self.host}" + (f" ({self.by})" if self.by else "")

    def to_wire(self) -> dict[str, str]:
        return {"user": self.user, "host": self.host} | ({"by": self.by} if self.by else {})

    @staticmethod
    def from_wire(value: object) -> Requester:
        parts = value if isinstance(value, dict) else {}
        by = parts.get("by")
        name = short_name(by) if isinstance(by, str) else ""
        return Requester(str(parts.get("user", "?")), str(parts.get("host", "?")), name)


MAX_NAME = 64
"""Characters of `MLXOPS_BY` that are recorded."""


def short_name(text: str) -> str:
    """Return a name that comes from outside on one line, bounded, with its control characters escaped."""
    return one_line(text[:MAX_NAME])[:MAX_NAME]


@dataclass(frozen=True)
class Envelope:
    """A request with its context: the settings of its host, and the build and name of the control node."""

    request: AnyRequest
    settings: Settings
    build: str
    asker: Requester = field(default_factory=Requester)
    agreed: bool = False
    """Use the settings saved on the host instead of `settings`: `--local` without a hosts.yaml."""
    ticket: str = ""
    """Identifies the request. A second request with the same ticket follows the first one and does nothing itself."""
    heard: int = 0
    """Events of the operation's record that the control node received over an earlier connection."""

    def encode(self) -> bytes:
        return json.dumps(
            {
                "mlxops": PROTOCOL,
                "command": self.request.name,
                "args": wire.encode(self.request),
                "settings": self.settings.to_wire(),
                "build": self.build,
                "asker": self.asker.to_wire(),
                "agreed": self.agreed,
                "ticket": self.ticket,
                "heard": self.heard,
            },
            ensure_ascii=True,
        ).encode()


def decode_envelope(data: bytes) -> Envelope:
    """Raises `ValueError` for anything that is not a request of this protocol; `UnknownCommandError` is one."""
    try:
        body = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(body, dict) or body.get("mlxops") != PROTOCOL:
        raise ValueError(f"not a request of protocol {PROTOCOL}")
    command, args, settings = (body.get(key) for key in ("command", "args", "settings"))
    if not isinstance(command, str) or not isinstance(args, dict) or not isinstance(settings, dict):
        raise ValueError("a request has a command, args and settings")
    return Envelope(
        request=decode_request(command, args),
        settings=settings_from_wire(settings),
        build=str(body.get("build", "")),
        asker=Requester.from_wire(body.get("asker")),
        agreed=body.get("agreed") is True,
        ticket=_ticket(body.get("ticket")),
        heard=_count(body.get("heard")),
    )


def _ticket(value: object) -> str:
    return value if isinstance(value, str) and TICKET.fullmatch(value) else ""


_TOO_MUCH = 10**300
"""No real amount is that large. Larger integers cannot be converted to floats."""


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _TOO_MUCH else 0


def _is_size(value: object) -> bool:
    return type(value) is int and abs(value) < _TOO_MUCH


@dataclass(frozen=True)
class Hello:
    """The first event of an agent."""

    version: str
    build: str


@dataclass(frozen=True)
class Started:
    """The events of this operation's record follow, beginning with the first that the control node does not have."""

    operation: str


@dataclass(frozen=True)
class LogLine:
    """A line of a log, without its end and without control characters."""

    text: str
    mark: str = ""
    """With `--follow`: the position behind this line. A request with it continues there."""


@dataclass(frozen=True)
class Reached:
    """A position in a followed log, without a line."""

    mark: str


@dataclass(frozen=True)
class Note:
    """A sentence for people. `level`: info or warning."""

    message: str
    level: str = "info"
    commands: Commands = ()
    """The commands that the message names."""

    @classmethod
    def of(cls, text: str, level: str = "info") -> Note:
        """Return the note of a text whose commands are in backticks."""
        message, commands = split(text)
        return cls(message, level, commands)


@dataclass(frozen=True)
class Phase:
    """An operation enters a phase: resolve, download, check, stop, ending, start, proof, checks, commit."""

    name: str
    message: str


@dataclass(frozen=True)
class Progress:
    """Bytes done of a total; `total` is 0 if it is not known."""

    name: str
    done: int
    total: int

    rate: int = 0
    """Recent bytes a second; 0 if not known."""

    def __str__(self) -> str:
        """Return the known parts of `12.3 GB of 190 GB, 6%, 110 MB/s, 27 min left`."""
        if not self.total:
            return amount(self.done)
        parts = [f"{amount(self.done)} of {amount(self.total)}", f"{self.done * 100 // self.total}%"]
        if self.rate and self.done < self.total:
            parts += [f"{amount(self.rate)}/s", f"{duration((self.total - self.done) / self.rate)} left"]
        return ", ".join(parts)


@dataclass(frozen=True)
class Done:
    """The command's result as JSON. `command` is empty from older agents."""

    result: Mapping[str, object]
    command: str = ""


@dataclass(frozen=True)
class Failed:
    error: MlxopsError


Event = Hello | Started | LogLine | Reached | Note | Phase | Progress | Done | Failed


def encode_event(event: Event) -> str:
    """Return the event as a line without its end. It is pure ASCII, so it contains no escape sequence."""
    body: dict[str, object] = {"mlxops": PROTOCOL}
    match event:
        case Hello(version, build):
            body |= {"event": "hello", "version": version, "build": build}
        case Started(operation):
            body |= {"event": "started", "operation": operation}
        case LogLine(text, mark):
            body |= {"event": "line", "text": text, "mark": mark}
        case Reached(mark):
            body |= {"event": "reached", "mark": mark}
        case Note(message, level, commands):
            body |= {"event": "note", "level": level, "message": message}
            if commands:
                body["commands"] = [list(command) for command in commands]
        case Phase(name, message):
            body |= {"event": "phase", "name": name, "message": message}
        case Progress(name, done, total, rate):
            body |= {"event": "progress", "name": name, "done": done, "total": total, "rate": rate}
        case Done(result, command):
            body |= {"event": "done", "result": dict(result), "command": command}
        case Failed(error):
            body |= {"event": "failed", "error": error.to_wire()}
    return json.dumps(body, ensure_ascii=True, separators=(",", ":"))


def decode_event(line: str) -> Event | None:
    """Return the event of a line. Return None for noise, and for an unknown event of a later version."""
    if not line.startswith(MARKER):
        return None
    try:
        body = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(body, dict):
        return None
    match body.get("event"):
        case "hello":
            return Hello(str(body.get("version")), str(body.get("build")))
        case "started":
            return Started(str(body.get("operation")))
        case "line":
            return LogLine(str(body.get("text")), str(body.get("mark", "")))
        case "reached":
            return Reached(str(body.get("mark", "")))
        case "note":
            commands = commands_from_wire(body.get("commands"))
            return Note(str(body.get("message")), str(body.get("level", "info")), commands)
        case "phase":
            return Phase(str(body.get("name")), str(body.get("message")))
        case "progress" if _is_size(body.get("done")) and _is_size(body.get("total")):
            return Progress(str(body.get("name")), body["done"], body["total"], _count(body.get("rate")))
        case "done" if isinstance(body.get("result"), dict):
            return Done(body["result"], str(body.get("command", "")))
        case "failed" if isinstance(body.get("error"), dict):
            return Failed(error_from_wire(body["error"]))
    return None
