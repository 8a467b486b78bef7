"""Choose the names that may be probed through the gateway without harm. Pure.

A name is probed only if every server that the gateway may send the request to knows the name that the gateway sends:
mlx-lm drops its model for an unknown one. Agents describe their ports (`ServerNames`) in the results of `gateway` and
`load`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from typing import Protocol

from mlxops.core.frozen import dataclass
from mlxops.core.gateway import Entry, SameHost, address_of, same_base, same_name, url
from mlxops.core.names import shown

WILDCARD = "*"


class ServerNames(Protocol):
    """The fields of a result that say under which names a port's server answers."""

    @property
    def state(self) -> str | None: ...
    @property
    def answers_to(self) -> str | None:
        """The only name that the server accepts; None: any, or not known."""

    @property
    def also_answers_to(self) -> tuple[str, ...]: ...
    @property
    def answers_to_any(self) -> bool: ...
    @property
    def drops_for_others(self) -> bool: ...
    @property
    def not_asked(self) -> str | None:
        """Why it must not be asked for a completion."""


@dataclass(frozen=True)
class GatewayServer:
    """A port of a managed host."""

    url: str
    """Its api_base, by the host's settings."""
    slot: str | None
    """The alias that hosts.yaml gives the port."""
    ready: bool = True
    idle: bool = False
    """Nothing listens there: a request fails and does no harm."""
    names: tuple[str, ...] = ()
    """The names that it accepts; empty: not known."""
    any_name: bool = False
    drops: bool = True
    """It drops its model for an unknown name."""
    not_asked: str = ""
    """Why it must not be asked at all."""


def server_of(described: ServerNames, base: str, slot: str | None, *, idle: bool = False) -> GatewayServer:
    """Return the server at the URL `base`, with the names from its agent's answer. `slot`: the port's alias."""
    only = described.answers_to
    return GatewayServer(
        url=base,
        slot=slot,
        ready=described.state == "ready",
        idle=idle,
        names=(*((only,) if only is not None else ()), *described.also_answers_to),
        any_name=described.answers_to_any,
        drops=described.drops_for_others,
        not_asked=described.not_asked or "",
    )


@dataclass(frozen=True)
class ProbePlan:
    """The names to probe through one gateway."""

    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name -> the URLs of the ready servers that it leads to."""
    bases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name -> every api_base that may answer for it there."""
    others: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name -> the api_bases of its deployments elsewhere."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Name that leads to a ready server -> why it must not be probed."""


def plan_probes(
    entries: Sequence[Entry] | None, servers: Sequence[GatewayServer], same_host: SameHost = same_name
) -> ProbePlan:
    """Choose the names to probe.

    `entries` are the gateway's. None: not known; then choose the aliases of slots, where a wrong name does no harm.
    """
    if entries is None:
        return _plan_by_slot(servers)
    names: dict[str, tuple[str, ...]] = {}
    bases: dict[str, tuple[str, ...]] = {}
    others: dict[str, tuple[str, ...]] = {}
    skipped: dict[str, str] = {}
    for alias in dict.fromkeys(entry.alias for entry in entries):
        routes = [(entry, _server_at(entry, servers, same_host)) for entry in entries if entry.alias == alias]
        urls = tuple(dict.fromkeys(server.url for _, server in routes if server is not None and server.ready))
        if not urls:
            continue
        names[alias] = urls
        ready = [entry.api_base for entry, server in routes if server is not None and server.ready and entry.api_base]
        bases[alias] = tuple(dict.fromkeys([*urls, *ready]))
        others[alias] = tuple(
            dict.fromkeys(e.api_base for e, server in routes if e.api_base and (server is None or not server.ready))
        )
        if why := _why_skipped(alias, routes):
            skipped[alias] = why
    return ProbePlan(names, bases, others, skipped)


def _plan_by_slot(servers: Sequence[GatewayServer]) -> ProbePlan:
    names: dict[str, tuple[str, ...]] = {}
    skipped: dict[str, str] = {}
    for server in servers:
        if server.ready and server.slot:
            names[server.slot] = (*names.get(server.slot, ()), server.url)
            harmful = server.drops and not server.any_name
            if why := server.not_asked or ("the name that the gateway sends for it is not known" if harmful else ""):
                skipped.setdefault(server.slot, why)
    return ProbePlan(names, names, {}, skipped)


def _server_at(entry: Entry, servers: Iterable[GatewayServer], same_host: SameHost) -> GatewayServer | None:
    """Return the server that an entry leads to; None if it is no server of ours."""
    target = entry.address
    for server in servers:
        address = address_of(server.url)
        if target is not None and address is not None and target[1] == address[1] and same_host(target[0], address[0]):
            return server
    return None


def _why_skipped(alias: str, routes: Iterable[tuple[Entry, GatewayServer | None]]) -> str:
    """Return why a name must not be probed; empty if it may be. `routes`: its entries, and where they lead."""
    if WILDCARD in alias:
        return "it stands for many names"
    for entry, server in routes:
        if server is not None and not server.idle and (why := _why_not_sent(server, entry.certain_name)):
            return why
    return ""


def _why_not_sent(server: GatewayServer, sends: str | None) -> str:
    """Return why a name must not be sent to a server; empty if it may be."""
    port = (address_of(server.url) or ("", 0))[1]
    if server.not_asked:
        return f"port {port}: {server.not_asked}"
    if server.any_name or (sends is not None and sends in server.names):
        return ""
    if sends is None:
        return f"the name that the gateway sends to port {port} is not known" if server.drops else ""
    if server.names:
        return f"the gateway sends the name {shown(sends)}, and port {port} answers to {server.names[0]}"
    if not server.ready and sends == server.slot:
        return ""  # a model that mlxops loads there gets this name
    return f"whether port {port} answers to {shown(sends)} is not known" if server.drops else ""


def names_for(entries: Iterable[Entry], base: str, slot: str | None, same_host: SameHost = same_name) -> list[str]:
    """Return the gateway's names for the server at `base`, its slot's alias first. If it has none, return the slot's
    alias."""
    address = address_of(base)
    leading = [
        entry.alias
        for entry in entries
        if address and entry.address and entry.address[1] == address[1] and same_host(entry.address[0], address[0])
    ]
    names = list(dict.fromkeys(leading)) or ([slot] if slot else [])
    return sorted(names, key=lambda name: name != slot)


def entries_differ(
    in_files: Iterable[Entry], reported: Iterable[Entry], alias: str, same_host: SameHost = same_name
) -> bool:
    """Return whether the running gateway treats a name otherwise than its files say. It reads them when it starts."""
    mine, theirs = ([e for e in entries if e.alias == alias] for entries in (in_files, reported))

    def same(one: Entry, other: Entry) -> bool:
        return one.sends == other.sends and same_base(one.api_base or "", other.api_base or "", same_host)

    return not (
        all(any(same(one, other) for other in theirs) for one in mine)
        and all(any(same(one, other) for other in mine) for one in theirs)
    )


def slots_beside(port: int, address: str, slots: Mapping[int, str], ports: Iterable[int]) -> tuple[GatewayServer, ...]:
    """Return the host's other ports, by its settings. Assume that each knows only its slot's alias."""
    return tuple(
        GatewayServer(url(address, other), slots.get(other), ready=False, names=tuple(filter(None, [slots.get(other)])))
        for other in ports
        if other != port
    )
