"""Where the big parts of the test lab live: built once, kept between runs, shared by parallel ones.

Needs no pytest: `inv demo` uses it too.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

PYTHON = f"py{sys.version_info.major}.{sys.version_info.minor}"
_STAMP = ".complete"

ENGINES: Mapping[str, tuple[str, ...]] = {
    # On Linux the plain mlx package has no backend of its own; its CPU build is an extra.
    "mlx-lm": ("mlx==0.32.4" if sys.platform == "darwin" else "mlx[cpu]==0.32.4", "mlx-lm==0.32.2"),
}
HUB = ("olah==0.5.4",)
GATEWAY = ("litellm[proxy]==1.109.0",)
GATEWAY_OVERRIDES = ("certifi>=2026.7.22", "litellm-proxy-extras==0.4.110")
"""LiteLLM pins releases that an index may not have. Neither is used here: certificate authorities, of which plain HTTP
on loopback needs none, and the migrations of a database that the lab's gateway does not have."""
PEER = ("pyinfra==3.10.0",)
"""What the benchmarks hold `inv status` against: another program that asks hosts over paramiko."""
UV = ("uv==0.13.9",)
"""Unlike pip, it can install a release that a package's requirements exclude."""

OPENAI_SERVERS = ("1.8.1", "1.7.1", "1.5.1", "1.4.2")
"""The versions of mlx-openai-server that are driven: the first is the one that every run has."""
OPENAI_SERVER_PYTHON = ((3, 11), (3, 12))
"""The first and the last Python that they run on."""
_TORCH = "torch==2.13.0"
_NOT_ON_LINUX = tuple(f"{name} ; sys_platform == 'darwin'" for name in ("mflux", "torch", "torchvision"))
"""What mlx-openai-server declares and does not resolve on Linux; it serves language models without."""

REAL_HOME = "MLXOPS_TEST_REAL_HOME"
"""The variable in which a test run that gives its processes a throwaway HOME passes on the real one."""

_AMBIENT: Mapping[str, str] = {
    name: value
    for name, value in {**os.environ, "HOME": os.environ.get(REAL_HOME) or str(Path.home())}.items()
    if name not in ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
}
"""The environment in which things are built: the user's own, as it was before tests take the home directory away.
pip finds its configuration and its cache through it."""


class BuildFailed(RuntimeError):
    """A part of the lab could not be built; the message ends with the last words of what failed."""


