"""What mlxops knows of a server program. A further engine is one more file in `engines`, like `mlx_lm.py`."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import socket
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mlxops.common import files
from mlxops.core.errors import Refused
from mlxops.core.model_options import Option
from mlxops.core.ports import Health
from mlxops.core.registry import Model
from mlxops.core.text import utf8

MAX_BODY = 1024 * 1024
MAX_TEMPLATE = 1024 * 1024
"""Bytes; the longest chat templates have some thirty thousand."""
USUAL_FOLDERS = ("/opt/homebrew/bin", "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin")


@dataclass(frozen=True)
class Command:
    """How an engine is started: the argv before its options, and where that was found."""

    argv: tuple[str, ...]
    source: str
    version: str | None = None
    """Where it is a plain installation, which tells without being run."""
    help: str | None = None
    """What it says about its own options, if it was asked."""


@dataclass(frozen=True)
class Serving:
    """One model to be served: everything that an engine's options are made of."""

    model: Model
    alias: str
    path: Path
    bind: str
    port: int
    folder: Path
    """A folder of the server's own; its working directory."""
    options: tuple[Option, ...] = ()
    """The model's own options and its family's; paths among them are absolute."""

    def text(self, key: str) -> str | None:
        """The value of a textual option; None if it is absent or switched off."""
        return next((o.value for o in self.options if o.key == key and isinstance(o.value, str)), None)

    def has(self, key: str) -> bool:
        """Whether the option is given; a null that switches it off counts."""
        return any(option.key == key for option in self.options)


@dataclass(frozen=True)
class DetectedServer:
    """What the argv of a process that is an engine's program says."""

    port: int | None
    """The port that it was given; None if the argv does not say. It may listen on another one."""
    model: str
    """As the argv names it: a path, a repo id or an alias."""
    host: str | None


@dataclass(frozen=True)
class Names:
    """The model names that a running server accepts for the model that it has loaded."""

    known: tuple[str, ...] = ()
    """The first is the one to use. Empty: argv and version do not show them."""
    any: bool = False
    """It accepts any name."""
    sure: bool = True
    """False: the argv could also belong to an older version, which accepts any name."""
    drops: bool = True
    """A request with an unknown name makes it drop the model that it holds."""
    not_asked: str = ""
    """Why it must not be asked for a completion; empty if it may be."""


class Engine(Protocol):
    name: str
    distribution: str
    """The name of its Python package, as its folder of metadata begins."""
    completion_paths: frozenset[str]
    """The paths at which its servers give completions."""
    reserved: frozenset[str]
    """Options that belong to mlxops; refused in a model's `args`."""
    needs: frozenset[str]
    """Options of a known family that it has to be told; what it finds out by itself is not among them."""
    drains: bool
    """Asked to end, it lets open requests finish first."""

    def command(self, launch: Sequence[str], environ: Mapping[str, str]) -> Command:
        """Where it is. `launch` is the configured argv, empty for none. Raises `Refused` (engine_not_found)."""

    def inquiry(self, command: Command, serving: Serving) -> tuple[str, ...]:
        """The argv that makes it print its options, if `argv` needs to know them; else empty."""

    def argv(self, command: Command, serving: Serving) -> tuple[str, ...]:
        """The complete argv. Raises `Refused` for options that it cannot be given."""

    def prepare(self, serving: Serving) -> None:
        """What must be in the server's folder before it starts."""

    def environment(self) -> Mapping[str, str]:
        """Variables that it needs beyond the plain ones."""

    def recognise(self, argv: Sequence[str]) -> DetectedServer | None:
        """Return what the argv says if the process runs this engine's server program (see `program`); else None."""

    def served_name(self, argv: Sequence[str]) -> str | None:
        """The name under which a server with this argv serves its model."""

    def any_name(self, version: str | None) -> bool:
        """Whether this version answers whatever name a request has. An unknown version is taken for a recent one."""

    def further_names(self, version: str | None) -> tuple[str, ...]:
        """Return further names that a server of this version accepts for the model that it was started with."""

    def names(self, argv: Sequence[str], version: str | None) -> Names:
        """Return the names that a running server with this argv accepts. `version` None: not known."""

    def health(self, host: str, port: int, timeout: float) -> Health:
        """The cheap probe. Never loads, evicts or generates anything."""

    def fatal(self, log: str) -> str | None:
        """The line of a log's end that says that loading failed, for servers that stay up all the same."""


