"""Models that an engine cannot load are refused before any server stops. Tried with the real engines."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxops.agent.engines import engine_named
from mlxops.agent.engines.base import EngineCommand, ServerSpec
from mlxops.agent.hub.snapshot import inspect, judge
from mlxops.agent.operations.model_files import ModelFiles
from mlxops.agent.operations.preflight import Prepared, check
from mlxops.core.errors import Refused
from mlxops.core.planner import LoadPlan, ModelRef, Outcome, Wanted
from mlxops.core.registry import Model
from tests.lab import cache, models
from tests.lab.homelab import Homelab, Studio
from tests.lab.hub import Hub
from tests.lab.shapes import MLA, N, plain
from tests.steps import words_of

REPO = "tiny-org/odd"
WEIGHTS = "model.safetensors"


def spoiled(tmp_path: Path, spoil: Callable[[Path], object], model: str = models.QWEN) -> Path:
    """Return the folder of a modified tiny model."""
    folder = tmp_path / "spoiled"
    shutil.copytree(models.tiny_models() / model, folder)
    spoil(folder)
    return folder


def renamed(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).rename(folder / name)


def configured(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def an_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    renamed("adapters.safetensors")(folder)


def in_pytorchs_format(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length]) | {"__metadata__": {"format": "pt"}}
    encoded = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])
    (folder / "README.md").unlink()


def error_of_load(studio: Studio, *words: str) -> Any:
    done = studio.mlxctl("load", "--model", REPO, "--port", str(studio.ports[0]), "--json", *words)
    assert done.exit == 3, done
    return done.json["hosts"][0]["error"]


class TestUnloadableWeights:
    def test_unloadable_weights_are_refused_and_the_server_stays(self, homelab: Homelab, tmp_path: Path) -> None:
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
    def test_weights_with_other_names_are_refused(
        self, homelab: Homelab, tmp_path: Path, name: str, engine: str
    ) -> None:
        studio = homelab.studio
        with_engines(homelab)
        models.install_snapshot(studio.hub, REPO, spoiled(tmp_path, renamed(name)))
        register(studio, engine=engine)
        error = error_of_load(studio, "--dry-run")
        assert error["code"] == "not_servable", error


class TestMultimodalModel:
    """Served by mlx-openai-server as `multimodal`, which loads it with mlx-vlm."""

    @pytest.mark.parametrize(
        ("model_type", "known"),
        [("kimi_vl", True), ("Qwen2_VL", True), ("cohere2_vision", True), ("qwen3", False), ("idefics9", False)],
    )
    def test_unknown_architecture_is_refused(
        self, homelab: Homelab, tmp_path: Path, model_type: str, known: bool
    ) -> None:
        with_engines(homelab)
        studio = homelab.studio
        models.install_snapshot(studio.hub, REPO, spoiled(tmp_path, configured(model_type=model_type)))
        register(studio, engine="mlx-openai-server", model_type="multimodal")
        if known:
            studio.mlxctl("load", "--model", REPO, "--port", str(studio.ports[0]), "--dry-run").ok()
            return
        error = error_of_load(studio, "--dry-run")
        assert error["code"] == "unknown_architecture", error
        assert error["why"].startswith(f"its model_type is {model_type!r}, which mlx-vlm "), error

    def test_memory_estimate_uses_full_keys_and_values(self, homelab: Homelab, tmp_path: Path) -> None:
        with_engines(homelab)
        studio = homelab.studio
        latent = plain("deepseek_v3", 27, 16, 16, 2048, **MLA)
        folder = spoiled(tmp_path, configured(model_type="kimi_vl", text_config=latent, max_position_embeddings=N))
        models.install_snapshot(studio.hub, REPO, folder)
        for kind, size in (("lm", 27 * 576), ("multimodal", 27 * 16 * 320)):
            register(studio, engine="mlx-openai-server", model_type=kind)
            (row,) = studio.mlxctl("list", "--memory", "--json").ok().json["hosts"][0]["models"]
            assert row["memory"]["context_bytes"] == size * N * 2
        homelab.configure(memory="6GB")
        assert error_of_load(studio, "--dry-run")["code"] == "does_not_fit"


VERDICTS = {"named weights.00", "unknown architecture", "hqq", "a shard is gone", "no tokenizer"}
"""Some variants that must be refused. If they are not, the test tried nothing."""
AS_A_RULE = {"code for the model"}
"""Refused although mlx-lm 0.31.3 loads it, because that imports the repository's code (CVE-2026-5843)."""


