"""Decide which names may be asked for through the gateway without harm. Pure.

A name is asked for only if every server that the gateway may send it to knows the name that the gateway sends: for
an unknown one mlx-lm drops its model. Agents describe their ports, as `GatewayServer`, in the results of `gateway` and
`load`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field

from mlxops.core.frozen import dataclass
from mlxops.core.gateway import Entry, SameHost, address_of, same_base, same_name, url
from mlxops.core.names import shown

STAR = "*"


@dataclass(frozen=True)
class GatewayServer:
    """A port of a managed host."""

    url: str
    """Its api_base, by the host's settings."""
    slot: str | None
    ready: bool = True
    idle: bool = False
    """Nothing is there: a request fails and does no harm."""
    known: tuple[str, ...] = ()
    """The names that it accepts; empty: not known."""
    any_name: bool = False
    drops: bool = True
    """It drops its model for an unknown name."""
    not_asked: str = ""
    """Why it must not be asked at all."""


def server_of(row: Mapping[str, object], base: str, slot: str | None, *, idle: bool = False) -> GatewayServer:
    """Read a port from its agent's row; see `operations.asking.to_wire`."""
    only, also = row.get("answers_to"), row.get("also_answers_to")
    known = [only, *(also if isinstance(also, list) else [])]
    return GatewayServer(
        url=base,
        slot=slot,
        ready=row.get("state") == "ready",
        idle=idle,
        known=tuple(name for name in known if isinstance(name, str)),
        any_name=row.get("answers_to_any") is True,
        drops=row.get("drops_for_others") is not False,
        not_asked=str(row.get("not_asked") or ""),
    )


@dataclass(frozen=True)
class Asking:
    """The names to ask one gateway for."""

    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name -> the URLs of the ready servers that it leads to."""
    bases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name -> every api_base that may answer for it there."""
    others: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name -> the api_bases of its deployments elsewhere."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Name that leads to a ready server -> why it is not asked for."""


def to_ask(
    entries: Sequence[Entry] | None, servers: Sequence[GatewayServer], same_host: SameHost = same_name
) -> Asking:
    """Choose the names to ask for.

    `entries`: the gateway's; None: not known. Then ask for the aliases of slots, where a wrong name does no harm.
    """
    if entries is None:
        return _by_slot(servers)
    names: dict[str, tuple[str, ...]] = {}
    bases: dict[str, tuple[str, ...]] = {}
    others: dict[str, tuple[str, ...]] = {}
    skipped: dict[str, str] = {}
    for alias in dict.fromkeys(entry.alias for entry in entries):
        ways = [(entry, _target(entry, servers, same_host)) for entry in entries if entry.alias == alias]
        urls = tuple(dict.fromkeys(server.url for _, server in ways if server is not None and server.ready))
        if not urls:
            continue
        names[alias] = urls
        found = [entry.api_base for entry, server in ways if server is not None and server.ready and entry.api_base]
        bases[alias] = tuple(dict.fromkeys([*urls, *found]))
        others[alias] = tuple(
            dict.fromkeys(e.api_base for e, server in ways if e.api_base and (server is None or not server.ready))
        )
        if why := _why_not(alias, ways):
            skipped[alias] = why
    return Asking(names, bases, others, skipped)


def _by_slot(servers: Sequence[GatewayServer]) -> Asking:
    names: dict[str, tuple[str, ...]] = {}
    skipped: dict[str, str] = {}
    for server in servers:
        if server.ready and server.slot:
            names[server.slot] = (*names.get(server.slot, ()), server.url)
            harm = server.drops and not server.any_name
            if why := server.not_asked or ("what the gateway sends for it is not known" if harm else ""):
                skipped.setdefault(server.slot, why)
    return Asking(names, names, {}, skipped)


def _target(entry: Entry, servers: Iterable[GatewayServer], same_host: SameHost) -> GatewayServer | None:
    where = entry.address
    for server in servers:
        at = address_of(server.url)
        if where is not None and at is not None and where[1] == at[1] and same_host(where[0], at[0]):
            return server
    return None


def _why_not(alias: str, ways: Iterable[tuple[Entry, GatewayServer | None]]) -> str:
    """Return why a name must not be asked for; empty if it may be."""
    if STAR in alias:
        return "it stands for many names"
    for entry, server in ways:
        if server is not None and not server.idle and (why := _unknown_to(server, entry.certain_name)):
            return why
    return ""


def _unknown_to(server: GatewayServer, sends: str | None) -> str:
    """Return why a name must not be sent to a server; empty if it may be."""
    port = (address_of(server.url) or ("", 0))[1]
    if server.not_asked:
        return f"port {port}: {server.not_asked}"
    if server.any_name or (sends is not None and sends in server.known):
        return ""
    if sends is None:
        return f"what the gateway sends to port {port} is not known" if server.drops else ""
    if server.known:
        return f"the gateway sends the name {shown(sends)}, and port {port} answers to {server.known[0]}"
    if not server.ready and sends == server.slot:
        return ""  # a model that mlxops loads there gets this name
    return f"whether port {port} answers to {shown(sends)} is not known" if server.drops else ""


def names_for(entries: Iterable[Entry], base: str, slot: str | None, same_host: SameHost = same_name) -> list[str]:
    """Return the gateway's names for the server at `base`, its slot's alias first; if there are none, only that."""
    at = address_of(base)
    leading = [
        entry.alias
        for entry in entries
        if at and entry.address and entry.address[1] == at[1] and same_host(entry.address[0], at[0])
    ]
    names = list(dict.fromkeys(leading)) or ([slot] if slot else [])
    return sorted(names, key=lambda name: name != slot)


def differ(files: Iterable[Entry], running: Iterable[Entry], alias: str, same_host: SameHost = same_name) -> bool:
    """Whether the running gateway treats a name otherwise than its files say, which it reads when it starts."""
    mine, theirs = ([e for e in each if e.alias == alias] for each in (files, running))

    def same(one: Entry, other: Entry) -> bool:
        return one.sends == other.sends and same_base(one.api_base or "", other.api_base or "", same_host)

    return not (
        all(any(same(one, other) for other in theirs) for one in mine)
        and all(any(same(one, other) for other in mine) for one in theirs)
    )


def slots_beside(port: int, address: str, slots: Mapping[int, str], ports: Iterable[int]) -> tuple[GatewayServer, ...]:
    """Return the host's other ports, by its settings. Each counts as knowing only its slot's alias."""
    return tuple(
        GatewayServer(url(address, each), slots.get(each), ready=False, known=(slots[each],) if each in slots else ())
        for each in ports
        if each != port
    )
