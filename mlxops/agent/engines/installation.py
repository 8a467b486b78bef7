"""Where programs and Python packages are installed on the host, and in which version."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from mlxops.common import files
from mlxops.core.errors import Refused

USUAL_FOLDERS = ("/opt/homebrew/bin", "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin")


def search_path(environ: Mapping[str, str]) -> str:
    """Return a PATH for finding programs. SSH sets a very short PATH, so the usual folders are added."""
    home = environ.get("HOME", "")
    own = [f"{home}/.local/bin", f"{home}/bin"] if home else []
    return os.pathsep.join(dict.fromkeys([*environ.get("PATH", "").split(os.pathsep), *own, *USUAL_FOLDERS]))


def find_program(name: str, environ: Mapping[str, str]) -> str | None:
    import shutil

    return shutil.which(name, path=search_path(environ))


def split_command(text: str, variable: str) -> list[str]:
    """Split a shell command from an environment variable. Raises `Refused` (bad_launch_command)."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        words, why = [], str(error)
    else:
        why = "it is empty"
    if not words:
        raise Refused(
            "bad_launch_command",
            f"{variable} on the host is not a command",
            why=why,
            hint=f"set {variable} to a complete command, or unset it",
        )
    return words


def expand_command(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return a configured argv with `~/` expanded and the program's path absolute."""
    home = environ.get("HOME", "~")
    words = [f"{home}/{word[2:]}" if word.startswith("~/") else word for word in argv]
    if "/" not in words[0]:
        words[0] = find_program(words[0], environ) or words[0]
    return tuple(words)


def check_executable(program: str, source: str) -> None:
    """Raise `Refused` (engine_not_found) unless `program`, configured in `source`, is an executable file."""
    if not (os.path.isfile(program) and os.access(program, os.X_OK)):
        raise Refused(
            "engine_not_found",
            f"the engine's program {program!r} does not exist or is not executable",
            why=f"it is configured in {source}",
            hint="correct the path, or install the program there",
        )


_SHEBANG = re.compile(
    rb"#!(/\S*python[\d.]*)\s*\n|#!/bin/sh\n'''exec' ['\"]?(/[^'\"\n]*python[\d.]*)['\"]? "
    rb"|#!\s*(?:/usr)?/bin/env\s+(python[\d.]*)\s*\n"
)
"""The first lines of a Python script. Installers use the second form if the path is long or has spaces. The third form
looks the interpreter up on PATH."""
_PYTHON = re.compile(r"python[\d.]*")


def interpreter_of(argv: Sequence[str], path: str) -> str | None:
    """Return the Python that runs a command: a script's, or the first word of `python -m`; else None.

    `path`: the PATH that the command will have.
    """
    if list(argv[1:2]) == ["-m"]:
        return argv[0] if len(argv) > 2 and _PYTHON.fullmatch(os.path.basename(argv[0])) else None
    try:
        match = _SHEBANG.match(files.read_start(argv[0], 4096))
    except OSError:
        return None
    if match and match[3]:
        import shutil

        return shutil.which(os.fsdecode(match[3]), path=path)
    return os.fsdecode(match[1] or match[2]) if match else None


def installed_version(argv: Sequence[str], distribution: str) -> str | None:
    """Return the version of the Python package behind a command; None if only running the command would show it."""
    return version_in(site_packages(argv, distribution), distribution)


def site_packages(argv: Sequence[str], distribution: str) -> Path | None:
    """Return the site-packages folder that has the package behind a command; None if it is not found.

    Searched are the program's own environment, the environment behind its symbolic link, and the environment of the
    project that a launcher gets as argument.
    """
    key = (tuple(argv[:6]), distribution)
    lookups = _lookups  # another thread may end the cache
    if lookups is None:
        return _find_site_packages(*key)
    if key not in lookups:
        lookups[key] = _find_site_packages(*key)
    return lookups[key]


_lookups: dict[tuple[tuple[str, ...], str], Path | None] | None = None


@contextmanager
def cached_lookups() -> Iterator[None]:
    """Look up each installation once inside this context: ten servers of one engine share an installation."""
    global _lookups  # noqa: PLW0603 - one thread uses it, for one `status`
    _lookups = {}
    try:
        yield
    finally:
        _lookups = None


def _find_site_packages(argv: tuple[str, ...], distribution: str) -> Path | None:
    for word in argv:
        for folder in installation_folders(Path(word)):
            for site in sorted(folder.glob("lib/python3*/site-packages")):
                if any(site.glob(f"{distribution}-*.dist-info")):
                    return site
    return None


def installation_folders(path: Path) -> Iterator[Path]:
    """Yield the folders that may be the Python environment of a program or project."""
    if not path.is_absolute() or not os.path.exists(path):
        return
    if os.path.isdir(path):
        yield path / ".venv"
    else:
        yield path.parent.parent
        yield Path(os.path.realpath(path)).parent.parent


def version_in(site: Path | None, distribution: str) -> str | None:
    """Return a package's version from the name of its metadata folder (PyPA, "Recording installed projects").

    Asking the program itself would take as long as starting it.
    """
    folders = sorted(site.glob(f"{distribution}-*.dist-info")) if site else []
    return folders[0].name.removeprefix(f"{distribution}-").removesuffix(".dist-info") if folders else None


def older_than(since: tuple[int, int], version: str | None) -> bool:
    """Return whether a version is older than `since`. An unknown version counts as recent."""
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < since
