"""Models without weights: their files look complete, for engines that load nothing."""

from __future__ import annotations

import json
from pathlib import Path

MODELS = ("org/alpha", "org/beta", "org/gamma")


def snapshot(hub: Path, repo_id: str) -> Path:
    """A complete MLX snapshot without a model in it."""
    repo = hub / f"models--{repo_id.replace('/', '--')}"
    sha = repo_id.encode().hex().ljust(40, "0")[:40]
    folder = repo / "snapshots" / sha
    folder.mkdir(parents=True)
    header = json.dumps({"w": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    config = {"model_type": "qwen3", "architectures": ["X"], "quantization": {"group_size": 64, "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    (folder / "README.md").write_text("---\nlibrary_name: mlx\ntags:\n- mlx\n---\n", encoding="utf-8")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(sha, encoding="utf-8")
    return folder
