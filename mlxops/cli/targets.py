"""Which hosts a command goes to: from `--host`, `--local`, the environment and hosts.yaml."""

from __future__ import annotations

import os
import sys
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mlxops.control.client import HostTarget, local_python
from mlxops.core.errors import UsageError
from mlxops.core.frozen import dataclass
from mlxops.core.settings import Settings

if TYPE_CHECKING:
    from mlxops.control.inventory import Gateway, Inventory


def checkout() -> Path | None:
    """Return the folder of the tasks.py that `inv` found; for `mlxctl` the checkout that this package is in, if any."""
    loaded = getattr(sys.modules.get("tasks"), "__file__", None)
    folder = Path(loaded).parent if loaded else Path(__file__).resolve().parents[2]
    return folder if os.path.isfile(folder / "tasks.py") else None


@dataclass(frozen=True)
class Targets:
    """The choice of hosts of one command line."""

    command: str
    host: str | None
    local: bool

    @cached_property
    def inventory(self) -> Inventory | None:
        """hosts.yaml, if there is one. Raises `UsageError` (bad_hosts_file)."""
        from mlxops.control import inventory

        path = inventory.hosts_file(os.environ, checkout())
        return None if path is None else inventory.load(path)

    @property
    def gateway(self) -> Gateway | None:
        """The gateway that hosts.yaml describes."""
        return self.inventory.gateway if self.inventory else None

    def select(self, *, all_by_default: bool = False, only_one: bool = False) -> tuple[HostTarget, ...]:
        """Raises `UsageError`: bad_hosts_file, no_hosts_file, unknown_host, one_host."""
        name = self.host
        if name is None and self.local:
            name = os.environ.get("MLXOPS_HOST")
        if self.inventory is None:
            if not self.local:
                raise UsageError(
                    "no_hosts_file",
                    "there is no hosts.yaml",
                    why="MLXOPS_HOSTS_FILE is not set, and ~/.config/mlxops/hosts.yaml does not exist",
                    hint="create that file (the repository has an example), or use --local on the host itself",
                )
            return (HostTarget("local", None, local_python(), Settings(), agreed=True, flags=" --local"),)
        hosts = self.inventory.select(name, all_by_default=all_by_default and not self.local)
        if (only_one or self.local) and len(hosts) > 1:
            raise UsageError(
                "one_host",
                f"{self.command} takes one host",
                why=f"{len(hosts)} are selected: {', '.join(host.name for host in hosts)}",
                hint=f"name one of them: --host {hosts[0].name}",
            )
        if self.local:
            flags = self._flags(hosts[0].name)
            return (HostTarget(hosts[0].name, None, local_python(), hosts[0].settings, flags=flags),)
        return tuple(
            HostTarget(host.name, host.ssh, host.interpreter(), host.settings, flags=self._flags(host.name))
            for host in hosts
        )

    def _flags(self, host: str) -> str:
        """Return the flags with which another command goes to the same host."""
        default = self.inventory.default if self.inventory else None
        if self.local:
            default = os.environ.get("MLXOPS_HOST", default)
        return ("" if host == default else f" --host {host}") + (" --local" if self.local else "")
