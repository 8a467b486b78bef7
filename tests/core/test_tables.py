"""Text for a terminal: aligned columns, and nothing that can steer it."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlxops.core.tables import harmless, one_line, size, table
from tests.properties import PROPERTY, hostile_texts


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 模型", "plain é 模型"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("a\rb\x08\x7f\0", "a\\rb\\x08\\x7f\\x00"),
        ("abc\u202etxt.exe", "abc\\u202etxt.exe"),
        ("\u200f\u2066\u2069", "\\u200f\\u2066\\u2069"),
        ("\udcff", "\\udcff"),
        ("tab\tand\nline", "tab\tand\nline"),
    ],
)
def test_only_steering_characters_are_escaped(text: str, shown: str) -> None:
    assert harmless(text) == shown


@given(hostile_texts)
@PROPERTY
def test_harmless_text_has_no_steering_characters_and_can_be_encoded(text: str) -> None:
    shown = harmless(text)
    shown.encode()
    assert not [c for c in shown if unicodedata.category(c) == "Cc" and c not in "\t\n"]
    assert not [
        c
        for c in shown
        if unicodedata.bidirectional(c) in {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    ]
    assert not set(shown) & set("\u200e\u200f\u061c"), "marks that turn the direction"


@given(hostile_texts)
@PROPERTY
def test_one_line_has_no_line_end_and_no_outer_spaces(text: str) -> None:
    assert len(one_line(text).splitlines()) <= 1 and one_line(text) == one_line(text).strip()


def test_columns_are_aligned_without_trailing_spaces() -> None:
    text = table(["A", "LONG"], [["x", None], ["yyyy", "b c"], ["", 7]])
    assert text == "A     LONG\nx     -\nyyyy  b c\n-     7"


@given(st.lists(st.tuples(hostile_texts, st.none() | st.integers() | hostile_texts, hostile_texts), max_size=4))
@example([("", "\n", "\n")])
@PROPERTY
def test_table_has_one_line_for_each_row(rows: list[tuple[object, ...]]) -> None:
    lines = table(["A", "B", "C"], rows).split("\n")
    assert len(lines) == len(rows) + 1
    assert all(line == line.rstrip() for line in lines)
    start = lines[0].index("B")
    assert all(line[start - 2 : start] == "  " for line in lines)


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (None, "-"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_499, "999.5 kB"),
        (1_000_000, "1.0 MB"),
        (999_999_999, "1.0 GB"),
        (190_400_000_000, "190.4 GB"),
        (2 * 10**15, "2000.0 TB"),
    ],
)
def test_size_has_a_fitting_unit(number: int | None, shown: str) -> None:
    assert size(number) == shown
