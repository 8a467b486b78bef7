"""The console script `mlxctl`. What takes time is imported by `program`, after Ctrl-C is seen to."""

from __future__ import annotations

import sys


def main() -> None:
    """Raises `SystemExit`."""
    if sys.argv[1:2] == ["__complete"]:  # at each press of the tabulator key: import as little as possible
        from mlxops.cli.complete import main as complete

        raise SystemExit(complete(sys.argv[2:]))
    from mlxops.cli import startup

    startup.prepare()
    from mlxops.cli.program import run

    run()


if __name__ == "__main__":
    main()
