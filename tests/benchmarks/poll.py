"""Print the seconds of one more status over an open connection, as `inv status --watch` takes it.

    python -m tests.benchmarks.poll

The host is the default one of the hosts.yaml that `inv` would find.
"""

from __future__ import annotations

import os
import time

from mlxops.control import inventory, output
from mlxops.control.client import HostTarget
from mlxops.control.watch.link import Link
from mlxops.core.commands.status import Status
from mlxops.core.protocol import Event

POLLS = 20


def main() -> None:
    path = inventory.hosts_file(os.environ, None)
    assert path is not None
    (host,) = inventory.load(path).select(None, all_by_default=False)
    link = Link(HostTarget(host.name, host.ssh, host.interpreter(), host.settings), Status(), _ignore)
    try:
        link.poll()  # opens the connection, and starts the agent
        began = time.perf_counter()
        for _ in range(POLLS):
            link.poll()
        output.say(str((time.perf_counter() - began) / POLLS))
    finally:
        link.close()


def _ignore(host: str, event: Event) -> None:
    pass


if __name__ == "__main__":
    main()
