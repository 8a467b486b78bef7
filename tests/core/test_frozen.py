"""`mlxops.core.frozen.dataclass` behaves as the standard library's."""

from __future__ import annotations

from dataclasses import field

from mlxops.core.frozen import dataclass


@dataclass(frozen=True)
class Entry:
    name: str
    places: dict[str, str] = field(default_factory=dict, hash=False)


def test_field_without_hash_is_compared_but_not_hashed() -> None:
    one, other = Entry("a", {"x": "1"}), Entry("a", {"x": "2"})
    assert one != other and hash(one) == hash(other) and len({one, other}) == 2