def cache_folder(environ: Mapping[str, str] = _AMBIENT) -> Path:
    """`MLXOPS_TEST_CACHE`, else `mlxops-test` in the user's cache directory."""
    chosen = environ.get("MLXOPS_TEST_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    home = Path(environ["HOME"])
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "mlxops-test"
    base = environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path there is invalid and to be ignored.
    return (Path(base) if base.startswith("/") else home / ".cache") / "mlxops-test"


def engine_venv(engine: str) -> Path:
    """The virtual environment of a real engine, with this Python. Raises `BuildFailed`."""
    return _venv(engine, ENGINES[engine])


def hub_venv() -> Path:
    """The virtual environment of the Hugging Face hub's stand-in. Raises `BuildFailed`."""
    return _venv("hub", HUB)


def peer_venv() -> Path:
    """The virtual environment of pyinfra. Raises `BuildFailed`."""
    return _venv("pyinfra", PEER)


def gateway_venv() -> Path:
    """The virtual environment of the real LiteLLM proxy: about 600 MB. Raises `BuildFailed`."""
    return _uv_venv("litellm", GATEWAY, GATEWAY_OVERRIDES)


def has_openai_server() -> bool:
    """Whether this Python is one that they run on."""
    return OPENAI_SERVER_PYTHON[0] <= sys.version_info[:2] <= OPENAI_SERVER_PYTHON[1]


def openai_server_venv(version: str = OPENAI_SERVERS[0], *, transformers: str = "") -> Path:
    """The virtual environment of a real mlx-openai-server. Raises `BuildFailed`.

    `transformers` is a requirement such as `transformers>=5`; without one, it is what the version works with.
    """
    if not has_openai_server():
        raise BuildFailed(f"mlx-openai-server has no version for this Python, {PYTHON}")
    # 1.4 calls the tokenizer in a way that transformers 5 answers with another type.
    extra = transformers or ("transformers<5" if version.startswith("1.4.") else "")
    pins = tuple(filter(None, (f"mlx-openai-server=={version}", extra)))
    # The builds of mlx that these were made with; later ones are not asked for.
    overrides = (*_NOT_ON_LINUX, *(("mlx==0.31.2",) if version.startswith(("1.7.", "1.8.")) else ()))

    def build(folder: Path) -> None:
        uv = str(_venv("uv", UV) / "bin" / "uv")
        python = str(folder / "bin" / "python")
        run([sys.executable, "-m", "venv", str(folder)])
        if sys.platform != "linux":
            run([uv, "pip", "install", "--python", python, *pins])
            return
        listed = folder / "overrides.txt"
        listed.write_text("\n".join([*overrides, ""]), encoding="utf-8")
        run([uv, "pip", "install", "--python", python, "--overrides", str(listed), *pins])
        # mlx has no backend of its own there; the CPU's has to be of exactly its version.
        run([uv, "pip", "install", "--python", python, "--no-deps", f"mlx-cpu=={_installed(folder, 'mlx')}"])
        _install_torch(uv, python, folder)

    suffix = f"-{transformers.replace('>=', '').replace('==', '')}" if transformers else ""
    return built(f"mlx-openai-server-{version}{suffix}-{PYTHON}", _stamp(*pins, *overrides, _TORCH), build)


def _install_torch(uv: str, python: str, folder: Path) -> None:
    """torch for the CPU alone: its CUDA packages are several GB, and nothing here could use them."""
    try:
        run([uv, "pip", "install", "--python", python, "--torch-backend", "cpu", _TORCH])
        return
    except BuildFailed:
        pass  # its index for the CPU is out of reach; pip may be configured with a wheel
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    report = folder / "torch.json"
    run([*pip, "--dry-run", "--quiet", "--report", str(report), _TORCH])
    names = [each["metadata"]["name"] for each in json.loads(report.read_text(encoding="utf-8"))["install"]]
    unwanted = [name for name in names if name.startswith("nvidia")]
    if unwanted:
        raise BuildFailed(f"{_TORCH} for the CPU alone cannot be had: pip would install {', '.join(unwanted)}")
    run([*pip, _TORCH])


def _installed(folder: Path, distribution: str) -> str:
    found = list(folder.glob(f"lib/python3*/site-packages/{distribution}-*.dist-info"))
    if len(found) != 1:
        raise BuildFailed(f"{distribution} is not installed in {folder}")
    return found[0].name.removeprefix(f"{distribution}-").removesuffix(".dist-info")


def built(name: str, stamp: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, made by `build` unless it is there and complete for `stamp`.

    The stamp is written last: what an interrupted build left is removed and made again. Runs that come at the same
    time wait for the one that builds. `build` gets the folder's final path (virtual environments cannot be moved);
    the folder does not exist yet.
    """
    folder = cache_folder() / name
    if _is_complete(folder, stamp):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{name}.lock")):
        if _is_complete(folder, stamp):
            return folder
        (folder / _STAMP).unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
        _say(f"building {name} in {folder.parent} (once)")
        build(folder)
        partial = folder / f"{_STAMP}.partial"
        partial.write_text(stamp, encoding="utf-8")
        partial.replace(folder / _STAMP)
    return folder


def run(argv: Sequence[str], env: Mapping[str, str] = _AMBIENT) -> None:
    """Run a step of a build. Raises `BuildFailed` with the last lines of its output."""
    last: deque[str] = deque(maxlen=20)
    with subprocess.Popen(
        argv,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        last.extend(process.stdout)
    if process.returncode != 0:
        raise BuildFailed(f"{' '.join(argv)}: exit status {process.returncode}\n{''.join(last)}")


def _venv(name: str, pins: tuple[str, ...]) -> Path:
    def build(folder: Path) -> None:
        python = str(folder / "bin" / "python")
        run([sys.executable, "-m", "venv", str(folder)])
        run([python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *pins])

    return built(f"{name}-{PYTHON}", _stamp(*pins), build)


def _uv_venv(name: str, pins: tuple[str, ...], overrides: tuple[str, ...]) -> Path:
    """Like `_venv`, with requirements that replace what the packages themselves declare."""

    def build(folder: Path) -> None:
        uv = _venv("uv", UV) / "bin" / "uv"
        run([sys.executable, "-m", "venv", str(folder)])
        listed = folder / "overrides.txt"
        listed.write_text("".join(f"{line}\n" for line in overrides), encoding="utf-8")
        python = str(folder / "bin" / "python")
        run([str(uv), "pip", "install", "--python", python, *pins, "--overrides", str(listed)])

    return built(f"{name}-{PYTHON}", _stamp(*pins, *overrides), build)


def _stamp(*parts: str) -> str:
    return "\n".join([*parts, f"{platform.python_implementation()} {sys.platform} {platform.machine()}", ""])


def _is_complete(folder: Path, stamp: str) -> bool:
    try:
        if (folder / _STAMP).read_text(encoding="utf-8") != stamp:
            return False
    except OSError:
        return False
    python = folder / "bin" / "python"
    # A virtual environment whose interpreter was uninstalled is a dangling link.
    return not python.is_symlink() or python.exists()


def _say(progress: str) -> None:
    sys.stderr.write(f"mlxops lab: {progress}\n")
    sys.stderr.flush()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"another run is building; waiting for {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
