"""The console script `mlxctl`. What takes time is imported by `program`, after Ctrl-C is seen to."""

from __future__ import annotations

from mlxops.cli import startup


def main() -> None:
    """Raises `SystemExit`."""
    startup.prepare()
    from mlxops.cli.program import run

    run()


if __name__ == "__main__":
    main()
