"""The row `swap` of `inv bench`, for either engine.

    python -m tests.benchmarks.swap [mlx-lm | mlx-openai-server] [--rounds N]

Needs no pytest.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from mlxops.control import render
from tests.benchmarks import serving
from tests.benchmarks.stats import Row, rows_table

ENGINES = ("mlx-lm", "mlx-openai-server")


def measure(engine: str, rounds: int) -> Row:
    row = next(each for each in serving.CONTESTS if each.name == "swap")
    row = replace(
        row,
        what=row.what.replace("mlx-lm", engine),
        turns=rounds,
        open=lambda folder: serving.swapping(folder, engine),
    )
    with tempfile.TemporaryDirectory(prefix="mlxops-swap-") as name:
        return row.hold(Path(name))


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.swap")
    parser.add_argument("engine", nargs="?", default="mlx-lm", choices=ENGINES)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    render.say(rows_table([measure(given.engine, given.rounds)]))
