"""How long a port is without an answer while its model is swapped, against the bare engine's own start.

    python -m tests.benchmarks.swap [mlx-lm | mlx-openai-server] [--rounds N]

In one run, by turns: the engine alone, from its start to its first completion, as a shell would start it; and a swap
by `load --force` of one model for another, of which mlxops reports the seconds without an answer. Medians, and their
ratio. Needs no pytest.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
from pathlib import Path

from tests.lab import cache, models
from tests.lab.homelab import Homelab, Studio

ONE, OTHER = "bench/one", "bench/other"


def main(engine: str = "mlx-lm", rounds: int = 3) -> None:
    with tempfile.TemporaryDirectory(prefix="mlxops-swap-") as name, Homelab(Path(name)) as lab:
        studio = lab.studio
        launch = _launch(engine)
        lab.configure(engine=engine, launch={engine: launch})
        snapshots = [studio.install(ONE, models.QWEN), studio.install(OTHER, models.QWEN_B)]
        studio.mlxctl("init").ok()
        port = studio.ports[0]
        studio.mlxctl("load", ONE, str(port), timeout=300).ok()  # also fills the caches of the engine's own files
        bare, down = [], []
        for turn in range(rounds):
            bare.append(_bare(studio, engine, launch, snapshots[turn % 2]))
            swapped = studio.mlxctl("load", (OTHER, ONE)[turn % 2], str(port), "--force", "--json", timeout=300).ok()
            down.append(swapped.json["hosts"][0]["result"]["downtime_seconds"])
        studio.mlxctl("unload", str(port)).ok()
    _say(engine, bare, down)


def _launch(engine: str) -> list[str]:
    if engine == "mlx-lm":
        return [str(cache.engine_venv("mlx-lm") / "bin" / "mlx_lm.server")]
    return [str(cache.openai_server_venv() / "bin" / "mlx-openai-server"), "launch"]


def _bare(studio: Studio, engine: str, launch: list[str], snapshot: Path) -> float:
    """Seconds from the start of the engine to its first completion, on a port that nobody uses."""
    port = studio.ports[-1]
    folder = Path(tempfile.mkdtemp(dir=studio.folder))
    (folder / "bare").symlink_to(snapshot)
    options = ["--model", "bare"] if engine == "mlx-lm" else ["--model-path", str(snapshot)]
    options += ["--no-log-file", "--served-model-name", "bare"] if engine != "mlx-lm" else []
    env = {"HOME": str(studio.home), "PATH": os.defpath, "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    with subprocess.Popen(
        [*launch, *options, "--host", studio.address, "--port", str(port)],
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
                    return time.monotonic() - began
                except urllib.error.URLError:
                    if server.poll() is not None:
                        raise
                    time.sleep(0.01)
        finally:
            server.terminate()


def _say(engine: str, bare: list[float], down: list[float]) -> None:
    summary = {
        "engine": engine,
        "bare_start_to_first_completion_seconds": [round(each, 2) for each in bare],
        "swap_downtime_seconds": [round(each, 2) for each in down],
        "ratio_of_medians": round(statistics.median(down) / statistics.median(bare), 2),
    }
    sys.stdout.write(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.swap")
    parser.add_argument("engine", nargs="?", default="mlx-lm", choices=["mlx-lm", "mlx-openai-server"])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    main(given.engine, given.rounds)
