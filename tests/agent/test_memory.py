"""The memory of a host: budget, use and prefetch."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mlxops.agent.context import Context
from mlxops.agent.host.darwin import default_gpu_limit
from mlxops.agent.host.memory import HostMemory
from mlxops.agent.host.system import LinuxSystem, System, this_system
from mlxops.agent.operations import prefetch
from mlxops.agent.paths import HostPaths, host_paths
from mlxops.agent.serving.memory import Budget, budget, check_fits, estimate_of, in_use
from mlxops.agent.serving.observe import observe
from mlxops.agent.state.store import Store
from mlxops.core.errors import Refused
from mlxops.core.kv_cache import kv_cache
from mlxops.core.layers import MODEL_TYPES
from mlxops.core.memory import Estimate, Use
from mlxops.core.ports import Owner, PortView, State, World
from mlxops.core.protocol import Event, Note, Phase
from mlxops.core.records import Operation
from mlxops.core.registry import EMPTY
from mlxops.core.settings import PortRange, Settings
from tests.lab import models
from tests.lab.envelopes import envelope
from tests.lab.shapes import EVERY_TYPE, MLA, PUBLISHED, Fields, N, nested, plain
from tests.lab.world import free_port

GB = 10**9

STUDIO_256 = HostMemory(274877906944, gpu_limit=241_644 * 1024 * 1024, gpu_limit_set=True)
"""The homelab's Mac Studio, 256 GB, with its raised limit."""
FRESH_MAC = HostMemory(274877906944, gpu_limit=default_gpu_limit(274877906944))


def here(tmp_path: Path, **settings: object) -> HostPaths:
    made = replace(Settings(), state=str(tmp_path / "state"), hub=str(tmp_path / "hub"), **settings)  # type: ignore[arg-type]
    return host_paths(made, {"HOME": str(tmp_path)})


@pytest.mark.parametrize(
    ("host", "size", "source"),
    [
        (STUDIO_256, 241_644 * 1024 * 1024, "iogpu.wired_limit_mb"),
        (FRESH_MAC, 206_158_430_208, "the GPU's default limit"),
        (HostMemory(100), 90, "nine tenths of RAM"),
    ],
)
def test_budget_is_the_gpus_wired_limit_or_a_share_of_ram(
    tmp_path: Path, host: HostMemory, size: int, source: str
) -> None:
    found = budget(here(tmp_path), host)
    assert found.size == size and found.source.startswith(source)


def test_memory_setting_overrides_the_system(tmp_path: Path) -> None:
    found = budget(here(tmp_path, memory=186 * GB), STUDIO_256)
    assert (found.size, found.source) == (186 * GB, "memory in hosts.yaml")
    assert 0 < budget(here(tmp_path)).size < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_refusal_has_the_numbers_and_the_fewest_unloads(tmp_path: Path) -> None:
    uses = [
        Use(8100, "jerry-xl", "boot", 10, 190 * GB, None),
        Use(8101, "big", "mlxops", 11, 30 * GB, 40 * GB),
        Use(8102, "small", "hand", 12, 5 * GB, None),
    ]
    limit = replace(budget(here(tmp_path)), size=241 * GB, source="test")
    with pytest.raises(Refused) as caught:
        check_fits("new", Estimate(9 * GB, GB, 32768), limit, uses, leaving=(), ports=range(8100, 8110))
    error = caught.value
    assert "needs about 10.5 GB, and 6.0 GB of 241 GB are left" in error.message
    assert "jerry-xl on 8100 190 GB (boot); big on 8101 40.0 GB; small on 8102 5.0 GB (hand)" in error.why
    assert error.hint.startswith("make room: mlxctl unload 8102 --force;")
    check_fits("new", Estimate(9 * GB, GB, 32768), limit, uses, leaving=(8102,), ports=range(8100, 8110))


# -- what a model needs ----------------------------------------------------------------------------------------------