def installed_version(argv: Sequence[str], distribution: str) -> str | None:
    """The version of the package that is run; None where that cannot be told without running it."""
    return version_in(site_packages(argv, distribution), distribution)


def site_packages(argv: Sequence[str], distribution: str) -> Path | None:
    """The folder in which the package of the program that is run is installed; None where that cannot be told.

    Beside the program itself, behind its link, or in the environment of the project that a launcher is given.
    """
    key = (tuple(argv[:6]), distribution)
    if _looked_up is None:
        return _look_up(*key)
    if key not in _looked_up:
        _looked_up[key] = _look_up(*key)
    return _looked_up[key]


_looked_up: dict[tuple[tuple[str, ...], str], Path | None] | None = None


@contextmanager
def each_looked_up_once() -> Iterator[None]:
    """While it is entered, no installation is looked for twice: ten servers of one engine are one installation."""
    global _looked_up  # noqa: PLW0603 - for this one thread and this one look
    _looked_up = {}
    try:
        yield
    finally:
        _looked_up = None


def _look_up(words: tuple[str, ...], distribution: str) -> Path | None:
    for word in words:
        for top in installation_folders(Path(word)):
            for site in sorted(top.glob("lib/python3*/site-packages")):
                if any(site.glob(f"{distribution}-*.dist-info")):
                    return site
    return None


def installation_folders(path: Path) -> Iterator[Path]:
    """Where the installation that a program or a project belongs to may be."""
    if not path.is_absolute() or not os.path.exists(path):
        return
    if os.path.isdir(path):
        yield path / ".venv"
    else:
        yield path.parent.parent
        yield Path(os.path.realpath(path)).parent.parent


def older_than(since: tuple[int, int], version: str | None) -> bool:
    """Whether a version is older than `since`. An unknown version counts as recent."""
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < since


def version_in(site: Path | None, distribution: str) -> str | None:
    """From the name of its metadata folder (PyPA, "Recording installed projects"): asking the program itself takes
    as long as starting it."""
    found = sorted(site.glob(f"{distribution}-*.dist-info")) if site else []
    return found[0].name.removeprefix(f"{distribution}-").removesuffix(".dist-info") if found else None


def search_path(environ: Mapping[str, str]) -> str:
    """The folders in which a program is looked for. SSH gives next to nothing, so the usual ones are added."""
    home = environ.get("HOME", "")
    own = [f"{home}/.local/bin", f"{home}/bin"] if home else []
    return os.pathsep.join(dict.fromkeys([*environ.get("PATH", "").split(os.pathsep), *own, *USUAL_FOLDERS]))


def which(program: str, environ: Mapping[str, str]) -> str | None:
    return shutil.which(program, path=search_path(environ))


