"""Makes two models with gigabytes of random weights: `python bigmodel.py FOLDER GIGABYTES`, run as tinymodel.py is."""

from __future__ import annotations

import sys
from pathlib import Path

import tinymodel  # type: ignore[import-not-found]  # beside this file, when it is run

LAYER_BYTES = 2 * 3 * 2048 * 8192
"""Nearly all of a layer's bytes: three matrices of bfloat16."""

if __name__ == "__main__":
    target, gigabytes = Path(sys.argv[1]), float(sys.argv[2])
    layers = max(1, round(gigabytes * 1e9 / LAYER_BYTES))
    tinymodel.SIZES.update(hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers)
    for seed, name in enumerate(("big-one", "big-other")):
        tinymodel.make_qwen3(target / name, seed=seed)
