"""`gateway`: check every alias, from the gateway's files to what answers."""

from __future__ import annotations

from mlxops.core.command import Group, Hosts, Request, switch
from mlxops.core.frozen import dataclass
from mlxops.core.replies import ErrorRow


@dataclass(frozen=True)
class ServedPort:
    """A port of a host, as far as a gateway's entry has to agree with it."""

    port: int
    alias: str | None
    state: str
    owner: str | None
    model: str | None
    answers_to: str | None
    """The only model name that the server accepts; None: any, or not known."""
    also_answers_to: tuple[str, ...]
    answers_to_any: bool
    drops_for_others: bool
    not_asked: str | None
    paths: tuple[str, ...]
    """The paths at which the server gives completions; empty if not known."""
    context_length: int | None
    assigned: bool
    detail: str


@dataclass(frozen=True)
class ServedPorts:
    """What the agent answers. The result that is shown is made of it and the gateway's files on the control node."""

    ports: tuple[ServedPort, ...]
    registry_error: ErrorRow | None


@dataclass(frozen=True)
class Gateway(
    Request[ServedPorts],
    group=Group.LOOK,
    example="mlxctl gateway --through",
    hosts=Hosts.ALL,
    repeatable=True,
):
    """Check every alias, from the gateway's files to what answers."""

    through: bool = switch("also one small completion per alias through the running gateway", sent=False)
    print: bool = switch("print the entries to paste into the gateway's configuration, once; asks no host", sent=False)
    env: bool = switch(
        "with --print: values as os.environ/NAME, and the lines for the env file as comments", sent=False
    )