def snapshot(tmp_path: Path, config: Fields, gigabytes: float, dtype: str = "BF16") -> Path:
    """Create a snapshot with sparse weights of that size."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header = json.dumps({"norm": {"dtype": dtype, "shape": [1], "data_offsets": [0, 2]}}).encode()
    with (folder / "model.safetensors").open("wb") as weights:
        weights.write(len(header).to_bytes(8, "little") + header)
        weights.truncate(int(gigabytes * GB))
    return folder


@pytest.mark.parametrize(
    ("repo", "weights", "memory", "fits"),
    [
        # Full keys and values, although the model has a latent: more than the memory.
        ("deepseek-ai/DeepSeek-V2-Lite", 8.84, 16, False),
        ("deepseek-ai/DeepSeek-V2.5", 132.6, 144, False),
        ("openbmb/MiniCPM3-4B", 2.29, 16, False),
        ("tencent/Youtu-LLM-2B", 1.1, 8, False),
        ("deepseek-ai/DeepSeek-R1", 378, 384, True),
        # Windows, layers without attention, recurrent layers: less than full keys and values.
        ("google/gemma-3-27b-it", 16.9, 24, True),
        ("google/gemma-3-12b-it", 8.0, 12, True),
        ("CohereForAI/c4ai-command-r7b-12-2024", 4.5, 8, True),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", 60.6, 64, True),
        ("nvidia/Llama-3_3-Nemotron-Super-49B-v1", 28.1, 72, True),
        ("ibm-granite/granite-4.0-h-tiny", 3.9, 6, True),
        ("ai21labs/Jamba-v0.1", 29.0, 32, True),
        ("stepfun-ai/Step-3.5-Flash", 110.8, 116, True),
        ("Qwen/Qwen3.6-35B-A3B", 19.7, 24, True),
        ("google/gemma-4-26B-A4B", 15.6, 18, True),
    ],
)
def test_model_is_refused_only_if_it_does_not_fit(
    tmp_path: Path, repo: str, weights: float, memory: int, fits: bool
) -> None:
    need = estimate_of(snapshot(tmp_path, PUBLISHED[repo][0], weights))
    assert need is not None
    limit = Budget(memory * GB, "test")
    if fits:
        check_fits(repo, need, limit, (), (), ())
    else:
        with pytest.raises(Refused, match="does not fit in memory"):
            check_fits(repo, need, limit, (), (), ())


def test_refusal_says_that_the_estimate_may_be_too_high(tmp_path: Path) -> None:
    need = estimate_of(snapshot(tmp_path, PUBLISHED["google/gemma-3-1b-it"][0] | {"model_type": "gemma5"}, 1))
    assert need is not None
    with pytest.raises(Refused) as caught:
        check_fits("new", need, Budget(GB, "test"), (), (), ())
    assert "for 32768 tokens of context (upper estimate: how this model keeps" in caught.value.why


@pytest.mark.parametrize(("weights", "size"), [("F32", 4), ("BF16", 2), ("F16", 2)])
def test_value_size_is_taken_from_the_weights(tmp_path: Path, weights: str, size: int) -> None:
    """Many conversions shrank the weights but left `torch_dtype: float32` in config.json."""
    config = PUBLISHED["google/gemma-2-27b-it"][0] | {"torch_dtype": "float32"}
    need = estimate_of(snapshot(tmp_path, config, 1, weights))
    assert need is not None and need.context_bytes == PUBLISHED["google/gemma-2-27b-it"][1] * size


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024}, 1024),
        ({"max_position_embeddings": None, "max_seq_len": 512}, 512),
        ({"max_position_embeddings": -1}, N),
        ({"max_position_embeddings": "2048"}, N),
    ],
)
def test_context_length_is_limited_by_the_model(tmp_path: Path, config: Fields, tokens: int) -> None:
    need = estimate_of(snapshot(tmp_path, EVERY_TYPE["llama"] | config, 1))
    assert need is not None and need.context_tokens == tokens
    nested = snapshot(tmp_path / "snapshot", {"model_type": "kimi_vl", "text_config": EVERY_TYPE["llama"] | config}, 1)
    inner = estimate_of(nested)
    assert inner is not None and inner.context_tokens == tokens


# -- what the engine itself keeps ------------------------------------------------------------------------------------

UNANSWERED = {
    "LiquidAI/LFM2.5-VL-1.6B": "mlx-lm has no lfm2_vl; mlx-openai-server serves it with mlx-vlm",
    "bitnet": "needs Metal",
    "muse_spark": "needs Metal",
    "olmo": "needs ai2-olmo",
    "prism_hadamard_qwen35": "needs packed weights",
}
Rows = list[tuple[int, int | None, int]]


def kept_by(python: Path, configs: dict[str, Fields]) -> dict[str, Rows | str]:
    """Return the cache size of mlx-lm for each configuration, or why it refuses it."""
    script = Path(__file__).parents[1] / "lab" / "kvshapes.py"
    done = subprocess.run(
        [python, script],
        input=json.dumps(configs),
        env={"MLX_DISABLE_COMPILE": "1"},  # two models compute a little after all; a compiler is not needed for it
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    answers: dict[str, Rows | str] = json.loads(done.stdout)
    return answers


def differences(answers: dict[str, Rows | str]) -> dict[str, tuple[int, int]]:
    """Return (estimate, size in the engine) of a full context, in bytes, where they differ."""
    found = {}
    for name, rows in answers.items():
        cache = kv_cache(PUBLISHED[name][0] if name in PUBLISHED else EVERY_TYPE[name])
        assert cache is not None and cache.certain, name
        if isinstance(rows, list):
            kept = sum(width * min(N, window or N) for width, window, _ in rows) * 2
            if cache.context_bytes(N) != kept:
                found[name] = (cache.context_bytes(N), kept)
    return found


def test_estimate_equals_the_cache_of_mlx_lm_for_every_model_type(engine: Path) -> None:
    published = {repo: config for repo, (config, _) in PUBLISHED.items()}
    answers = kept_by(engine / "bin" / "python", published | EVERY_TYPE)
    refused = {name: why for name, why in answers.items() if isinstance(why, str)}
    assert refused.keys() <= UNANSWERED.keys(), refused
    assert differences(answers) == {}
    for repo, config in published.items():
        cache, rows = kv_cache(config), answers[repo]
        if cache is not None and isinstance(rows, list):
            assert sum(state for *_, state in rows) <= 1.2 * cache.state_bytes + 1_000_000, repo


def test_every_model_type_of_mlx_lm_has_a_rule(engine: Path) -> None:
    (models,) = engine.glob("lib/python*/site-packages/mlx_lm/models")
    types = {path.stem for path in models.glob("*.py") if "class ModelArgs" in path.read_text()}
    assert len(types) > 100
    assert {
        name for name in types if name not in MODEL_TYPES and name.removesuffix("_text") not in MODEL_TYPES
    } == set()


def test_estimate_covers_the_mlx_lm_of_mlx_openai_server(openai_server: Path) -> None:
    answers = kept_by(openai_server.parent / "python", EVERY_TYPE)
    assert sum(isinstance(rows, list) for rows in answers.values()) > 100
    assert {name for name, (ours, kept) in differences(answers).items() if ours < kept} == set()


@pytest.fixture
def by_hand(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process whose arguments are those of a server of a cached model, on a port that is not ours."""
    snapshot = tmp_path / "hub" / "models--org--big" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "llama"}')
    with (snapshot / "model.safetensors").open("wb") as weights:
        weights.truncate(GB)  # sparse
    script = tmp_path / "mlx_lm.server"
    script.write_text("import time; time.sleep(1000)\n")
    port = free_port()
    argv = [sys.executable, str(script), "--model", str(snapshot), "--port", str(port)]
    with subprocess.Popen(argv, cwd=tmp_path) as child:
        yield child, port
        child.kill()


