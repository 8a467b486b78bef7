"""Installs an agent on the host that it runs on. Sent there by `deploy`, before anything of mlxops is there.

Arguments: LENGTH STATE OPTIONS (JSON, see `Options`). Standard input: the sources, and the wheels if there are any,
as a tar.

Standard library only, nothing of mlxops, Python 3.11. It answers with events of the protocol. An agent counts as
installed when its stamp is there, which is written last; `<state>/venv` points to the one in use, and is turned
to a new one by one rename. Whatever ends this in between leaves the old agent at work and the new one unstamped.
The build before stays, for `--rollback`, and so does every one that a process uses: agents hold a lock on their stamp.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LOCK_SECONDS = 900.0
STAMP = "installed.json"
PREVIOUS = "venv.previous"
IMPORTED = {"pyyaml": "yaml"}
"""Packages that are imported by another name."""
LAST_LINES = 12
_DROPPED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_TARGET", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV")
_ABOUT = "import sys; print(sys.version.split()[0], sys._base_executable)"
_F_FULLFSYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)
_CHECK = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))"


class ProblemError(Exception):
    """Installing failed: what, why, and what to do."""

    code = "install_failed"
    exit = 6

    def __init__(self, message: str, why: str, hint: str) -> None:
        super().__init__(message)
        self.message, self.why, self.hint = message, why, hint


class NothingBeforeError(ProblemError):
    code = "nothing_to_roll_back_to"
    exit = 3


AGENT = {"__init__.py", "agent", "common", "core"}
"""What an agent needs of the package. `mlxctl` needs the rest, too."""


@dataclass(frozen=True)
class Options:
    """`requirements`: the agent's; `control`: those that `mlxctl` needs beyond them; `by`: who deploys."""

    build: str = ""
    uv: str | None = None
    requirements: Sequence[str] = ()
    control: Sequence[str] = ()
    by: str = "?"
    mlxctl: bool = False
    dry_run: bool = False
    wheels: bool = False
    rollback: bool = False


def main(arguments: list[str], archive: bytes) -> int:
    state, wire = arguments
    options = Options(**json.loads(wire))
    os.umask(0o077)
    try:
        do = rollback if options.rollback else install
        result = do(Path(state), options, archive)
        tell(event="done", result=result)
        return 0
    except ProblemError as error:
        return failed(error.message, error.why, error.hint, error.code, error.exit)
    except OSError as error:
        return failed("the agent cannot be installed", str(error), f"check the disk and the permissions of {state}")


def install(state: Path, options: Options, archive: bytes) -> dict[str, object]:
    if not options.dry_run:
        lock(state)
    home = state / "agents" / options.build
    link = state / "venv"
    script = state / "bin" / "mlxctl"
    # Once asked for, it comes along with every further deploy: half a mlxctl would be none.
    full = options.mlxctl or script.exists()
    requirements = wanted([*options.requirements, *(options.control if full else ())])
    modules = [*map(imported, requirements), *(["mlxops.cli.program"] if full else [])]
    whole = (home / STAMP).is_file() and not fault(home, options.build, modules)
    changed = not whole or not points_to(link, home)
    if options.dry_run:
        return {"build": options.build, "changed": changed, "path": str(home), "dry_run": True}
    if not whole:
        build_agent(home, options, requirements, modules, archive, full=full)
    if not points_to(link, home):
        tell_replaced(link)
        turn(link, home)
    if full:
        link_mlxctl(state, script)
    pruned = prune(state)
    python = ask([str(home / "bin" / "python"), "-I", "-c", _ABOUT])
    result = {"build": options.build, "python": python.stdout.strip(), "changed": changed, "path": str(home)}
    return result | {"pruned": pruned, "mlxctl": str(script) if full else None}


def imported(requirement: str) -> str:
    """The module by which a requirement is imported."""
    name = re.split(r"[^\w-]", requirement)[0].replace("-", "_")
    return IMPORTED.get(name, name)


def lock(state: Path) -> None:
    """Until the end of this process."""
    state.mkdir(parents=True, exist_ok=True)
    state.chmod(0o700)
    wait_for(os.open(state / "deploy.lock", os.O_RDWR | os.O_CREAT, 0o600))


