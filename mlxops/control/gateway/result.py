"""What `gateway` and the receipt of a load report. The field names are the keys of the JSON result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from mlxops.control.gateway.probe import ProbeResult
from mlxops.core.frozen import dataclass
from mlxops.core.gateway import Mismatch
from mlxops.core.ports import Owner, State


@dataclass(frozen=True)
class AliasRow:
    """A port of a host, with the gateway's names for it."""

    alias: str | None
    """The first of `names`."""
    names: tuple[str, ...]
    slot: str | None
    """The alias that hosts.yaml gives the port."""
    port: int
    url: str
    sends: str | None
    """The name that the gateway sends to the port."""
    state: State | None
    owner: Owner | None
    model: str | None
    answers_to: str | None
    also_answers_to: tuple[str, ...]
    answers_to_any: bool
    drops_for_others: bool
    not_asked: str | None
    context_length: int | None
    verdict: str
    """`ok`, or the codes of the findings about the port."""


@dataclass(frozen=True)
class ProbedAliasRow(AliasRow):
    """The same after `--through`."""

    through: ProbeResult | None
    """The worst of `passages`."""
    passages: tuple[ProbeResult, ...]
    skipped: Mapping[str, str]
    """Name that was not probed -> the reason."""


@dataclass(frozen=True)
class GatewayResult:
    aliases: tuple[AliasRow | ProbedAliasRow, ...]
    findings: tuple[Mismatch, ...]


@dataclass(frozen=True)
class Receipt:
    """The probes through the gateway after a load: `gateway` in its result."""

    asked: bool
    """Whether at least one name was probed."""
    why: str | None = None
    """Why no name was probed."""
    aliases: tuple[ProbeResult, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