def test_foreign_server_counts_as_memory_in_use(tmp_path: Path, by_hand: tuple[subprocess.Popen[bytes], int]) -> None:
    child, port = by_hand
    paths = here(tmp_path, ports=PortRange(1, 2))
    system = this_system()
    world = observe(paths, Store(paths.state, paths.registry), EMPTY, system)
    found = next(use for use in in_use(world, system, {}) if use.pid == child.pid)
    assert (found.port, found.model, found.owner) == (port, "org/big", "hand")
    assert found.counted >= 2 * GB, "its weights, and as much for a context of unknown length"


def test_running_server_counts_the_context_that_its_load_counted(
    tmp_path: Path, by_hand: tuple[subprocess.Popen[bytes], int]
) -> None:
    """mlx-lm has no option for the length of a context."""
    child, port = by_hand
    snapshot = tmp_path / "hub" / "models--org--big" / "snapshots" / "abc"
    (snapshot / "config.json").write_bytes((models.tiny_models() / models.QWEN / "config.json").read_bytes())
    world, system = World({port: PortView(port, None, State.READY, Owner.HAND, "big", pid=child.pid)}), this_system()

    def counted(**contexts: int) -> int:
        uses = in_use(replace(world, contexts=contexts), system, {})
        return next(use.counted for use in uses if use.pid == child.pid)

    assert counted(big=10**8) > counted() + GB and counted(other=10**8) == counted()


