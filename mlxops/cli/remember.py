"""Remember the names of hosts, ports, models and operations for tab completion, from the answers to a command.

The file has a line for each name: kind, host, name and meaning, with tabs between them. It is only written if its
folder exists, which the first completion creates.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from mlxops.cli.complete import names_file, remembered

if TYPE_CHECKING:
    from mlxops.control.inventory import Host
    from mlxops.core.replies import HostReply

MAX_ROWS, MAX_OPERATIONS, MAX_CHARACTERS = 200, 40, 120
"""Of one kind of one host; of a name or a meaning."""
Rows = dict[tuple[str, str], dict[str, str]]
"""(kind, host) -> name -> meaning."""


def remember(
    hosts: Mapping[str, Host], replies: Sequence[HostReply[object]], operations: Mapping[str, tuple[str, str]]
) -> None:
    """Write what is new. `hosts`: those of hosts.yaml. `operations`: host -> (id, command) that this command began.

    Raises `OSError`.
    """
    known: Rows = {}
    for kind, host, name, meaning in remembered():
        known.setdefault((kind, host), {})[name] = meaning
    rows = {key: found for key, found in known.items() if not hosts or key[1] in hosts or key[1] == ""}
    rows |= _of_hosts(hosts, known)
    for reply in replies:
        rows |= _of_reply(reply, rows)
    for host, (operation, command) in operations.items():
        rows["operation", host] = {operation: command, **rows.get(("operation", host), {})}
    lines = [*_lines(rows)]
    if lines != [*_lines(known)]:
        _write(lines)


def _of_hosts(hosts: Mapping[str, Host], known: Rows) -> Rows:
    """Return the hosts, and the slots of each whose status is not known."""
    if not hosts:
        return {}
    rows: Rows = {("host", ""): {name: host.ssh for name, host in hosts.items()}}
    for name, host in hosts.items():
        slots = host.settings.slots
        if ("port", name) not in known:
            rows["port", name] = {str(port): alias for port, alias in slots.items()}
        rows["alias", name] = {alias: f"port {port}" for port, alias in slots.items()}
    return rows


def _of_reply(reply: HostReply[object], rows: Rows) -> Rows:
    """Return what an answer names. The modules are those that its command has imported."""
    host, result = reply.host, reply.result
    match reply.command:
        case "status":
            from mlxops.core.commands.status import StatusResult

            if isinstance(result, StatusResult):
                models = {row.model: f"on {row.port}" for row in result.ports if row.model}
                ports = {str(row.port): _about(row.alias, row.model, row.state) for row in result.ports}
                return {("port", host): ports, ("model", host): rows.get(("model", host), {}) | models}
        case "list":
            from mlxops.core.commands.list import ListResult

            if isinstance(result, ListResult):
                repos = {row.repo_id: row.name for row in result.models if row.repo_id}
                return {("model", host): {row.name: row.repo_id or "" for row in result.models}, ("repo", host): repos}
        case "ops":
            from mlxops.core.commands.ops import OpsResult

            if isinstance(result, OpsResult):
                seen = {
                    row.operation: _about(row.command, row.model or row.repo, row.state) for row in result.operations
                }
                return {("operation", host): seen | _without(rows.get(("operation", host), {}), seen)}
    return {}


def _without(rows: dict[str, str], other: dict[str, str]) -> dict[str, str]:
    return {name: meaning for name, meaning in rows.items() if name not in other}


def _about(*words: object) -> str:
    return " ".join(str(word) for word in words if word)


def _lines(rows: Rows) -> Iterator[str]:
    for (kind, host), found in rows.items():
        usable = {name: meaning for name, meaning in found.items() if _is_usable(name)}
        for name, meaning in [*usable.items()][: MAX_OPERATIONS if kind == "operation" else MAX_ROWS]:
            yield "\t".join([kind, host, name, meaning[:MAX_CHARACTERS] if meaning.isprintable() else ""])


def _is_usable(name: str) -> bool:
    """Whether a name can be typed: others would steer the terminal."""
    return 0 < len(name) <= MAX_CHARACTERS and name.isprintable()


def _write(lines: Iterable[str]) -> None:
    """Replace the file: a completion at the same time reads the old or the new one."""
    path = names_file()
    new = f"{path}.{os.getpid()}"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)
        os.replace(new, path)
    except BaseException:
        os.unlink(new)
        raise
