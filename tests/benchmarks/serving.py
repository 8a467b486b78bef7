"""The cost of `load` and of a swap over the engine's own start, and of `status` with live ports."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
import urllib.error
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path

from tests.benchmarks import lost
from tests.benchmarks.contest import BenchFailed, Contest, Cost, Timed
from tests.benchmarks.scene import homelab, inv
from tests.benchmarks.stats import Limit
from tests.lab import cache, models
from tests.lab.homelab import Homelab, Studio
from tests.lab.quick import snapshot, with_fake

ONE, OTHER = "bench/one", "bench/other"
LIVE = (0, 5, 10)
ENGINES = ("mlx-lm", "mlx-openai-server")
HELD_START_SECONDS = 5.0
"""How much longer the servers of the row `hold` take to start."""


def launch(engine: str) -> list[str]:
    """Return the engine's argv; build the engine on demand. Raises `cache.BuildFailed`."""
    if engine == "mlx-lm":
        return [str(cache.engine_venv("mlx-lm") / "bin" / "mlx_lm.server")]
    return [str(cache.openai_server_venv() / "bin" / "mlx-openai-server"), "launch"]


@contextmanager
def serving(folder: Path, engine: str, gigabytes: float = 0) -> Iterator[tuple[Homelab, list[Path]]]:
    """Yield a homelab with this engine and two registered models, and the folders of their snapshots.

    `gigabytes`: the size of each model; 0 for the tiny ones.
    """
    program = launch(engine)
    tiny = models.tiny_models()
    made = models.big_models(folder, gigabytes) if gigabytes else (tiny / models.QWEN, tiny / models.QWEN_B)
    with homelab(folder) as lab:
        lab.configure(engine=engine, launch={engine: program})
        snapshots = [
            models.install_snapshot(lab.studio.hub, repo, model) for repo, model in zip((ONE, OTHER), made, strict=True)
        ]
        inv(lab, "init")()
        yield lab, snapshots


@contextmanager
def _load(folder: Path) -> Iterator[Mapping[str, Timed]]:
    with serving(folder, "mlx-lm") as (lab, snapshots):
        port = str(lab.studio.ports[0])
        up, down = inv(lab, "load", "--model", ONE, "--port", port), inv(lab, "unload", "--port", port)

        def load() -> float:
            took = up()
            down()
            return took

        yield {
            "engine": lambda: bare(lab.studio, "mlx-lm", launch("mlx-lm"), snapshots[0]),
            "inv load": load,
            "inv status": inv(lab, "status"),
        }


@contextmanager
def swapping(folder: Path, engine: str, gigabytes: float = 0) -> Iterator[Mapping[str, Timed]]:
    """A swap's seconds without an answer on the port, against the engine's own start."""
    with serving(folder, engine, gigabytes) as (lab, snapshots):
        port = str(lab.studio.ports[0])
        inv(lab, "load", "--model", ONE, "--port", port)()
        turns = cycle((OTHER, ONE))
        own = cycle(snapshots)

        def swap() -> float:
            arguments = ("load", "--model", next(turns), "--port", port, "--force", "--json")
            seconds = inv(lab, *arguments).run()[1].json["hosts"][0]["result"]["downtime_seconds"]
            return float(seconds)

        try:
            yield {"engine": lambda: bare(lab.studio, engine, launch(engine), next(own)), "swap": swap}
        finally:
            inv(lab, "unload", "--port", port)()


@contextmanager
def _holding(folder: Path) -> Iterator[Mapping[str, Timed]]:
    """The longest wait of a client in a swap behind a real gateway, against the port's seconds without an answer."""
    with lost.open_place(folder, "mlx-lm", HELD_START_SECONDS, hold=60) as place:
        place.load(lost.FIRST).ok()
        changes = cycle(("swap", "rollback"))
        waiting: dict[str, list[float]] = {"downtime": [], "longest wait": []}

        def next_of(name: str) -> float:
            if not waiting[name]:
                row = lost.measure(place, next(changes))
                if row.lost or row.twice:
                    raise BenchFailed(f"{row.lost} requests were lost, and {row.twice} generations were run twice")
                waiting["longest wait"].append(row.longest)
                waiting["downtime"].append(place.last_downtime())
            return waiting[name].pop(0)

        yield {name: partial(next_of, name) for name in waiting}


def bare(studio: Studio, engine: str, program: Sequence[str], snapshot: Path) -> float:
    """Start the engine as a shell would, on a free port; return the seconds to its first completion."""
    port = studio.ports[-1]
    folder = Path(tempfile.mkdtemp(dir=studio.folder))
    (folder / "bare").symlink_to(snapshot)
    options = ["--model", "bare"] if engine == "mlx-lm" else ["--model-path", str(snapshot)]
    options += ["--no-log-file", "--served-model-name", "bare"] if engine != "mlx-lm" else []
    env = {"HOME": str(studio.home), "PATH": os.defpath, "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    with subprocess.Popen(
        [*program, *options, "--host", studio.address, "--port", str(port)],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            while True:
                try:
                    studio.completion(port, "bare", timeout=300)
                    return time.perf_counter() - began
                except urllib.error.URLError as error:
                    if server.poll() is not None:
                        raise BenchFailed(f"the bare engine ended with {server.returncode}") from error
                    time.sleep(0.01)
        finally:
            server.terminate()


@contextmanager
def _live_ports(folder: Path) -> Iterator[Mapping[str, Mapping[int, Timed]]]:
    """One host for each amount. The engine is a fake that loads nothing: only the look at ports is measured."""
    with homelab(folder, studios=len(LIVE)) as lab:
        for studio, amount in zip(lab.studios, LIVE, strict=True):
            with_fake(lab, studio.name)
            for port in studio.ports[:amount]:
                snapshot(studio.hub, f"bench/model-{port}")
            inv(lab, "init", "--host", studio.name)()
            for port in studio.ports[:amount]:
                arguments = ("--model", f"bench/model-{port}", "--port", str(port), "--host", studio.name)
                inv(lab, "load", *arguments)()
        try:
            yield {
                "inv status": {
                    amount: inv(lab, "status", "--host", studio.name)
                    for studio, amount in zip(lab.studios, LIVE, strict=True)
                }
            }
        finally:
            for studio in lab.studios:
                inv(lab, "unload-all", "--yes", "--host", studio.name)()


CONTESTS = (
    Contest(
        "load",
        "inv load of a cached model, mlx-lm",
        "inv load",
        "engine",
        Limit({"engine": 1.0, "inv status": 1.5}),
        5,
        _load,
    ),
    *(
        Contest(
            f"swap-{engine}",
            f"a port's seconds without an answer in a swap, {engine}",
            "swap",
            "engine",
            Limit({"engine": 1.0}),
            3,
            partial(swapping, engine=engine),
        )
        for engine in ENGINES
    ),
    Contest(
        "hold",
        "the longest wait of four clients in a swap, hold: 60; none lost, none run twice",
        "longest wait",
        "downtime",
        Limit({"downtime": 1.0}, plus=10.0),
        3,
        _holding,
    ),
)
COSTS = (Cost("ports", "live port", 7, _live_ports),)
