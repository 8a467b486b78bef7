"""The collection that `inv` finds; what is in it lives in `mlxops.tasks`."""

from mlxops.cli import startup

startup.prepare()
from mlxops.tasks import namespace  # noqa: E402, F401 - what takes time comes after