def rollback(state: Path, options: Options, archive: bytes) -> dict[str, object]:
    """Back to the build before; once more, and it is forward again."""
    if not options.dry_run:
        lock(state)
    link = state / "venv"
    before = state / PREVIOUS
    home = state / os.readlink(before) if before.is_symlink() else None
    if home is None or not (home / STAMP).is_file():
        raise NothingBeforeError("there is no build to go back to", "one was deployed so far", "the present one stays")
    if found := fault(home, home.name, []):
        raise ProblemError(f"the build before, {home.name}, does not work any more", found, "the present one stays")
    if options.dry_run:
        return {"build": home.name, "changed": True, "path": str(home), "dry_run": True}
    turn(link, home)
    python = ask([str(home / "bin" / "python"), "-I", "-c", _ABOUT])
    return {"build": home.name, "python": python.stdout.strip(), "changed": True, "path": str(home)}


def tell_replaced(link: Path) -> None:
    try:
        old = json.loads((link / STAMP).read_text())
        note(f"this replaces {old['build']}, deployed by {old.get('by', '?')} at {old.get('at', '?')}")
    except (OSError, ValueError, LookupError, TypeError):
        return  # there was none


def link_mlxctl(state: Path, script: Path) -> None:
    """`<state>/bin/mlxctl` runs what `venv` points to; the user's own folder of programs gets a link to it."""
    script.parent.mkdir(exist_ok=True)
    new = script.with_name("mlxctl.new")
    new.write_text(f'#!/bin/sh\nexec {shlex.quote(str(state / "venv/bin/python"))} -P -m mlxops.mlxctl "$@"\n')
    new.chmod(0o700)
    new.replace(script)
    link = Path.home() / ".local" / "bin" / "mlxctl"
    if link.is_symlink() and os.readlink(link) == str(script):
        return
    if link.is_symlink() or link.exists():
        note(f"{link} is there and not ours: it was left as it is; the program is {script}")
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(script)
    note(f"{link} is mlxctl now; if it is not found, add {link.parent} to PATH")


def prune(state: Path) -> list[str]:
    """Remove the builds that are neither in use, nor the present one, nor the one before."""
    kept = {os.readlink(state / name).rpartition("/")[2] for name in ("venv", PREVIOUS) if (state / name).is_symlink()}
    pruned = []
    for home in sorted((state / "agents").iterdir()):
        if home.name not in kept and not in_use(home):
            (home / STAMP).unlink(missing_ok=True)
            shutil.rmtree(home, ignore_errors=True)
            pruned.append(home.name)
    return pruned


