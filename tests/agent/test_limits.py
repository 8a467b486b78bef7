"""Limits that a load gives to real engines: in their command, in the run record, and in no comparison."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxops.agent.engines import engine_named
from mlxops.agent.engines.base import EngineCommand, ServerSpec
from mlxops.agent.host.memory import HostMemory
from mlxops.agent.operations.limits import awaited, raised_wired_limit
from mlxops.agent.operations.model_files import ModelFiles
from mlxops.agent.operations.preflight import Prepared, expected_context, expected_type
from mlxops.agent.serving.memory import estimate_of
from mlxops.core.memory import Use
from mlxops.core.model_options import Option, Origin
from mlxops.core.planner import LoadPlan, ModelRef, Outcome, Wanted
from mlxops.core.registry import Model, parse
from mlxops.core.settings import Settings
from tests.lab import cache, models
from tests.lab.homelab import Homelab, Studio

QWEN, LLAMA = "tiny-org/tiny-qwen3", "tiny-org/tiny-llama"
LM_LIMITS = ["--decode-concurrency", "32", "--prompt-concurrency", "8", "--prompt-cache-bytes", "22020096"]
"""With a terabyte left: the engine's own 32 and 8, and 42 contexts of 524288 bytes (2048 tokens)."""
HIDES_LIMITS = """\
import re, runpy, sys, io, contextlib
if "--help" in sys.argv:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        runpy.run_module("mlx_lm.server", run_name="__main__")
    print(re.sub(r"--(decode-concurrency|prompt-concurrency|prompt-cache-bytes)", "--gone", text.getvalue()))
else:
    runpy.run_module("mlx_lm.server", run_name="__main__")
"""


class Installation:
    """An installation of the real mlx-lm that can be upgraded: its program and its package's metadata."""

    def __init__(self, folder: Path) -> None:
        self.program = folder / "bin" / "mlx_lm.server"
        self.site = folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
        self.program.parent.mkdir(parents=True)
        self.site.mkdir(parents=True)
        self.install("0.32.2", "import runpy; runpy.run_module('mlx_lm.server', run_name='__main__')\n")

    def install(self, version: str, script: str) -> None:
        shutil.rmtree(self.site)
        (self.site / f"mlx_lm-{version}.dist-info").mkdir(parents=True)
        self.program.write_text(f"#!{cache.engine_venv('mlx-lm')}/bin/python\n{script}")
        self.program.chmod(0o755)


def ready(studio: Studio, *arguments: str) -> Any:
    return studio.mlxctl("load", *arguments, "--json", timeout=300).ok().json["hosts"][0]["result"]


def record(studio: Studio, port: int) -> Any:
    return json.loads((studio.state / "run" / f"{port}.json").read_text(encoding="utf-8"))


def drift(studio: Studio) -> Any:
    return studio.mlxctl("status", "--json").ok().json["hosts"][0]["drift"]


def flags(studio: Studio, name: str) -> dict[str, object]:
    """Return the limits of the budget that `list` shows."""
    rows = studio.mlxctl("list", "--json").ok().json["hosts"][0]["models"]
    found = next(row["flags"] for row in rows if row["name"] == name)
    return {flag["key"]: flag["value"] for flag in found if flag["origin"] == "budget"}


@pytest.fixture
def studio(homelab: Homelab) -> Studio:
    for name, model in ((QWEN, models.QWEN), (LLAMA, models.LLAMA)):
        homelab.studio.install(name, model)
    homelab.studio.mlxctl("init").ok()
    return homelab.studio


@pytest.mark.timeout(300)
def test_mlx_lm_gets_limits_that_are_never_drift(homelab: Homelab, studio: Studio, tmp_path: Path) -> None:
    first, second = studio.ports[0], studio.ports[1]
    installed = Installation(tmp_path / "engine")
    homelab.configure(launch={"mlx-lm": [str(installed.program)]})

    memory = ready(studio, QWEN, str(first), "--dry-run")["plan"]["memory"]
    contexts = memory["contexts"] * (memory["context_bytes"] + memory["state_bytes"])
    assert memory["contexts"] == 32 and memory["weight_bytes"] > 0
    assert memory["total_bytes"] == memory["weight_bytes"] + contexts + memory["cache_bytes"] + memory["server_bytes"]

    told = studio.mlxctl("load", QWEN, str(first)).ok().stderr

    assert "limits: 32 requests at once, 22.0 MB of contexts; it may take up to" in told
    assert "mlx-lm does not limit the length of a context: 2048 tokens are counted" in told
    run = record(studio, first)
    assert run["budget"] == run["argv"][-6:] == LM_LIMITS
    command = next(each.command for each in studio.processes() if f"--port {first}" in each.command)
    assert command.endswith(" ".join(LM_LIMITS))
    assert studio.completion(first, "jerry-xl")["choices"]
    assert flags(studio, QWEN) == {"decode_concurrency": 32, "prompt_concurrency": 8, "prompt_cache_bytes": 22020096}

    # Another port is loaded, and less memory is left.
    homelab.configure(launch={"mlx-lm": [str(installed.program)]}, memory="500 GB")
    ready(studio, LLAMA, str(second))
    assert drift(studio) == []
    again = ready(studio, QWEN, str(first))
    assert (again["changed"], again["notes"], again["pid"]) == (False, [], run["pid"])

    # The record of a build without budgets, or one that was lost: the server stays and is adopted.
    (studio.state / "run" / f"{first}.json").unlink()
    adopted = ready(studio, QWEN, str(first))
    assert (adopted["changed"], adopted["pid"]) == (False, run["pid"])
    assert record(studio, first)["budget"] == LM_LIMITS and drift(studio) == []

    # The library is upgraded, and the new one has no limits.
    installed.install("0.99.0", HIDES_LIMITS)
    assert drift(studio) == []
    assert ready(studio, QWEN, str(first))["pid"] == run["pid"]
    studio.mlxctl("unload", str(first)).ok()
    told = studio.mlxctl("load", QWEN, str(first)).ok().stderr
    assert "no limits of its memory are set: the installed mlx-lm is not known to have any" in told
    assert record(studio, first)["budget"] == [] and drift(studio) == []
    studio.mlxctl("unload", str(second)).ok()
    warned = next(note for note in ready(studio, LLAMA, str(second))["notes"] if "no limit of the contexts" in note)
    assert f"{QWEN} on {first}" in warned and f"{LLAMA} on {second}" in warned
    studio.mlxctl("unload-all", "--yes").ok()


