"""What an engine can load is served, and what it cannot is refused before anything stops: tried with the real ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.lab import cache, models
from tests.lab.homelab import Homelab, Studio
from tests.steps import words_of

REPO = "tiny-org/odd"
WEIGHTS = "model.safetensors"


def spoiled(tmp_path: Path, spoil: Callable[[Path], object], model: str = models.QWEN) -> Path:
    """The directory of a tiny model that was changed."""
    folder = tmp_path / "spoiled"
    shutil.copytree(models.tiny_models() / model, folder)
    spoil(folder)
    return folder


def renamed(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).rename(folder / name)


def error_of_load(studio: Studio, *words: str) -> Any:
    done = studio.mlxctl("load", "--model", REPO, "--port", str(studio.ports[0]), "--json", *words)
    assert done.exit == 3, done
    return done.json["hosts"][0]["error"]


class TestWeightsThatTheEngineDoesNotLoad:
    def test_are_refused_and_the_healthy_server_stays(self, homelab: Homelab, tmp_path: Path) -> None:
        studio = homelab.studio
        port = studio.ports[0]
        studio.install("tiny-org/good", models.LLAMA)
        models.install_snapshot(studio.hub, REPO, spoiled(tmp_path, renamed("weights.00.safetensors")))
        studio.mlxctl("init").ok()
        pid = (
            studio.mlxctl("load", "--model", "tiny-org/good", "--port", str(port), "--json")
            .ok()
            .json["hosts"][0]["result"]["pid"]
        )
        error = error_of_load(studio, "--force")
        assert error["code"] == "not_servable" and "no model*.safetensors" in error["why"], error
        row = studio.mlxctl("status", "--json").ok().json["hosts"][0]["ports"][0]
        assert (row["pid"], row["state"], row["model"]) == (pid, "ready", "tiny-org/good")
        assert words_of(studio, port, "jerry-xl") is not None
        studio.mlxctl("unload", "--port", str(port)).ok()

    @pytest.mark.parametrize(
        ("name", "engine"),
        [
            ("weights.00.safetensors", "mlx-openai-server"),
            ("weights.00.safetensors", "mlx-lm"),
            ("pytorch_model.safetensors", "mlx-lm"),
            ("diffusion_pytorch_model.safetensors", "mlx-lm"),
            ("MODEL.safetensors", "mlx-lm"),
        ],
    )
    def test_are_refused_by_name(self, homelab: Homelab, tmp_path: Path, name: str, engine: str) -> None:
        studio = homelab.studio
        with_engines(homelab)
        models.install_snapshot(studio.hub, REPO, spoiled(tmp_path, renamed(name)))
        register(studio, engine=engine)
        error = error_of_load(studio, "--dry-run")
        assert error["code"] == "not_servable", error


def with_engines(lab: Homelab) -> None:
    server = cache.openai_server_venv() / "bin" / "mlx-openai-server"
    lab.configure(
        launch={
            "mlx-lm": [str(cache.engine_venv("mlx-lm") / "bin" / "mlx_lm.server")],
            "mlx-openai-server": [str(server), "launch"],
        }
    )


def register(studio: Studio, **more: object) -> None:
    entry = {"repo_id": REPO, "model_id": REPO, "cache_path": None, "format": "mlx", "port": None, **more}
    studio.registry_path.write_text(json.dumps({"version": 1, "models": {REPO: entry}}), encoding="utf-8")
