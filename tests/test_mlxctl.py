"""The positional forms of the seed become flags; everything else stays as it was typed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxops.mlxctl import with_flags
from tests.properties import PROPERTY

VALUES = frozenset({"--model", "--port", "--repo", "--host", "--timeout"})


@pytest.mark.parametrize(
    ("typed", "made"),
    [
        ("load jerry-xl 8100", "load --model jerry-xl --port 8100"),
        ("load org/name 8100", "load --model org/name --port 8100"),
        ("load jerry-xl", "load --model jerry-xl"),
        ("load", "load"),
        ("load --json jerry-xl 8100", "load --json --model jerry-xl --port 8100"),
        ("load jerry-xl --host studio 8100", "load --model jerry-xl --host studio --port 8100"),
        ("load jerry-xl --host=studio 8100", "load --model jerry-xl --host=studio --port 8100"),
        ("load jerry-xl 8100 --repo org/name --force", "load --model jerry-xl --port 8100 --repo org/name --force"),
        ("load --model jerry-xl --port 8100", "load --model jerry-xl --port 8100"),
        ("load --model jerry-xl 8100", "load --model jerry-xl --port 8100"),
        ("load --model=jerry-xl 8100", "load --model=jerry-xl --port 8100"),
        ("load --port 8100 jerry-xl", "load --port 8100 --model jerry-xl"),
        ("load jerry-xl 8100 8101", "load --model jerry-xl --port 8100 8101"),
        ("load jerry-xl --port 8100 8101", "load --model jerry-xl --port 8100 8101"),
        ("load jerry-xl --port", "load --model jerry-xl --port"),
        ("unload 8100", "unload --port 8100"),
        ("unload 8100 --json", "unload --port 8100 --json"),
        ("unload --json 8100", "unload --json --port 8100"),
        ("unload --model jerry-xl", "unload --model jerry-xl"),
        ("unload", "unload"),
        ("status", "status"),
        ("list --host studio", "list --host studio"),
        ("--version", "--version"),
        ("--help load", "--help load"),
        ("reconcile 8100", "reconcile 8100"),
        ("", ""),
    ],
)
def test_what_is_typed_becomes(typed: str, made: str) -> None:
    assert with_flags(typed.split(), VALUES) == made.split()


def test_a_word_is_never_taken_apart() -> None:
    assert with_flags(["load", "a b; $(id)", "8100\n"], VALUES) == ["load", "--model", "a b; $(id)", "--port", "8100\n"]
    assert with_flags(["unload", ""], VALUES) == ["unload", "--port", ""]


@given(
    st.lists(
        st.sampled_from(["load", "unload", "8100", "x", "--model", "--json", "--port=1", "--host", "-h"]), max_size=7
    )
)
@PROPERTY
def test_no_word_is_lost_and_their_order_stays(words: list[str]) -> None:
    rest = iter(with_flags(words, VALUES))
    assert all(word in rest for word in words)
