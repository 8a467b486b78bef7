"""Puts this tree's agent on a host that has nothing but SSH and, somewhere, Python 3.11 or uv.

Two steps: a shell script looks for an interpreter, because nothing else is sure to be there; then that
interpreter runs `agent/install.py`, which is sent together with the sources. Both arrive on standard input, and
what varies is an argument: no value is ever part of a program's text.
"""

from __future__ import annotations

import io
import re
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mlxops.build import PACKAGE, build_id, shipped
from mlxops.control.inventory import Host
from mlxops.control.session import ConnectionLost, Ended, Transport
from mlxops.core.errors import AgentProblem, OutcomeUnknown
from mlxops.core.protocol import Done, Failed, Note, decode_event

DEPENDENCIES = ("huggingface_hub", "psutil")
"""Those of mlxops's own dependencies that the agent uses."""
PLACES = (
    "PATH",
    "/opt/homebrew/bin",
    "/usr/local/bin",
    "/usr/bin",
    "~/.local/bin",
    "~/.cargo/bin",
    "~/.pyenv/versions/*/bin",
    "~/.local/share/uv/python/*/bin",
)
"""Where Python and uv are looked for: folders, also as patterns; PATH stands for the folders of the host's PATH."""
UV_PYTHON = "3.12"
"""What uv is asked for where there is no Python."""
SILENCE = 300.0
"""Seconds; pip says nothing while it downloads."""
_FOUND = "mlxops-found"

FIND = r"""
say() { printf 'mlxops-found\t%s\t%s\t%s\n' "$1" "$2" "${3-}"; }
here() {
    say looked "$1"
    [ -x "$1/uv" ] && say uv "$1/uv"
    for name in python3.13 python3.12 python3.11 python3; do
        [ -x "$1/$name" ] || continue
        # Apple's is 3.9, or a stub that opens a window on the Mac's screen.
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
# The program is as long as its first argument says; the archive follows it.
_START = "import sys; exec(compile(sys.stdin.buffer.read(int(sys.argv[1])), 'install', 'exec'))"


@dataclass
class _Search:
    """What the script found, in the order in which it looked."""

    looked: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    bare: list[str] = field(default_factory=list)
    """Python without venv or ensurepip, as Debian has it; enough when there is uv."""
    old: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    uv: list[str] = field(default_factory=list)


def install(
    transport: Transport, host: Host, note: Callable[[str], None], *, places: Sequence[str] = PLACES
) -> dict[str, object]:
    """Install the agent of this tree, or find it installed: `{build, python, changed, seconds, path}`.

    Raises `AgentProblem` no_python or install_failed, `OutcomeUnknown` when the connection broke; doing it again
    is always safe.
    """
    started = time.monotonic()
    build = build_id()
    try:
        found = _search(transport, places)
        uv = found.uv[0] if found.uv else ""
        python = _choose(transport, host, found, uv, note)
        note(f"installing {build} with {python}")
        result = _run_installer(transport, host, python, uv if python not in found.whole else "", build, note)
    except ConnectionLost as error:
        raise OutcomeUnknown(
            "deploy_interrupted",
            f"the connection to {host.name} broke during deploy",
            why=str(error),
            hint="run deploy again: it goes on from what is there; the agent in use was left as it is",
        ) from error
    return {
        "build": build,
        "python": result.get("python"),
        "changed": result.get("changed"),
        "seconds": round(time.monotonic() - started, 3),
        "path": result.get("path"),
    }


def requirements() -> list[str]:
    """The agent's dependencies, pinned as those of mlxops are."""
    from importlib.metadata import requires

    names = {re.split(r"[^A-Za-z0-9_.-]", each)[0]: each for each in requires("mlxops") or () if "extra ==" not in each}
    by_name = {name.replace("-", "_").lower(): requirement for name, requirement in names.items()}
    return [by_name[name] for name in DEPENDENCIES]


def archive() -> bytes:
    """The agent's sources as a tar; equal sources give equal bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in shipped():
            data = path.read_bytes()
            member = tarfile.TarInfo(f"mlxops/{path.relative_to(PACKAGE).as_posix()}")
            member.size, member.mode = len(data), 0o600
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _search(transport: Transport, places: Sequence[str]) -> _Search:
    lines, ended = _run(transport, ["/bin/sh", "-s", "--", *places], FIND.encode())
    found = _Search()
    for line in lines:
        marker, *fields = line.split("\t")
        if marker == _FOUND and len(fields) >= 2:
            kept: list[str] | None = getattr(found, fields[0], None)
            if kept is not None and fields[1] not in kept:
                kept.append(fields[1])
    if not found.looked:
        raise AgentProblem(
            "no_python",
            "the host does not run a shell script",
            why=f"/bin/sh ended with {ended.status}: {_last(ended)}",
            hint="the account needs a login shell that runs commands",
        )
    return found


def _choose(transport: Transport, host: Host, found: _Search, uv: str, note: Callable[[str], None]) -> str:
    """The interpreter that installs, and that the agent will run on."""
    if found.whole:
        return found.whole[0]
    if uv and found.bare:
        return found.bare[0]
    if uv:
        note(f"there is no Python 3.11 or later; {uv} fetches {UV_PYTHON}")
        _, ended = _run(transport, [uv, "python", "install", UV_PYTHON], b"")
        lines, found_it = _run(transport, [uv, "python", "find", "--no-project", UV_PYTHON], b"")
        paths = [line for line in lines if line.startswith("/")]
        if ended.status == 0 and found_it.status == 0 and paths:
            return paths[-1]
        raise AgentProblem(
            "no_python",
            f"{host.name} has no Python 3.11 or later, and uv could not fetch one",
            why=_last(ended) or _last(found_it),
            hint=f"run it on the host: {uv} python install {UV_PYTHON}",
        )
    reasons = [f"looked in {', '.join(found.looked)}"]
    reasons += [f"without venv or ensurepip: {', '.join(found.bare)}"] if found.bare else []
    reasons += [f"older than 3.11: {', '.join(found.old)}"] if found.old else []
    reasons += [f"does not start: {', '.join(found.broken)}"] if found.broken else []
    raise AgentProblem(
        "no_python",
        f"{host.name} has no Python 3.11 or later that can make an environment, and no uv",
        why="; ".join(reasons),
        hint="apt-get install python3-venv on the host"
        if found.bare
        else "install uv on the host, without root: curl -LsSf https://astral.sh/uv/install.sh | sh",
    )


def _run_installer(
    transport: Transport, host: Host, python: str, uv: str, build: str, note: Callable[[str], None]
) -> dict[str, object]:
    program = (PACKAGE / "agent" / "install.py").read_bytes()
    argv = [python, "-I", "-c", _START, str(len(program)), uv, host.settings.state, build, *requirements()]
    session = transport.start(argv, program + archive())
    try:
        for line in session.lines(SILENCE):
            match decode_event(line):
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
        why=_last(ended) or "it said nothing",
        hint="run deploy again; the agent in use was left as it is",
    )


def _run(transport: Transport, argv: Sequence[str], data: bytes) -> tuple[list[str], Ended]:
    session = transport.start(argv, data)
    try:
        return list(session.lines(SILENCE)), session.wait(30.0)
    finally:
        session.close()


def _last(ended: Ended) -> str:
    """The end of standard error, on one line."""
    return " | ".join(line.strip() for line in ended.stderr.splitlines()[-6:] if line.strip())
