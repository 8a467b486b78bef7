"""The codec between dataclasses and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import pytest
from hypothesis import given

from mlxops.core.command import request_type
from mlxops.core.wire import DecodeError, decode, encode, omitted
from mlxops.tasks import command_names
from tests.properties import PROPERTY, json_values


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class Inner:
    number: int
    share: float = 0.0


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner | None
    many: tuple[Inner, ...] = ()
    by_port: Mapping[int, Inner | None] | None = None
    colour: Colour = Colour.RED
    flag: bool = False
    value: str | int | bool | None = None
    extra: int | None = omitted(None)


FULL = Outer("a", Inner(1, 0.5), (Inner(2),), {8100: Inner(3), 8101: None}, Colour.RED, True, True, 4)


@pytest.mark.parametrize("value", [FULL, Outer("a", None), Outer("a", None, value=7), Outer("a", None, value="7")])
def test_encoded_value_decodes_to_itself(value: Outer) -> None:
    assert decode(Outer, json.loads(json.dumps(encode(value)))) == value


def test_omitted_field_is_left_out_while_it_has_its_default() -> None:
    assert "extra" not in encode(Outer("a", None)) and encode(FULL)["extra"] == 4


def test_unknown_key_is_ignored_and_missing_key_takes_the_default() -> None:
    assert decode(Outer, {"name": "a", "inner": None, "later": 1}) == Outer("a", None)


def test_whole_number_counts_as_a_number() -> None:
    assert decode(Inner, {"number": 1, "share": 2}) == Inner(1, 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "name is not a text"),
        ({"name": 1}, "name is not a text"),
        ({"inner": []}, "inner is not an object"),
        ({"inner": {}}, "inner.number is missing"),
        ({"inner": {"number": True}}, "inner.number is not a whole number"),
        ({"inner": {"number": 1.0}}, "inner.number is not a whole number"),
        ({"inner": {"number": 1, "share": "x"}}, "inner.share is not a number"),
        ({"many": {}}, "many is not a list"),
        ({"many": [{"number": 1}, 2]}, r"many\[1\] is not an object"),
        ({"by_port": {"x": None}}, "by_port is keyed by 'x', not by a number"),
        ({"by_port": []}, "by_port is not an object"),
        ({"inner": {"number": 1, "share": 10**400}}, "inner.share is too large"),
        ({"colour": "blue"}, "colour is not one of red"),
        ({"flag": 1}, "flag is not true or false"),
        ({"value": []}, "value is not a text"),
    ],
)
def test_value_of_another_type_is_refused_with_its_path(change: dict[str, object], message: str) -> None:
    with pytest.raises(DecodeError, match=f"^{message}$"):
        decode(Outer, {"name": "a", "inner": None} | change)


def test_required_key_must_be_there() -> None:
    with pytest.raises(DecodeError, match=r"^name is missing$"):
        decode(Outer, {"inner": None})


@given(json_values)
@PROPERTY
def test_any_json_is_decoded_or_refused(value: object) -> None:
    for name in command_names():
        for kind in (request_type(name), request_type(name).result):
            try:
                decode(kind, value)
            except DecodeError:
                pass


@pytest.mark.parametrize("name", command_names())
def test_request_survives_the_wire(name: str) -> None:
    request = request_type(name)()
    assert decode(type(request), json.loads(json.dumps(encode(request)))) == request
