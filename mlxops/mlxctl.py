"""The console script `mlxctl`. What takes time is imported by `program`, after Ctrl-C is seen to."""

from __future__ import annotations

from mlxops import entry


def main() -> None:
    """Raises `SystemExit`."""
    entry.prepare()
    from mlxops.program import run

    run()


if __name__ == "__main__":
    main()
