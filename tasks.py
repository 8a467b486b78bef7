"""The collection that `inv` finds; what is in it lives in `mlxops.tasks`."""

from mlxops.tasks import namespace  # noqa: F401
