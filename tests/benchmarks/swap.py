"""The rows `swap-ENGINE` of `inv bench`.

    python -m tests.benchmarks.swap [mlx-lm | mlx-openai-server] [--rounds N] [--gigabytes N]

Needs no pytest. With `--gigabytes`, the two models have random weights of that size.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from mlxops.control import output
from tests.benchmarks import serving
from tests.benchmarks.stats import Row, rows_table


def measure(engine: str, rounds: int, gigabytes: float) -> Row:
    contest = next(contest for contest in serving.CONTESTS if contest.name == f"swap-{engine}")
    contest = replace(contest, turns=rounds, open=partial(serving.swapping, engine=engine, gigabytes=gigabytes))
    with tempfile.TemporaryDirectory(prefix="mlxops-swap-") as name:
        return contest.measure(Path(name))


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.swap")
    parser.add_argument("engine", nargs="?", default="mlx-lm", choices=serving.ENGINES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=0)
    options = parser.parse_args()
    output.say(rows_table([measure(options.engine, options.rounds, options.gigabytes)]))
