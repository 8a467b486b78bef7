"""YAML is read with limits; a problem has a line and a hint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxops.control.yaml_file import FileProblem, NotFast, compose, compose_fast, construct, read_text
from tests.lab.homelab import CHECKOUT
from tests.properties import PROPERTY

WIDE_MERGE = "\n".join(
    ["k0: &k0 {a: 1, b: 2}"] + [f"k{i}: &k{i} {{<<: [{', '.join([f'*k{i - 1}'] * 40)}], x{i}: 1}}" for i in range(1, 7)]
)
WIDE_LIST = "\n".join(["k0: &k0 [x]"] + [f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 40)}]" for i in range(1, 9)])


def value_of(text: str, *, max_depth: int = 16, aliases: bool = True) -> object:
    node = compose(text, max_depth=max_depth, aliases=aliases)
    return None if node is None else construct(node)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("# nothing\n", None),
        ("a: [1, yes, x]\n", {"a": [1, True, "x"]}),
        ("a: &a {x: 1}\nb: {<<: *a, y: 2}\n", {"a": {"x": 1}, "b": {"x": 1, "y": 2}}),
        ("a: &a [1]\nb: [*a, *a]\n", {"a": [1], "b": [[1], [1]]}),
        ("a: 0x" + "f" * 100, {"a": "0x" + "f" * 100}),
        ("a: |\n  x\n  \ty\n", {"a": "x\n\ty\n"}),
    ],
)
def test_yaml_within_the_limits_is_read(text: str, value: object) -> None:
    assert value_of(text) == value


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("a:\n\tb: 1\n", 2, "a tab, where YAML allows only spaces"),
        ("a:\r\tb: 1\n", 2, "a tab, where YAML allows only spaces"),
        ("a: 1\nb: 'x\n", 3, "found unexpected end of stream"),
        ("a: *x\n", 1, "found undefined alias"),
        ("a: 1\nb: \x07\n", 2, "the character U+0007"),
        ("a: 1\n---\nb: 1\n", 2, "expected a single document"),
        ("a: 1\nb: &b [*b]\n", 2, "the anchor b contains itself"),
        ("a: 1\nb: &b {<<: *b}\n", 2, "the anchor b contains itself"),
        ("a: " + "[" * 5000, 1, "nested too deeply"),
        ("a: 1\nb: !!python/object/apply:os.system [x]\n", 2, "could not determine a constructor"),
        ("a: 2026-99-99\n", 0, "month must be in 1..12"),
        (WIDE_MERGE, 4, "more than 250000 values"),
        (WIDE_LIST, 5, "more than 250000 values"),
    ],
)
def test_problem_is_reported_with_its_line(text: str, line: int, what: str) -> None:
    with pytest.raises(FileProblem) as caught:
        value_of(text)
    assert (caught.value.line, caught.value.hint != "") == (line, True)
    assert what in caught.value.what
    assert caught.value.place("x.yaml") == (f"x.yaml:{line}" if line else "x.yaml")


@pytest.mark.parametrize("text", ["a: &x 1\n", "a: *x\n"])
def test_anchors_are_refused_where_they_are_not_allowed(text: str) -> None:
    with pytest.raises(FileProblem, match="anchors and aliases are not used here"):
        compose(text, max_depth=16, aliases=False)


@given(st.text(max_size=200))
@PROPERTY
def test_any_text_is_read_or_reported(text: str) -> None:
    try:
        value_of(text)
    except FileProblem as problem:
        assert problem.what and problem.hint


@pytest.mark.parametrize(
    ("data", "line", "what"),
    [
        (b"x" * 2049, 0, "is too large: more than 2 kB"),
        (b"a\n\xff", 2, "is not UTF-8"),
        ("ab".encode("utf-16"), 0, "is UTF-16"),
        (b"\0" * 8, 0, "holds nothing but zero bytes"),
    ],
)
def test_file_that_is_not_short_utf8_text_is_refused(tmp_path: Path, data: bytes, line: int, what: str) -> None:
    (tmp_path / "x.yaml").write_bytes(data)
    with pytest.raises(FileProblem, match=what) as caught:
        read_text(tmp_path / "x.yaml", 2048)
    assert caught.value.line == line


def test_byte_order_mark_is_not_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbfa: 1")
    assert read_text(tmp_path / "x.yaml", 2048) == "a: 1"


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_path_that_is_no_regular_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(FileProblem, match="cannot be read"):
        read_text(path, 2048, allow_pipe=True)


def test_fast_reading_is_equal() -> None:
    text = (CHECKOUT / "hosts.yaml").read_text(encoding="utf-8")
    fast, slow = compose_fast(text, max_depth=16), compose(text, max_depth=16, aliases=False)
    assert fast is not None and slow is not None and construct(fast) == construct(slow)


@pytest.mark.parametrize("text", ["a: \u00fc\n", "a:\tb\n", "a: 1\r\nb: 2\n", "a: \u2028b\n"])
def test_text_that_libyaml_may_read_differently_is_not_read_fast(text: str) -> None:
    with pytest.raises(NotFast):
        compose_fast(text, max_depth=16)


@pytest.mark.parametrize("text", ["a: " + "[" * 100, "a: &a 1\nb: *a\n"])
def test_fast_reading_has_the_same_limits(text: str) -> None:
    with pytest.raises(FileProblem):
        compose_fast(text, max_depth=16)
