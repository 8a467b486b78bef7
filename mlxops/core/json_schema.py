"""JSON Schema (2020-12) of what `wire.encode` makes of a type. Pure."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints

DIALECT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]
_SCALARS: Mapping[object, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    types.NoneType: "null",
}


class Schemas:
    """Makes schemas. `defs` collects those of the dataclasses that they refer to."""

    def __init__(
        self, describe: Callable[[type], Mapping[str, str]] = lambda kind: {}, *, closed: bool = False
    ) -> None:
        """`describe` returns the meaning of a dataclass's fields. `closed`: allow no key that a type does not have."""
        self.defs: dict[str, Schema] = {}
        self._describe, self._closed = describe, closed
        self._names: dict[str, type] = {}

    def of(self, hint: Any) -> Schema:
        """Return the schema of an annotation."""
        if hint is object or hint is Any:
            return {}
        if hint in _SCALARS:
            return {"type": _SCALARS[hint]}
        origin, arguments = get_origin(hint), get_args(hint)
        if origin in (Union, types.UnionType):
            return any_of([self.of(each) for each in arguments])
        if is_dataclass(hint) and isinstance(hint, type):
            return self._reference(hint)
        if isinstance(hint, type) and issubclass(hint, Enum):
            return {"enum": [each.value for each in hint]}
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return {"type": "object", "additionalProperties": self.of(arguments[1])}
        if origin in (tuple, list, frozenset, set):
            return {"type": "array", "items": self.of(arguments[0])}
        raise TypeError(f"{hint} has no JSON form")

    def object_of(self, kind: type) -> Schema:
        """Return the schema of a dataclass itself."""
        properties = self.properties(kind)
        return self.record(properties, [key for key in properties if key not in omittable(kind)])

    def record(self, properties: Mapping[str, Schema], required: list[str]) -> Schema:
        made: Schema = {"type": "object", "properties": dict(properties), "required": required}
        return made | ({"additionalProperties": False} if self._closed else {})

    def properties(self, kind: Any) -> dict[str, Schema]:
        """Return the schema of each key of a dataclass."""
        hints, meanings = get_type_hints(kind), self._describe(kind)
        made = {each.name: self.of(hints[each.name]) for each in _sent(kind)}
        made |= {key: self.of(hint) for key, hint in getattr(kind, "FURTHER_KEYS", {}).items()}
        return {key: schema | _description(meanings.get(key, "")) for key, schema in made.items()}

    def _reference(self, kind: type) -> Schema:
        name = kind.__name__
        if self._names.setdefault(name, kind) is not kind:
            name = f"{kind.__module__.rpartition('.')[2]}.{name}"
        if name not in self.defs:
            self.defs[name] = {}  # ends the recursion of a type that refers to itself
            self.defs[name] = self.object_of(kind)
        return {"$ref": f"#/$defs/{name}"}


def omittable(kind: Any) -> set[str]:
    """Return the keys of a dataclass that may be left out."""
    return {each.name for each in _sent(kind) if each.metadata.get("omit")}


def any_of(schemas: list[Schema]) -> Schema:
    """Return the schema of a value that fits one of these."""
    if all([*each] == ["type"] for each in schemas):
        return {"type": [each["type"] for each in schemas]}
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _sent(kind: Any) -> list[Any]:
    return [each for each in fields(kind) if not each.metadata.get("local")]


def _description(text: str) -> Schema:
    return {"description": text} if text else {}
