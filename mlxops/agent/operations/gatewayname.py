"""What the gateway's entries say of a port: would a new server answer to the name, and take as many tokens?

The control node says it, where it can read the gateway's configuration: in the request's `sent`,
`{"8100": ["jerry-xl"]}`, and `promised`, `{"8100": 131072}`.
"""

from __future__ import annotations

from mlxops.agent.engines.base import installed_version
from mlxops.agent.operations.context import Context
from mlxops.core import planner
from mlxops.core.names import shown
from mlxops.core.planner import Target


def check_name(ctx: Context, target: Target, port: int) -> None:
    """Before anything is downloaded or stopped. Raises `Refused` (gateway_name), and engine_not_found."""
    names = _sent(ctx, port)
    if not names:
        return
    engine, command = ctx.engine(target)
    version = installed_version(command.argv, engine.distribution)
    if not engine.any_name(version):
        also = engine.further_names(version)
        planner.check_sent_names(port, ctx.where.settings.alias(port, target.name), names, also)


def name_warning(ctx: Context, alias: str, port: int) -> str | None:
    """Return a warning if the gateway sends a name that this engine knows beside the alias, and others may not."""
    other = [name for name in _sent(ctx, port) if name != alias]
    if not other:
        return None
    return f"the gateway sends the name {shown(other[0])} to port {port}; another engine there would only know {alias}"


def _sent(ctx: Context, port: int) -> list[str]:
    names = _of_port(ctx, "sent", port)
    return list(map(str, names)) if isinstance(names, list) else []


def context_warning(ctx: Context, port: int, context_length: int | None) -> str | None:
    """A sentence, if the gateway promises more input tokens than the model that comes to this port takes."""
    promised = _of_port(ctx, "promised", port)
    if not isinstance(promised, int) or context_length is None or promised <= context_length:
        return None
    return f"the gateway promises {promised} input tokens on port {port}; this model takes {context_length}"


def _of_port(ctx: Context, key: str, port: int) -> object:
    said = ctx.request.args.get(key)
    return said.get(str(port)) if isinstance(said, dict) else None
