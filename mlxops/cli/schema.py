"""The JSON Schema of every document that `--json` prints, from the types of the results."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from mlxops.cli.field_docs import field_docs
from mlxops.control.output import SCHEMA
from mlxops.core.command import AnyRequest, Group, UnknownCommandError, request_type
from mlxops.core.errors import Exit, UsageError
from mlxops.core.frozen import dataclass
from mlxops.core.json_schema import DIALECT, Schema, Schemas, any_of, omittable
from mlxops.core.replies import ErrorRow
from mlxops.core.wire import omitted
from mlxops.tasks import command_names

EXIT, ERROR = {"$ref": "#/$defs/exit"}, {"$ref": "#/$defs/error"}


@dataclass(frozen=True)
class Row:
    """What a document has for each host."""

    result: type
    nested: bool = False
    """The result is under `result`, and not beside the host's name."""
    sometimes: Mapping[str, object] | None = None
    """Further keys with their types, beside the result."""


@dataclass(frozen=True)
class PrintedEntries:
    """What `gateway --print` prints: LiteLLM's configuration, and what belongs to it."""

    model_list: tuple[Mapping[str, object], ...]
    environ: Mapping[str, str]
    """The variables that the entries refer to."""
    notes: tuple[str, ...]
    router_settings: Mapping[str, object] | None = omitted(None)
    """Only if an alias has a hold."""


def printed() -> list[type[AnyRequest]]:
    """Return the commands that are typed."""
    return [kind for name in command_names() if (kind := request_type(name)).group is not Group.HIDDEN]


def rows(kind: type[AnyRequest]) -> list[Row]:
    """Return the forms of a command's rows. Those that the control node makes itself are named here."""
    own = Row(kind.result, kind.nested)
    match kind.name:
        case "status":
            from mlxops.core.status_diff import Change

            return [Row(kind.result, False, {"at": str, "away_since": str | None, "changes": tuple[Change, ...]})]
        case "gateway":
            from mlxops.control.gateway.result import GatewayResult

            return [Row(GatewayResult), Row(PrintedEntries)]
        case "ops":
            from mlxops.core.commands.cancel import CancelResult

            changes = [Row(each.result, True) for each in printed() if each.changes]
            return [own, Row(kind.result, True), Row(CancelResult, True), *changes]
    return [own]


def schema(command: str | None = None, *, closed: bool = False) -> Schema:
    """Return the schema of a command's documents, or of all.

    `closed`: allow no key that this version does not know. Raises `UsageError` (unknown_command).
    """
    kinds = printed() if command is None else [_typed(command)]
    schemas = Schemas(_meanings, closed=closed)
    forms = {kind.name: any_of([*_documents(kind, schemas)]) for kind in kinds}
    error = schemas.object_of(ErrorRow)
    error["properties"]["exit"] = EXIT
    failed = _document(schemas, {"type": "string"}, {"type": "array", "maxItems": 0}, failed=True)
    return {
        "$schema": DIALECT,
        "title": "mlxctl --json" if command is None else f"mlxctl {command} --json",
        "anyOf": [*({"$ref": f"#/$defs/{name}"} for name in forms), {"$ref": "#/$defs/failed"}],
        "$defs": {**forms, "failed": failed, "error": error, "exit": _exit(), **schemas.defs},
    }


def _meanings(kind: type) -> Mapping[str, str]:
    return {key: re.sub(r"\bNone\b", "null", " ".join(text.split())) for key, text in field_docs(kind).items()}


def _typed(command: str) -> type[AnyRequest]:
    try:
        kind = request_type(command)
    except UnknownCommandError:
        kind = None
    if kind is None or kind.group is Group.HIDDEN:
        why = "it prints no documents with --json, or mlxops has no such command"
        raise UsageError("unknown_command", f"no schema of {command!r}", why=why, hint="see: `mlxctl --help`")
    return kind


def _documents(kind: type[AnyRequest], schemas: Schemas) -> Iterable[Schema]:
    """Yield the schema of each form of document that a command prints."""
    for row in rows(kind):
        host = _row(schemas, row, may_detach=kind.changes)
        yield _document(schemas, {"const": kind.name}, {"type": "array", "minItems": 1, "items": host})
    if kind.name == "logs":  # with --follow, before the document
        yield schemas.record({"host": {"type": "string"}, "line": {"type": "string"}}, ["host", "line"])


def _document(schemas: Schemas, command: Schema, hosts: Schema, *, failed: bool = False) -> Schema:
    ok = {"const": False} if failed else {"type": "boolean", "description": "no host has an error"}
    keys = {"schema": {"const": SCHEMA}, "command": command, "ok": ok, "hosts": hosts}
    return schemas.record(keys | ({"error": ERROR} if failed else {}), [*keys, *(["error"] if failed else [])])


def _row(schemas: Schemas, row: Row, *, may_detach: bool) -> Schema:
    keys: dict[str, Schema] = {
        "host": {"type": "string"},
        "reachable": {"type": "boolean"},
        "error": {"anyOf": [ERROR, {"type": "null"}]},
    }
    always = [*keys]
    if row.nested:
        detached = {"operation": {"type": "string", "description": "With --detach: its id. `result` is null."}}
        keys |= {"result": any_of([schemas.of(row.result), {"type": "null"}])} | (detached if may_detach else {})
        return schemas.record(keys, [*always, "result"])
    keys |= schemas.properties(row.result) | {key: schemas.of(hint) for key, hint in (row.sometimes or {}).items()}
    needed = [key for key in schemas.properties(row.result) if key not in omittable(row.result)]
    succeeded: Schema = {"if": {"properties": {"error": {"type": "null"}}}, "then": {"required": needed}}
    return schemas.record(keys, always) | succeeded


def _exit() -> Schema:
    return {
        "type": "integer",
        "description": "exit status of mlxctl; the largest of all hosts, but 1 before all others",
        "oneOf": [{"const": int(each), "title": each.name, "description": each.meaning} for each in Exit],
    }
