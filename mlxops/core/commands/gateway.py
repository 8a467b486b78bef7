"""`gateway`: check every alias, from the gateway's files to what answers."""

from __future__ import annotations

from mlxops.core.command import Group, Hosts, Request, switch
from mlxops.core.frozen import dataclass
from mlxops.core.replies import ErrorRow


@dataclass(frozen=True)
class ServedPort:
    """The facts about a host's port that a gateway's entry must match."""

    port: int
    alias: str | None
    """The slot's alias."""
    state: str
    """One of the port states."""
    owner: str | None
    """Who started the server."""
    model: str | None
    answers_to: str | None
    """The only model name that the server accepts; None: any, or not known."""
    also_answers_to: tuple[str, ...]
    """Further names of the same model."""
    answers_to_any: bool
    """The server accepts every model name."""
    drops_for_others: bool
    """The server drops its model if a request names an unknown one."""
    not_asked: str | None
    """Why the server must not be asked; None if it may be."""
    paths: tuple[str, ...]
    """The paths at which the server gives completions; empty if not known."""
    context_length: int | None
    """Input tokens that the server accepts; None if not known."""
    assigned: bool
    """The registry assigns a model to this port."""
    detail: str
    """What is special about the state, for people."""
    swap_seconds: float | None = None
    """The longest time that one of its latest swaps left the port without a server; None: it has had none."""
    smallest_context: int | None = None
    """The smallest context of the models that the port serves, has assigned, or had lately; None if not known."""


@dataclass(frozen=True)
class ServedPorts:
    """The agent's result. The control node adds the gateway's files, and makes the result that it shows."""

    ports: tuple[ServedPort, ...]
    registry_error: ErrorRow | None
    """Why the registry cannot be read; None if it can."""


@dataclass(frozen=True)
class Gateway(
    Request[ServedPorts],
    group=Group.LOOK,
    example="mlxctl gateway --through",
    hosts=Hosts.ALL,
    repeatable=True,
):
    """Check every alias, from the gateway's files to the server."""

    through: bool = switch("also one small completion per alias through the running gateway", sent=False)
    print: bool = switch("print the entries to paste into the gateway's configuration, once", sent=False)
    env: bool = switch(
        "with --print: values as os.environ/NAME, and the lines for the env file as comments", sent=False
    )
