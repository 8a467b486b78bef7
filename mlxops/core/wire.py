"""One codec between dataclasses and JSON: for requests, results and events. Pure.

A dataclass is a JSON object whose keys are its fields. Nested dataclasses, enums, tuples, mappings and optional values
follow their annotations. A key that the dataclass does not have is ignored, because another version may have sent it. A
missing key takes the field's default. Everything else that does not fit is a `DecodeError` with the path of the value.

A class with its own JSON form has two methods: `to_wire(self)`, and the static `from_wire(value)`, which may raise
`ValueError`. Keys that are no fields are in its `FURTHER_KEYS`, with their types, for the JSON Schema.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, is_dataclass
from enum import Enum
from functools import cache, partial
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")
_OMIT = "omit"
_LOCAL = "local"


class DecodeError(ValueError):
    """A value does not fit its type. `path`: where it is, such as `ports[0].pid`."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path or 'the value'} is {problem}")
        self.path, self.problem = path, problem

    def within(self, outer: str) -> DecodeError:
        """Return the error of the whole of which the value is a part; `outer` is the name of that part."""
        dot = "." if outer and self.path and not self.path.startswith("[") else ""
        return DecodeError(f"{outer}{dot}{self.path}", self.problem)


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


def decode(kind: type[T], value: object, path: str = "") -> T:
    """Return `value` as a `kind`. Raises `DecodeError`."""
    try:
        return cast(T, _decoder(cast(Any, kind))(value))
    except DecodeError as error:
        raise error.within(path) from None


_Decoder = Callable[[Any], object]
"""Return the decoded value, or raise `DecodeError`."""


@cache
def _decoder(kind: Any) -> _Decoder:
    """Return the decoder of a type. A host sends thousands of values of a few types, so each type is examined once."""
    if kind is object or kind is Any:
        return lambda value: value
    origin = get_origin(kind)
    if origin is Union or origin is types.UnionType:
        return _union_decoder(get_args(kind))
    if origin is not None:
        is_mapping = issubclass(origin, Mapping)
        return _mapping_decoder(*get_args(kind)) if is_mapping else _list_decoder(origin, get_args(kind)[0])
    if hasattr(kind, "from_wire"):
        return partial(_from_wire, kind)
    if is_dataclass(kind):
        return _object_decoder(cast(type, kind))
    return partial(_enum if issubclass(kind, Enum) else _scalar, kind)


def _from_wire(kind: Any, value: object) -> object:
    try:
        return kind.from_wire(value)
    except DecodeError:
        raise
    except ValueError as error:
        raise DecodeError("", f"not valid: {error}") from None


def _enum(kind: type[Enum], value: object) -> object:
    try:
        return kind(value)
    except ValueError:
        raise DecodeError("", f"not one of {', '.join(str(each.value) for each in kind)}") from None


_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "null"}


def _scalar(kind: type, value: object) -> object:
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise DecodeError("", "too large") from None
    if type(value) is not kind:
        raise DecodeError("", f"not {_NAMES.get(kind, kind.__name__)}")
    return value


def _union_decoder(kinds: Sequence[Any]) -> _Decoder:
    choices = [_decoder(kind) for kind in kinds if kind is not types.NoneType]
    may_be_none = types.NoneType in kinds

    def decode_union(value: object) -> object:
        if value is None and may_be_none:
            return None
        problems = []
        for choice in choices:
            try:
                return choice(value)
            except DecodeError as error:
                problems.append(error)
        raise problems[0]

    return decode_union


def _mapping_decoder(key_kind: Any, value_kind: Any) -> _Decoder:
    part_decoder = _decoder(value_kind)

    def decode_mapping(value: object) -> object:
        if not isinstance(value, dict):
            raise DecodeError("", "not an object")
        return {_key(key_kind, key): _part(part_decoder, part, key) for key, part in value.items()}

    return decode_mapping


def _list_decoder(origin: Any, kind: Any) -> _Decoder:
    part_decoder = _decoder(kind)

    def decode_list(value: object) -> object:
        if not isinstance(value, list):
            raise DecodeError("", "not a list")
        return origin(_part(part_decoder, part, index) for index, part in enumerate(value))

    return decode_list


def _object_decoder(kind: type) -> _Decoder:
    annotations = get_type_hints(kind)
    keys = [(each.name, _decoder(annotations[each.name]), _is_required(each)) for each in _sent(kind)]

    def decode_object(value: object) -> object:
        if not isinstance(value, Mapping):
            raise DecodeError("", "not an object")
        arguments: dict[str, object] = {}
        for name, part_decoder, required in keys:
            if name in value:
                arguments[name] = _part(part_decoder, value[name], name)
            elif required:
                raise DecodeError(name, "missing")
        return kind(**arguments)

    return decode_object


def _is_required(each: Field[Any]) -> bool:
    return each.default is MISSING and each.default_factory is MISSING


def _part(decoder: _Decoder, value: object, at: str | int) -> object:
    try:
        return decoder(value)
    except DecodeError as error:
        raise error.within(f"[{at}]" if isinstance(at, int) else at) from None


def _key(kind: Any, key: str) -> object:
    if kind is not int:
        return key
    if not key.isdecimal():
        raise DecodeError("", f"keyed by {key!r}, not by a number")
    return int(key)