@pytest.fixture(scope="module")
def odd(engine: Path, tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create the folder of the odd variants. The file `canary` beside it lists those whose code ran."""
    folder = tmp_path_factory.mktemp("odd") / "models"
    folder.mkdir()
    run_odd(
        "make",
        str(tiny_models / models.QWEN),
        str(folder),
        python=engine,
        folder=folder.parent,
    )
    return folder


def run_odd(*arguments: str, python: Path, folder: Path) -> str:
    script = Path(cache.__file__).with_name("oddmodels.py")
    own = {**os.environ, "TMPDIR": str(folder)}  # MLX compiles what it needs there
    argv = [str(python / "bin" / "python"), str(script), *arguments]
    done = subprocess.run(argv, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def refusal(engine: str, argv: tuple[str, ...], folder: Path) -> str | None:
    """Return why a load of this folder is refused; None if it is not."""
    entry = Model("odd", REPO)
    found = engine_named(engine)
    serving = ServerSpec(entry, "odd", folder, "127.0.0.1", 8100, folder)
    files = ModelFiles("a" * 40, folder, 0)
    prepared = Prepared(
        found, EngineCommand(argv, "test"), serving, files, Wanted(REPO, files.revision, engine, argv, "")
    )
    verdict = judge(str(folder), "org")
    if verdict.why and not verdict.whole:
        return verdict.why
    try:
        check(LoadPlan(ModelRef("odd", REPO, None, entry), 8100, "odd", Outcome.START), prepared, inspect(folder))
    except Refused as error:
        return f"{error.code}: {error.why}"
    return None


@pytest.mark.parametrize("engine_name", ["mlx-lm", "mlx-openai-server"])
def test_refused_models_are_those_that_the_engine_cannot_load(odd: Path, engine_name: str) -> None:
    """Both directions: a model is refused if and only if the real engine cannot load it."""
    if engine_name == "mlx-openai-server" and not cache.has_openai_server():
        pytest.skip("it has no version for this Python")
    venv = cache.engine_venv(engine_name) if engine_name == "mlx-lm" else cache.openai_server_venv()
    program = {"mlx-lm": ("mlx_lm.server",), "mlx-openai-server": ("mlx-openai-server", "launch")}[engine_name]
    canary = odd.with_name("canary")
    canary.unlink(missing_ok=True)
    truth: dict[str, str | None] = json.loads(run_odd("try", str(odd), python=venv, folder=odd.parent).splitlines()[-1])
    argv = (str(venv / "bin" / program[0]), *program[1:])
    reasons = {name: refusal(engine_name, argv, odd / name) for name in truth}
    wrong = {
        name: (truth[name], reasons[name])
        for name in truth
        if (truth[name] is None) != (reasons[name] is None) and name not in AS_A_RULE
    }
    assert wrong == {}
    assert {name for name in truth if reasons[name]} >= VERDICTS | AS_A_RULE and len(truth) > 50
    ran = set(canary.read_text().splitlines()) if canary.exists() else set()
    assert ran == (AS_A_RULE if engine_name == "mlx-openai-server" else set()), (
        "whose code ran, though nothing is trusted"
    )


class TestCheckBeforeDownload:
    """The check uses the hub's list and config.json. No weights are downloaded, and the cache stays empty."""

    @pytest.fixture
    def studio(self, online_homelab: Homelab) -> Studio:
        return online_homelab.studio

    @pytest.mark.parametrize(
        ("name", "spoil", "code", "why"),
        [
            ("weights-00", renamed("weights.00.safetensors"), "not_servable", "no model*.safetensors"),
            ("qwen9", configured(model_type="qwen9"), "unknown_architecture", "'qwen9'"),
            ("bnb", configured(quantization_config={"quant_method": "bitsandbytes"}), "not_servable", "'bitsandbytes'"),
            ("lora", an_adapter, "not_mlx", "it is an adapter"),
        ],
    )
    def test_unservable_repository_is_refused(
        self,
        studio: Studio,
        hub: Hub,
        tmp_path: Path,
        name: str,
        spoil: Callable[[Path], object],
        code: str,
        why: str,
    ) -> None:
        repo = f"tiny-org/before-{name}"
        hub.add(repo, spoiled(tmp_path, spoil))
        done = studio.mlxctl("load", "--model", repo, "--port", str(studio.ports[0]), "--json")
        assert done.exit == 3, done
        error = done.json["hosts"][0]["error"]
        assert error["code"] == code and why in error["why"], error
        assert not models.repo_folder(studio.hub, repo).exists() and not studio.registry_path.exists()

    def test_pytorch_weights_are_accepted(self, studio: Studio, hub: Hub, tmp_path: Path) -> None:
        """mlx-lm converts such weights while it loads them."""
        repo, port = "tiny-org/in-pytorchs-format", studio.ports[0]
        hub.add(repo, spoiled(tmp_path, in_pytorchs_format))
        studio.mlxctl("load", "--model", repo, "--port", str(port), "--overcommit").ok()
        assert words_of(studio, port, "jerry-xl") is not None
        studio.mlxctl("unload", "--port", str(port)).ok()
        assert studio.mlxctl("list", "--json").ok().json["hosts"][0]["models"][0]["problems"] == []


class TestUntrustedCode:
    def test_untrusted_code_is_noted_and_not_run(self, homelab: Homelab, tmp_path: Path) -> None:
        studio, canary, port = homelab.studio, tmp_path / "canary", homelab.studio.ports[0]

        def with_code(at: Path) -> None:
            (at / "own.py").write_text(f"open({str(canary)!r}, 'w')\nclass X: pass\n")
            configured(auto_map={"AutoConfig": "own.X", "AutoModelForCausalLM": "own.X"})(at)

        models.install_snapshot(studio.hub, REPO, spoiled(tmp_path, with_code))
        done = studio.mlxctl("load", "--model", REPO, "--port", str(port), "--overcommit").ok()
        assert "the repository's code is not run: config.json name" in done.stderr
        assert words_of(studio, port, "jerry-xl") is not None and not canary.exists()
        assert not any("--trust-remote-code" in process.command for process in studio.processes())
        studio.mlxctl("unload", "--port", str(port)).ok()


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
