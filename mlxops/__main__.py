"""`python -m mlxops`: the same as `mlxctl`."""

from mlxops.mlxctl import main

main()
