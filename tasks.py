"""The collection that `inv` finds; what is in it lives in `mlxops.tasks`."""

from mlxops import entry

entry.prepare()
from mlxops.tasks import namespace  # noqa: E402, F401 - what takes time comes after
