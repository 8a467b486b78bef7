"""The commands, on the host: observe, plan, apply, look again.

Each takes a `Context` and returns the result that the control node renders, or raises a `MlxopsError`. A change
runs in a worker of its own, holds the lock of every port that it touches, and takes the registry's lock only for the
instant of a write.
"""

from __future__ import annotations

from collections.abc import Callable

from mlxops.agent.context import Context


def command(name: str) -> Callable[[Context], dict[str, object]] | None:
    """The operation of a command; its module is imported only now."""
    match name:
        case "status":
            from mlxops.agent.operations.status import status

            return status
        case "list":
            from mlxops.agent.operations.status import list_models

            return list_models
        case "gateway":
            from mlxops.agent.operations.status import answering

            return answering
        case "ops":
            from mlxops.agent.operations.ops import ops

            return ops
        case "logs":
            from mlxops.agent.operations.logs import logs

            return logs
        case "init":
            from mlxops.agent.operations.init import init

            return init
        case "load":
            from mlxops.agent.operations.load import load

            return load
        case "unload":
            from mlxops.agent.operations.unload import unload

            return unload
        case "unload-all":
            from mlxops.agent.operations.unload import unload_all

            return unload_all
        case "restore":
            from mlxops.agent.operations.restore import restore

            return restore
        case "boot":
            from mlxops.agent.operations.boot import boot

            return boot
        case "pull":
            from mlxops.agent.operations.pull import pull

            return pull
        case "remove":
            from mlxops.agent.operations.pull import remove

            return remove
        case "rollback":
            from mlxops.agent.operations.rollback import rollback

            return rollback
        case "set":
            from mlxops.agent.operations.set import set_

            return set_
        case "reconcile":
            from mlxops.agent.operations.reconcile import reconcile

            return reconcile
    return None
