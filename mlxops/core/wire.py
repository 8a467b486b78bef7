"""One codec between dataclasses and JSON: for requests, results and events. Pure.

A dataclass is a JSON object whose keys are its fields. Nested dataclasses, enums, tuples, mappings and optional values
follow their annotations. A key that the dataclass does not have is ignored, because another version may have sent it. A
missing key takes the field's default. Everything else that does not fit is a `DecodeError` with the path of the value.

A class with its own JSON form has two methods: `to_wire(self)`, and the static `from_wire(value)`, which may raise
`ValueError`.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")
_OMIT = "omit"
_LOCAL = "local"


class DecodeError(ValueError):
    """A value does not fit its type. `path`: where it is, such as `ports[0].pid`."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path or 'the value'} is {problem}")
        self.path, self.problem = path, problem


def omitted(default: T, help: str = "") -> T:
    """Declare a field whose key is left out while it has its default."""
    return field(default=default, metadata={_OMIT: True, "help": help})


def encode(value: object) -> Any:
    """Return `value` as JSON has it: dict, list, str, int, float, bool, None."""
    if value is None or (isinstance(value, str | int | float) and not isinstance(value, Enum)):
        return value
    if hasattr(value, "to_wire"):
        return value.to_wire()
    if is_dataclass(value):
        return _encode_object(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): encode(part) for key, part in value.items()}
    if isinstance(value, tuple | list | frozenset | set):
        return [encode(part) for part in value]
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _encode_object(value: Any) -> dict[str, Any]:
    parts = {}
    for each in _sent(cast(Any, type(value))):
        part = getattr(value, each.name)
        if not each.metadata.get(_OMIT) or part != each.default:
            parts[each.name] = encode(part)
    return parts


@cache
def _sent(kind: Any) -> tuple[Field[Any], ...]:
    return tuple(each for each in fields(kind) if not each.metadata.get(_LOCAL))


@cache
def _annotations(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind)


def decode(kind: type[T], value: object, path: str = "") -> T:
    """Return `value` as a `kind`. Raises `DecodeError`."""
    return cast(T, _decode(kind, value, path))


def _decode(kind: Any, value: object, path: str) -> object:
    if kind is object or kind is Any:
        return value
    origin = get_origin(kind)
    if origin is Union or origin is types.UnionType:
        return _decode_union(kind, value, path)
    if origin is not None:
        return _decode_container(origin, get_args(kind), value, path)
    if hasattr(kind, "from_wire"):
        try:
            return kind.from_wire(value)
        except DecodeError:
            raise
        except ValueError as error:
            raise DecodeError(path, f"not valid: {error}") from None
    if is_dataclass(kind):
        return _decode_object(cast(type, kind), value, path)
    if issubclass(kind, Enum):
        try:
            return kind(value)
        except ValueError:
            raise DecodeError(path, f"not one of {', '.join(str(each.value) for each in kind)}") from None
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise DecodeError(path, "too large") from None
    if type(value) is not kind:
        raise DecodeError(path, f"not {_NAMES.get(kind, kind.__name__)}")
    return value


_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "null"}


def _decode_union(kind: Any, value: object, path: str) -> object:
    choices = get_args(kind)
    if value is None and types.NoneType in choices:
        return None
    problems = []
    for choice in choices:
        if choice is types.NoneType:
            continue
        try:
            return _decode(choice, value, path)
        except DecodeError as error:
            problems.append(error)
    raise problems[0]


def _decode_container(origin: Any, arguments: tuple[Any, ...], value: object, path: str) -> object:
    if issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise DecodeError(path, "not an object")
        key_kind, value_kind = arguments
        return {_key(key_kind, key, path): _decode(value_kind, part, f"{path}.{key}") for key, part in value.items()}
    if not isinstance(value, list):
        raise DecodeError(path, "not a list")
    return origin(_decode(arguments[0], part, f"{path}[{index}]") for index, part in enumerate(value))


def _key(kind: Any, key: str, path: str) -> object:
    if kind is not int:
        return key
    if not key.isdecimal():
        raise DecodeError(path, f"keyed by {key!r}, not by a number")
    return int(key)


def _decode_object(kind: type, value: object, path: str) -> object:
    if not isinstance(value, Mapping):
        raise DecodeError(path, "not an object")
    annotations = _annotations(kind)
    arguments: dict[str, object] = {}
    for each in _sent(kind):
        at = f"{path}.{each.name}" if path else each.name
        if each.name in value:
            arguments[each.name] = _decode(annotations[each.name], value[each.name], at)
        elif each.default is MISSING and each.default_factory is MISSING:
            raise DecodeError(at, "missing")
    return kind(**arguments)
