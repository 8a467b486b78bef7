"""Install an agent on this host. `deploy` sends this file to a host that may have nothing of mlxops yet.

Arguments: LENGTH STATE OPTIONS (JSON, see `Options`). Standard input: a tar of the sources and, if used, the wheels.

It needs Python 3.11 and only the standard library, and prints events of the protocol. An agent counts as installed once
its stamp exists, which is written last. `<state>/venv` links to the agent in use; one rename switches it. If this
program is killed, the old agent stays in use and the new one has no stamp. The previous build stays for `--rollback`,
and so does every build that a process uses: agents hold a lock on their stamp.
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
MODULE_NAMES = {"pyyaml": "yaml"}
"""Packages whose module has another name."""
LAST_LINES = 12
"""How many lines of a failed command's output are reported."""
_DROPPED_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_TARGET", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV")
_PRINT_PYTHON = "import sys; print(sys.version.split()[0], sys._base_executable)"
_F_FULLFSYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)
_CHECK_MODULES = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))"


class ProblemError(Exception):
    """The installation failed: what, why, and what to do."""

    code = "install_failed"
    exit = 6

    def __init__(self, message: str, why: str, hint: str) -> None:
        super().__init__(message)
        self.message, self.why, self.hint = message, why, hint


class NothingBeforeError(ProblemError):
    code = "nothing_to_roll_back_to"
    exit = 3


AGENT_PARTS = {"__init__.py", "agent", "common", "core"}
"""The parts of the package that an agent needs. `mlxctl` needs all of it."""


@dataclass(frozen=True)
class Options:
    """`requirements`: those of the agent. `control`: further ones of `mlxctl`. `by`: who deploys."""

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
        action = rollback if options.rollback else install
        result = action(Path(state), options, archive)
        emit(event="done", result=result)
        return 0
    except ProblemError as error:
        return emit_failure(error.message, error.why, error.hint, error.code, error.exit)
    except OSError as error:
        return emit_failure(
            "the agent cannot be installed", str(error), f"check the disk and the permissions of {state}"
        )


def install(state: Path, options: Options, archive: bytes) -> dict[str, object]:
    if not options.dry_run:
        lock(state)
    home = state / "agents" / options.build
    link = state / "venv"
    script = state / "bin" / "mlxctl"
    # Once installed, mlxctl is part of every later deploy, so that it always fits the agent.
    full = options.mlxctl or script.exists()
    requirements = applicable([*options.requirements, *(options.control if full else ())])
    modules = [*map(module_of, requirements), *(["mlxops.cli.program"] if full else [])]
    complete = (home / STAMP).is_file() and not find_fault(home, options.build, modules)
    changed = not complete or not points_to(link, home)
    if options.dry_run:
        return {"build": options.build, "changed": changed, "path": str(home), "dry_run": True}
    if not complete:
        build_agent(home, options, requirements, modules, archive, full=full)
    if not points_to(link, home):
        note_replaced(link)
        switch(link, home)
    if full:
        link_mlxctl(state, script)
    pruned = prune(state)
    python = capture([str(home / "bin" / "python"), "-I", "-c", _PRINT_PYTHON])
    result = {"build": options.build, "python": python.stdout.strip(), "changed": changed, "path": str(home)}
    return result | {"pruned": pruned, "mlxctl": str(script) if full else None}


def module_of(requirement: str) -> str:
    """Return the module name of a requirement."""
    name = re.split(r"[^\w-]", requirement)[0].replace("-", "_")
    return MODULE_NAMES.get(name, name)


def lock(state: Path) -> None:
    """Hold the deploy lock until this process ends."""
    state.mkdir(parents=True, exist_ok=True)
    state.chmod(0o700)
    wait_for_lock(os.open(state / "deploy.lock", os.O_RDWR | os.O_CREAT, 0o600))


