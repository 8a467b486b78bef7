"""Builds of mlxops side by side: this checkout, and an earlier commit of its history.

Each build is a virtual environment with its own copy of the package and both command-line programs. The dependencies
are those of the environment that runs the tests, so nothing is downloaded and all builds have the same ones.
"""

from __future__ import annotations

import compileall
import io
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path

from tests.lab.homelab import CHECKOUT

EARLIER_COMMIT = "d05bae8"
"""The oldest version whose hosts must upgrade without touching a running server."""
_PARTS = ("mlxops", "pyproject.toml", "tasks.py")
_SCRIPT = """\
#!{python}
import sys
from {module} import {name}
sys.exit({call}())
"""


class NoHistory(Exception):
    """The commit is not in this checkout; the message says why."""

    def __init__(self, why: str, *, shallow: bool = False) -> None:
        super().__init__(why)
        self.shallow = shallow


@dataclass(frozen=True)
class Build:
    """An installed build. `folder` is its virtual environment, and has a `tasks.py` that `inv` finds."""

    folder: Path

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    @property
    def build_id(self) -> str:
        """What its agent calls itself: `<version>+<hash>`."""
        argv = [self.python, "-I", "-m", "mlxops.agent", "--build"]
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()

    def script(self, name: str) -> str:
        """Return the path of `inv` or `mlxctl`."""
        return str(self.folder / "bin" / name)


def this_build(folder: Path) -> Build:
    """Install the checkout as it is on disk."""
    folder.mkdir(parents=True)
    sources = folder / "sources"
    sources.mkdir()
    for part in _PARTS:
        path = CHECKOUT / part
        if path.is_dir():
            shutil.copytree(path, sources / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, sources / part)
    return _install(sources, folder / "build")


def earlier_build(folder: Path, commit: str = EARLIER_COMMIT) -> Build:
    """Install a commit. Raises `NoHistory`."""
    data = _archive(commit)
    sources = folder / "sources"
    sources.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.extractall(sources, filter="data")
    return _install(sources, folder / "build")


def _archive(commit: str) -> bytes:
    if shutil.which("git") is None:
        raise NoHistory("git is not installed (Debian and Ubuntu: apt-get install git)")
    if not (CHECKOUT / ".git").exists():
        raise NoHistory(f"the build of {commit} is made from git, and {CHECKOUT} is not a git checkout")
    if _git("cat-file", "-e", f"{commit}^{{commit}}").returncode != 0:
        shallow = _git("rev-parse", "--is-shallow-repository").stdout.strip() == b"true"
        why = "this clone is shallow: git fetch --unshallow" if shallow else "fetch the whole history"
        raise NoHistory(f"the build of {commit} is made from git, and the commit is not here; {why}", shallow=shallow)
    archive = _git("archive", "--format=tar", commit, *_PARTS)
    if archive.returncode != 0:
        raise NoHistory(f"git archive {commit}: {archive.stderr.decode(errors='replace').strip()}")
    return archive.stdout


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    argv = ["git", "-c", f"safe.directory={CHECKOUT}", *arguments]
    return subprocess.run(argv, cwd=CHECKOUT, check=False, capture_output=True)


def _install(sources: Path, folder: Path) -> Build:
    """Make the virtual environment, with bytecode for the package."""
    venv.create(folder, with_pip=False, symlinks=True)
    build = Build(folder)
    (packages,) = folder.glob("lib/python3*/site-packages")
    shutil.copytree(sources / "mlxops", packages / "mlxops")
    shutil.copy(sources / "tasks.py", folder / "tasks.py")
    # A path in a .pth file counts, but .pth files in that folder do not: the checkout stays out of the way.
    own = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in sorted(own)), encoding="utf-8")
    project = tomllib.loads((sources / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    _write_script(build, "mlxctl", project["scripts"]["mlxctl"])
    _write_script(build, "inv", "invoke.main:program.run")
    compileall.compile_dir(packages / "mlxops", quiet=2)
    compileall.compile_file(folder / "tasks.py", quiet=2)
    return build


def _write_script(build: Build, name: str, entry_point: str) -> None:
    module, _, call = entry_point.partition(":")
    path = build.folder / "bin" / name
    text = _SCRIPT.format(python=build.python, module=module, name=call.split(".")[0], call=call)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def main() -> None:
    """Build one into a new folder: `python -m tests.lab.builds FOLDER [COMMIT]`; without a commit, this checkout."""
    folder = Path(sys.argv[1])
    build = earlier_build(folder, sys.argv[2]) if len(sys.argv) > 2 else this_build(folder)
    sys.stdout.write(f"{build.build_id} {build.folder}\n")


if __name__ == "__main__":
    main()
