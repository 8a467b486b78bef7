"""`mlxops.core.frozen.dataclass` behaves as the standard library's."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from dataclasses import field
from typing import Any

import pytest

from mlxops.core.frozen import dataclass


@dataclass(frozen=True)
class Entry:
    name: str
    places: dict[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Sub(Entry):
    size: int = 3


def _pair(**members: Any) -> tuple[type[Any], type[Any]]:
    """Return a class of each of the two decorators with these members."""
    annotations = dict.fromkeys(("first", *members), "int")

    def make(decorate: Callable[[type], type]) -> type[Any]:
        return decorate(type("Made", (), {"__annotations__": annotations, "__module__": __name__, **members}))

    return make(dataclass(frozen=True)), make(dataclasses.dataclass(frozen=True))


def _outcome(call: Callable[[], object]) -> object:
    try:
        return repr(call())
    except (TypeError, AttributeError) as error:
        return type(error).__name__, str(error)


CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (("a",), {}),
    (("a", 1), {}),
    (("a",), {"second": 2}),
    ((), {"first": "a", "third": [4]}),
    ((), {}),
    (("a", 1, 2, 3), {}),
    (("a",), {"fourth": 4}),
    (("a",), {"first": "b"}),
]


@pytest.mark.parametrize(("arguments", "named"), CALLS)
def test_call_has_the_outcome_of_the_standard_library(arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    ours, theirs = _pair(second=7, third=field(default_factory=list))
    assert _outcome(lambda: ours(*arguments, **named)) == _outcome(lambda: theirs(*arguments, **named))
    # The first object compiles __init__, and the second uses it.
    assert _outcome(lambda: ours(*arguments, **named)) == _outcome(lambda: theirs(*arguments, **named))


@pytest.mark.parametrize("name", ["first", "second", "unknown"])
def test_object_refuses_assignment_and_deletion(name: str) -> None:
    for kind in _pair(second=7):
        made = kind("a")
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"cannot assign to field '{name}'"):
            setattr(made, name, 1)
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"cannot delete field '{name}'"):
            delattr(made, name)


def test_default_factory_makes_a_value_for_each_object() -> None:
    one, other = Entry("a"), Entry("b")
    assert one.places == {} and one.places is not other.places


def test_subclass_has_the_fields_of_its_base_first() -> None:
    assert repr(Sub("a", {"x": "1"}, 4)) == "Sub(name='a', places={'x': '1'}, size=4)"
    assert Sub("a") != Entry("a")


def test_method_of_the_class_itself_is_kept() -> None:
    ours, theirs = _pair(__repr__=lambda self: "own", second=7)
    assert repr(ours("a")) == repr(theirs("a")) == "own"


def test_helpers_of_the_standard_library_work() -> None:
    entry = Entry("a", {"x": "1"})
    assert dataclasses.replace(entry, name="b") == Entry("b", {"x": "1"})
    assert dataclasses.asdict(entry) == {"name": "a", "places": {"x": "1"}}
    assert copy.deepcopy(entry) == entry == pickle.loads(pickle.dumps(entry))
    match entry:
        case Entry("a", places):
            assert places == {"x": "1"}
        case _:
            pytest.fail("no match")


def test_field_without_hash_is_compared_but_not_hashed() -> None:
    one, other = Entry("a", {"x": "1"}), Entry("a", {"x": "2"})
    assert one != other and hash(one) == hash(other) and len({one, other}) == 2