def expand(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[str, ...]:
    """A configured argv with `~/` expanded and its program made absolute."""
    home = environ.get("HOME", "~")
    parts = [f"{home}/{part[2:]}" if part.startswith("~/") else part for part in argv]
    if "/" not in parts[0]:
        parts[0] = which(parts[0], environ) or parts[0]
    return tuple(parts)


def runnable(argv: Sequence[str], source: str) -> Command:
    """Raises `Refused` if the program of `argv` is not an executable file."""
    if not (os.path.isfile(argv[0]) and os.access(argv[0], os.X_OK)):
        raise Refused(
            "engine_not_found",
            f"the engine's program {argv[0]!r} is not there",
            why=f"it is what {source} says",
            hint="correct it, or install the program there",
        )
    return Command(tuple(argv), source)


def split(text: str, variable: str) -> list[str]:
    try:
        parts = shlex.split(text)
    except ValueError as error:
        parts, why = [], str(error)
    else:
        why = "it is empty"
    if not parts:
        raise Refused(
            "bad_launch_command",
            f"{variable} on the host is not a command",
            why=why,
            hint=f"set {variable} to a complete command, or unset it",
        )
    return parts


def template_text(path: str | Path) -> str:
    """A chat template, which an entry of the registry names. Raises `OSError`; `ValueError` if it is not text."""
    return utf8(files.read(path, MAX_TEMPLATE))


def options(argv: Sequence[str]) -> dict[str, str]:
    """The long options of an argv with their values, `--a b` and `--a=b` alike; the last one wins."""
    found: dict[str, str] = {}
    for index, word in enumerate(argv):
        if word.startswith("--"):
            key, equals, value = word.partition("=")
            following = argv[index + 1] if index + 1 < len(argv) else ""
            found[key] = value if equals else following
    return found


@dataclass(frozen=True)
class Program:
    """What a process runs: a file, or a module of Python, and the words that it was given."""

    path: str
    """Empty for a module."""
    module: str
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        return os.path.basename(self.path) or self.module


_PYTHON = re.compile(r"(python|pypy)[\d.]*[a-z]?", re.IGNORECASE)
_WITH_VALUE = {"-W", "-X", "--check-hash-based-pycs"}
"""Options of Python's own whose value may be the next word (`python --help`)."""


def program(argv: Sequence[str]) -> Program | None:
    """Return the program that a process with this argv runs: its first word, or its Python's script or module.

    Later words do not count: tmux, ssh and editors have other commands in their arguments.
    """
    if not argv or not argv[0]:
        return None
    if not _PYTHON.fullmatch(os.path.basename(argv[0])):
        return Program(argv[0], "", tuple(argv[1:]))
    rest = iter(enumerate(argv[1:], 2))
    for following, word in rest:
        if not word.startswith("-"):
            return Program(word, "", tuple(argv[following:]))
        if word in _WITH_VALUE:
            next(rest, None)
        elif not word.startswith("--"):
            # Short options may share a word: -um MODULE, -ImMODULE. What follows -c is code, not a program.
            letters = re.match(r"-[^cmWX]*([cmWX]?)(.*)", word, re.DOTALL)
            letter, attached = letters.groups() if letters else ("", "")
            if letter == "m":
                module = attached or next((value for _, value in rest), "")
                return Program("", module, tuple(argv[following + (not attached) :])) if module else None
            if letter == "c":
                return None
            if letter and not attached:
                next(rest, None)
    return None


def abbreviated(argv: Sequence[str], option: str, shortest: int) -> str | None:
    """Return the value of an option of an argparse program; `shortest`: the letters to which it may be shortened."""
    value = None
    for key, given in options(argv).items():
        if len(key) >= shortest and option.startswith(key):
            value = given
    return value or None


def port_number(text: str) -> int | None:
    """The port that an option of somebody's process names; None if it is none."""
    return int(text) if text.isdecimal() and len(text) <= 5 else None


def check_args(engine: str, model: Model, reserved: frozenset[str], help: str | None) -> None:
    """Raises `Refused` if a model's own arguments take what belongs to mlxops, or abbreviate it; or if the engine does
    not know one. `help` is what it says of its options; None: it was not asked."""
    known = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", help or ""))
    for index, word in enumerate(model.args):
        key = word.partition("=")[0]
        if help is not None and re.match("--[a-z]", key) and not any(each.startswith(key) for each in known):
            raise Refused(
                "unknown_argument",
                f"the model's args contain {key!r}, which the installed {engine} does not know",
                why="its --help does not mention it",
                hint=f"take it out: {_without(model, index)}; or correct it{_perhaps(key, known)}",
            )
        taken = next((r for r in reserved if key == r or (len(key) > 2 and r.startswith(key))), None)
        if taken:
            raise Refused(
                "reserved_argument",
                f"the model's args contain {key!r}",
                why=f"{taken} of {engine} is set by mlxops",
                hint=f"take it out: {_without(model, index)}",
            )


_NOT_SENT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL, errno.EPERM, errno.EACCES}
"""No descriptor, memory, or local port is left for a connection, or a filter of this host forbids it."""


