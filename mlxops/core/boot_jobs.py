"""Match the boot jobs of hosts.yaml (servers that the system starts) with the output of service managers. Pure.

Sources: launchctl(1), launchd.plist(5), systemctl(1), systemd.unit(5), systemd-escape(1), cgroups(7).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping

from mlxops.core.frozen import dataclass
from mlxops.core.ports import Standing

UNIT_TYPES = (".service", ".scope")
_TRIGGERS = (".timer", ".socket", ".path")
"""Units that start the service of the same name."""


# -- names -----------------------------------------------------------------------------------------------------------


def unit_of(label: str) -> str:
    """Return the systemd unit that a label names. `.service` may be omitted, and a timer stands for its service."""
    for trigger in _TRIGGERS:
        label = label.removesuffix(trigger)
    return label if label.endswith(UNIT_TYPES) else f"{label}.service"


def is_unit(label: str, unit: str) -> bool:
    """Whether a label names this unit. A template (`name@`) names all its instances. Escapes may be omitted."""
    if not label:
        return False
    wanted = unit_of(label).casefold()
    names = {unit.casefold(), _unescaped(unit).casefold()}
    template, at, rest = wanted.partition("@")
    if at and rest in {".service", ".scope"}:
        return any(name.startswith(f"{template}@") and name.endswith(rest) for name in names)
    return bool(names & {wanted, _unescaped(wanted)})


def _unescaped(unit: str) -> str:
    return re.sub(r"\\x([0-9a-fA-F]{2})", lambda match: chr(int(match[1], 16)), unit)


def in_user_manager(units: Iterable[str], above: Iterable[tuple[str, ...]] = ()) -> bool:
    """Whether a user's systemd runs a process, by the units that it is in and the commands of its ancestors."""
    managed = any(program_of(argv) == "systemd" and "--user" in argv for argv in above)
    return managed or any(unit.startswith("user@") for unit in units)


def same_label(one: str, other: str) -> bool:
    """Whether two labels are equal, ignoring case, as macOS does for file names."""
    return bool(one) and one.casefold() == other.casefold()


# -- commands for the operator ---------------------------------------------------------------------------------------


def bootout(domain: str, label: str) -> str:
    sudo = "sudo " if domain == "system" else ""
    return f"{sudo}launchctl bootout {shlex.quote(f'{domain}/{label}')}"


def systemctl(verb: str, unit: str, *, user: bool) -> str:
    return f"{'systemctl --user' if user else 'sudo systemctl'} {verb} {shlex.quote(unit)}"


# -- output of service managers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launched:
    """A job as `launchctl print` shows it."""

    pid: int | None = None
    state: str = ""
    path: str = ""

    @property
    def active(self) -> bool:
        return self.pid is not None or self.state in {"running", "spawning", "spawn scheduled"}


def launched(text: str) -> Launched:
    """Read `launchctl print DOMAIN/LABEL`. Only the job's own lines count. Its dictionaries are indented deeper."""
    own = re.compile(r"^(?:\t| {1,8})(pid|state|path) = (.*)$", re.MULTILINE)
    fields: dict[str, str] = {}
    for key, value in own.findall(text):
        fields.setdefault(key, value.strip())
    pid = fields.get("pid", "")
    return Launched(int(pid) if pid.isdecimal() else None, fields.get("state", ""), fields.get("path", ""))


def is_disabled(text: str, label: str) -> bool | None:
    """Whether `launchctl print-disabled DOMAIN` lists a label as disabled; None if it does not list the label."""
    line = re.search(rf'^\s*"{re.escape(label)}" => (\w+)', text, re.MULTILINE | re.IGNORECASE)
    return None if line is None else line[1] in {"disabled", "true"}


def properties(text: str) -> dict[str, str]:
    """Read `systemctl show --property=...`."""
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def standing_of_unit(shown: Mapping[str, str]) -> Standing:
    """Return the standing of a unit from the output of `systemctl show`."""
    load, active, sub = (shown.get(key, "") for key in ("LoadState", "ActiveState", "SubState"))
    if load == "not-found":
        return Standing.MISSING
    if active in {"active", "activating", "reloading"} and sub != "exited":
        return Standing.ACTIVE
    if load == "masked" or shown.get("UnitFileState", "").startswith("masked"):
        return Standing.DISABLED
    wanted = any(shown.get(key) for key in ("WantedBy", "RequiredBy", "TriggeredBy"))
    if active not in {"active", "deactivating"} and shown.get("UnitFileState") == "disabled" and not wanted:
        return Standing.DISABLED
    return Standing.LOADED if load else Standing.UNKNOWN


# -- commands of processes --------------------------------------------------------------------------------------------

SHELLS = frozenset({"sh", "bash", "zsh", "dash", "ksh", "fish", "ash", "csh", "tcsh", "nu", "login", "su"})
"""Differs from `servers.SHELLS`: `login` and `su` are included because they can run a command too."""
CARRIERS = frozenset(
    {
        *("tmux", "screen", "zellij", "ssh", "sshd", "sshd-session", "mosh-server", "watch"),
        *("vi", "vim", "nvim", "emacs", "nano", "code", "less", "more", "tail", "cat", "man", "git"),
    }
)
"""Programs whose arguments may name a script that they do not run. A terminal multiplexer shows its first command, and
an editor the file that it edits."""


def words_of(argv: tuple[str, ...]) -> Iterator[str]:
    """Yield the words of a command that may name the program or script that it runs, also in a shell's `-c` text."""
    program = program_of(argv)
    if program in CARRIERS:
        return
    for position, word in enumerate(argv):
        if word.startswith("-"):
            continue
        yield word
        before = argv[position - 1] if position else ""
        if program in SHELLS | {"env", "sudo", "caffeinate", "nohup"} and re.fullmatch(r"-[A-Za-z]*c", before):
            yield from words_in(word)


def words_in(text: str) -> list[str]:
    """Return the words of a shell command line, without operators."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        return list(lexer)
    except ValueError:  # an open quote: this is not shell
        return text.split()


def program_of(argv: tuple[str, ...]) -> str:
    """Return the name of a program, without the dash of a login shell."""
    return argv[0].rstrip(": ").rpartition("/")[2].removeprefix("-").partition(":")[0] if argv else ""