# -- without a real engine -------------------------------------------------------------------------------------------


def spec(*options: Option, **fields: object) -> ServerSpec:
    model = Model("jerry", "org/jerry", **fields)  # type: ignore[arg-type]  # as each test says
    return ServerSpec(model, "jerry-xl", Path("/hub/sha"), "127.0.0.1", 8100, Path("/run"), options)


LM = ("--decode-concurrency", "--prompt-concurrency", "--prompt-cache-bytes")
OPENAI = ("--decode-concurrency", "--prompt-concurrency", "--max-bytes")


@pytest.mark.parametrize(
    ("engine", "serving", "added"),
    [
        ("mlx-lm", spec(), LM),
        ("mlx-lm", spec(args=("--max-tokens", "5")), LM),
        ("mlx-lm", spec(args=("--decode-concurrency=4",)), LM[1:]),
        ("mlx-lm", spec(args=("--prompt-cache-b", "4GB")), LM[:2]),
        ("mlx-lm", spec(args=("--de", "4", "--prompt-co", "2")), LM[2:]),
        ("mlx-openai-server", spec(), OPENAI),
        ("mlx-openai-server", spec(args=("--max-bytes", "7")), OPENAI[:2]),
        ("mlx-openai-server", spec(Option("model_type", "multimodal", Origin.REGISTRY)), OPENAI[:2]),
        ("mlx-openai-server", spec(args=("--model-type", "multimodal")), OPENAI[:2]),
        ("mlx-openai-server", spec(args=("--model-type", "whisper")), ()),
    ],
)
def test_load_adds_only_options_that_the_entry_leaves_open(
    engine: str, serving: ServerSpec, added: tuple[str, ...]
) -> None:
    made = engine_named(engine).argv(EngineCommand(("/x/serve",), "test"), serving)
    assert engine_named(engine).limit_options(serving, made).all == added


@pytest.mark.parametrize(("kind", "added"), [("embeddings", ()), ("multimodal", OPENAI[:2]), ("lm", OPENAI)])
def test_model_type_of_launch_decides_which_limits_are_added(kind: str, added: tuple[str, ...]) -> None:
    engine = engine_named("mlx-openai-server")
    serving = spec(Option("model_type", None, Origin.REGISTRY))  # `model_type: null`: what `launch` says
    made = engine.argv(EngineCommand(("/x/serve", "launch", "--model-type", kind), "`launch` in hosts.yaml"), serving)
    assert engine.limit_options(serving, made).all == added


@pytest.mark.parametrize(
    ("engine", "version", "arguments", "unbounded"),
    [
        ("mlx-lm", "0.32.2", (), True),
        ("mlx-lm", "0.32.2", ("--decode-concurrency", "4"), True),
        ("mlx-lm", "0.32.2", ("--prompt-cache-bytes", "4GB"), False),
        ("mlx-lm", None, ("--prompt-cache-b=4000",), False),
        ("mlx-openai-server", "1.7.1", (), True),
        ("mlx-openai-server", "1.7.1", ("--max-bytes", "4000"), False),
        ("mlx-openai-server", "1.8.1", ("--max-bytes", "4000"), True),
        ("mlx-openai-server", "1.8.1", ("--decode-concurrency", "4"), False),
        ("mlx-openai-server", None, ("--decode-concurrency", "4"), False),
    ],
)
def test_server_is_unbounded_if_nothing_limits_its_contexts(
    engine: str, version: str | None, arguments: tuple[str, ...], unbounded: bool
) -> None:
    assert engine_named(engine).is_unbounded(("x", "--model", "m", *arguments), version) == unbounded