class NotSent(Exception):
    """A request could not be sent for reasons of our own, which tell nothing of the server."""


def _without(model: Model, index: int) -> str:
    """Return the command that removes the argument at `index`, with its value, from a model's args."""
    word, after = model.args[index], model.args[index + 1 : index + 2]
    count = 2 if "=" not in word and after and not after[0].startswith("-") else 1
    left = [*model.args[:index], *model.args[index + count :]]
    return f"mlxctl set --model {model.name} --set {shlex.quote('args=' + shlex.join(left))}"


def _perhaps(key: str, known: Collection[str]) -> str:
    import difflib

    close = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def get_status(host: str, port: int, path: str, timeout: float) -> int | None:
    """The HTTP status of a GET; None if there was no answer within `timeout` seconds altogether. Raises `NotSent`.

    By hand, because `status` asks this, and http.client imports TLS and mail, which takes longer than all the asking.
    """
    name = f"[{host}]" if ":" in host else host
    request = f"GET {path} HTTP/1.1\r\nHost: {name}:{port}\r\nConnection: close\r\n\r\n"
    answer = b""
    deadline = time.monotonic() + timeout
    try:
        with socket.create_connection((host, port), timeout) as connection:
            connection.sendall(request.encode())
            # To its end, although the first line is enough: a server whose answer is cut off writes that into its log.
            while len(answer) < MAX_BODY and (left := deadline - time.monotonic()) > 0:
                connection.settimeout(left)  # it is for one read, and a byte each second would never end
                if not (part := connection.recv(65536)):
                    break
                answer += part
    except OSError as error:
        if error.errno in _NOT_SENT:
            raise NotSent(str(error)) from None
        # Else it may have answered, and kept the connection open all the same.
    status = re.match(rb"HTTP/1\.[01] (\d{3})\b", answer)
    return int(status[1]) if status else None


def status_health(host: str, port: int, timeout: float) -> Health:
    """What the status of GET /health says: 200 serves, another is broken, none is silence."""
    try:
        status = get_status(host, port, "/health", timeout)
    except NotSent:
        return Health.NOT_ASKED
    match status:
        case None:
            return Health.SILENT
        case 200:
            return Health.SERVING
        case _:
            return Health.BROKEN


class NoCompletion(Exception):
    """The server answered, but not with a completion; the text says with what."""


def complete(host: str, port: int, model: str, timeout: float) -> dict[str, object]:
    """One small chat completion, within `timeout` seconds altogether.

    Raises `OSError` when there was no answer, `NoCompletion` when it was another one.
    """
    import http.client

    from mlxops.common.http import answer_until, completion, question

    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    connection.response_class = answer_until(time.monotonic() + timeout)
    try:
        connection.request("POST", "/v1/chat/completions", question(model), {"Content-Type": "application/json"})
        response = connection.getresponse()
        data = response.read(MAX_BODY)
        status = response.status
    except http.client.HTTPException as error:
        raise NoCompletion(f"it does not speak HTTP: {type(error).__name__}") from None
    finally:
        connection.close()
    if status != 200:
        raise NoCompletion(f"it answered {status}: {data[:300].decode(errors='replace')}")
    answer = completion(data)
    if answer is None:
        raise NoCompletion(f"it answered 200 without a completion: {data[:300].decode(errors='replace')}")
    return answer
