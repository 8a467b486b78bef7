"""The engines that mlxops can drive, one file each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from mlxops.agent.engines.base import Engine, Seen
from mlxops.agent.engines.mlx_lm import MlxLm
from mlxops.agent.engines.mlx_openai_server import MlxOpenAIServer
from mlxops.core.errors import Refused

ENGINES: dict[str, Engine] = {engine.name: engine for engine in (MlxOpenAIServer(), MlxLm())}


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


def recognise(argv: Sequence[str]) -> tuple[str, Seen] | None:
    """The engine and what it serves, if this argv is a server of any engine."""
    return _recognised(tuple(argv))


@lru_cache(maxsize=4096)
def _recognised(argv: tuple[str, ...]) -> tuple[str, Seen] | None:
    """Kept, because who looks again and again sees the same few hundred processes each time."""
    for engine in ENGINES.values():
        seen = engine.recognise(argv)
        if seen is not None:
            return engine.name, seen
    return None
