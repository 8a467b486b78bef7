"""The commands on the host: observe, plan, apply, observe again.

Each command is the function `run` of the module with its name. It takes a `Context` and the command's request. It
returns the command's result, or raises an `MlxopsError`. A change runs in its own worker. It holds the lock of every
port that it touches, and takes the registry's lock only for the instant of a write.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import cast

from mlxops.agent.context import Context
from mlxops.core.command import AnyRequest


def operation(name: str) -> Callable[[Context, AnyRequest], object]:
    """Return the operation of a command; its module is imported now."""
    module = import_module(f"{__name__}.{name.replace('-', '_')}")
    return cast("Callable[[Context, AnyRequest], object]", module.run)