def in_use(home: Path) -> bool:
    try:
        stamp = os.open(home / STAMP, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(stamp, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # in use, or not known: the file system has no locks
        return True
    finally:
        os.close(stamp)
    return False


def wait_for(lock: int) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    told = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not told:
                note("another deploy is at work on this host; waiting for it")
                told = True
            if time.monotonic() > deadline:
                raise ProblemError(
                    "another deploy is at work on this host",
                    f"it has not ended within {LOCK_SECONDS:.0f} s",
                    "see what it does: ps -ef | grep pip",
                ) from None
            time.sleep(0.1)
        except OSError as error:
            raise ProblemError(
                "the state folder cannot be locked",
                f"its file system has no locks (flock: {error.strerror})",
                "put the state folder on a local disk: `state` in hosts.yaml, then inv deploy",
            ) from None


def build_agent(
    home: Path, options: Options, requirements: list[str], modules: list[str], archive: bytes, *, full: bool
) -> None:
    """Everything up to the stamp. A virtual environment cannot be moved: it is made where it will be."""
    if home.exists():
        if in_use(home):
            raise ProblemError(
                "the agent has to be made anew, and is at work", f"a process uses {home}", "deploy when it has ended"
            )
        note("making it anew: it is not whole, or mlxctl is to come with it")
        shutil.rmtree(home)
    home.parent.mkdir(parents=True, exist_ok=True)
    python = home / "bin" / "python"
    uv = options.uv
    note("making the environment")
    if uv:
        run([uv, "venv", "--quiet", "--no-project", "--no-config", "--python", sys.executable, str(home)])
    else:
        run([sys.executable, "-I", "-m", "venv", str(home)])
    unpack(archive, site_packages(python), home / "wheels", full=full)
    if requirements:
        note(f"installing {', '.join(map(imported, requirements))}")
        pip = (
            [uv, "pip", "install", "--compile-bytecode", "--python", str(python)]
            if uv
            else [str(python), "-I", "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--compile"]
        )
        run([*pip, *(["--no-index", "--find-links", str(home / "wheels")] if options.wheels else []), *requirements])
        shutil.rmtree(home / "wheels", ignore_errors=True)
    run([str(python), "-I", "-m", "compileall", "-q", str(site_packages(python) / "mlxops")])
    if found := fault(home, options.build, modules):
        raise ProblemError("the new agent does not work", found, "the agent in use was left as it is; deploy again")
    os.sync()  # the stamp must not reach the disk before what it vouches for
    stamp(
        home,
        {
            "build": options.build,
            "python": sys.version.split()[0],
            "requirements": requirements,
            "by": options.by,
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    )


def fault(home: Path, build: str, modules: list[str]) -> str:
    """Why it is not the agent of this build with its dependencies; empty if it is."""
    python = str(home / "bin" / "python")
    try:
        said = ask([python, "-I", "-m", "mlxops.agent", "--build"])
        found = ask([python, "-I", "-c", _CHECK, *modules])
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if said.returncode != 0:
        return said.stderr.strip()[-300:] or f"it ended with {said.returncode}"
    if said.stdout.strip() != build:
        return f"it is {said.stdout.strip()}, not {build}: were the sources edited meanwhile?"
    return "" if found.returncode == 0 else f"one of {', '.join(modules)} is missing"


def wanted(requirements: list[str]) -> list[str]:
    """Those that hold for this system; the only markers there are name sys_platform."""
    return [
        each for each in requirements if "sys_platform" not in each or re.search(rf"['\"]{sys.platform}['\"]", each)
    ]


def site_packages(python: Path) -> Path:
    answer = ask([str(python), "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    if answer.returncode != 0:
        raise ProblemError(
            "the new environment does not work", answer.stderr.strip()[-300:], "check Python on the host"
        )
    return Path(answer.stdout.strip())


def unpack(archive: bytes, folder: Path, wheels: Path, *, full: bool) -> None:
    """The agent; with `full` also the control part; and wheels into a folder of their own."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            source = tar.extractfile(member)
            parts = Path(member.name).parts
            if source is None or len(parts) < 2 or parts[0] not in {"mlxops", "wheels"} or ".." in parts:
                raise ProblemError("the archive is not mlxops's", member.name, "deploy again")
            if parts[0] == "mlxops" and not full and parts[1] not in AGENT:
                continue
            target = wheels / parts[-1] if parts[0] == "wheels" else folder / member.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read())


def ask(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=60, check=False
    )


def run(command: list[str]) -> None:
    """Its last lines are the reason if it fails. What it says also keeps the connection from being silent."""
    environ = {key: value for key, value in os.environ.items() if key not in _DROPPED} | {"PIP_USER": "0"}
    last: deque[str] = deque(maxlen=LAST_LINES)
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environ
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last.append(line.decode(errors="replace").strip())
            sys.stdout.write("\n")
            sys.stdout.flush()
    if process.returncode != 0:
        raise ProblemError(
            f"{Path(command[0]).name} {' '.join(command[1:5])} ended with {process.returncode}",
            " | ".join(line for line in last if line) or "it said nothing",
            "the agent in use was left as it is; put that right and deploy again",
        )


def stamp(home: Path, what: dict[str, object]) -> None:
    with (home / f"{STAMP}.new").open("w") as file:
        json.dump(what, file)
        file.flush()
        flush(file.fileno())
    (home / f"{STAMP}.new").replace(home / STAMP)
    sync_folder(home)


def points_to(link: Path, home: Path) -> bool:
    return link.is_symlink() and (link.parent / os.readlink(link)) == home


def turn(link: Path, home: Path) -> None:
    if link.exists() and not link.is_symlink():
        link.rename(link.with_name(f"venv.before-{time.time_ns()}"))  # somebody made it by hand
    if link.is_symlink():
        before = link.with_name(f"{PREVIOUS}.new")
        before.unlink(missing_ok=True)
        before.symlink_to(os.readlink(link))
        before.replace(link.with_name(PREVIOUS))
    new = link.with_name("venv.new")
    new.unlink(missing_ok=True)
    new.symlink_to(home.relative_to(link.parent))
    new.replace(link)
    sync_folder(link.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def flush(descriptor: int) -> None:
    """As `store.flush`, which is not there yet."""
    try:
        if _F_FULLFSYNC is not None:
            fcntl.fcntl(descriptor, _F_FULLFSYNC)
            return
    except OSError as error:
        if error.errno not in {errno.ENOTSUP, errno.EINVAL, errno.ENOTTY}:
            raise
    os.fsync(descriptor)


def note(message: str) -> None:
    tell(event="note", level="info", message=message)


def failed(message: str, why: str, hint: str, code: str = ProblemError.code, exit: int = ProblemError.exit) -> int:
    """Tell it; returns the exit status."""
    tell(event="failed", error={"code": code, "exit": exit, "message": message, "why": why, "hint": hint})
    return exit


def tell(**body: object) -> None:
    sys.stdout.write(json.dumps({"mlxops": 1, **body}, separators=(",", ":")) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[2:], sys.stdin.buffer.read()))
