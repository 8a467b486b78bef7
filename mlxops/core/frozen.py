"""`dataclass(frozen=True)`, as the standard library's, at a tenth of the price when a module is imported.

The standard library compiles six methods for each frozen class. Here five of them are shared by all classes, and
`__init__` is compiled when the first object is made. An agent imports some seventy such classes to answer a `status`,
and makes objects of some thirty. The standard library still finds the fields, so `fields`, `replace` and `match` work.
A frozen class cannot have `__post_init__`, or fields with `kw_only` or `init=False`. Other options than `frozen=True`
go to the standard library unchanged. Type checkers see the standard library's function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:

    def dataclass(cls: type | None = None, /, **options: bool) -> Any:
        return _frozen if options == {"frozen": True} else dataclasses.dataclass(cls, **options)


def _frozen(cls: type) -> type:
    own = vars(cls)
    # Without a docstring the standard library makes one from the signature, which is slow.
    cls.__doc__ = own.get("__doc__") or cls.__name__
    made: type = dataclasses.dataclass(init=False, eq=False, repr=False)(cls)
    shared: dict[str, Callable[..., object]] = {
        "__init__": _first_init(made),
        "__setattr__": _set,
        "__delattr__": _delete,
        "__eq__": _equal,
        "__hash__": _hash,
        "__repr__": _repr,
    }
    for name, method in shared.items():
        # A class that defines __eq__ itself has __hash__ = None.
        if name not in own or (name == "__hash__" and own[name] is None):
            setattr(made, name, method)
    return made


def _first_init(cls: Any) -> Callable[..., None]:
    """Return an `__init__` that replaces itself by the compiled one."""

    def __init__(self: object, *arguments: object, **named: object) -> None:
        cls.__init__ = init = _compiled_init(cls)
        init(self, *arguments, **named)

    return __init__


def _compiled_init(cls: type) -> Callable[..., None]:
    """Return the `__init__` that the standard library would compile."""
    scope: dict[str, Any] = {"_set": object.__setattr__, "_missing": dataclasses.MISSING}
    parameters, lines = ["self"], []
    for each in dataclasses.fields(cls):
        default, value = "", each.name
        if each.default is not dataclasses.MISSING:
            default, scope[f"_default_{each.name}"] = f"=_default_{each.name}", each.default
        elif each.default_factory is not dataclasses.MISSING:
            default, scope[f"_make_{each.name}"] = "=_missing", each.default_factory
            value = f"_make_{each.name}() if {each.name} is _missing else {each.name}"
        parameters.append(each.name + default)
        lines.append(f" _set(self, {each.name!r}, {value})")
    exec(f"def __init__({', '.join(parameters)}):\n" + "\n".join(lines or [" pass"]), scope)
    init: Callable[..., None] = scope["__init__"]
    init.__qualname__ = f"{cls.__qualname__}.__init__"
    return init


def _set(self: object, name: str, value: object) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


def _delete(self: object, name: str) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")


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