@pytest.mark.parametrize(
    ("engine", "launch", "fields", "expected"),
    [
        ("mlx-openai-server", (), {}, ("lm", None)),
        ("mlx-openai-server", (), {"options": {"model_type": "multimodal"}}, ("multimodal", None)),
        ("mlx-openai-server", ("--model-type", "multimodal", "--context-length", "9"), {}, ("lm", 9)),
        ("mlx-openai-server", ("--model-type", "multimodal"), {"options": {"model_type": None}}, ("multimodal", None)),
        ("mlx-openai-server", ("--context-length", "9"), {"context_length": 7}, ("lm", 7)),
        ("mlx-openai-server", (), {"context_length": 7, "args": ("--context-length=5",)}, ("lm", 5)),
        ("mlx-openai-server", (), {"args": ("--model-type", "embeddings")}, ("embeddings", None)),
        ("mlx-lm", ("--model-type", "multimodal"), {"context_length": 7}, ("lm", 7)),
        ("unknown", (), {"context_length": 7}, ("lm", 7)),
    ],
)
def test_launch_and_args_decide_what_is_estimated(
    engine: str, launch: tuple[str, ...], fields: dict[str, Any], expected: tuple[str, int | None]
) -> None:
    settings, entry = Settings(engine=engine, launch={engine: ("server", *launch)}), Model("m", "org/m", **fields)
    assert (expected_type(settings, entry), expected_context(settings, entry)) == expected


def test_estimate_of_a_load_counts_the_context_length_of_its_args() -> None:
    for engine, words, tokens in (
        ("mlx-openai-server", ("--context-length", "131072"), 131072),
        ("mlx-openai-server", (), 9),
        ("mlx-lm", (), 9),
    ):
        made = engine_named(engine)
        command, files = EngineCommand(("server",), "PATH"), ModelFiles("1" * 40, Path("/m"), 1)
        wanted = Wanted("org/m", "1" * 40, engine, ("server", "--model", "m", *words), "/m")
        prepared = Prepared(made, command, spec(context_length=9), files, wanted)
        assert prepared.context_length == tokens


def test_limits_leave_room_for_assigned_models_that_do_not_serve(tmp_path: Path) -> None:
    """After a reboot, `restore` loads one after the other."""
    entries = {}
    for name, port in (("a", 8103), ("b", 8104), ("c", 8102), ("d", None)):
        path = models.install_snapshot(tmp_path, f"org/{name}", models.tiny_models() / models.QWEN)
        entries[name] = {"repo_id": f"org/{name}", "cache_path": str(path), "port": port}
    known = parse(json.dumps({"version": 1, "models": entries}).encode())
    plan = LoadPlan(ModelRef("a", "org/a", None, known.models["a"]), 8103, "a", Outcome.START)
    one = estimate_of(Path(str(entries["b"]["cache_path"])))
    assert one is not None
    settings = Settings()
    serving = Use(8102, "c", "mlxops", 10, one.total, None)
    assert awaited(settings, known, plan, []) == 2 * one.total, (
        "b and c, but not what is loaded, and not what has no port"
    )
    assert awaited(settings, known, plan, [serving]) == one.total


@pytest.mark.parametrize(
    ("limit", "is_set", "named"),
    [(None, False, False), (98304, False, False), (98304, True, False), (120000, True, True)],
)
def test_wired_limit_of_a_mac_is_named_if_it_is_raised(limit: int | None, is_set: bool, named: bool) -> None:
    memory = HostMemory(128 * 1024**3, gpu_limit=limit and limit * 1024**2, gpu_limit_set=is_set)
    danger = raised_wired_limit(memory)
    assert (danger is not None) == named
    assert danger is None or "leaves 11.6 GB of 137 GB for the system" in danger.message


@pytest.mark.usefixtures("quick_engine")
def test_engine_behind_an_unknown_program_gets_no_limits(studio: Studio) -> None:
    port = studio.ports[0]
    told = studio.mlxctl("load", QWEN, str(port)).ok().stderr
    assert "no limits of its memory are set: the installed mlx-lm is not known to have any" in told
    studio.mlxctl("unload-all", "--yes").ok()


@pytest.mark.usefixtures("quick_engine")
def test_record_of_an_earlier_build_is_no_drift(studio: Studio) -> None:
    port = studio.ports[0]
    ready(studio, QWEN, str(port))
    run = record(studio, port)
    del run["budget"]
    (studio.state / "run" / f"{port}.json").write_text(json.dumps(run), encoding="utf-8")
    assert drift(studio) == []
    assert ready(studio, QWEN, str(port))["pid"] == run["pid"]
    studio.mlxctl("unload-all", "--yes").ok()


@pytest.mark.usefixtures("quick_engine")
def test_dangerous_setting_is_a_warning_of_load(homelab: Homelab, studio: Studio) -> None:
    port = studio.ports[0]
    homelab.configure(env={"MLX_METAL_FAST_SYNCH": "1"})
    noted = ready(studio, QWEN, str(port))["notes"]
    assert any("MLX_METAL_FAST_SYNCH is set (env in hosts.yaml)" in note for note in noted)
    assert [each["code"] for each in drift(studio)] == ["dangerous_setting"]
    studio.mlxctl("unload-all", "--yes").ok()
