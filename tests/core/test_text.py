"""Decode bytes that should be UTF-8."""

from __future__ import annotations

import pytest

from mlxops.core.text import NotUTF8, utf8

TEXT = '{"version": 1, "models": {"a": {}}}\n'


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.replace("\n", "\r\n").encode(),
        b"",
        "\u4f60\u597d".encode(),
        b"a\0b",
    ],
)
def test_utf8_is_decoded_with_or_without_a_byte_order_mark(data: bytes) -> None:
    assert utf8(data).encode() == data.removeprefix(b"\xef\xbb\xbf")


@pytest.mark.parametrize(
    ("data", "what", "line"),
    [
        (TEXT.encode("utf-16"), "is UTF-16", 0),
        (TEXT.encode("utf-16-le"), "is UTF-16", 0),
        (TEXT.encode("utf-16-be"), "is UTF-16", 0),
        (TEXT.encode("utf-32"), "is UTF-32", 0),
        (b"\0" * 4096, "holds nothing but zero bytes, as after a power loss", 0),
        (b"a\nb\n\xff", "is not UTF-8", 3),
        ("name: M\u00fcller".encode("latin-1"), "is not UTF-8", 1),
    ],
)
def test_other_encoding_is_named(data: bytes, what: str, line: int) -> None:
    with pytest.raises(NotUTF8) as caught:
        utf8(data)
    assert (caught.value.what, caught.value.line) == (what, line)
    assert what in str(caught.value) and "save it as UTF-8" in str(caught.value)
