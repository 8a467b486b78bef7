"""Puts this tree's agent on a host that has nothing but SSH and, somewhere, Python 3.11 or uv.

Two steps: a shell script looks for an interpreter, because nothing else is sure to be there; then that
interpreter runs `agent/install.py`, which is sent together with the sources. Both arrive on standard input, and
what varies is an argument: no value is ever part of a program's text.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlxops.common.build import PACKAGE, build_id, shipped
from mlxops.control.channel import NOISE_BYTES, ConnectionLost, Ended, ReadLimits, Transport, events
from mlxops.control.inventory import Host
from mlxops.core.errors import AgentProblem, OutcomeUnknown, UsageError
from mlxops.core.protocol import Done, Failed, Note

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


@dataclass(frozen=True)
class DeployOptions:
    """What a deploy is asked for, beyond the agent itself."""

    mlxctl: bool = False
    """Also the control part, and `mlxctl` in the user's own folder of programs."""
    wheels: Path | None = None
    """A folder with all wheels that are needed, for a host without a package index."""
    rollback: bool = False
    """Instead: back to the build that was there before."""
    dry_run: bool = False
    by: str = "?"


def install(
    transport: Transport,
    host: Host,
    note: Callable[[str], None],
    *,
    places: Sequence[str] = PLACES,
    wish: DeployOptions = DeployOptions(),
) -> dict[str, object]:
    """Install the agent of this tree, or find it installed: `{build, python, changed, seconds, path, ...}`.

    Raises `AgentProblem` no_python or install_failed, `UsageError` no_wheels, `OutcomeUnknown` when the connection
    broke; doing it again is always safe.
    """
    started = time.monotonic()
    build = build_id()
    try:
        found = _search(transport, places)
        uv = found.uv[0] if found.uv else ""
        python = _choose(transport, host, found, uv, note)
        if not wish.dry_run:
            note("going back to the build before" if wish.rollback else f"{build}, with {python}")
        result = _run_installer(transport, host, python, _options(wish, build, uv, python in found.whole), wish, note)
    except ConnectionLost as error:
        raise OutcomeUnknown(
            "deploy_interrupted",
            f"the connection to {host.name} broke during deploy",
            why=str(error),
            hint="run deploy again: it goes on from what is there; the agent in use was left as it is",
        ) from error
    return {
        **result,
        "seconds": round(time.monotonic() - started, 3),
        "own_build": build,
    }


def _options(wish: DeployOptions, build: str, uv: str, whole: bool) -> dict[str, object]:
    """What the installer is told; its `Options`."""
    return {
        "build": build,
        "uv": None if whole else uv or None,
        "requirements": requirements(),
        "control": control_requirements(),
        "by": wish.by,
        "mlxctl": wish.mlxctl,
        "wheels": wish.wheels is not None,
        "rollback": wish.rollback,
        "dry_run": wish.dry_run,
    }


def requirements() -> list[str]:
    """The agent's dependencies, pinned as those of mlxops are."""
    return [_pinned()[name] for name in DEPENDENCIES]


def control_requirements() -> list[str]:
    """What the control part needs beyond them."""
    return [requirement for name, requirement in _pinned().items() if name not in ("huggingface_hub", "psutil")]


def _pinned() -> dict[str, str]:
    from importlib.metadata import requires

    names = {re.split(r"[^A-Za-z0-9_.-]", each)[0]: each for each in requires("mlxops") or () if "extra ==" not in each}
    return {name.replace("-", "_").lower(): requirement for name, requirement in names.items()}


def archive(wheels: Path | None = None) -> bytes:
    """The sources as a tar, and wheels; equal files give equal bytes. Raises `UsageError` (no_wheels)."""
    files = {f"mlxops/{path.relative_to(PACKAGE).as_posix()}": path for path in [*shipped(), *_control_sources()]}
    if wheels is not None:
        found = sorted(wheels.glob("*.whl"))
        if not found:
            raise UsageError(
                "no_wheels",
                f"there is no wheel in {wheels}",
                why="--wheels is the folder with all that the agent needs",
                hint=f"on a machine like the host: pip download -d {shlex.quote(str(wheels))} --only-binary=:all: "
                "huggingface_hub psutil",
            )
        files |= {f"wheels/{path.name}": path for path in found}
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
    transport: Transport,
    host: Host,
    python: str,
    options: dict[str, object],
    wish: DeployOptions,
    note: Callable[[str], None],
) -> dict[str, object]:
    program = (PACKAGE / "agent" / "install.py").read_bytes()
    argv = [python, "-I", "-c", _START, str(len(program)), host.settings.state, json.dumps(options)]
    session = transport.start(argv, program + (b"" if wish.rollback else archive(wish.wheels)))
    try:
        for event in events(session, ReadLimits(SILENCE, NOISE_BYTES, greeted=True)):
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
        why=_last(ended) or "it said nothing",
        hint="run deploy again; the agent in use was left as it is",
    )


def _run(transport: Transport, argv: Sequence[str], data: bytes) -> tuple[list[str], Ended]:
    session = transport.start(argv, data)
    try:
        return list(session.lines(ReadLimits(SILENCE, NOISE_BYTES))), session.wait(30.0)
    finally:
        session.close()


def _last(ended: Ended) -> str:
    """The end of standard error, on one line."""
    return " | ".join(line.strip() for line in ended.stderr.splitlines()[-6:] if line.strip())
