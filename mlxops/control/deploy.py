"""Install this tree's agent on a host that has only SSH and, somewhere, Python 3.11 or uv.

Two steps. A shell script looks for a Python interpreter: no other language is certain to exist. That interpreter then
runs `agent/install.py`, which is sent together with the sources. Both programs arrive on standard input. Values are
passed as arguments and never become part of a program's text.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import field
from pathlib import Path

from mlxops.common.build import PACKAGE, build_id, shipped
from mlxops.control.channel import NOISE_BYTES, ConnectionLost, Ended, ReadLimits, Transport, events
from mlxops.control.inventory import Host
from mlxops.core.errors import AgentProblem, OutcomeUnknown, UsageError
from mlxops.core.frozen import dataclass
from mlxops.core.protocol import Done, Failed, Note

AGENT_DEPENDENCIES = ("huggingface_hub", "psutil")
"""The dependencies of mlxops that the agent uses."""
SEARCH_FOLDERS = (
    "PATH",
    "/opt/homebrew/bin",
    "/usr/local/bin",
    "/usr/bin",
    "~/.local/bin",
    "~/.cargo/bin",
    "~/.pyenv/versions/*/bin",
    "~/.local/share/uv/python/*/bin",
)
"""Folders, or patterns of folders, in which to look for Python and uv. PATH stands for the folders of the host's
PATH."""
UV_PYTHON = "3.12"
"""The version that uv installs if there is no Python."""
SILENCE_SECONDS = 300.0
"""Longest time without output: pip prints nothing while it downloads."""
_FOUND = "mlxops-found"

FIND = r"""
say() { printf 'mlxops-found\t%s\t%s\t%s\n' "$1" "$2" "${3-}"; }
here() {
    say looked "$1"
    [ -x "$1/uv" ] && say uv "$1/uv"
    for name in python3.13 python3.12 python3.11 python3; do
        [ -x "$1/$name" ] || continue
        # Apple's Python is 3.9, or a stub that opens a dialog on the Mac's screen.
        [ "$1/$(uname -s)" = /usr/bin/Darwin ] && continue
        about=$("$1/$name" -I -c 'import sys
if sys.version_info < (3, 11): print("old"); sys.exit()
try: import venv, ensurepip; print("whole")
except ImportError: print("bare")' </dev/null 2>/dev/null) || about=broken
        say "$about" "$1/$name"
        [ "$about" = whole ] && exit 0
    done
}
for place in "$@"; do
    if [ "$place" = PATH ]; then
        IFS=:
        for folder in $PATH; do here "$folder"; done
    else
        IFS=
        for folder in $place; do here "$folder"; done
    fi
done
"""
# The first argument is the length of the program on standard input. The archive follows it.
_START_INSTALLER = "import sys; exec(compile(sys.stdin.buffer.read(int(sys.argv[1])), 'install', 'exec'))"


@dataclass
class SearchResult:
    """Folders, Python interpreters and uv programs on the host, in the order of the search."""

    looked: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    bare: list[str] = field(default_factory=list)
    """Python without venv or ensurepip, as on Debian. Enough if there is uv."""
    old: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    uv: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DeployOptions:
    """The options of a deploy."""

    mlxctl: bool = False
    """Also install the control part, and `mlxctl` in the user's folder of programs."""
    wheels: Path | None = None
    """A folder with all the wheels that the agent needs, for a host without a package index."""
    rollback: bool = False
    """Return to the build before instead."""
    dry_run: bool = False
    by: str = "?"


def install(
    transport: Transport,
    host: Host,
    note: Callable[[str], None],
    *,
    places: Sequence[str] = SEARCH_FOLDERS,
    options: DeployOptions = DeployOptions(),
) -> dict[str, object]:
    """Install the agent of this tree, unless it is installed. Return `{build, python, changed, seconds, path, ...}`.

    Raises `AgentProblem` no_python or install_failed, `UsageError` no_wheels, and `OutcomeUnknown` when the connection
    broke. A repeated deploy is always safe.
    """
    started = time.monotonic()
    build = build_id()
    try:
        search = find_interpreters(transport, places)
        uv = search.uv[0] if search.uv else ""
        python = _choose(transport, host, search, uv, note)
        if not options.dry_run:
            note("returning to the build before" if options.rollback else f"{build}, with {python}")
        result = _run_installer(
            transport, host, python, options, _installer_options(options, build, uv, python in search.whole), note
        )
    except ConnectionLost as error:
        raise OutcomeUnknown(
            "deploy_interrupted",
            f"the connection to {host.name} broke during deploy",
            why=str(error),
            hint="run deploy again, it continues; the agent in use is unchanged",
        ) from error
    return {
        **result,
        "seconds": round(time.monotonic() - started, 3),
        "own_build": build,
    }


def _installer_options(options: DeployOptions, build: str, uv: str, whole: bool) -> dict[str, object]:
    """Return the installer's `Options` as JSON."""
    return {
        "build": build,
        "uv": None if whole else uv or None,
        "requirements": requirements(),
        "control": control_requirements(),
        "by": options.by,
        "mlxctl": options.mlxctl,
        "wheels": options.wheels is not None,
        "rollback": options.rollback,
        "dry_run": options.dry_run,
    }


def requirements() -> list[str]:
    """Return the agent's dependencies, with the pins of mlxops."""
    return [_pinned()[name] for name in AGENT_DEPENDENCIES]


def control_requirements() -> list[str]:
    """Return the other dependencies, which only the control part needs."""
    return [requirement for name, requirement in _pinned().items() if name not in AGENT_DEPENDENCIES]


def _pinned() -> dict[str, str]:
    from importlib.metadata import requires

    requirements = [line for line in requires("mlxops") or () if "extra ==" not in line]
    names = [re.split(r"[^A-Za-z0-9_.-]", line)[0].replace("-", "_").lower() for line in requirements]
    return dict(zip(names, requirements, strict=True))


def archive(wheels: Path | None = None) -> bytes:
    """Return a tar of the sources and wheels. Equal files give equal bytes. Raises `UsageError` (no_wheels)."""
    files = {f"mlxops/{path.relative_to(PACKAGE).as_posix()}": path for path in [*shipped(), *_control_sources()]}
    if wheels is not None:
        paths = sorted(wheels.glob("*.whl"))
        if not paths:
            raise UsageError(
                "no_wheels",
                f"there is no wheel in {wheels}",
                why="--wheels names a folder with all the wheels that the agent needs",
                hint=f"on a machine like the host: pip download -d {shlex.quote(str(wheels))} --only-binary=:all: "
                "huggingface_hub psutil",
            )
        files |= {f"wheels/{path.name}": path for path in paths}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, path in files.items():
            data = path.read_bytes()
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o600
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _control_sources() -> list[Path]:
    """The rest of the package, for `--mlxctl`: the control part and the manual."""
    folders = (PACKAGE / name for name in ("cli", "control"))
    return [
        *(path for folder in folders for path in sorted(folder.rglob("*.py"))),
        *sorted(PACKAGE.glob("[!_]*.py")),
        *sorted((PACKAGE / "docs").glob("*.md")),
    ]


def find_interpreters(transport: Transport, places: Sequence[str], seconds: float = SILENCE_SECONDS) -> SearchResult:
    """Find Python and uv on a host. Raises `AgentProblem` (no_python) if it runs no shell script, `TooSlow`."""
    lines, ended = run_program(transport, ["/bin/sh", "-s", "--", *places], FIND.encode(), seconds)
    search = SearchResult()
    for line in lines:
        marker, *fields = line.split("\t")
        if marker == _FOUND and len(fields) >= 2:
            paths: list[str] | None = getattr(search, fields[0], None)
            if paths is not None and fields[1] not in paths:
                paths.append(fields[1])
    if not search.looked:
        raise AgentProblem(
            "no_python",
            "the host does not run a shell script",
            why=f"/bin/sh ended with {ended.status}: {_end_of_stderr(ended)}",
            hint="the account needs a login shell that runs commands",
        )
    return search


def _choose(transport: Transport, host: Host, search: SearchResult, uv: str, note: Callable[[str], None]) -> str:
    """Return the interpreter that runs the installer, and later the agent."""
    if search.whole:
        return search.whole[0]
    if uv and search.bare:
        return search.bare[0]
    if uv:
        note(f"there is no Python 3.11 or later; {uv} fetches {UV_PYTHON}")
        _, installed = run_program(transport, [uv, "python", "install", UV_PYTHON], b"")
        lines, located = run_program(transport, [uv, "python", "find", "--no-project", UV_PYTHON], b"")
        paths = [line for line in lines if line.startswith("/")]
        if installed.status == 0 and located.status == 0 and paths:
            return paths[-1]
        raise AgentProblem(
            "no_python",
            f"{host.name} has no Python 3.11 or later, and uv could not fetch one",
            why=_end_of_stderr(installed) or _end_of_stderr(located),
            hint=f"run it on the host: {uv} python install {UV_PYTHON}",
        )
    reasons = [f"looked in {', '.join(search.looked)}"]
    reasons += [f"without venv or ensurepip: {', '.join(search.bare)}"] if search.bare else []
    reasons += [f"older than 3.11: {', '.join(search.old)}"] if search.old else []
    reasons += [f"does not start: {', '.join(search.broken)}"] if search.broken else []
    raise AgentProblem(
        "no_python",
        f"{host.name} has no Python 3.11 or later that can make an environment, and no uv",
        why="; ".join(reasons),
        hint="apt-get install python3-venv on the host"
        if search.bare
        else "install uv on the host, without root: curl -LsSf https://astral.sh/uv/install.sh | sh",
    )


def _run_installer(
    transport: Transport,
    host: Host,
    python: str,
    options: DeployOptions,
    installer_options: dict[str, object],
    note: Callable[[str], None],
) -> dict[str, object]:
    program = (PACKAGE / "agent" / "install.py").read_bytes()
    argv = [python, "-I", "-c", _START_INSTALLER, str(len(program)), host.settings.state, json.dumps(installer_options)]
    session = transport.start(argv, program + (b"" if options.rollback else archive(options.wheels)))
    try:
        for event in events(session, ReadLimits(SILENCE_SECONDS, NOISE_BYTES, greeted=True)):
            match event:
                case Note(message):
                    note(message)
                case Done(result):
                    return dict(result)
                case Failed(error):
                    raise error
        ended = session.wait(30.0)
    finally:
        session.close()
    raise AgentProblem(
        "install_failed",
        f"installing on {host.name} ended with {ended.status}",
        why=_end_of_stderr(ended) or "it printed nothing to standard error",
        hint="run deploy again; the agent in use is unchanged",
    )


class TooSlow(ConnectionLost):
    """The program did not end within its time."""


def run_program(
    transport: Transport, argv: Sequence[str], data: bytes, seconds: float = SILENCE_SECONDS
) -> tuple[list[str], Ended]:
    """Run a program on a host. Return its output and its end. Raises `ConnectionLost`, `TooSlow`."""
    session, limits = transport.start(argv, data), ReadLimits(seconds, NOISE_BYTES)
    try:
        return list(session.lines(limits)), session.wait(30.0)
    except ConnectionLost as lost:
        raise (TooSlow(str(lost)) if limits.left == 0.0 else lost) from None
    finally:
        session.close()


def _end_of_stderr(ended: Ended) -> str:
    """Return the last lines of standard error on one line."""
    return " | ".join(line.strip() for line in ended.stderr.splitlines()[-6:] if line.strip())
