"""The supported engines, one file each: `mlx_lm.py` defines the engine `mlx-lm` as its `ENGINE`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module

from mlxops.agent.engines.base import DetectedServer, Engine
from mlxops.common.build import engines
from mlxops.core.errors import Refused

ENGINES: dict[str, Engine] = {name: import_module(f"{__name__}.{name.replace('-', '_')}").ENGINE for name in engines()}


def engine_named(name: str) -> Engine:
    """Return an engine by its name. Raises `Refused` (unknown_engine)."""
    engine = ENGINES.get(name)
    if engine is None:
        raise Refused(
            "unknown_engine",
            f"there is no engine {name!r}",
            why=f"the engines are {', '.join(ENGINES)}",
            hint="correct `engine` in the registry entry or in hosts.yaml",
        )
    return engine


def recognise(argv: Sequence[str]) -> tuple[str, DetectedServer] | None:
    """Return the engine's name and what the argv shows if a process with this argv is an engine's server; else None."""
    return _recognise(tuple(argv))


@lru_cache(maxsize=4096)
def _recognise(argv: tuple[str, ...]) -> tuple[str, DetectedServer] | None:
    """Cached, because repeated observations see the same few hundred processes."""
    for engine in ENGINES.values():
        server = engine.recognise(argv)
        if server is not None:
            return engine.name, server
    return None