def rollback(state: Path, options: Options, archive: bytes) -> dict[str, object]:
    """Switch to the previous build. A second rollback switches back."""
    if not options.dry_run:
        lock(state)
    link = state / "venv"
    previous = state / PREVIOUS
    home = state / os.readlink(previous) if previous.is_symlink() else None
    if home is None or not (home / STAMP).is_file():
        raise NothingBeforeError("there is no previous build", "only one build was deployed", "the current one stays")
    if fault := find_fault(home, home.name, []):
        raise ProblemError(f"the previous build, {home.name}, no longer works", fault, "the current one stays")
    if options.dry_run:
        return {"build": home.name, "changed": True, "path": str(home), "dry_run": True}
    switch(link, home)
    python = capture([str(home / "bin" / "python"), "-I", "-c", _PRINT_PYTHON])
    return {"build": home.name, "python": python.stdout.strip(), "changed": True, "path": str(home)}


def note_replaced(link: Path) -> None:
    try:
        old = json.loads((link / STAMP).read_text())
        note(f"this replaces {old['build']}, deployed by {old.get('by', '?')} at {old.get('at', '?')}")
    except (OSError, ValueError, LookupError, TypeError):
        return  # there is no old agent


def link_mlxctl(state: Path, script: Path) -> None:
    """Create `<state>/bin/mlxctl`, which runs the agent in use, and a link to it in ~/.local/bin."""
    script.parent.mkdir(exist_ok=True)
    new = script.with_name("mlxctl.new")
    new.write_text(f'#!/bin/sh\nexec {shlex.quote(str(state / "venv/bin/python"))} -P -m mlxops.mlxctl "$@"\n')
    new.chmod(0o700)
    new.replace(script)
    link = Path.home() / ".local" / "bin" / "mlxctl"
    if link.is_symlink() and os.readlink(link) == str(script):
        return
    if link.is_symlink() or link.exists():
        note(f"{link} exists and is not a link of mlxops: it was not changed; the program is {script}")
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(script)
    note(f"created {link}; if the shell does not find mlxctl, add {link.parent} to PATH")


def prune(state: Path) -> list[str]:
    """Remove the builds other than the current one, the previous one, and those in use."""
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
    except OSError:  # in use, or unknown because the file system has no locks
        return True
    finally:
        os.close(stamp)
    return False


def wait_for_lock(lock: int) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    noted = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not noted:
                note("another deploy is running on this host; waiting for it")
                noted = True
            if time.monotonic() > deadline:
                raise ProblemError(
                    "another deploy is running on this host",
                    f"it has not ended within {LOCK_SECONDS:.0f} s",
                    "see what it is doing: ps -ef | grep pip",
                ) from None
            time.sleep(0.1)
        except OSError as error:
            raise ProblemError(
                "the state folder cannot be locked",
                f"its file system has no locks (flock: {error.strerror})",
                "put the state folder on a local disk: `state` in hosts.yaml, then mlxctl deploy",
            ) from None


def build_agent(
    home: Path, options: Options, requirements: list[str], modules: list[str], archive: bytes, *, full: bool
) -> None:
    """Build the agent in place, because a virtual environment cannot be moved. Write the stamp last."""
    if home.exists():
        if in_use(home):
            raise ProblemError(
                "the agent must be rebuilt but is in use", f"a process uses {home}", "deploy again when it has ended"
            )
        note("rebuilding the agent: it is incomplete, or mlxctl is to be added")
        shutil.rmtree(home)
    home.parent.mkdir(parents=True, exist_ok=True)
    python = home / "bin" / "python"
    uv = options.uv
    note("creating the environment")
    if uv:
        run([uv, "venv", "--quiet", "--no-project", "--no-config", "--python", sys.executable, str(home)])
    else:
        run([sys.executable, "-I", "-m", "venv", str(home)])
    unpack(archive, site_packages(python), home / "wheels", full=full)
    if requirements:
        note(f"installing {', '.join(map(module_of, requirements))}")
        pip = (
            [uv, "pip", "install", "--compile-bytecode", "--python", str(python)]
            if uv
            else [str(python), "-I", "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--compile"]
        )
        run([*pip, *(["--no-index", "--find-links", str(home / "wheels")] if options.wheels else []), *requirements])
        shutil.rmtree(home / "wheels", ignore_errors=True)
    run([str(python), "-I", "-m", "compileall", "-q", str(site_packages(python) / "mlxops")])
    if fault := find_fault(home, options.build, modules):
        raise ProblemError("the new agent does not work", fault, "the agent in use was not changed; deploy again")
    os.sync()  # the stamp must not reach the disk before the files
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


