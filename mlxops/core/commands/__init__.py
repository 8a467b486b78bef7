"""The commands: for each its request, its result, and how the result is shown. See `mlxops.core.command`."""
