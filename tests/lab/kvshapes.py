"""What mlx-lm itself keeps of a conversation. Runs with the interpreter of an engine's venv, not with ours.

Reads `{name: config}` from standard input, writes `{name: answer}`: `[[width, window, state bytes], ...]`, one row for
each cache, or the reason why the engine does not take the configuration. Nothing is computed: arrays of MLX have a
shape before they have values, so a model of 400 billion parameters takes no memory here.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys

import mlx.core as mx
from mlx_lm.models import cache as caches
from mlx_lm.utils import MODEL_ARCHITECTURE_REMAPPING, MODEL_REMAPPING

TOKENS = 2


def kept(config: dict) -> list[list[int | None]]:
    model_type = config["model_type"]
    architecture = (config.get("architectures") or [None])[0]
    name = MODEL_ARCHITECTURE_REMAPPING.get((model_type, architecture), MODEL_REMAPPING.get(model_type, model_type))
    module = importlib.import_module(f"mlx_lm.models.{name}")
    model = module.Model(module.ModelArgs.from_dict(json.loads(json.dumps(config))))
    model.set_dtype(mx.bfloat16)
    made = caches.make_prompt_cache(model)
    model(mx.zeros((1, TOKENS), dtype=mx.int32), cache=made)
    return [row for each in made for row in rows(each)]


def rows(each: object) -> list[list[int | None]]:
    if isinstance(each, caches.CacheList):
        return [row for inner in each.caches for row in rows(inner)]
    if isinstance(each, caches.ArraysCache):
        return [[0, None, sum(array.nbytes for array in each.cache if array is not None)]]
    if each.keys is None:
        return []
    window = getattr(each, "max_size", None) or getattr(each, "chunk_size", None)
    return [[sum(array.shape[1] * array.shape[3] for array in (each.keys, each.values)), window, 0]]


def main() -> None:
    answers = {}
    for name, config in json.load(sys.stdin).items():
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                answers[name] = kept(config)
        except (Exception, SystemExit) as error:
            answers[name] = f"{type(error).__name__}: {error}"
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
