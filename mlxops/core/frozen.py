"""`dataclass`, as the standard library's, at half the price when a module is imported.

For each frozen class `dataclasses.dataclass` compiles six methods. Three of them are the same for all classes, and are
shared here: `__eq__`, `__hash__` and `__repr__`. An agent imports some seventy such classes for a `status`. Other
arguments than `frozen=True` go to the standard library unchanged. Type checkers see the standard library's function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:

    def dataclass(cls: type | None = None, /, **options: bool) -> Any:
        def make(cls: type) -> type:
            return _frozen(cls) if options == {"frozen": True} else dataclasses.dataclass(**options)(cls)

        return make if cls is None else make(cls)


def _frozen(cls: type) -> type:
    own = vars(cls)
    made: type = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    shared: dict[str, Callable[..., object]] = {"__eq__": _equal, "__hash__": _hash, "__repr__": _repr}
    for name, method in shared.items():
        # A class that defines __eq__ itself has __hash__ = None.
        if name not in own or (name == "__hash__" and own[name] is None):
            setattr(made, name, method)
    return made


def _compared(value: Any) -> tuple[object, ...]:
    kind = type(value)
    names = kind.__dict__.get("_compared_names")
    if names is None:
        names = tuple(each.name for each in dataclasses.fields(kind) if each.compare)
        kind._compared_names = names
    return tuple([getattr(value, name) for name in names])


def _equal(self: object, other: object) -> object:
    return _compared(self) == _compared(other) if type(self) is type(other) else NotImplemented


def _hash(self: Any) -> int:
    kind = type(self)
    names = kind.__dict__.get("_hashed_names")
    if names is None:
        names = tuple(f.name for f in dataclasses.fields(kind) if (f.compare if f.hash is None else f.hash))
        kind._hashed_names = names
    return hash(tuple([getattr(self, name) for name in names]))


def _repr(self: Any) -> str:
    parts = [f"{each.name}={getattr(self, each.name)!r}" for each in dataclasses.fields(self) if each.repr]
    return f"{type(self).__qualname__}({', '.join(parts)})"
