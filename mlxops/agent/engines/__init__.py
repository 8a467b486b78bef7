"""The engines that mlxops can drive, one file each: `mlx_lm.py` has the engine `mlx-lm`, as its `ENGINE`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module

from mlxops.agent.engines.base import DetectedServer, Engine
from mlxops.common.build import engines
from mlxops.core.errors import Refused

ENGINES: dict[str, Engine] = {name: import_module(f"{__name__}.{name.replace('-', '_')}").ENGINE for name in engines()}


def engine_named(name: str) -> Engine:
    engine = ENGINES.get(name)
    if engine is None:
        raise Refused(
            "unknown_engine",
            f"there is no engine {name!r}",
            why=f"this mlxops knows {', '.join(ENGINES)}",
            hint="correct `engine` in the registry entry or in hosts.yaml",
        )
    return engine


def recognise(argv: Sequence[str]) -> tuple[str, DetectedServer] | None:
    """Return the engine and what the argv says, if a process with this argv is an engine's server program."""
    return _recognised(tuple(argv))


@lru_cache(maxsize=4096)
def _recognised(argv: tuple[str, ...]) -> tuple[str, DetectedServer] | None:
    """Kept, because who looks again and again sees the same few hundred processes each time."""
    for engine in ENGINES.values():
        seen = engine.recognise(argv)
        if seen is not None:
            return engine.name, seen
    return None
