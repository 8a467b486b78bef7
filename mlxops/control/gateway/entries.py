"""`gateway --print`: the entries to paste into the gateway's configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import yaml

from mlxops.control.client import HostTarget
from mlxops.control.gateway.ports import configured_ports
from mlxops.core import gateway as core
from mlxops.core.errors import Refused


def entries_to_paste(targets: Sequence[HostTarget], *, env: bool) -> tuple[dict[str, object], dict[str, str]]:
    """Return the document to paste and the variables that it refers to. Raises `Refused` (no_slots)."""
    ports = [port for target in targets for port in configured_ports(target)]
    if not any(port.alias for port in ports):
        raise Refused(
            "no_slots",
            "there is nothing to print: no port has an alias",
            why="hosts.yaml gives the host no slots",
            hint="add them, for example: slots: {8100: jerry-xl}",
        )
    return core.document_with_variables(ports) if env else (core.document_with_values(ports), {})


def as_yaml(document: Mapping[str, object], environ: Mapping[str, str]) -> str:
    """Return YAML with nothing but `model_list`; the lines for the env file follow as comments."""
    text = str(yaml.safe_dump(dict(document), sort_keys=False, default_flow_style=False, width=200)).rstrip("\n")
    if not environ:
        return text
    return "\n".join([text, "# For the gateway's env file:", *(f"# {name}={value}" for name, value in environ.items())])