def test_reservation_counts_until_the_server_does(tmp_path: Path, by_hand: tuple[subprocess.Popen[bytes], int]) -> None:
    _, port = by_hand
    paths = here(tmp_path, ports=PortRange(1, 2))
    system = this_system()
    world = observe(paths, Store(paths.state, paths.registry), EMPTY, system)
    (serving,) = [use for use in in_use(world, system, {}) if use.port == port]
    load = Operation("other", "load", "org/other", reserves=serving.counted + 5)
    uses = in_use(world, system, {port: load, 1: load})
    assert [use.counted for use in uses if use.port == 1] == [serving.counted + 5]
    assert sum(use.counted for use in uses if use.port == port) == serving.counted + 5, "the larger one of the two"


# -- reading ahead ---------------------------------------------------------------------------------------------------


class Stubborn(LinuxSystem):
    """The system with scripted sizes of available memory; the last one repeats."""

    def __init__(self, *available: int) -> None:
        self.answers = list(available)

    def available(self) -> int | None:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def context(tmp_path: Path, system: System) -> tuple[Context, list[Event]]:
    paths = here(tmp_path)
    events: list[Event] = []
    request = envelope("load", {}, paths.settings, "")
    return Context(request.request, paths, Store(paths.state, paths.registry), system, events.append, {}), events


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """A snapshot whose weights are not in the page cache. Skip on a file system without a page cache."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    weights = snapshot / "model.safetensors"
    weights.write_bytes(os.urandom(8 * 1024 * 1024))
    with weights.open("rb") as file:
        os.fsync(file.fileno())
        if sys.platform == "darwin":
            pytest.skip("macOS does not drop a file's pages on request")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_share(weights) > 0.5:
        pytest.skip("the file system keeps its files in memory")
    return snapshot


def cached_share(path: Path) -> float:
    """Return how many bytes of a file are in the page cache (mincore(2))."""
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        seen = (ctypes.c_ubyte * pages)()
        view = ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(size), seen) == 0
        del view
    return sum(each & 1 for each in seen) / pages


def test_weights_are_prefetched_before_anything_stops(tmp_path: Path, cold: Path) -> None:
    ctx, events = context(tmp_path, Stubborn(GB))
    prefetch.prefetch_weights(ctx, cold, "m")
    assert cached_share(cold / "model.safetensors") == 1.0
    assert isinstance(events[0], Phase) and events[0].name == "warm"


def test_weights_are_not_prefetched_if_memory_is_short(tmp_path: Path, cold: Path) -> None:
    ctx, events = context(tmp_path, Stubborn(8 * 1024 * 1024))
    prefetch.prefetch_weights(ctx, cold, "m")
    assert cached_share(cold / "model.safetensors") < 0.5
    assert isinstance(events[0], Note) and "not read ahead" in events[0].message


def test_latent_model_served_as_multimodal_is_estimated_with_full_keys_and_values(tmp_path: Path) -> None:
    path = snapshot(tmp_path, nested("kimi_vl", plain("deepseek_v3", 27, 16, 16, 2048, **MLA)), 1)
    text, seeing = estimate_of(path), estimate_of(path, model_type="multimodal")
    assert text is not None and text.context_bytes == 27 * 576 * N * 2
    assert seeing is not None and seeing.context_bytes == 27 * 16 * 320 * N * 2