def find_fault(home: Path, build: str, modules: list[str]) -> str:
    """Return why this is not a working agent of this build with its dependencies; empty if it is."""
    python = str(home / "bin" / "python")
    try:
        version = capture([python, "-I", "-m", "mlxops.agent", "--build"])
        imports = capture([python, "-I", "-c", _CHECK_MODULES, *modules])
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if version.returncode != 0:
        return version.stderr.strip()[-300:] or f"it ended with {version.returncode}"
    if version.stdout.strip() != build:
        return f"it is {version.stdout.strip()}, not {build}: were the sources edited during the deploy?"
    return "" if imports.returncode == 0 else f"one of {', '.join(modules)} is missing"


def applicable(requirements: list[str]) -> list[str]:
    """Return the requirements for this system. Their only markers are about sys_platform."""
    own = rf"['\"]{sys.platform}['\"]"
    return [text for text in requirements if "sys_platform" not in text or re.search(own, text)]


def site_packages(python: Path) -> Path:
    answer = capture([str(python), "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    if answer.returncode != 0:
        raise ProblemError(
            "the new environment does not work", answer.stderr.strip()[-300:], "check Python on the host"
        )
    return Path(answer.stdout.strip())


def unpack(archive: bytes, folder: Path, wheels: Path, *, full: bool) -> None:
    """Unpack the agent, with `full` also the control node's part, and the wheels into their own folder."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            source = tar.extractfile(member)
            parts = Path(member.name).parts
            if source is None or len(parts) < 2 or parts[0] not in {"mlxops", "wheels"} or ".." in parts:
                raise ProblemError("the archive is not one of mlxops", member.name, "deploy again")
            if parts[0] == "mlxops" and not full and parts[1] not in AGENT_PARTS:
                continue
            target = wheels / parts[-1] if parts[0] == "wheels" else folder / member.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read())


def capture(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=60, check=False
    )


def run(command: list[str]) -> None:
    """Run a command; report its last lines if it fails. Print a newline per line: a silent connection times out."""
    environ = {key: value for key, value in os.environ.items() if key not in _DROPPED_VARIABLES} | {"PIP_USER": "0"}
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
            " | ".join(line for line in last if line) or "it printed nothing",
            "the agent in use was not changed; fix the cause and deploy again",
        )


def stamp(home: Path, content: dict[str, object]) -> None:
    with (home / f"{STAMP}.new").open("w") as file:
        json.dump(content, file)
        file.flush()
        flush(file.fileno())
    (home / f"{STAMP}.new").replace(home / STAMP)
    sync_folder(home)


def points_to(link: Path, home: Path) -> bool:
    return link.is_symlink() and (link.parent / os.readlink(link)) == home


def switch(link: Path, home: Path) -> None:
    if link.exists() and not link.is_symlink():
        link.rename(link.with_name(f"venv.before-{time.time_ns()}"))  # not created by a deploy
    if link.is_symlink():
        previous = link.with_name(f"{PREVIOUS}.new")
        previous.unlink(missing_ok=True)
        previous.symlink_to(os.readlink(link))
        previous.replace(link.with_name(PREVIOUS))
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
    """Like `durable_files.flush`, which is not installed yet."""
    try:
        if _F_FULLFSYNC is not None:
            fcntl.fcntl(descriptor, _F_FULLFSYNC)
            return
    except OSError as error:
        if error.errno not in {errno.ENOTSUP, errno.EINVAL, errno.ENOTTY}:
            raise
    os.fsync(descriptor)


def note(message: str) -> None:
    emit(event="note", level="info", message=message)


def emit_failure(
    message: str, why: str, hint: str, code: str = ProblemError.code, exit: int = ProblemError.exit
) -> int:
    """Emit the error and return the exit status."""
    emit(event="failed", error={"code": code, "exit": exit, "message": message, "why": why, "hint": hint})
    return exit


def emit(**body: object) -> None:
    sys.stdout.write(json.dumps({"mlxops": 1, **body}, separators=(",", ":")) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[2:], sys.stdin.buffer.read()))
