"""Would a new server answer to the name that the gateway sends for its port?

The control node says what that is, in the request's `sent`, where it can read the gateway's configuration:
`{"8100": ["jerry-xl"]}`.
"""

from __future__ import annotations

from mlxops.agent.engines import engine_named
from mlxops.agent.engines.base import installed_version
from mlxops.agent.operations.context import Context
from mlxops.core import planner
from mlxops.core.planner import Target


def check_name(ctx: Context, target: Target, port: int) -> None:
    """Before anything is downloaded or stopped. Raises `Refused` (gateway_name), and engine_not_found."""
    sent = _sent(ctx, port)
    if not sent:
        return
    settings = ctx.where.settings
    engine = engine_named((target.entry.engine if target.entry else None) or settings.engine)
    command = engine.command(settings.launch.get(engine.name, ()), {**ctx.environ, **settings.env})
    if not engine.any_name(installed_version(command.argv, engine.distribution)):
        planner.check_sent_names(port, settings.alias(port, target.name), sent)


def _sent(ctx: Context, port: int) -> list[str]:
    sent = ctx.request.args.get("sent")
    names = sent.get(str(port)) if isinstance(sent, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []
