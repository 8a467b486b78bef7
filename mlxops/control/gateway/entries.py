"""`gateway --print`: the entries to paste into the gateway's configuration, and the settings of those that wait."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import yaml

from mlxops.control.client import HostTarget
from mlxops.control.gateway.check import client_entries
from mlxops.control.gateway.ports import configured_ports, observed_ports, same_host
from mlxops.core import gateway as core
from mlxops.core import hold
from mlxops.core.commands.gateway import ServedPorts
from mlxops.core.errors import Refused
from mlxops.core.frozen import dataclass
from mlxops.core.gateway import GatewayPort
from mlxops.core.litellm import LiteLLMConfig
from mlxops.core.replies import HostReply
from mlxops.core.tables import one_line


@dataclass(frozen=True)
class Printed:
    document: Mapping[str, object]
    """`model_list`, and `router_settings` if an alias has a hold."""
    environ: Mapping[str, str]
    """The variables that the document refers to."""
    notes: tuple[str, ...] = ()
    """What a person must know who pastes it."""


def entries_to_paste(
    targets: Sequence[HostTarget],
    replies: Sequence[HostReply[ServedPorts]],
    today: LiteLLMConfig,
    not_known: str = "",
    *,
    env: bool,
) -> Printed:
    """Return what to paste. Raises `Refused` (no_slots).

    `replies`: only the contexts come from them; a host may be down. `today`: what the gateway's files say; `not_known`:
    why they are not known.
    """
    answered = {reply.host: reply.result for reply in replies}
    ports = [port for target in targets for port in observed_ports(configured_ports(target), answered.get(target.name))]
    if not any(port.alias for port in ports):
        raise Refused(
            "no_slots",
            "there is nothing to print: no port has an alias",
            why="hosts.yaml gives the host no slots",
            hint="add them, for example: slots: {8100: jerry-xl}",
        )
    document, environ = core.document_with_variables(ports) if env else (core.document_with_values(ports), {})
    names = hold.other_names(client_entries(today, ports), today.synonyms, ports, same_host)
    holds = hold.holds_of(ports, today.retry, names)
    notes = (*_unknown(not_known, ports), *hold.notes(ports, today.retry, holds), *_contexts(ports))
    return Printed(hold.with_settings(document, ports, holds), environ, notes)


def _contexts(ports: Sequence[GatewayPort]) -> Iterator[str]:
    """Yield what `max_input_tokens` means, and why an alias has none."""
    slots = [port for port in ports if port.alias]
    promised = core.promised_contexts(slots)
    if promised:
        yield "max_input_tokens: the smallest context of the alias's latest models. `load` warns of one with less."
    for port in slots:
        if port.alias not in promised:
            why = f"{port.host} did not answer" if port.state is None else "no model on its port has a known context"
            yield f"{port.alias}: no max_input_tokens, because {why}."


def _unknown(why: str, ports: Sequence[GatewayPort]) -> tuple[str, ...]:
    """Return what a hold does not consider if the gateway's files are not known."""
    if not why or not any(port.alias and port.hold for port in ports):
        return ()
    return (f"{why}. So fallbacks and other names of these aliases are not known here: compare them yourself.",)


def as_yaml(printed: Printed) -> str:
    """Return YAML. The notes and the lines for the env file follow as comments."""
    lines = [_dump({"model_list": printed.document["model_list"]})]
    if settings := printed.document.get("router_settings"):
        lines += [*(f"# {line}" for line in _MERGE), _dump({"router_settings": settings})]
    lines += [f"# {one_line(note)}" for note in printed.notes]
    if printed.environ:
        lines += ["# For the gateway's env file:", *(f"# {name}={value}" for name, value in printed.environ.items())]
    return "\n".join(lines)


_MERGE = (
    "A configuration has router_settings once: if yours has them, add model_group_retry_policy there,",
    "or the second one hides the first.",
)


def _dump(document: Mapping[str, object]) -> str:
    return str(yaml.safe_dump(dict(document), sort_keys=False, default_flow_style=False, width=200)).rstrip("\n")
