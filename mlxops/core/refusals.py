"""The errors with which plans are refused: what is wrong, why, and what to type next. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from shlex import quote

from mlxops.core.errors import MlxopsError, Refused, UsageError
from mlxops.core.names import AUTO, shown
from mlxops.core.ports import Owner, PortView, World
from mlxops.core.records import Run
from mlxops.core.registry import Model, Registry

# -- the model -------------------------------------------------------------------------------------------------------


def unknown_model(name: str, registry: Registry, port: str | None = None) -> Refused:
    """`port` is the port as it was typed, if any."""
    import difflib

    # People leave out the organisation, so the part behind it is compared too.
    known = {alike: model for model in registry.models for alike in (model, model.rpartition("/")[2])}
    close = [*dict.fromkeys(known[alike] for alike in difflib.get_close_matches(name, known, n=3))]
    return Refused(
        "unknown_model",
        f"there is no model {name!r} in the registry",
        why="did you mean " + " or ".join(close) + "?" if close else "it was neither registered nor found by init",
        hint=f"see: `mlxctl list`; or register it: `mlxctl load {name} {_port_words(port)} --repo org/name`",
    )


def two_repositories(name: str, repo_id: str | None, port: str | None) -> Refused:
    return Refused(
        "ambiguous_model",
        f"--model {name} and --repo {repo_id} name two different repositories",
        why="a --model of the form org/name is the repository itself",
        hint=f"use a short name: `mlxctl load {name.rpartition('/')[2]} {_port_words(port)} --repo {repo_id}`",
    )


def several_entries(repo_id: str, models: Sequence[Model], port: str | None) -> Refused:
    return Refused(
        "ambiguous_model",
        f"several models use {repo_id}: {', '.join(model.name for model in models)}",
        why="a repository can stand for a model only if one entry has it",
        hint=f"name the model that you mean: `mlxctl load {models[0].name} {_port_words(port)}`",
    )


def entry_without_repo(entry: Model, port: str | None) -> Refused:
    return Refused(
        "entry_unusable",
        f"the registry entry {entry.name!r} names no repository",
        why="; ".join(entry.problems),
        hint=f"give it one: `mlxctl load {entry.name} {_port_words(port)} --repo org/name`",
    )


def _port_words(port: str | None) -> str:
    return port if port and port.isdecimal() else f"--port {AUTO}"


# -- the port --------------------------------------------------------------------------------------------------------


def port_needed(name: str) -> UsageError:
    return UsageError(
        "port_needed",
        f"no port is given, and {name!r} has none of its own",
        why="it is neither the alias of a slot nor assigned to a port",
        hint=f"let mlxops choose one: `mlxctl load {name} --port auto`; see the ports: `mlxctl status`",
    )


def no_idle_port(world: World) -> Refused:
    idle = [f"{port} ({view.alias})" for port, view in sorted(world.ports.items()) if view.unserved and view.alias]
    return Refused(
        "no_idle_port",
        "no port without an alias is idle",
        why=f"idle slots with an alias: {', '.join(idle) or 'none'}",
        hint="name one of them with --port, or unload a model first",
    )


def alias_elsewhere(name: str, own: int, port: int) -> Refused:
    """`own` is the port whose alias is `name`."""
    return Refused(
        "alias_elsewhere",
        f"{name} is the alias of port {own}",
        why="an alias never changes its port: the gateway's entry for it is fixed",
        hint=f"load it there: --port {own}; or another model on {port}",
    )


def gateway_name(port: int, answers_to: str, sent: Sequence[str], unknown: Iterable[str]) -> Refused:
    """The gateway sends the names `sent`. Of these, the server would not answer to `unknown`."""
    names = ", ".join(map(shown, unknown))
    return Refused(
        "gateway_name",
        f"the gateway sends the name {names} to port {port}, but the server does not answer to it",
        why=f"a server on port {port} answers to {answers_to}, whatever its model and engine",
        hint=f"in the gateway's entry for port {port}: model: openai/{answers_to}",
        details={"port": port, "answers_to": answers_to, "sent": list(sent)},
    )


def unknown_port(view: PortView) -> Refused:
    return Refused(
        "unknown_port",
        f"what is on port {view.port} could not be determined",
        why=view.detail,
        hint="nothing is changed while it is unknown; try again, then look on the host itself",
    )


def foreign_port(view: PortView, after: str = "") -> Refused:
    """`after` completes the hint: what to do once the process is stopped."""
    return Refused(
        "foreign_port",
        f"port {view.port} is held by a process that is not ours",
        why=view.detail or f"its pid is {view.pid}",
        hint=f"mlxops never signals it; stop it yourself on the host{_kill_command(view)}{after}",
    )


def boot_port(view: PortView, present: str) -> Refused:
    """`present` says what the port serves instead."""
    claim = view.boot
    name = f" {claim.job.name}" if claim else ""
    other = f", which hosts.yaml gives port {claim.job.port}" if claim and claim.job.port != view.port else ""
    why = [claim.how if claim else "", present, "the system starts it again when it is stopped"]
    return Refused(
        "boot_port",
        f"port {view.port} belongs to the boot job{name}{other}",
        why="; ".join(filter(None, why)),
        hint=f"as the operator of the host: {claim.stop if claim else 'stop the job'}; then try again",
    )


def _kill_command(view: PortView) -> str:
    """Return the command that ends a foreign process, if its pid is known. A boot job would only start it again."""
    return f": kill {view.pid}" if view.pid is not None and view.owner is Owner.FOREIGN else ""


# -- the server ------------------------------------------------------------------------------------------------------


def port_in_use(view: PortView) -> Refused:
    return Refused(
        "port_in_use",
        f"port {view.port} serves {view.model or 'another model'}",
        why=f"it is {view.state}, owner {view.owner}, pid {view.pid}",
        hint=f"swap it: add --force; or first: {_unload_command(view)}",
    )


def unexpected_model(expect: str, held: Sequence[str], view: PortView, wanted: str) -> Refused:
    """`held`: the models that the port has instead."""
    names = " and ".join(map(shown, held)) or "no model"
    again = f" --force --expect {quote(held[0])}" if held else ""
    return Refused(
        "unexpected_model",
        f"port {view.port} holds {names}, not {shown(expect)}",
        why="somebody changed it since, or --expect names another model than was there",
        hint=f"look again: `mlxctl status`; then: `mlxctl load {wanted} {view.port}{again}`",
        details={"port": view.port, "expected": expect, "held": list(held)},
    )


def serves_other_files(port: int, run: Run) -> Refused:
    return Refused(
        "port_in_use",
        f"port {port} serves {run.model} from {run.repo_id} at {run.revision[:12]}",
        why="the request is for another repository or revision",
        hint="swap it: add --force",
    )


def adopted_twice(name: str, other: PortView) -> Refused:
    return Refused(
        "model_elsewhere",
        f"{name} is served on port {other.port} too",
        why="mlxops serves a model on one port only, and adopts a running server only if the model has no other",
        hint=f"first: {_unload_command(other)}",
    )


def served_elsewhere(name: str, other: PortView) -> Refused:
    return Refused(
        "model_elsewhere",
        f"{name} is served on port {other.port}",
        why="mlxops serves a model on one port only",
        hint=f"move it: add --force; or first: {_unload_command(other)}",
    )


def not_ours_elsewhere(name: str, other: PortView) -> Refused:
    return Refused(
        "model_elsewhere",
        f"{name} is served on port {other.port} by a process that mlxops did not start",
        why="mlxops moves only its own servers",
        hint=f"first: `mlxctl unload {other.port} --force`",
    )


def hand_started(view: PortView, command: str, notes: Iterable[str]) -> Refused:
    return Refused(
        "hand_started",
        f"the server on port {view.port} was started by hand",
        why="; ".join([f"pid {view.pid}: {command[:200]}", *notes]),
        hint=f"to stop it anyway: `mlxctl unload {view.port} --force`",
    )


def _unload_command(view: PortView) -> str:
    return f"`mlxctl unload {view.port}{' --force' if view.owner is Owner.HAND else ''}`"


# -- several ---------------------------------------------------------------------------------------------------------


def merge_refusals(errors: Sequence[MlxopsError]) -> MlxopsError:
    """Merge errors into the first one with the largest exit status, and name the others in it (`details.others`)."""
    first, *others = sorted(errors, key=lambda error: -error.exit)
    if others:
        first.why = "; ".join(filter(None, [first.why, *(error.message for error in others)]))
        first.set_hint("; ".join(dict.fromkeys(filter(None, (error.marked_hint for error in (first, *others))))))
        first.details["others"] = [error.to_wire() for error in others]
    return first
