"""The running gateway, and the names of it that lead to one server and may be asked for without harm."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from mlxops.common.http import ChatServer
from mlxops.control.gateway.config import GatewayConfig
from mlxops.control.gateway.probe import LITELLM_FIELDS
from mlxops.control.gateway.result import AliasRow, GatewayResult
from mlxops.control.gateway.through import RunningGateway, read_running, required_key
from mlxops.control.inventory import Gateway
from mlxops.core.frozen import dataclass
from mlxops.core.probe_names import WILDCARD, ProbePlan, server_of
from mlxops.core.replies import HostReply


@dataclass(frozen=True)
class Route:
    """What asks for the gateway's names."""

    gateway: RunningGateway

    @property
    def plan(self) -> ProbePlan:
        return self.gateway.plan

    @property
    def url(self) -> str:
        return self.gateway.gateway.url or ""

    def names(self, row: AliasRow) -> list[str]:
        """Return the names that lead to a row's port."""
        return [name for name in self.gateway.names_to(row.url) if WILDCARD not in name]

    def why_not(self, name: str) -> str | None:
        """Return why a name is not asked for; None if it is."""
        if len(self.plan.names[name]) > 1 or self.plan.others.get(name):
            return "the gateway sends it to several servers, so it is not known which one would answer"
        return self.plan.skipped.get(name)

    def server(self, name: str) -> ChatServer:
        """Return the gateway as a server of the model `name`."""
        parts = urlsplit(self.url)
        return ChatServer(
            parts.scheme,
            parts.hostname or "",
            parts.port,
            name,
            base=parts.path.rstrip("/").removesuffix("/v1"),
            headers={"Authorization": f"Bearer {self.gateway.key}"} if self.gateway.key else None,
            fields=LITELLM_FIELDS,
        )


def read_route(gateway: Gateway, config: GatewayConfig, aliases: Sequence[HostReply[GatewayResult]]) -> Route:
    """Ask the running gateway for its names. `aliases`: the result of `gateway`. Raises what `required_key` raises."""
    key = required_key(gateway, config)
    rows = [row for reply in aliases if reply.result for row in reply.result.aliases]
    servers = [server_of(row, row.url, row.slot, idle=row.owner is None) for row in rows]
    return Route(read_running(gateway, config, key, servers))
