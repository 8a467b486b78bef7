"""The cost of files: a download, a scan of the cache, a write of the registry."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from mlxops.agent.state.store import Store
from mlxops.core.registry import Registry
from tests.benchmarks.contest import Contest, Cost, Program, Timed
from tests.benchmarks.scene import homelab, host_environment, inv, inv_local, python
from tests.benchmarks.stats import Limit
from tests.lab import models
from tests.lab.homelab import Studio, script
from tests.lab.hub import Hub

REPOS = 1000
AMOUNTS = (10, 100, REPOS)
TENSORS, FILES = 1800, 15
"""Tensors and weight files of each cached model: those of 70 billion parameters in 8 bits, common on a Studio."""
WEIGHT_BYTES = 100_000_000
SHARDS = 6
"""Weight files of the downloaded repository, each of `WEIGHT_BYTES`."""
TRANSACTIONS_PER_TURN = 20
SCAN = "import sys; from huggingface_hub import scan_cache_dir; scan_cache_dir(sys.argv[1])"


# -- inv pull -----------------------------------------------------------------------------------------------------


@contextmanager
def _pull(folder: Path) -> Iterator[Mapping[str, Timed]]:
    repo, model = "bench/big", folder / "model"
    _write_model(model, [{"w": WEIGHT_BYTES}] * SHARDS)
    (folder / "hub").mkdir()
    with Hub(folder / "hub") as hub:
        hub.add(repo, model)
        with homelab(folder, hub_url=hub.url) as lab:
            studio = lab.studio
            ours = inv(lab, "pull", "--repo", repo)
            theirs = _hf_download(studio, repo, folder / "theirs")
            yield {
                "hf download": lambda: _download_again(folder / "theirs", theirs),
                "inv pull": lambda: _download_again(models.repo_folder(studio.hub, repo), ours),
            }


def _hf_download(studio: Studio, repo: str, cache: Path) -> Program:
    # Otherwise it asks a package index for a newer version of itself.
    env = {"HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return Program([script("hf"), "download", repo], studio.home, {**host_environment(studio), **env})


def _download_again(cached: Path, program: Program) -> float:
    shutil.rmtree(cached, ignore_errors=True)
    return program()


# -- inv init -----------------------------------------------------------------------------------------------------


@contextmanager
def _init(folder: Path, *, trees: bool) -> Iterator[Mapping[str, Timed]]:
    with homelab(folder) as lab:
        fill(lab.studio.hub, REPOS, folder / "model", trees=trees)
        yield {"scan_cache_dir": python(lab.studio, SCAN, str(lab.studio.hub)), "inv init": _fresh_init(lab.studio)}


def _fresh_init(studio: Studio) -> Timed:
    """`inv init --local` with an empty registry, so that every model is registered."""
    program = inv_local(studio, "init")

    def run() -> float:
        # Not deleted: a registry that was there and is gone is an error.
        studio.registry_path.write_text('{"version": 1, "models": {}}', encoding="utf-8")
        return program()

    return run


@contextmanager
def _caches(folder: Path) -> Iterator[Mapping[str, Mapping[int, Timed]]]:
    """One host for each amount, with its own cache."""
    with homelab(folder, studios=len(AMOUNTS)) as lab:
        studios = dict(zip(AMOUNTS, lab.studios, strict=True))
        for amount, studio in studios.items():
            fill(studio.hub, amount, folder / "model", trees=True)
        yield {
            "inv init": {amount: _fresh_init(studio) for amount, studio in studios.items()},
            "inv list": {amount: inv_local(studio, "list") for amount, studio in studios.items()},
            "scan_cache_dir": {amount: python(studio, SCAN, str(studio.hub)) for amount, studio in studios.items()},
        }


def fill(hub: Path, repos: int, model: Path, *, trees: bool) -> None:
    """Fill a cache with models that have real headers and hardly any weights.

    `trees`: with the listings that huggingface_hub keeps since 1.22.
    """
    if not model.exists():
        tensors = [f"model.layers.{number}.self_attn.q_proj.weight" for number in range(TENSORS)]
        _write_model(model, [dict.fromkeys(tensors[number::FILES], 16) for number in range(FILES)])
    for number in range(repos):
        models.install_snapshot(hub, f"mlx-community/model-{number:04}", model, trees=trees)


def _write_model(folder: Path, shards: list[dict[str, int]]) -> None:
    """Write the files of a quantized Qwen3 as the hub has them. `shards`: {tensor: bytes} of each weight file."""
    folder.mkdir(parents=True)
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 40960}
    config |= {"quantization": {"group_size": 64, "bits": 4}, "num_hidden_layers": 28, "num_key_value_heads": 8}
    for name, content in (
        ("config.json", config),
        ("tokenizer.json", {"version": "1.0", "model": {"type": "BPE", "vocab": {}}}),
        ("tokenizer_config.json", {"model_max_length": 40960}),
        ("special_tokens_map.json", {}),
        ("generation_config.json", {}),
        ("added_tokens.json", {}),
        ("vocab.json", {}),
    ):
        (folder / name).write_text(json.dumps(content, indent=4), encoding="utf-8")
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n", encoding="utf-8")
    (folder / "README.md").write_text("---\nlibrary_name: mlx\n---\n", encoding="utf-8")
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, tensors in zip(files, shards, strict=True):
        _write_weights(folder / name, tensors)
    index = {
        "metadata": {"total_size": sum(map(_size, shards))},
        "weight_map": {name: file for file, tensors in zip(files, shards, strict=True) for name in tensors},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4), encoding="utf-8")


def _write_weights(path: Path, tensors: Mapping[str, int]) -> None:
    """Write a safetensors file of zeros."""
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, size in tensors.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)


def _size(tensors: Mapping[str, int]) -> int:
    return sum(tensors.values())


# -- a registry transaction -----------------------------------------------------------------------------------------


@contextmanager
def _transaction(folder: Path) -> Iterator[Mapping[str, Timed]]:
    """Runs in this process: the write is timed, not the start of a program."""
    hub = folder / "hub"
    hub.mkdir()
    store = Store(folder / "state", hub / "registry.json")
    store.create_folders()
    entry = {"repo_id": "org/model", "model_id": "org/model", "cache_path": "/hub/models--org--model", "format": "mlx"}
    known = {f"model-{number}": {**entry, "port": None} for number in range(7)}
    store.registry.path.write_text(json.dumps({"version": 1, "models": known}, indent=2), encoding="utf-8")
    numbers = count(1)
    content = store.registry.path.read_bytes()

    def transaction() -> None:
        port = next(numbers)

        def change(registry: Registry) -> Registry:
            return registry.set_fields("model-0", {"port": port})

        store.registry.update(change)

    yield {
        "bare write": lambda: _seconds_of_one(lambda: _bare_write(hub / "bare.json", content)),
        "transaction": lambda: _seconds_of_one(transaction),
    }


def _seconds_of_one(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    for _ in range(TRANSACTIONS_PER_TURN):
        work()
    return (time.perf_counter() - began) / TRANSACTIONS_PER_TURN


def _bare_write(path: Path, content: bytes) -> None:
    """Do the least that survives a power cut: write, flush, rename, flush the folder."""
    temporary = f"{path}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.write(fd, content)
    _flush(fd)
    os.close(fd)
    os.rename(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _flush(fd: int) -> None:
    full = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: its fsync does not reach the disk
    if full is None:
        os.fsync(fd)
    else:
        fcntl.fcntl(fd, full)


# -- tab completion -------------------------------------------------------------------------------------------------


@contextmanager
def _complete(folder: Path) -> Iterator[Mapping[str, Timed]]:
    """Two hosts with twenty models each are remembered."""
    names = folder / "mlxops" / "names"
    names.parent.mkdir()
    rows = [f"model\t{host}\torg/model-{number}\ton 8100" for host in ("studio", "studio2") for number in range(20)]
    names.write_text("\n".join(rows), encoding="utf-8")
    env = {"XDG_CACHE_HOME": str(folder), "PATH": os.environ["PATH"]}
    yield {
        "python -c pass": Program([sys.executable, "-c", "pass"], folder, env),
        "mlxctl __complete": Program([script("mlxctl"), "__complete", "zsh", "load", ""], folder, env),
    }


CONTESTS = (
    Contest(
        "complete",
        "tab completion of a model's name",
        "mlxctl __complete",
        "python -c pass",
        Limit({"python -c pass": 3}),
        25,
        _complete,
    ),
    Contest(
        "pull",
        f"inv pull, {SHARDS * WEIGHT_BYTES // 1_000_000} MB, the same hub",
        "inv pull",
        "hf download",
        Limit({"hf download": 1.05}),
        7,
        _pull,
    ),
    Contest(
        "init",
        f"inv init --local, {REPOS} repositories",
        "inv init",
        "scan_cache_dir",
        Limit({"scan_cache_dir": 0.35}),
        7,
        lambda folder: _init(folder, trees=True),
    ),
    Contest(
        "init-old",
        "the same, cached by huggingface_hub before 1.22: no listings",
        "inv init",
        "scan_cache_dir",
        Limit({"scan_cache_dir": 0.35}),
        7,
        lambda folder: _init(folder, trees=False),
    ),
    Contest(
        "registry",
        "one registry transaction",
        "transaction",
        "bare write",
        Limit({"bare write": 1.5}),
        15,
        _transaction,
    ),
)
COSTS = (Cost("repositories", "repository", 3, _caches),)
